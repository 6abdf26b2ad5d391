"""What a class of models can do, so that scores that it cannot have are refused before a search."""

from typing import TYPE_CHECKING, NamedTuple

from paretomerge.errors import EvaluationError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


class ModelKind(NamedTuple):
    """What a class of models can do.

    Attributes:
        name: The name of the class in transformers.
        writes_text: Whether it generates text.
        is_encoder_decoder: Whether an encoder reads the prompt, as in T5.
    """

    name: str
    writes_text: bool = True
    is_encoder_decoder: bool = False

    @classmethod
    def of(
        cls, model_class: "type[PreTrainedModel]", config: "PretrainedConfig"
    ) -> "ModelKind":
        """Describe a class of transformers.

        Args:
            model_class: The class.
            config: The config of the model.
        """
        is_encoder_decoder = bool(getattr(config, "is_encoder_decoder", False))
        writes_text = bool(model_class.can_generate())
        return cls(model_class.__name__, writes_text, is_encoder_decoder)

    def check_writes_text(self, score: str) -> None:
        """Raise EvaluationError if the model does not generate text, which a score needs."""
        if not self.writes_text:
            raise EvaluationError(
                f"{score}: needs a model that writes text, but the base is a {self.name} "
                "(`architectures` in its config.json); score it with `function` objectives"
            )

    def check_is_decoder(self, score: str) -> None:
        """Raise EvaluationError if the model is no decoder, which a score needs."""
        self.check_writes_text(score)
        if self.is_encoder_decoder:
            raise EvaluationError(
                f"{score}: needs a model that is a decoder alone, but the base is a {self.name}, "
                "which has an encoder; score it with tasks or `function` objectives"
            )
