"""Published tables, row by row, and the same rows measured on the machine at hand."""
