"""The demo zoo's own parts: adapters of four fine-tunes, and the script that trained them."""
