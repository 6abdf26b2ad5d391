from itertools import takewhile

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    GPTNeoConfig,
    GPTNeoForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    MistralForCausalLM,
)

from paretomerge.evaluate.inference.generate import GreedyGenerator
from paretomerge.evaluate.inference.prefill import (
    group_by_prefix,
    join_groups,
    prefill,
    shared_prefix,
    supports_cache,
)
from tests.architectures import ARCHITECTURES
from tests.evaluate.inference.test_language_model import (
    CAUSAL,
    Counting,
    likelihoods,
    one_by_one,
)

HEAD = tuple(range(5, 15))


def tails(seed=0, lengths=(3, 6, 1, 4, 2, 5)):
    rng = np.random.default_rng(seed)
    return [tuple(rng.integers(3, 48, n).tolist()) for n in lengths]


@pytest.mark.parametrize("longest", [20, 14])
@pytest.mark.parametrize("name", CAUSAL)
def test_examples_read_once_for_all_documents_change_no_answer(name, longest):
    """Few-shot requests, with one token, with several answers to a document, and some that are
    longer than the model reads.
    """
    model = Counting(ARCHITECTURES[name]())
    requests = [(HEAD + tail, (7, 8)[: 1 + i % 2]) for i, tail in enumerate(tails())]
    requests += [
        (HEAD + tail, answer)
        for tail in tails(1)
        for answer in ((3, 4, 5), (9, 9), (4,))
    ]
    work = likelihoods(model, requests, longest=longest, together=6)
    if longest == 20:
        assert (
            (1, len(HEAD)) in model.shapes
            or (1, len(HEAD) - 1) in model.shapes
            or model.inner.config.sliding_window
        )
    for found, (context, answer) in zip(work.results, requests, strict=True):
        expected = one_by_one(model.inner, context, list(answer), longest)
        assert (
            found[0] == pytest.approx(expected[0], rel=1e-4, abs=1e-4)
            and found[1] == expected[1]
        )


@pytest.mark.parametrize("name", CAUSAL)
def test_prompts_with_a_common_head_are_answered_as_if_alone(name):
    model = ARCHITECTURES[name]()
    model.generation_config.eos_token_id = None
    prompts = [(i, HEAD + tail) for i, tail in enumerate(tails())]
    together = GreedyGenerator(model, None, [], 5).generate(prompts)
    for number, tokens in prompts:
        assert (
            together[number]
            == GreedyGenerator(model, None, [], 5).generate([(number, tokens)])[number]
        )


def test_a_head_is_read_once_and_only_last_positions_are_told():
    model = Counting(ARCHITECTURES["llama"]())
    with torch.no_grad():
        reading = prefill(model, [HEAD + tail for tail in tails()], 4)
        alone = model.inner(torch.tensor([HEAD + tails()[1]])).logits[0, -1]
    assert model.shapes == [(1, 10), (6, 6)]
    assert reading.logits.shape[:2] == (6, 1) and reading.mask.sum(1).tolist() == [
        13,
        16,
        11,
        14,
        12,
        15,
    ]
    assert torch.allclose(reading.logits[1, -1], alone, atol=1e-5)


def test_where_windows_are_short_padding_comes_first():
    model = Counting(ARCHITECTURES["mistral"]())
    model.config.sliding_window = 12
    with torch.no_grad():
        prefill(model, [HEAD + tail for tail in tails()], 4)
    assert model.shapes == [(6, 16)]


def windowed(name):
    """With places for a prompt, not for what follows it as well."""
    if name == "gpt_neo":
        sizes = {
            "vocab_size": 48,
            "hidden_size": 16,
            "num_layers": 2,
            "num_heads": 2,
            "max_position_embeddings": 64,
        }
        return GPTNeoForCausalLM(
            GPTNeoConfig(
                **sizes, window_size=16, attention_types=[[["global", "local"], 1]]
            )
        ).eval()
    return MistralForCausalLM(
        replaced(ARCHITECTURES[name]().config, sliding_window=16)
    ).eval()


def replaced(config, **more):
    return type(config)(**{**config.to_dict(), **more})


@pytest.mark.parametrize("name", ["mistral", "gpt_neo"])
def test_what_follows_counts_against_the_window(name):
    torch.manual_seed(0)
    model = windowed(name)
    model.generation_config.eos_token_id = None
    prompts = [(i, HEAD + tail) for i, tail in enumerate(tails())]
    together = GreedyGenerator(model, None, [], 12).generate(prompts)
    assert together == {
        k: v
        for prompt in prompts
        for k, v in GreedyGenerator(model, None, [], 12).generate([prompt]).items()
    }
    requests = [
        (HEAD + tail, (*answer, 5, 6, 7, 8))
        for tail in tails(1)
        for answer in ((3, 4, 5), (9, 9), (4,))
    ]
    for found, (context, answer) in zip(
        likelihoods(model, requests, 64, 6).results, requests, strict=True
    ):
        assert found[0] == pytest.approx(
            one_by_one(model, context, list(answer), 64)[0], rel=1e-4, abs=1e-4
        )


