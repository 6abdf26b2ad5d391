"""From a front to one checkpoint."""
