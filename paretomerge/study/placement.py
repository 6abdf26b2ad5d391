"""What all merges of a study have in common: dtype, device, tokenizer and checks."""

from dataclasses import dataclass, replace

from paretomerge.config.settings import SourcesSetting
from paretomerge.recipe import Recipe


@dataclass(frozen=True)
class Placement:
    """How merges are made while they are scored, and how they are written.

    Attributes:
        dtype: The dtype of the live weights and of written checkpoints; None for the base's.
        device: `cpu`, `cuda` or `cuda:N`.
        sources: Where the base and the sources stay: `device`, or `mmap` for their files; None for
            `device` where it fits.
        tokenizer_source: `union`, `base` or a model, as in recipes; None to keep the base's
            tokenizer without a look at the others.
        chat_template: A template, its name, or `auto`, as in recipes.
        allow_mismatch: Whether models are merged that do not seem to belong together.
    """

    dtype: str | None = None
    device: str = "cpu"
    sources: SourcesSetting | None = None
    tokenizer_source: str | None = None
    chat_template: str | None = None
    allow_mismatch: bool = False

    def apply(self, recipe: Recipe) -> Recipe:
        """Return the recipe with the dtype, the tokenizer and the chat template of the study."""
        return replace(
            recipe,
            dtype=self.dtype,
            tokenizer_source=self.tokenizer_source,
            chat_template=self.chat_template,
        )


DEFAULT_PLACEMENT = Placement()
"""Merges as the base is, on the CPU."""
