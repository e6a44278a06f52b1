"""What was measured, compared: differences, intervals, tables of figures."""
