"""Penalties, masks and slot events during training; one paper per file."""
