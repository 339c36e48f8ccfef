"""Rows as people have them to tokens as at inference."""
