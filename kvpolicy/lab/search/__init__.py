"""Looking for better parameters and budgets."""
