import math

import pytest
import torch

from paretomerge.errors import EvaluationError
from paretomerge.evaluate.evaluator import Candidate
from paretomerge.evaluate.perplexity import PerplexityEvaluator
from tests.evaluate.test_evaluate import live


@pytest.fixture
def text(tmp_path, specialists):
    lines = (
        (specialists / "tasks" / "data" / "copy" / "search.jsonl")
        .read_text()
        .splitlines()[:120]
    )
    (tmp_path / "text.txt").write_text("".join(line.split('"')[3] for line in lines))
    return tmp_path / "text.txt"


def test_perplexity_is_that_of_the_tokens_one_window_at_a_time(specialists, text):
    model = live(specialists / "models" / "scribe")
    model.model.float()
    tokens = model.tokenizer.encode(text.read_text(), add_special_tokens=False)
    size = model.model.config.max_position_embeddings
    windows = [tokens[i : i + size] for i in range(0, len(tokens), size)]
    found = {
        split: PerplexityEvaluator("p", text).evaluate(model, split)["p"]
        for split in ("search", "held_out")
    }
    for split, mine in (("search", windows[::2]), ("held_out", windows[1::2])):
        with torch.no_grad():
            losses = [
                float(model.model(torch.tensor([w]), labels=torch.tensor([w])).loss)
                * (len(w) - 1)
                for w in mine
            ]
        assert found[split].value == pytest.approx(
            math.exp(sum(losses) / sum(len(w) - 1 for w in mine)), rel=1e-4
        )
        assert (
            found[split].n == len(mine) and 0 < found[split].stderr < found[split].value
        )
    bits = PerplexityEvaluator("b", text, "bits_per_byte").evaluate(model, "search")[
        "b"
    ]
    size = sum(len(model.tokenizer.decode(w[1:]).encode()) for w in windows[::2])
    nats = math.log(found["search"].value) * sum(len(w) - 1 for w in windows[::2])
    assert bits.value == pytest.approx(nats / math.log(2) / size, rel=1e-4)


def test_a_model_that_knows_the_text_has_the_lower_one(specialists, text):
    scribe, mirror = (
        PerplexityEvaluator("p", text).evaluate(
            live(specialists / "models" / m), "search"
        )["p"]
        for m in ("scribe", "mirror")
    )
    assert scribe.value != mirror.value


def test_a_broken_model_is_no_score(specialists, text):
    model = live(specialists / "models" / "scribe")
    with torch.no_grad():
        model.model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(EvaluationError, match="NaN: the merged weights overflow"):
        PerplexityEvaluator("p", text).evaluate(model, "search")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "cannot be read as a text file"),
        (b"\xff\xfe\x00", "UTF-8"),
        (b"short", "at least 256 tokens, got 5"),
    ],
)
def test_a_file_that_cannot_be_read_is_told(specialists, tmp_path, content, told):
    if content is not None:
        (tmp_path / "t.txt").write_bytes(content)
    model = live(specialists / "models" / "scribe")
    with pytest.raises(EvaluationError, match=told):
        PerplexityEvaluator("p", tmp_path / "t.txt").evaluate(
            Candidate(model.model, model.tokenizer, {}), "search"
        )
