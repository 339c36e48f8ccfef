"""Studies that compare methods, each at its own tuned learning rate."""
