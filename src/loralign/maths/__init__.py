"""Pure batched maths and keyed randomness: torch only, the ground of everything."""
