"""The tokenizer and the vocabulary of a merge that is in memory, as its checkpoint has them."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from paretomerge.merging.engine import write_companions
from paretomerge.merging.plan.plan import Plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def write_result_tokenizer(plan: Plan, folder: Path) -> None:
    """Write the tokenizer that the checkpoint of a plan would have.

    Args:
        plan: The plan.
        folder: An existing folder. It also gets the other files that come with the weights.
    """
    write_companions(plan, folder)


def load_result_tokenizer(plan: Plan) -> "PreTrainedTokenizerBase":
    """Load the tokenizer that the checkpoint of a plan would have.

    Args:
        plan: The plan.

    Returns:
        The tokenizer. No file is left behind.
    """
    from transformers import AutoConfig, AutoTokenizer

    with TemporaryDirectory(prefix="paretomerge-") as name:
        folder = Path(name)
        write_result_tokenizer(plan, folder)
        # Without a config.json beside it, the class of a tokenizer may be unknown.
        config = AutoConfig.for_model(**plan.config)
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, config=config, trust_remote_code=False
        )
    # Errors and files of other libraries must not name a folder that is gone.
    tokenizer.name_or_path = str(plan.template.tokenizer_folder)
    return tokenizer


def resize_to_vocabulary(model: "PreTrainedModel", plan: Plan) -> None:
    """Give a model the rows and the special tokens of a plan's vocabulary.

    The new rows hold nothing of use: the merge writes all of them.

    Args:
        model: The loaded base.
        plan: A plan over this base.
    """
    vocabulary = plan.vocabulary
    if vocabulary is None:
        return
    # Without the mean of the old rows, whose covariance takes minutes and is overwritten anyway.
    model.resize_token_embeddings(vocabulary.size, mean_resizing=False)
    for key, value in vocabulary.config_updates.items():
        setattr(model.config, key, value)
    has_file = (plan.template.folder / "generation_config.json").is_file()
    if not has_file:
        from transformers import GenerationConfig

        # As a loader of the checkpoint would make it, with the special tokens of the vocabulary.
        model.generation_config = GenerationConfig.from_model_config(model.config)