def test_models_that_keep_a_state_are_not_gone_on_with():
    model = ARCHITECTURES["llama"]()
    assert supports_cache(model)
    model._is_stateful = True
    assert not supports_cache(model)
    sizes = {
        "vocab_size": 48,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    convolutions = Lfm2ForCausalLM(
        Lfm2Config(
            **sizes, num_key_value_heads=1, layer_types=["conv", "full_attention"]
        )
    )
    assert not supports_cache(convolutions)
    requests = [(HEAD + tail, (7, 8)) for tail in tails()]
    for found, (context, answer) in zip(
        likelihoods(convolutions.eval(), requests).results, requests, strict=True
    ):
        assert found[0] == pytest.approx(
            one_by_one(convolutions, context, list(answer))[0], rel=1e-4, abs=1e-4
        )


def test_what_is_common_must_be_worth_a_pass():
    rows = [((*HEAD, *tail), len(HEAD) + len(tail) - 1) for tail in tails()]

    def common(rows):
        return shared_prefix(*zip(*rows, strict=True))

    assert common(rows) == HEAD
    assert common([*rows, (HEAD, 9)]) == HEAD[:9]
    assert common(rows[:1]) == ()
    assert (
        common([((1, *tail), len(tail)) for tail in tails()]) == ()
    )  # a first token alone saves nothing
    assert common([*rows, ((1, 2, 3), 2)]) == ()


def test_prompts_of_one_task_are_together():
    few = [HEAD[:8] + tail for tail in tails()]
    other = [HEAD[::-1] + tail for tail in tails(1)]
    lone = [(40, 41, 42, 43), (44,) * 30]
    found = group_by_prefix([*few, *lone, *other])
    assert sorted(map(sorted, found)) == [
        [0, 1, 2, 3, 4, 5],
        [6, 7],
        [8, 9, 10, 11, 12, 13],
    ]
    assert found[0] == [7, 6]  # the longest of all first


@given(
    st.lists(
        st.lists(st.integers(0, 2), min_size=1, max_size=12).map(tuple), max_size=30
    )
)
def test_groups_have_every_prompt_once_the_longest_first(prompts):
    groups = group_by_prefix(prompts)
    assert sorted(i for group in groups for i in group) == list(range(len(prompts)))
    lengths = [[len(prompts[i]) for i in group] for group in groups]
    assert all(one == sorted(one, reverse=True) for one in lengths)
    assert [one[0] for one in lengths] == sorted(
        (one[0] for one in lengths), reverse=True
    )


def test_small_groups_are_joined_where_their_batches_cost_more_than_their_prefix_saves():
    one = [HEAD + tail for tail in tails()]
    other = [(*HEAD[:6], 90, *tail) for tail in tails(1)]
    prompts = [*one, *other]
    groups = [list(range(6)), list(range(6, 12))]
    joined = join_groups(groups, prompts, 16, batch_cost=1000)
    assert [sorted(group) for group in joined] == [list(range(12))]
    assert join_groups(groups, prompts, 16, batch_cost=0) == join_groups(
        groups, prompts, 6, batch_cost=1000
    )  # full batches are not fewer together
    assert len(join_groups(groups, prompts, 16, batch_cost=0)) == 2


@given(
    st.lists(
        st.lists(st.integers(0, 2), min_size=1, max_size=12).map(tuple), max_size=30
    ),
    st.integers(1, 8),
    st.integers(0, 60),
)
def test_joined_groups_read_and_step_no_more(prompts, max_rows, batch_cost):
    groups = group_by_prefix(prompts)
    joined = join_groups(groups, prompts, max_rows, batch_cost)
    assert sorted(i for group in joined for i in group) == list(range(len(prompts)))
    for group in joined:
        lengths = [len(prompts[i]) for i in group]
        assert lengths == sorted(lengths, reverse=True)

    def cost(groups):
        batches = sum(-(-len(group) // max_rows) for group in groups)
        return batches * batch_cost + sum(map(read, groups))

    def read(group):
        members = [prompts[i] for i in group]
        columns = zip(*members, strict=False)
        same = takewhile(lambda column: len(set(column)) == 1, columns)
        common = len(list(same))
        return sum(map(len, members)) - common * (len(members) - 1)

    assert cost(joined) <= cost(groups)
