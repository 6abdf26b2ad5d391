"""Models on disk: reading and writing checkpoints, and what their files say about the network.

Public names, by module:

- `reader`: `Checkpoint`, a model folder or Hub model opened for reading.
- `adapter`: `AdaptedCheckpoint`, a checkpoint with a LoRA adapter added to it;
  `adapter_options`: what its config may say; `adapter_names`, `adapter_match`,
  `adapter_factors`: which tensors it changes, and how.
- `loaded_names`: `LoadedNames`, the names of tensors in a model that transformers has loaded, and
  what it makes of the stored ones; `gathered`: `GatheredTensor`, such a tensor or the reverse.
- `operand`: `Operand`, one tensor that a merge reads a few rows at a time; `StoredTensor`,
  `CachedTensor` and `InMemoryTensor` are the kinds of it.
- `architecture`: `Architecture`, the place of each tensor in the network.
- `model_config`: `routed_config`, the config of a model made of other models' layers.
- `fold`: `Fold` and `fold_of`, which weights a scale of the residual stream is folded into.
- `tokenizer`, `chat_template`, `vocabulary`: tokens and their ids, chat templates, and
  `merge_vocabularies`; `remapped`: an embedding in the merged vocabulary.
- `companions`: the other files of a model folder, which are copied.
- `reference`: how a recipe names a model; `hub`: downloads from the Hugging Face Hub.
- `writer`: `new_folder` and `WeightsWriter`, a checkpoint that appears whole or not at all.

Only safetensors files are read, and no value in a file is trusted. Every error is a
`CheckpointError`. Nothing here knows merge methods, tasks or scores.
"""
