"""Search spaces of merge weights, densities and methods."""
