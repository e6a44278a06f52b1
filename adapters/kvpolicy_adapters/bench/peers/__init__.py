"""Scripts that decode with other projects' code, each in a process of its own."""
