"""Spaces: a trial's parameters -> a recipe."""
