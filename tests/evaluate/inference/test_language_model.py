from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from paretomerge.evaluate.inference.generate import GreedyGenerator, is_plain_greedy
from paretomerge.evaluate.inference.language_model import ResidentLM
from paretomerge.evaluate.inference.likelihood import LogLikelihoods
from tests.architectures import ARCHITECTURES

CAUSAL = [
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3",
    "phi3",
    "gpt2",
    "gpt_neox",
    "olmo2",
    "mixtral",
]


def asked(*arguments):
    return SimpleNamespace(args=arguments)


@pytest.fixture(scope="module")
def scribe(specialists):
    folder = specialists / "models" / "scribe"
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32
    ).eval(), AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def lines(specialists):
    import json

    found = (
        (specialists / "tasks" / "data" / "reverse" / "held_out.jsonl")
        .read_text()
        .splitlines()[:40]
    )
    return [(line["prompt"], line["answer"]) for line in map(json.loads, found)]


class Counting(torch.nn.Module):
    """A model that remembers the shape of everything it reads, and that has room for so many
    rows.
    """

    def __init__(self, model, room=10**6):
        super().__init__()
        self.inner, self.room, self.shapes = model, room, []
        self.config, self.generation_config = model.config, model.generation_config

    @property
    def device(self):
        return self.inner.device

    def forward(
        self,
        input_ids,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        use_cache=None,
        logits_to_keep=0,
    ):
        if len(input_ids) > self.room:
            raise torch.OutOfMemoryError("out of memory")
        self.shapes.append(tuple(input_ids.shape))
        more = {
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "use_cache": use_cache,
        }
        return self.inner(
            input_ids,
            attention_mask=attention_mask,
            logits_to_keep=logits_to_keep,
            **more,
        )


def likelihoods(model, requests, longest=32, together=4):
    work = LogLikelihoods(model, requests, longest)
    for run, jobs in work.passes:
        for i in range(0, len(jobs), together):
            run(jobs[i : i + together])
    return work


def one_by_one(model, context, answer, longest=32):
    """The plainest way there is."""
    tokens = torch.tensor([*context, *answer])[-(longest + 1) :]
    with torch.no_grad():
        chances = model(tokens[None, :-1]).logits[0, -len(answer) :].log_softmax(-1)
    return float(
        chances.gather(1, torch.tensor(answer)[:, None]).sum()
    ), chances.argmax(1).tolist() == list(answer)


@pytest.mark.parametrize("name", CAUSAL)
def test_a_context_read_once_gives_what_each_sequence_gives_alone(name):
    model = ARCHITECTURES[name]()
    rng = np.random.default_rng(0)

    def words(n):
        return rng.integers(3, 48, n).tolist()

    requests = []
    for length in (15, 4, 11, 20):
        context = words(length)
        requests += [(context, words(k)) for k in (3, 5, 2, 1)]
    requests += [
        (words(3), words(2)),
        (words(30), words(8)),
        requests[0],
        (requests[0][0], requests[0][1][:2]),
    ]
    greedy = model.generate(
        torch.tensor([requests[0][0]]),
        max_new_tokens=3,
        do_sample=False,
        pad_token_id=0,
    )[0, -3:].tolist()
    requests.append((requests[0][0], greedy))
    work = likelihoods(model, requests)
    assert len(work.passes[1][1]) >= 3  # contexts that are read once
    for found, (context, answer) in zip(work.results, requests, strict=True):
        expected = one_by_one(model, context, answer)
        assert (
            found[0] == pytest.approx(expected[0], rel=1e-4, abs=1e-4)
            and found[1] == expected[1]
        )
    assert work.results[-1][1]


def test_the_harness_itself_says_the_same(scribe, lines):
    model, tokenizer = scribe
    choices = [answer for _, answer in lines[:3]] + ["b"]
    requests = [asked(prompt, answer) for prompt, _ in lines for answer in choices]
    requests += [
        asked(lines[0][0] * 6 + prompt, answer)
        for prompt, _ in lines[:5]
        for answer in choices
    ]  # longer than the model reads
    requests += [asked("", answer) for _, answer in lines[:3]]
    theirs, ours = (
        HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8),
        ResidentLM(model, tokenizer, 8),
    )
    for one, other in zip(
        theirs.loglikelihood(requests, disable_tqdm=True),
        ours.loglikelihood(requests, disable_tqdm=True),
        strict=True,
    ):
        assert one[0] == pytest.approx(other[0], abs=1e-4) and one[1] == other[1]
    text = " ".join(prompt for prompt, _ in lines)
    rolling = [
        lm.loglikelihood_rolling([asked(text), asked("abc")], disable_tqdm=True)
        for lm in (theirs, ours)
    ]
    assert rolling[0] == pytest.approx(rolling[1], rel=1e-5)


