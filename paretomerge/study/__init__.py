"""The loop of a study: ask the sampler, merge, evaluate, tell the sampler, record the trial.

- `Study` (study.py) is what a user works with. It loads nothing until something must be evaluated.
- `Search` (search.py) is a study with everything loaded: record, goals and levels.
- `Level` is one search space with its live model and sampler; a study has one or two.
- `Loop` explores one level. An `Executor` evaluates its trials: `InProcess`, `Processes` or
  `RayActors`; in each of them a `TrialRunner` merges and scores one candidate at a time, and `Race`
  may leave a candidate early.
- parts.py makes the models and evaluators that a worker needs of a study's settings; build.py a
  whole `Search`.
"""
