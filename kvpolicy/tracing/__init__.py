"""Recording what a generation decided, and reading it back."""
