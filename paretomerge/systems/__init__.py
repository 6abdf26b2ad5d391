"""Systems beside the single merged model: what several fine-tunes can also become.

Each module makes one of them from models and reads it back: experts behind a router, one checkpoint
with a mask per task, a family of models with a preference as input, an adapter.

- `lora`: `extract_lora`, a merge as an adapter of its base; `factors`, `peft_places`,
  `loaded_model`: its singular values, the format of peft, and the names that peft has.
- `emr`: `emr`, fine-tunes as one checkpoint with masks; `expand`: `EmrModel` and `expand`, the
  model of one task; `emr_vote`, `emr_files`: the arithmetic, and what is stored.
- `notes`: what the user should know where models differ.
- `task_models`: models as commands take them, `task=MODEL`.
"""
