"""Files and strings to objects."""
