"""Which members, and which coefficients: the paper's strategies, one a file, all in strategies.py."""
