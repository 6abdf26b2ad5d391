"""Whether a tokenizer puts the token that begins a sequence before texts."""

from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def with_bos_setting(
    tokenizer: "PreTrainedTokenizerBase", adds_bos: bool
) -> "PreTrainedTokenizerBase":
    """A tokenizer that does, or does not, put the token that begins a sequence before texts."""
    # Loaded anew, as the harness does it: not every tokenizer can change its mind later. The files
    # are written for it, since the tokenizer of a merge may be in no folder.
    with TemporaryDirectory(prefix="paretomerge-") as folder:
        tokenizer.save_pretrained(folder)
        changed: PreTrainedTokenizerBase = type(tokenizer).from_pretrained(
            folder, add_bos_token=adds_bos
        )
    changed.name_or_path = tokenizer.name_or_path
    return changed
