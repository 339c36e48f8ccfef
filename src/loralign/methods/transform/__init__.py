"""Gradients of pairs to updates of pairs; one paper per file."""
