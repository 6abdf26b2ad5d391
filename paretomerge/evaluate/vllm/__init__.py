"""One vLLM engine for a whole study, whose weights are replaced for every candidate.

- `backend`: `VLLMBackend`, which gives candidates to the engine and checks that it has them.
- `language_model`: what lm-evaluation-harness sends requests to.
- `probe`: log-probabilities of a fixed prompt, by which the weights of two models are compared.
- `process`: starts the worker, calls it, and ends it.
- `worker`: the process in vLLM's environment.
"""
