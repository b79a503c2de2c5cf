"""Routers fitted, proved and compared: score matrices, cross-validation, the publication gate, the portfolio."""
