"""What the user should know of models that become one: whose configs and chat templates differ."""

from collections.abc import Mapping

from paretomerge.checkpoint.chat_template import read_chat_template
from paretomerge.merging.card import public_notes
from paretomerge.merging.plan.plan import Plan, Weights


def chat_template_notes(
    base_name: str, base: Weights, models: Mapping[str, Weights]
) -> list[str]:
    """Say which models have a chat template that the result has not.

    A model that is asked in another template than it was tuned with answers worse, without an
    error.

    Args:
        base_name: The model whose tokenizer the result has.
        base: That model.
        models: Name -> fine-tune.
    """
    own = _stripped(base)
    notes = []
    for name, weights in models.items():
        template = _stripped(weights)
        if template and template != own:
            notes.append(
                f"{name}: has a chat template that is not that of {base_name}, which the result has"
            )
    return notes


def plan_notes(plan: Plan) -> tuple[str, ...]:
    """The notes of a plan with those on chat templates, as a folder may hold them.

    Args:
        plan: The merge that makes the stored checkpoint.
    """
    base_name = plan.recipe.base_model
    assert base_name is not None
    notes = chat_template_notes(base_name, plan.template, plan.weights)
    return public_notes((*plan.notes, *notes), plan.weights)


def _stripped(weights: Weights) -> str:
    # Copies of one template often differ in the newline at their end.
    return (read_chat_template(weights.tokenizer_folder) or "").strip()
