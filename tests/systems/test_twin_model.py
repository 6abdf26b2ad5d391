"""`TwinModel` against plain checkpoints that are built from the files by dense arithmetic."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from paretomerge.errors import EvaluationError
from paretomerge.evaluate.inference.batching import AdaptiveBatcher
from paretomerge.evaluate.inference.generate import GreedyGenerator
from paretomerge.evaluate.inference.likelihood import LogLikelihoods
from paretomerge.systems.twin import TwinModel, build_twin, export_corner
from tests.systems.twins import (
    PROMPTS,
    dense_model,
    encode,
    plain_logits,
    router_by_hand,
    save_family,
)

WORDS = ("abcab", "k", "rstuvwxq")
WEIGHTS = torch.tensor([[0.7, 0.2, 0.1], [0.0, 1.0, 0.0], [-0.3, 0.4, 1.2]])


@pytest.fixture(scope="module")
def folder(pico, tmp_path_factory):
    """Three tasks, in float32."""
    sources = [str(pico / name) for name in PROMPTS]
    out = tmp_path_factory.mktemp("twin") / "twin"
    return build_twin(str(pico / "base"), sources, PROMPTS, out, dtype="float32")


@pytest.fixture(scope="module")
def model(folder):
    return TwinModel.from_pretrained(folder)


def close(one, other):
    return torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("left", [True, False])
def test_each_row_of_a_batch_is_the_plain_model_of_its_weights(
    folder, model, tmp_path, left
):
    inputs = encode(WORDS, left)
    logits = model(**inputs, task_weights=WEIGHTS).logits
    for row, word in enumerate(WORDS):
        plain = dense_model(folder, WEIGHTS[row].tolist(), tmp_path / "plain")
        is_token = inputs["attention_mask"][row].bool()
        close(logits[row][is_token], plain_logits(plain, word))


def test_the_router_is_the_formula_and_reads_no_padding(folder, model):
    expected = torch.stack([router_by_hand(model, folder, word) for word in WORDS])
    for left in (True, False):
        close(model.task_weights(**encode(WORDS, left)), expected)
    close(expected.sum(1), torch.ones(3))


def test_without_given_weights_forward_uses_those_of_the_router(model):
    inputs = encode(WORDS)
    weights = model.task_weights(**inputs)
    close(model(**inputs).logits, model(**inputs, task_weights=weights).logits)
    # the rows have different weights, which a common mixture would not have
    assert (weights[0] - weights[2]).abs().max() > 0.5


def test_weights_of_zero_are_the_shared_model(folder, model):
    shared = AutoModelForCausalLM.from_pretrained(folder / "shared").eval()
    logits = model(**encode(WORDS), task_weights=torch.zeros(3)).logits
    close(logits[0, -len(WORDS[0]) :], plain_logits(shared, WORDS[0]))


@settings(max_examples=10, deadline=None)
@given(weights=st.lists(st.floats(-1, 2), min_size=3, max_size=3))
def test_rows_do_not_depend_on_their_batch(model, weights):
    inputs = encode(WORDS)
    given_weights = torch.tensor([weights, *WEIGHTS[1:].tolist()])
    together = model(**inputs, task_weights=given_weights).logits
    for row, word in enumerate(WORDS):
        alone = model(**encode([word]), task_weights=given_weights[row]).logits
        torch.testing.assert_close(
            together[row, -len(word) :], alone[0], rtol=1e-3, atol=1e-4
        )


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}],
    ids=["greedy", "beams", "several"],
)
def test_generate_writes_what_the_plain_models_write(folder, model, tmp_path, options):
    inputs = encode(WORDS)
    options = {**options, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    written = model.generate(**inputs, task_weights=WEIGHTS, **options)
    n_copies = options.get("num_return_sequences", 1)
    width = inputs["input_ids"].shape[1]
    for row, word in enumerate(WORDS):
        plain = dense_model(folder, WEIGHTS[row].tolist(), tmp_path / "plain")
        expected = plain.generate(**encode([word]), **options)[:, len(word) :]
        found = written[row * n_copies : (row + 1) * n_copies, width:]
        for one, other in zip(found.tolist(), expected.tolist(), strict=True):
            # a finished row is padded to the length of the longest
            n = min(len(one), len(other))
            assert one[:n] == other[:n] and not any(one[n:]) and not any(other[n:])


def test_generate_keeps_the_weights_of_the_prompt(model):
    inputs = encode(WORDS)
    weights = model.task_weights(**inputs)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    routed = model.generate(**inputs, **options)
    assert torch.equal(
        routed, model.generate(**inputs, task_weights=weights, **options)
    )


def test_threads_do_not_mix_their_weights(model):
    inputs = encode(WORDS)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}

    def write(row):
        weights = WEIGHTS[row]
        return model.generate(**inputs, task_weights=weights, **options).tolist()

    expected = [write(row) for row in range(3)]
    assert len({str(written) for written in expected}) == 3
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(write, range(3))) == expected


def test_the_evaluators_read_the_prompt_alone(folder, model, tmp_path):
    """Log-likelihoods of answers, and greedy answers, as by the plain model of the prompt."""
    requests = []
    for word in WORDS:
        context = encode([word])["input_ids"][0].tolist()
        # one token, several, and a second answer to the same prompt
        requests += [(context, [5]), (context, [7, 9, 2]), (context, [7, 9])]
    batcher = AdaptiveBatcher(4)
    found = LogLikelihoods(model, requests, 32).run(batcher)
    single = [LogLikelihoods(model, requests[:1], 32).run(batcher)[0]]
    assert single[0] == pytest.approx(found[0], rel=1e-4)
    prompts = [(i, tuple(requests[3 * i][0])) for i in range(3)]
    written = GreedyGenerator(model, None, [], 5).generate_in_batches(prompts, batcher)
    weights = model.task_weights(**encode(WORDS))
    for row, word in enumerate(WORDS):
        plain = dense_model(folder, weights[row].tolist(), tmp_path / "plain")
        mine = slice(3 * row, 3 * row + 3)
        expected = LogLikelihoods(plain, requests[mine], 32).run(batcher)
        for one, other in zip(found[mine], expected, strict=True):
            assert one == pytest.approx(other, rel=1e-4)
        options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
        greedy = plain.generate(**encode([word]), **options)[0, len(word) :]
        assert written[row][: len(greedy)] == greedy.tolist()[: len(written[row])]


def test_prompts_that_begin_alike_and_single_answers_are_read_one_by_one(model):
    """No prefix is read for several prompts, and no answer together with its prompt."""
    words = ["abcabcabk", "abcabcabx", "abcabcabzz", "abcabcabq", "abcabcabr"]
    contexts = [encode([word])["input_ids"][0].tolist() for word in words]
    requests = [(context, [7, 9, 2]) for context in contexts]
    batcher = AdaptiveBatcher(8)
    found = LogLikelihoods(model, requests, 32).run(batcher)
    prompts = [(i, tuple(context)) for i, context in enumerate(contexts)]
    written = GreedyGenerator(model, None, [], 4).generate_in_batches(prompts, batcher)
    for i, (context, answer) in enumerate(requests):
        weights = model.task_weights(torch.tensor([context]))
        ids = torch.tensor([context + answer])
        logits = model(ids, task_weights=weights).logits[0, len(context) - 1 : -1]
        picked = logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])
        assert found[i][0] == pytest.approx(float(picked.sum()), rel=1e-4)
        options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
        greedy = model.generate(torch.tensor([context]), **options)[0, len(context) :]
        assert written[i] == greedy.tolist()
    assert len({tuple(answer) for answer in written.values()}) > 1


def test_a_cache_carries_the_weights_of_its_rows(model):
    inputs = encode(WORDS)
    output = model(**inputs, use_cache=True)
    cache = output.past_key_values
    close(cache.task_weights, model.task_weights(**inputs))
    next_tokens = torch.tensor([[4], [9], [20]])
    mask = torch.cat([inputs["attention_mask"], torch.ones(3, 1, dtype=torch.long)], 1)
    longer = torch.cat([inputs["input_ids"], next_tokens], 1)
    weights = cache.task_weights
    whole = model(longer, mask, task_weights=weights).logits[:, -1]
    order = torch.tensor([2, 0, 1])
    cache.batch_select_indices(order)
    step = model(next_tokens[order], mask[order], past_key_values=cache)
    close(step.logits[:, -1], whole[order])


def test_what_is_ambiguous_is_refused(model):
    inputs = encode(WORDS)
    ids = inputs["input_ids"]
    with pytest.raises(EvaluationError, match="attention_mask: needed for a batch"):
        model(ids)
    with pytest.raises(EvaluationError, match="attention_mask: needed for a batch"):
        model.generate(ids)
    with pytest.raises(EvaluationError, match=r"the shape \(3,\) or \(3, 3\)"):
        model(**inputs, task_weights=torch.ones(2))
    cache = model(**inputs, use_cache=True).past_key_values
    with pytest.raises(EvaluationError, match="without a cache"):
        model.generate(**inputs, past_key_values=cache)
    mask = torch.ones(3, ids.shape[1] + 1)
    with pytest.raises(EvaluationError, match="weights of its own"):
        model(ids[:, :1], mask, past_key_values=cache, task_weights=torch.ones(3))
    plain = model.shared(ids[:1]).past_key_values
    with pytest.raises(EvaluationError, match="a cache that this model returned"):
        model(ids[:1, :1], past_key_values=plain)
    with pytest.raises(EvaluationError, match="unknown task 'dan'"):
        model.weights_of({"dan": 1})
    assert model.weights_of({"bob": 1}).tolist() == [0, 1, 0]


def test_the_factors_are_the_truncated_decomposition(pico, folder):
    shared = load_file(folder / "shared" / "model.safetensors")
    expert = AutoModelForCausalLM.from_pretrained(pico / "ada").state_dict()
    stored = load_file(folder / "exclusive-1.safetensors")
    for name, tensor in shared.items():
        delta = (expert[name].float() - tensor).numpy().astype(np.float64)
        if delta.ndim == 1:
            found = stored[f"{name}.whole"].numpy()
        else:
            u, s, v = np.linalg.svd(delta, full_matrices=False)
            rank = max(1, min(delta.shape) // 10)
            delta = (u[:, :rank] * s[:rank]) @ v[:rank]
            left, right = stored[f"{name}.left"], stored[f"{name}.right"]
            assert left.shape[1] == right.shape[0] == rank
            found = (left @ right).numpy()
        np.testing.assert_allclose(found, delta, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    "name",
    ["gpt2", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "gpt_neox", "olmo2"],
)
def test_architectures(name, tmp_path):
    """Conv1D, tied and scaled embeddings, biases, norms of heads, packed matrices."""
    save_family(tmp_path, name)
    prompts = {task: PROMPTS[task][:6] for task in ("ada", "bob")}
    sources = [str(tmp_path / task) for task in prompts]
    folder = build_twin(
        str(tmp_path / "base"), sources, prompts, tmp_path / "twin", rank_share=0.3
    )
    twin = TwinModel.from_pretrained(folder)
    weights = torch.tensor([[0.9, 0.3], [0.1, 1.1], [0.0, -0.5]])
    inputs = encode(WORDS)
    logits = twin(**inputs, task_weights=weights).logits
    shared = twin(**inputs, task_weights=torch.zeros(2)).logits
    assert (logits - shared)[0, -1].abs().max() > 1e-3
    for row, word in enumerate(WORDS):
        plain = dense_model(folder, weights[row].tolist(), tmp_path / "plain")
        close(logits[row, -len(word) :], plain_logits(plain, word))
        close(twin.task_weights(**inputs)[row], twin.task_weights(**encode([word]))[0])
    corner = export_corner(folder, "bob", tmp_path / "corner")
    exported = AutoModelForCausalLM.from_pretrained(corner).eval()
    one_hot = twin(**encode(WORDS[2:]), task_weights=torch.tensor([0.0, 1.0])).logits
    close(one_hot[0], plain_logits(exported, WORDS[2]))


def test_bfloat16_rows_are_those_of_plain_models_to_its_precision(pico, tmp_path):
    sources = [str(pico / name) for name in ("ada", "bob")]
    prompts = {task: PROMPTS[task][:6] for task in ("ada", "bob")}
    out = build_twin(str(pico / "base"), sources, prompts, tmp_path / "twin")
    twin = TwinModel.from_pretrained(out)
    assert twin.dtype == torch.bfloat16
    logits = twin(**encode(WORDS), task_weights=torch.tensor([0.2, 0.8])).logits
    wide = TwinModel.from_pretrained(out, dtype=torch.float32)
    exact = wide(**encode(WORDS), task_weights=torch.tensor([0.2, 0.8])).logits
    last = exact[:, -1]
    assert (logits[:, -1].float() - last).norm() < 0.03 * last.norm()
