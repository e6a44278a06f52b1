"""One file a command: what it asks, and how it prints what the lab gives."""
