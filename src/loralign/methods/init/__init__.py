"""What the live slots hold before step 0; one paper per file."""
