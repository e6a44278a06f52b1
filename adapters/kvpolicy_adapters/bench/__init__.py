"""Shapes of models to measure, the floor, and other projects' caches."""
