"""From a recipe to tensors: `plan` checks, `engine` merges, `resident` merges into a live model."""
