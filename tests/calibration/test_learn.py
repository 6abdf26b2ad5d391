"""Learned weights: the gradient, the groups, the recipe, and when to stop."""

from pathlib import Path

import pytest
import torch
from torch.func import functional_call
from transformers import AutoModelForCausalLM

from paretomerge.calibration import Example, learn_weights
from paretomerge.calibration.learn import _Learner, write_recipe
from paretomerge.errors import ConfigError
from paretomerge.merging.engine import merge
from paretomerge.merging.plan.make import make_plan
from paretomerge.recipe import Recipe
from tests.conftest import pico_examples

NAMES = ("ada", "bob")


def texts(pico: Path, count: int = 8) -> dict[str, list[Example]]:
    return {str(pico / name): pico_examples(name, count) for name in NAMES}


@pytest.fixture(scope="module")
def learner(pico: Path) -> _Learner:
    return _Learner.load(
        str(pico / "base"),
        texts(pico),
        groups=2,
        examples=8,
        max_tokens=20,
        batch_size=8,
        add_bos_token=None,
        device="cpu",
        on_progress=lambda _: None,
    )


def test_the_gradient_is_that_of_the_loss(pico: Path, learner: _Learner):
    """Against torch's own gradient through the sum of weighted deltas."""
    weights = torch.tensor([[0.3, 0.5], [0.2, -0.1]])
    learner._set(weights)
    measured = learner._gradient(0)
    model = learner.live.model
    leaf = weights.clone().requires_grad_()
    merged = {}
    for name, base in learner.base.items():
        layer = None
        if ".layers." in name:
            layer = int(name.split(".layers.")[1].split(".")[0])
        group = 1
        if "embed" in name or (layer is not None and layer < 2):
            group = 0
        total = base
        for row, source in enumerate(NAMES):
            loaded = AutoModelForCausalLM.from_pretrained(pico / source).state_dict()
            total = total + leaf[row, group] * (loaded[name].float() - base)
        merged[name] = total
    loss = 0.0
    for of_source in learner.training:
        answers = of_source[0]
        inputs = answers.batch.model_inputs()
        logits = functional_call(model, merged, args=(), kwargs=inputs).logits
        ours = logits[answers.places].log_softmax(-1)
        theirs = answers.log_probabilities
        divergence = (theirs.exp() * (theirs - ours)).sum(-1).mean()
        loss = loss + divergence / len(NAMES)
    (expected,) = torch.autograd.grad(loss, leaf)
    torch.testing.assert_close(measured, expected, rtol=1e-3, atol=1e-6)


def test_answers_alone_are_learned(pico: Path, learner: _Learner):
    """One place for each token of an answer, on the text of both splits."""
    for row, name in enumerate(NAMES):
        places = 0
        for answers in (*learner.training[row], *learner.held_out[row]):
            places += int(answers.places.sum())
            assert len(answers.log_probabilities) == int(answers.places.sum())
        wanted = 0
        for example in pico_examples(name, 8):
            stripped = len(example.prompt) - len(example.prompt.rstrip())
            wanted += len(example.text) + stripped
        assert places == wanted


def test_the_recipe_is_what_was_learned(pico: Path, tmp_path: Path):
    learned = learn_weights(
        str(pico / "base"), paths(pico), texts(pico), groups=2, steps=20, lr=0.05
    )
    first, best = learned.held_out[0], learned.held_out[learned.best]
    assert best < 0.9 * first
    assert min(learned.held_out.values()) == best
    file = tmp_path / "recipe.yml"
    write_recipe(learned, file)
    recipe = Recipe.load(file)
    assert recipe == learned.recipe
    jobs = {job.name: job for job in make_plan(recipe).jobs}
    for name, group in (
        ("model.embed_tokens.weight", 0),
        ("model.layers.1.mlp.up_proj.weight", 0),
        ("model.layers.2.mlp.up_proj.weight", 1),
        ("lm_head.weight", 1),
    ):
        job = jobs[name]
        for ref, parameters in zip(job.sources, job.parameters, strict=True):
            assert parameters["weight"] == learned.weights[ref.model][group]
    assert merge(recipe, tmp_path / "merged").is_dir()


def paths(pico: Path) -> list[str]:
    return [str(pico / name) for name in NAMES]


def test_one_source_is_found_again(pico: Path):
    """Its weight goes to 1, where it answers as it did."""
    ada = str(pico / "ada")
    data = {ada: pico_examples("ada", 12)}
    learned = learn_weights(
        str(pico / "base"), [ada], data, groups=1, steps=60, lr=0.05, patience=60
    )
    ((weight,),) = learned.weights.values()
    assert weight == pytest.approx(1, abs=0.03)


def test_it_stops_where_the_rest_of_the_text_gets_no_better(pico: Path):
    stopped = learn_weights(
        str(pico / "base"),
        paths(pico),
        texts(pico),
        start=0.5,
        lr=100.0,
        check_every=1,
        patience=2,
        steps=50,
    )
    assert list(stopped.held_out) == [0, 1, 2] and stopped.best == 0
    assert set(stopped.weights[str(pico / "ada")]) == {0.5}


def test_refusals(pico: Path):
    base = str(pico / "base")
    one = {str(pico / "ada"): [Example("abc")], str(pico / "bob"): [Example("abc")]}
    with pytest.raises(ConfigError, match="ada needs two examples or more"):
        learn_weights(base, paths(pico), one)
    with pytest.raises(ConfigError, match="bob has no text"):
        learn_weights(base, paths(pico), {str(pico / "ada"): [Example("abc")]})
    with pytest.raises(ConfigError, match="lr: expected a number of 0 or more"):
        learn_weights(base, paths(pico), texts(pico), lr=-1.0)
    with pytest.raises(ConfigError, match="start: expected a finite number"):
        learn_weights(base, paths(pico), texts(pico), start="x")
