"""Penalties on the training loss, for any Lightning trainer: imports nothing else of fedlight."""
