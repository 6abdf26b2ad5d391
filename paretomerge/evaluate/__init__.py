"""Evaluators: a merged model in memory -> scores with standard errors.

How an example of a task becomes a score:

1. `tasks`: `TaskLoader` loads a task of lm-evaluation-harness as `Examples`. Each example has its
   requests to the model: "log-likelihood of this answer", "write until a full stop".
2. `harness`: `HarnessEvaluator` sends requests to the model, except where `score_cache` has the
   score already. `inference` answers them on the resident model, or a `backend` such as vLLM does.
3. `examples`: `Examples.example_scores` lets the task turn responses into a score per example.
4. `harness`: `HarnessEvaluator.aggregate` combines these into a `Score` with its standard error.

Everything else that scores a `Candidate` is an `Evaluator` as well: `FunctionEvaluator` (the user's
Python), `PerplexityEvaluator` (a text file), `JudgeEvaluator` (a language model grades answers; in
`judge`), `SpeedEvaluator` (seconds per token) and `MergeFact` (what the merge measured);
`CombinedEvaluator` runs several. `estimators` predict the score on all examples from some of them,
for racing, and `time_limit` interrupts what hangs.
"""

from paretomerge.evaluate.evaluator import (
    Candidate,
    CombinedEvaluator,
    Evaluator,
    MergeFact,
    Objective,
    PerExample,
    Score,
    Split,
)
from paretomerge.evaluate.function import FunctionEvaluator
from paretomerge.evaluate.harness import HarnessEvaluator
from paretomerge.evaluate.perplexity import PerplexityEvaluator
from paretomerge.evaluate.score_cache import ScoreCache
from paretomerge.evaluate.speed import SpeedEvaluator
from paretomerge.evaluate.tasks import HarnessTask, TaskLoader

__all__ = [
    "Candidate",
    "CombinedEvaluator",
    "Evaluator",
    "FunctionEvaluator",
    "HarnessEvaluator",
    "HarnessTask",
    "MergeFact",
    "Objective",
    "PerExample",
    "PerplexityEvaluator",
    "Score",
    "ScoreCache",
    "SpeedEvaluator",
    "Split",
    "TaskLoader",
]
