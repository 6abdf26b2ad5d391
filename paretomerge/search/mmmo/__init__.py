"""MM-MO: multi-objective Bayesian optimisation of merges."""
