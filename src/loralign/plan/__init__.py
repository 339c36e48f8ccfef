"""What may be combined and what it costs, before anything is spent."""
