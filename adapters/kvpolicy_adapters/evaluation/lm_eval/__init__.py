"""A model for lm-evaluation-harness: any causal model of transformers, under a policy."""
