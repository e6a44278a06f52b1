"""Pictures, plots, tables and reports."""
