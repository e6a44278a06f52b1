"""Models of transformers under a policy."""
