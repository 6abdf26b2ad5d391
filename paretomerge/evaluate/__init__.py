"""Evaluators: a live model -> scores with standard errors."""
