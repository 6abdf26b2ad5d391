import math
import random

import pytest
import torch

from paretomerge.errors import EvaluationError
from paretomerge.evaluate.evaluator import Candidate
from paretomerge.evaluate.perplexity import PerplexityEvaluator
from tests.architectures import ARCHITECTURES
from tests.conftest import save_tokenizer
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


@pytest.fixture
def with_bos(tmp_path):
    """A model whose tokenizer puts `~` before each text, and a text."""
    folder = tmp_path / "model"
    ARCHITECTURES["llama"]().save_pretrained(folder)
    save_tokenizer(folder, adds_bos=True)
    letters = random.Random(0).choices("abcdefgh", k=200)
    (tmp_path / "letters.txt").write_text("".join(letters))
    return live(folder), tmp_path / "letters.txt"


def mean_loss(model, windows, first):
    """The mean over all predicted tokens, by transformers alone, one window at a time."""
    losses, count = 0.0, 0
    for window in windows:
        ids = torch.tensor([first + window])
        with torch.no_grad():
            logits = model(ids).logits[0, :-1].double()
        log_probs = torch.log_softmax(logits, -1)
        targets = ids[0, 1:]
        losses -= float(log_probs[range(len(targets)), targets].sum())
        count += len(targets)
    return losses / count


@pytest.mark.parametrize("adds_bos", [None, True, False])
def test_windows_begin_as_the_tokenizer_begins_texts(with_bos, adds_bos):
    candidate, text = with_bos
    tokenizer = candidate.tokenizer
    tokens = tokenizer.encode(text.read_text())
    bos, *tokens = tokens
    assert bos == tokenizer.bos_token_id and len(tokens) == 200
    first = [] if adds_bos is False else [bos]
    # 32 positions, and the first token of all takes one of them.
    step = 32 - len(first)
    windows = [tokens[i : i + step] for i in range(0, 200, step)]
    evaluator = PerplexityEvaluator("p", text, add_bos_token=adds_bos)
    for split, mine in (("search", windows[::2]), ("held_out", windows[1::2])):
        score = evaluator.evaluate(candidate, split)["p"]
        expected = math.exp(mean_loss(candidate.model, mine, first))
        assert score.value == pytest.approx(expected, rel=1e-5)


def test_the_first_window_is_that_of_the_harness(with_bos):
    """Of a text that is one window, the harness's rolling log-likelihood is the same sum."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    candidate, text = with_bos
    tokens = candidate.tokenizer.encode(text.read_text(), add_special_tokens=False)
    # 31 letters behind the first token; the harness puts it before texts by itself
    part = candidate.tokenizer.decode(tokens[:31]).replace(" ", "")
    harness = HFLM(candidate.model, tokenizer=candidate.tokenizer, add_bos_token=False)
    instance = Instance("loglikelihood_rolling", {}, (part,), 0)
    (log_likelihood,) = harness.loglikelihood_rolling([instance], disable_tqdm=True)
    bos = candidate.tokenizer.bos_token_id
    expected = -31 * mean_loss(candidate.model, [tokens[:31]], [bos])
    assert log_likelihood == pytest.approx(expected, rel=1e-5)


def test_a_first_token_that_the_tokenizer_lacks_is_an_error(specialists, text):
    model = live(specialists / "models" / "scribe")
    model.tokenizer.bos_token = None
    with pytest.raises(EvaluationError, match="has no token that begins a sequence"):
        PerplexityEvaluator("p", text, add_bos_token=True).evaluate(model, "search")
