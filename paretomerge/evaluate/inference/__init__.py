"""Fast inference with a model whose weights change between candidates.

- `language_model`: `ResidentLM`, what lm-evaluation-harness sends requests to.
- `likelihood`: log-likelihoods of answers. `generate`: greedy generation.
- `prefill`: reading prompts, and shared prefixes only once.
- `batching`: padding, and batches that fit into memory.
"""
