"""Which members, which coefficients: strategies that try merges against a score."""
