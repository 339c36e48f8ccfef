"""What is trained and how it becomes (A, B); one paper per file."""
