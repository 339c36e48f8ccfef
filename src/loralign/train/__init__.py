"""Attach a recipe to a trainer, drive its rules and episodes, run supervised fine-tuning."""
