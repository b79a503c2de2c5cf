"""The proxy score: how well a model answers a few questions of known answer."""
