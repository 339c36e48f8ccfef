"""Slots inside stock PEFT layers: the only room that touches PEFT's insides."""
