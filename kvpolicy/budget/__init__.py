"""Budgets, and how the layers of a model share one."""