@pytest.mark.parametrize("name", ["scribe", *CAUSAL])
def test_what_is_written_is_what_the_harness_writes(name, scribe, lines, pico):
    if name == "scribe":
        (model, tokenizer), prompts = scribe, [prompt for prompt, _ in lines]
    else:
        model, tokenizer = (
            ARCHITECTURES[name](),
            AutoTokenizer.from_pretrained(pico / "ada"),
        )
        model.generation_config.eos_token_id = (
            tokenizer.eos_token_id
        )  # else the harness writes on behind the end, while others do
        prompts = ["abcde", "xyz", "a", "the fox", "qqqqqqqqqqqq", "so", "on and on"]
    requests = [
        asked(prompt, {"until": ["."], "max_gen_toks": 12}) for prompt in prompts
    ]
    requests += [
        asked(prompt, {"until": ["e", "kk", "ab"], "max_gen_toks": 7})
        for prompt in prompts
    ]
    requests += [
        asked(prompt, {"until": [], "max_gen_toks": 5, "do_sample": False})
        for prompt in prompts[:3]
    ]
    theirs, ours = (
        HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4),
        ResidentLM(model, tokenizer, 4),
    )
    assert is_plain_greedy(model, {"until": ["."]})
    assert theirs.generate_until(requests, disable_tqdm=True) == ours.generate_until(
        requests, disable_tqdm=True
    )


def test_a_context_is_run_once_for_all_its_answers(scribe):
    model = Counting(scribe[0])
    context = list(range(3, 23))
    likelihoods(model, [(context, [k, k + 1, k + 2]) for k in range(4, 8)])
    assert model.shapes == [(1, 20), (4, 2)]
    model.shapes.clear()
    likelihoods(model, [(context, [k]) for k in range(4, 8)] + [(context, [5])])
    assert model.shapes == [
        (1, 20)
    ]  # one token each: the context's last logits tell them all


def test_finished_answers_leave_the_batch(scribe, lines):
    model, tokenizer = Counting(scribe[0]), scribe[1]
    prompts = [(i, tokenizer.encode(prompt)) for i, (prompt, _) in enumerate(lines[:8])]
    free = GreedyGenerator(model, tokenizer, [], 10).generate(prompts)
    rows = [rows for rows, length in model.shapes if length == 1]
    assert rows == sorted(rows, reverse=True) and rows[0] == 8 and rows[-1] <= 4
    model.shapes.clear()
    stop = [tokenizer.decode(tokens[1:2]) for tokens in free.values()]
    written = GreedyGenerator(model, tokenizer, stop, 10).generate(prompts)
    lengths = [len(tokens) for tokens in written.values()]
    assert set(lengths) == {1, 2} and 4 * lengths.count(2) <= 3 * 8
    steps = [shape for shape in model.shapes if shape[1] == 1]
    assert steps == [(lengths.count(2), 1)]
    assert all(tokens == free[i][: len(tokens)] for i, tokens in written.items())


def test_a_batch_that_finds_no_memory_is_halved_and_the_rest_are_smaller(scribe, lines):
    model, tokenizer = scribe
    requests = [asked(prompt, answer) for prompt, answer in lines]
    expected = ResidentLM(model, tokenizer, 16).loglikelihood(
        requests, disable_tqdm=True
    )
    lm = ResidentLM(model, tokenizer, 16)
    lm.set_model(Counting(model, room=5))
    found = lm.loglikelihood(requests, disable_tqdm=True)
    assert [value for value, _ in found] == pytest.approx(
        [value for value, _ in expected], rel=1e-4
    )
    assert [rows for rows, _ in lm.model.shapes][:8] == [4] * 8
    written = lm.generate_until(
        [asked(prompt, {"until": ["."], "max_gen_toks": 6}) for prompt, _ in lines[:9]],
        disable_tqdm=True,
    )
    assert len(written) == 9
    lm.set_model(Counting(model, room=0))
    with pytest.raises(torch.OutOfMemoryError):
        lm.loglikelihood(requests[:2], disable_tqdm=True)


def test_other_errors_are_not_taken_for_memory(scribe, lines):
    lm = ResidentLM(*scribe, 4)
    lm.set_model(
        SimpleNamespace(
            forward=lambda input_ids: None,
            device=torch.device("cpu"),
            config=scribe[0].config,
        )
    )
    with pytest.raises(TypeError):
        lm.loglikelihood([asked(*lines[0])], disable_tqdm=True)


def test_a_request_is_tokenised_once(scribe, lines, monkeypatch):
    lm = ResidentLM(*scribe, 16)
    requests = [asked(*line) for line in lines]
    lm.loglikelihood(requests, disable_tqdm=True)
    monkeypatch.setattr(HFLM, "tok_encode", None)
    lm.loglikelihood(requests, disable_tqdm=True)


@pytest.mark.parametrize(
    ("settings", "default", "alone"),
    [
        ({}, {}, True),
        (
            {"do_sample": False, "temperature": 0.0, "until": ["x"], "max_gen_toks": 3},
            {},
            True,
        ),
        ({"do_sample": True, "temperature": 0.5}, {}, False),
        ({"num_beams": 2}, {}, False),
        ({}, {"repetition_penalty": 1.1}, False),
        (
            {},
            {"do_sample": True, "top_k": 20},
            True,
        ),  # a request that does not ask for sampling is greedy
    ],
)
def test_only_plain_greedy_answers_are_written_here(settings, default, alone):
    from transformers import GenerationConfig

    assert (
        is_plain_greedy(
            SimpleNamespace(generation_config=GenerationConfig(**default)), settings
        )
        == alone
    )
