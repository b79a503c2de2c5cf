"""The tiny zoo: a base and four branches of under a million parameters, trained on the spot from generated text."""
