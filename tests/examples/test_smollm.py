"""The SmolLM2 family: its committed data, and a tiny expert. No search: that takes the model."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from examples.smollm import train
from examples.smollm.make_data import DATA, N_HELD_OUT, N_SEARCH
from examples.smollm.skills import EXPERTS, SKILLS, draw_items
from examples.smollm.skills.arithmetic import STORIES, calculate
from examples.smollm.skills.composed import STORIES as FRENCH_STORIES
from examples.smollm.skills.french import INTO_FRENCH
from examples.smollm.skills.splits import share_of, split_of
from examples.smollm.tasks import metrics
from paretomerge.merging.engine import merge
from paretomerge.study.study import load_study
from tests.conftest import REPOSITORY, pico_config, save_tokenizer

SMOLLM = REPOSITORY / "examples" / "smollm"
SPLITS = {"search": N_SEARCH, "held_out": N_HELD_OUT}


def committed(name, split):
    lines = (DATA / name / f"{split}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("name", SKILLS)
def test_committed_examples_are_those_that_the_generator_draws(name):
    for split, n in SPLITS.items():
        assert committed(name, split) == draw_items(name, split, n)


@pytest.mark.parametrize("name", SKILLS)
def test_no_prompt_is_in_two_splits(name):
    prompts = [item["prompt"] for split in SPLITS for item in committed(name, split)]
    prompts += [item["prompt"] for item in draw_items(name, "train", 2000)]
    assert len(set(prompts)) == len(prompts)


def test_no_translated_sentence_is_in_two_splits():
    of_split = {split: sentences(committed("french", split)) for split in SPLITS}
    of_split["train"] = sentences(draw_items("french", "train", 2000))
    for split, english in of_split.items():
        assert all(split_of(sentence.lower()) == split for sentence in english)


def sentences(items):
    """The English of each item: the answer, or what is left of the prompt without the request."""
    for item in items:
        requests = [r for r in INTO_FRENCH if matches(r, item["prompt"])]
        if not requests:
            yield item["answer"]
            continue
        before, after = requests[0].split("{text}")
        yield item["prompt"].removeprefix(before).removesuffix(after)


def matches(request, prompt):
    before, after = request.split("{text}")
    return prompt.startswith(before) and prompt.endswith(after)


@pytest.mark.parametrize("stories", [STORIES, FRENCH_STORIES])
def test_stories_of_the_splits_differ(stories):
    parts = [share_of(stories, split) for split in ("train", "search", "held_out")]
    assert sum(map(len, parts)) == len(stories) == len(set(stories))


def test_calculations():
    assert str(calculate("12 + 30 - 5")) == "12 + 30 = 42, 42 - 5 = 37"
    assert calculate("9 * 9 + 30") is None and calculate("4 - 9 + 30") is None
    for name in ("arithmetic", "composed"):
        for item in committed(name, "held_out"):
            for step in item["answer"].split(", "):
                left, right = step.split(" = ")
                assert eval(left) == int(right)


def test_the_general_questions_are_split():
    search, held_out = committed("general", "search"), committed("general", "held_out")
    assert (len(search), len(held_out)) == (20, 60)
    assert not {i["prompt"] for i in search} & {i["prompt"] for i in held_out}


@pytest.mark.parametrize(
    ("name", "answer", "right"),
    [
        ("last_number", "9 + 3 = 12.", "12"),
        ("same_sentence", "L’été  est là", "l'été est là."),
        ("same_object", '{"b": 1, "a": "x"}', '{"a": "x", "b": 1}'),
        ("contains_answer", "It is Paris, of course.", "paris"),
    ],
)
def test_metrics(name, answer, right):
    metric = getattr(metrics, name)
    assert metric({"answer": right}, [answer]) == {"acc": 1.0}
    for wrong in ("", "12 apples and 13", "{", "London"):
        assert metric({"answer": right}, [wrong]) == {"acc": 0.0}


@pytest.mark.parametrize("file", ["study.yaml", "composed.yaml", "regmean.yaml"])
def test_the_studies_are_read(file):
    settings = load_study(SMOLLM / file).settings
    assert settings.evaluation.apply_chat_template
    for model in settings.models:
        assert (SMOLLM / model.partition("+")[2] / "adapter_config.json").exists()


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning")
def test_a_tiny_expert_is_trained_twice_to_the_same_bytes_and_merged(tmp_path):
    base = tmp_path / "base"
    config = pico_config()
    config.max_position_embeddings = 512
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(base)
    save_tokenizer(base)
    template = "{% for m in messages %}{{ m['content'] }}={% endfor %}"
    (base / "chat_template.jinja").write_text(template)
    training = train.Training(steps=12, batch=4, rate=1e-2, rank=2)
    losses = train.train(base, "extraction", training, tmp_path / "a")
    train.train(base, "extraction", training, tmp_path / "b")
    first = load_file(tmp_path / "a" / "adapter_model.safetensors")
    second = load_file(tmp_path / "b" / "adapter_model.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert losses[-1] < losses[0]
    recipe = {"merge_method": "passthrough"}
    recipe["models"] = [{"model": f"{base}+{tmp_path / 'a'}"}]
    merged = load_file(merge(recipe, tmp_path / "out") / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(merged[name], load_file(base / "model.safetensors")[name])


def test_experts_have_adapters_of_the_size_that_git_bears():
    for expert in EXPERTS:
        weights = SMOLLM / "adapters" / expert / "adapter_model.safetensors"
        assert weights.stat().st_size < 10e6
