"""Which expert answers? What the builder and the service share: routers, features, the bundle."""
