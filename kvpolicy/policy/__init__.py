"""What a policy is, what it may see, and the base classes of its parts."""
