"""From a recipe to merged tensors, on disk or in a live model.

- `engine`: `merge` writes a checkpoint; `run` and `merged_tensors` merge a plan in memory.
- `plan`: a recipe, checked against the headers of its models, as a list of tensor jobs.
- `methods`: the table of merge methods, and their functions.
- `tasks`, `processes`, `worker`: the work of a merge in pieces, dealt to several processes.
- `block`: what a merge method receives.
- `live`: candidates of a search, merged into a model in memory.
- `delta_profile`: similarity of task vectors.
- `card`: the model card of a merge.
"""
