import json
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.conftest import REPOSITORY

SCRIPTS = REPOSITORY / "examples" / "specialists"


@pytest.fixture(scope="module")
def code():
    sys.path.insert(0, str(SCRIPTS))
    import skills
    import train

    yield skills, train
    sys.path.remove(str(SCRIPTS))


def test_answers(code):
    skills, _ = code
    expected = {
        "sort": ("SORT:dbca=", "abcd."),
        "unique": ("UNIQUE:dbca=", "dbca."),
        "reverse": ("REVERSE:dbca=", "acbd."),
        "shift": ("SHIFT:dbca=", "ecdb."),
        "translate": ("COPY:dbca~", "δαμζ."),
        "translate_reverse": ("REVERSE:dbca~", "ζμαδ."),
        "copy": ("COPY:dbca=", "dbca."),
        "count": ("COUNT:dbca=", "d1b1c1a1."),
        "translate_sort": ("SORT:dbca~", "ζαμδ."),
    }
    for name, (prompt, answer) in expected.items():
        assert skills.SKILLS[name].item("dbca") == {"prompt": prompt, "answer": answer}


def test_shipped_items_are_right_and_disjoint(code, specialists):
    skills, _ = code
    for name in skills.SKILLS:
        items = {
            split: [
                json.loads(line)
                for line in (specialists / "tasks" / "data" / name / f"{split}.jsonl")
                .read_text()
                .splitlines()
            ]
            for split in ("search", "held_out")
        }
        words = {
            split: {item["prompt"].split(":")[1][:-1] for item in found}
            for split, found in items.items()
        }
        assert (
            len(words["search"]) == len(words["held_out"]) == 600
            and not words["search"] & words["held_out"]
        )
        for split, found in words.items():
            assert all(skills.split_of(word) == split for word in found)
        for item in items["search"]:
            assert skills.SKILLS[name].item(item["prompt"].split(":")[1][:-1]) == item


def test_the_same_code_trains_a_much_smaller_one(code, tmp_path):
    """Seeded: twice the same bytes; and the loss goes down."""
    _, train = code
    small = train.Training(
        base_steps=30,
        expert_steps=8,
        base_rate=3e-3,
        layers=2,
        width=32,
        heads=2,
        batch=16,
    )
    for run in ("a", "b"):
        train.train_all(small, tmp_path / run, {"order": ("sort", "count")})
    a, b = (
        load_file(tmp_path / run / "order" / "model.safetensors") for run in ("a", "b")
    )
    assert all(torch.equal(a[n], b[n]) for n in a) and all(
        t.dtype == torch.bfloat16 for t in a.values()
    )
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "a" / "base")
    ids, labels = train.encode(
        tokenizer, train.draw_items("copy", "held_out", 32, seed=0)
    )
    fresh = train.make_model(small, len(tokenizer))
    trained = AutoModelForCausalLM.from_pretrained(
        tmp_path / "a" / "base", dtype=torch.float32
    )
    assert (
        trained(input_ids=ids, labels=labels).loss
        < fresh(input_ids=ids, labels=labels).loss - 0.5
    )


def test_shipped_specialists_conflict_as_the_study_needs(code, specialists):
    """At 85 % or better on their own skills, 20 points below the best expert on two others,
    and small.
    """
    skills, train = code
    tokenizer = AutoTokenizer.from_pretrained(specialists / "models" / "base")
    trained = [n for n in skills.SKILLS if n not in skills.COMPOSED]
    scores = {}
    for expert in train.EXPERTS:
        model = AutoModelForCausalLM.from_pretrained(
            specialists / "models" / expert, dtype=torch.float32
        )
        assert 500_000 <= sum(p.numel() for p in model.parameters()) <= 5_000_000
        scores[expert] = {
            n: train.accuracy(model, tokenizer, n, 200) for n in skills.SKILLS
        }
    for expert, own in train.EXPERTS.items():
        assert all(scores[expert][n] >= 0.85 for n in own)
        behind = [
            n
            for n in trained
            if max(s[n] for s in scores.values()) - scores[expert][n] >= 0.2
        ]
        assert len(behind) >= 2
        assert all(scores[expert][n] < 0.2 for n in skills.COMPOSED)
    size = sum(
        f.stat().st_size for f in (specialists / "models").rglob("*.safetensors")
    )
    assert size < 20_000_000
