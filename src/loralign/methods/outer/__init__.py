"""Episodes: commit live slots, start again; one paper per file."""
