"""A recipe, checked against headers, as a list of tensor jobs."""
