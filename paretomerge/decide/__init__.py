"""From a front to one checkpoint: pick a trial, compare models, measure the scores' optimism."""
