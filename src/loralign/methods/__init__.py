"""The methods: one file per axis and paper, and the table that names them."""
