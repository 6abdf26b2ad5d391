"""One loaded model that takes on one preference after another."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from paretomerge.errors import CheckpointError
from paretomerge.merging.engine import usable_device
from paretomerge.merging.live.loaded_tensors import LoadedTensors
from paretomerge.merging.live.model_class import load_model, load_tokenizer
from paretomerge.merging.live.names import Conversion
from paretomerge.systems.pareto_merging.factors import Factors
from paretomerge.systems.pareto_merging.family import (
    WHOLE,
    ParetoFamily,
    Weights,
    added,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class LiveFamily:
    """A model in memory whose tensors are overwritten for each preference.

    The base, the factors and the model stay in memory, so that a preference costs one pass over
    the weights. The weights are those that `ParetoFamily.write` writes, bit for bit on the CPU.

    Args:
        family: The family.
        device: `cpu`, `cuda` or `cuda:N`.

    Attributes:
        model: The model, in eval mode; `load` changes it.
        tokenizer: Its tokenizer; None for models that read no text.
        gamma: The preference that is loaded; None before the first.

    Raises:
        CheckpointError: If transformers cannot load the model.
    """

    def __init__(self, family: ParetoFamily, device: str = "cpu") -> None:
        self.family = family
        self.device = usable_device(device)
        folder = family.base.folder
        dtype = getattr(torch, family.base.dtype)
        self.model: PreTrainedModel = load_model(folder, dtype).to(self.device).eval()
        self.tokenizer: PreTrainedTokenizerBase | None = load_tokenizer(folder)
        self.gamma: Tensor | None = None
        self._tensors = LoadedTensors(self.model, family.base.headers)
        try:
            self._tensors.check_loaded(family.base.tensor)
        except CheckpointError as error:
            raise CheckpointError(f"{folder}: {error}") from error
        self._stored: dict[str, Tensor] = {}
        self._updates: dict[str, Factors | Tensor] = {}
        for name in family.varying:
            if name not in self._tensors.unused:
                self._stored[name] = family.base.tensor(name).to(self.device)
                self._updates[name] = self._update(name)

    def load(self, weights: Weights) -> "PreTrainedModel":
        """Overwrite the weights by those of a preference.

        Args:
            weights: The preference; see `ParetoFamily.gamma`.

        Returns:
            The model, valid until the next call.

        Raises:
            ConfigError: If the preference is none of this family.
        """
        gamma = self.family.gamma(weights).to(self.device)
        # Conversions need all of their members together.
        converted: dict[Conversion, dict[str, Tensor]] = {}
        with torch.no_grad():
            for name, update in self._updates.items():
                merged = added(self._stored[name], update, gamma, name)
                conversion = self._tensors.conversion(name)
                if conversion is not None:
                    converted.setdefault(conversion, {})[name] = merged
                    continue
                tensor = self._tensors.find(name)
                assert tensor is not None
                tensor.copy_(merged)
            for conversion, tensors in converted.items():
                for name in conversion.members:
                    if name not in tensors:
                        tensors[name] = self.family.base.tensor(name).to(self.device)
                self._tensors.convert(conversion, tensors)
        self.gamma = gamma
        return self.model

    def _update(self, name: str) -> Factors | Tensor:
        if name in self.family.manifest.whole:
            return self.family.part(name, WHOLE).to(self.device)
        factors = self.family.factors(name)
        return Factors(
            factors.a.to(self.device),
            factors.b.to(self.device),
            factors.cores.to(self.device),
        )
