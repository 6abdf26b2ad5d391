"""MM-MO: multi-objective Bayesian optimisation for model merging, as an Optuna sampler.

- `sampler`: `MMMOSampler`, the public class.
- `proposer`: the steps of one proposal, and their `Settings`.
- `surrogate`: Gaussian processes for objectives, constraints and success.
- `acquisition`: log expected hypervolume improvement.
- `candidates`: where the acquisition is evaluated and how it is maximised.

The path of a trial's standard error into the surrogate:

1. The objective of an Optuna study sets the trial's user attribute `stderr`. In a paretomerge
   study, the evaluator returns a `Score` per objective, and `record.Record` writes their `stderr`
   to the attribute.
2. `search.observations.reported_stderr` reads and checks it; `Observations.stderr` collects those
   of all trials and fills gaps with the median.
3. `proposer.MMMOProposer._model_objectives` passes them to the surrogate, unless the setting
   `known_noise` is off.
4. `surrogate.Surrogate._build` scales them with the outcomes, squares them and raises them
   to 1e-6 at least, so that exact scores do not make the kernel matrix singular.
5. `surrogate._BatchPlan.build` gives them to BoTorch as `train_Yvar`.

Source: Li et al. 2024, "It's Morphing Time: Unleashing the Potential of Multiple LLMs via
Multi-objective Optimization", arXiv 2407.00487.
"""
