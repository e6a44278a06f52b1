"""What ``kvpolicy draw`` draws with: a file a family of models."""
