"""Wrong arguments of measures and of `Score`, and what a user's function returns."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import paretomerge as pm
from paretomerge.evaluate.evaluator import Candidate
from paretomerge.evaluate.function import FunctionEvaluator


def score(model, tokenizer):
    return 1.0


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: pm.Task(5), "^Task: task: expected text"),
        (lambda: pm.Task(""), "^Task: task: expected text that is not empty"),
        (lambda: pm.Task("t", metric=3), "^Task: metric: expected text"),
        (lambda: pm.Task("t", name=3), "^Task: name: expected text"),
        (lambda: pm.Task("t", direction=["up"]), "direction must be maximize or"),
        (lambda: pm.Function(score, name=5), "^Function: name: expected text"),
        (lambda: pm.Function(max), "^function: max has no signature"),
        (lambda: pm.Function(score, "minimize"), r"write direction='minimize'"),
        (lambda: pm.Sparsity("minimize"), r"write direction='minimize'"),
        (lambda: pm.Size("layers", "maximize"), r"write direction='maximize'"),
        (lambda: pm.Size(["layers"]), "^size: use one of layers"),
        (lambda: pm.Perplexity(3), "^Perplexity: path: expected a path"),
        (lambda: pm.Judge(3, "polite"), "^Judge: prompts: expected a path"),
        (lambda: pm.Judge("p", 3), "^Judge: criteria: expected text"),
        (lambda: pm.Judge("p", "q", max_tokens="3"), "^Judge: max_tokens: expected"),
        (lambda: pm.Constraint(score, at_least=0), r"^constraint: write Function\("),
        (lambda: pm.Constraint(pm.Sparsity, at_least=0), "class Sparsity; write"),
        (lambda: pm.Constraint(3, at_least=0), "^constraint: use Task, Function"),
        (lambda: pm.Constraint("a", at_least=float("nan")), "^constraint on a: at_lea"),
        (lambda: pm.Constraint("a", at_least="0.3"), "at_least: expected a finite num"),
        (lambda: pm.Constraint("a", at_most=True), "at_most: expected a finite number"),
    ],
)
def test_measures_and_constraints(build, message):
    with pytest.raises(pm.ConfigError, match=message):
        build()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: pm.Score("0.5"), "a score must be a number, got '0.5'"),
        (lambda: pm.Score(None), "a score must be a number, got None"),
        (lambda: pm.Score(np.array([0.5])), "a score must be a number"),
        (lambda: pm.Score(10**400), "a score must be finite"),
        (lambda: pm.Score(np.float32("nan")), "a score must be finite"),
        (lambda: pm.Score(1, stderr="0.1"), "a standard error must be a number"),
        (lambda: pm.Score(1, stderr=-0.1), "a standard error must be finite and"),
        (lambda: pm.Score(1, n=0), "n, must be a whole number above 0, got 0"),
        (lambda: pm.Score(1, n=-3), "n, must be a whole number above 0, got -3"),
        (lambda: pm.Score(1, n=1.5), "n, must be a whole number above 0, got 1.5"),
        (lambda: pm.Score(1, example_scores=3), "must be a list of numbers, got 3"),
        (lambda: pm.Score(1, example_scores=("a",)), "of an example must be a number"),
        (lambda: pm.Score.mean_of([]), "needs at least one, got none"),
        (lambda: pm.Score.mean_of(0.5), "must be a list of numbers, got 0.5"),
        (lambda: pm.Score.mean_of("01"), "must be a list of numbers, got '01'"),
        (lambda: pm.Score.mean_of([1, None]), "of an example must be a number"),
        (lambda: pm.Score.mean_of([1, 10**400]), "a score must be finite"),
        (lambda: pm.Score.mean_of([1e200, -1e200]), "too large for a standard error"),
    ],
)
def test_scores(build, message):
    with pytest.raises(pm.EvaluationError, match=message):
        build()


@pytest.mark.parametrize("half", [np.float32(0.5), np.float16(0.5), torch.tensor(0.5)])
def test_a_score_holds_numbers_of_python(half):
    score = pm.Score(half, half, np.int64(3), [half, half, torch.tensor(1)])
    assert score == pm.Score(0.5, 0.5, 3, (0.5, 0.5, 1.0))
    assert type(score.n) is int
    # As in the record, which is JSON.
    assert json.loads(json.dumps([score.value, score.stderr, score.example_scores]))
    mean = pm.Score.mean_of(value for value in (half, 1, True))
    assert mean == pm.Score.mean_of([0.5, 1.0, 1.0])


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("0.5", "^mine: .* got str"),
        (None, "^mine: .* got NoneType"),
        (torch.zeros(2), "^mine: .* got Tensor"),
        (10**400, "^mine: .* returned 1000.*, but a score must be finite"),
        ({"a": "x"}, "^mine/a: .* got str"),
        ({"a": math.nan}, "^mine/a: .* returned nan, but a score must be finite"),
    ],
)
def test_what_a_function_must_not_return(value, message):
    evaluator = FunctionEvaluator("mine", lambda model, tokenizer: value)
    with pytest.raises(pm.EvaluationError, match=message):
        evaluator.evaluate(Candidate(None, None, {}), "search")


@pytest.mark.parametrize("value", [True, 1, np.float32(1), torch.tensor(1.0)])
def test_what_a_function_may_return(value):
    evaluator = FunctionEvaluator("mine", lambda model, tokenizer: value)
    scores = evaluator.evaluate(Candidate(None, None, {}), "search")
    assert scores == {"mine": pm.Score(1.0)}


def test_a_function_of_a_module_needs_a_signature():
    with pytest.raises(pm.EvaluationError, match="max has no signature"):
        FunctionEvaluator.load("mine", "builtins:max")


def test_paths_become_text():
    assert pm.Perplexity(Path("a.txt")) == pm.Perplexity("a.txt")
    assert pm.Judge(Path("p.jsonl"), "polite") == pm.Judge("p.jsonl", "polite")
