"""Every recipe of the suite, merged by mergekit and by us."""

import pytest

from paretomerge.errors import ParetoMergeError
from tests.conformance.compare import differences, tokenizer_differences
from tests.conformance.recipes import DRAWN, all_recipes, drawn
from tests.conformance.refusals import BOTH_REFUSE
from tests.conformance.tokenizer_recipes import TOKENIZERS

RECIPES = all_recipes()


@pytest.mark.parametrize("name", RECIPES)
def test_as_mergekit(name, ask, ours):
    answer = ask(RECIPES[name])
    assert not answer.error, f"mergekit failed: {answer.error}"
    folder = ours(RECIPES[name])
    assert differences(folder, answer.out, by_token=name in TOKENIZERS) == []
    if name in TOKENIZERS:
        # without a base mergekit starts a union from any of the models: `union-order` in deviations.py
        assert (
            tokenizer_differences(
                folder, answer.out, template="base_model" in RECIPES[name]
            )
            == []
        )


@pytest.mark.parametrize("name", BOTH_REFUSE)
def test_refused_as_by_mergekit(name, ask, ours):
    assert ask(BOTH_REFUSE[name]).error
    with pytest.raises(ParetoMergeError):
        ours(BOTH_REFUSE[name])


def test_the_suite_is_as_large_as_promised():
    assert len(RECIPES) >= 120


def test_random_recipes_are_the_same_in_every_run():
    assert drawn() == drawn() and len(drawn()) == DRAWN
    assert len(set(drawn().values())) == DRAWN
