"""Samplers: Optuna `BaseSampler` subclasses, which see parameters, values and their noise only.

- `point_sampler`: the frame of samplers that propose points of the unit cube.
- `encoding`: parameters as points, with conditions.
- `observations`: the trials of a study as arrays, with standard errors and constraints.
- `options`: checks of the samplers' options.
- `registry`: the samplers by name.
- `mmmo`: `MMMOSampler`, the default.
- `baselines`: other samplers, to compare with.
"""
