"""Scripts that run in another process, and import torch and what they measure."""
