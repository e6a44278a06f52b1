"""Families of models that draw images token by token."""
