"""One optimizer for pairs (A, B) under any transform and rules."""
