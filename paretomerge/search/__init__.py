"""Samplers: Optuna `BaseSampler` subclasses. They see parameters, values and noise, nothing else."""
