"""Merges written into loaded models, without a file on disk. While searching, candidates live here.

`in_place` overwrites the weights of one model. `routed` refers to the layers of the sources in
another order. Both are a `LiveModel` (see `model`). `matching` measures scales for routes; `names`
finds the tensors of a checkpoint in a loaded model.
"""
