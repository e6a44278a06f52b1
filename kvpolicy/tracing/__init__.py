"""Watching a generation (its decisions, where its heads look), and reading that back."""
