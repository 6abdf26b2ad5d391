"""One script per published figure; each runs as `python -m benchmarks.NAME` from the repository.

- `search`: docs/lab/search-benchmark.md; samplers on test problems, their ranks, what an ask takes.
- `specialists`: README.md; sources, untuned merges and searches on held-out examples.
- `smollm`, `smollm_composed`, `smollm_routes`, `smollm_gsm8k`: docs/lab/smollm.md; searches of the
  adapters of SmolLM2, the composed skill, routes through its layers, GSM8K.
- `candidate`: docs/lab/smollm.md; the cost of a candidate beside the loop by hand.
- `picks`: docs/lab/picks.md; what picks are worth, beside single-objective searches.
- `pareto_families`: docs/lab/pareto-merging.md; one folder for all preferences, beside a study.
- `racing`: docs/lab/evaluation.md; examples and hypervolume of searches with and without racing.
- `dataflow`: docs/lab/routes.md; what routes through layers add to a search.
- `stream`: docs/lab/routes.md; exactness of folded scales, time of a change of route.
- `estimators`: docs/lab/evaluation.md; a merge's score estimated from some of its examples.
- `evaluation`: docs/lab/evaluation.md; time of scoring, and the ratio to the harness's own model.
- `merge`: docs/lab/speed.md; time and memory of merges to disk beside mergekit.
- `scaling`: docs/scaling.md, docs/lab/scaling.md; memory and time of studies by workers and sizes.
- `overhead`: README.md; where a trial's time goes.
- `landscape`: docs/lab/landscape.md; makes, fits, checks and verifies the merge landscape.
- `references`: paretomerge/problems/data/references.json; reference points of the test problems.
- `quickstart_trials`: proves that two versions of the package run the same quickstart.

Shared modules: `peers`, `bayesian_peers` and `meter` (optimisers of the search benchmark),
`standings` (its tables), `workloads` (inputs of `merge` and `stream`), `study_api` (opens, runs and
reads studies), `reporting` (tables and result files).

`results/` holds what the scripts measured, one JSON line per search; each `table` command prints
the published table from there.
"""
