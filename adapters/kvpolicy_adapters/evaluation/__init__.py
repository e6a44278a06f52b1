"""Models as subjects of comparisons, and sweeps over architectures."""
