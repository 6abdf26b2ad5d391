"""A model with a LoRA adapter (peft's format) added to it, tensor by tensor, in memory only."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paretomerge.checkpoint.architecture import Architecture
from paretomerge.checkpoint.header import Header, read_header
from paretomerge.checkpoint.operand import Operand, Stored, extent
from paretomerge.checkpoint.reader import Checkpoint, Shards, inside, read_json
from paretomerge.checkpoint.reference import locate
from paretomerge.errors import CheckpointError, ErrorCollector, shorten

if TYPE_CHECKING:
    import torch

_PREFIX = "base_model.model."
_PART = re.compile(
    r"^(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(\.default)?(\.weight)?$"
)
_WRAPPED = re.compile(r"\.(modules_to_save(\.default)?|base_layer)(?=\.)")
_OTHER_KINDS = {
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "layer_replication": "one with replicated layers",
}
_ROWS = 1 << 16  # elements of a product at a time: products of other shapes would round otherwise


@dataclass(frozen=True)
class _Factors:
    """delta W = scale B A, or its transpose. left: (rows of W, r), right: (r, columns of W)."""

    left: Stored
    right: Stored
    scale: float
    swapped: bool  # the stored factors are those of the transpose (embeddings, Conv1D)

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.left.shape[0], self.right.shape[1]
        return (columns, rows) if self.swapped else (rows, columns)


@dataclass(frozen=True)
class Adapted:
    """A tensor plus the product of its adapter's factors."""

    stored: Stored
    factors: _Factors

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape

    @property
    def dtype(self) -> str:
        return self.stored.dtype

    @cached_property
    def _sides(self) -> "tuple[torch.Tensor, torch.Tensor]":
        left = self.factors.left.rows(0, self.factors.left.shape[0])
        right = self.factors.right.rows(0, self.factors.right.shape[0])
        return (
            (right.T.contiguous(), left.T.contiguous()) if self.factors.swapped else (left, right)
        )

    def rows(self, first: int, end: int, device: str = "cpu") -> "torch.Tensor":
        left, right = self._sides
        rows, columns = extent(self.shape)
        step = max(1, _ROWS // max(1, columns))
        merged = self.stored.rows(first, end, device)
        for start in range(first // step * step, end, step):
            product = (left[start : min(start + step, rows)] @ right).mul_(self.factors.scale)
            low, high = max(first, start), min(end, start + len(product))
            merged[low - first : high - first].add_(product[low - start : high - start].to(device))
        return merged


class AdaptedCheckpoint:
    """`checkpoint` with the adapter of the folder or Hub name `adapter`; tensors it does not touch are as they were."""

    def __init__(self, checkpoint: Checkpoint, adapter: str) -> None:
        self.checkpoint = checkpoint
        self.name = f"{checkpoint.name}+{adapter}"
        self.adapter = folder = locate(adapter)
        settings = read_json(folder / "adapter_config.json", f"{adapter}: adapter_config.json")
        _check_kind(settings, adapter)
        file = folder / "adapter_model.safetensors"
        if not file.is_file():
            raise CheckpointError(
                f"{adapter}: expected adapter_model.safetensors, got none; save the adapter as safetensors"
            )
        self._file = Shards(
            adapter, read_header(inside(folder, file.name)), checkpoint.shards.allow_nan
        )
        self._factors, self._replaced = self._match(settings, adapter)

    @property
    def folder(self) -> Path:
        return self.checkpoint.folder

    @property
    def config(self) -> dict[str, Any]:
        return self.checkpoint.config

    @property
    def headers(self) -> Mapping[str, Header]:
        return self.checkpoint.headers

    @property
    def architecture(self) -> Architecture:
        return self.checkpoint.architecture

    @property
    def dtype(self) -> str:
        return self.checkpoint.dtype

    def operand(self, name: str) -> Operand:
        if name in self._replaced:
            return self._file.operand(self._replaced[name])
        stored = self.checkpoint.operand(name)
        return Adapted(stored, self._factors[name]) if name in self._factors else stored

    def check_unchanged(self) -> None:
        self.checkpoint.check_unchanged()
        self._file.check_unchanged()

    def _match(
        self, settings: Mapping[str, Any], adapter: str
    ) -> tuple[dict[str, _Factors], dict[str, str]]:
        """The adapter's tensors by the model's tensor they belong to: factors, and whole replacements."""
        halves: dict[str, dict[str, str]] = {}
        replaced: dict[str, str] = {}
        for key in self._file.headers:
            found = _PART.match(key)
            if found is None:
                replaced[self._place(_WRAPPED.sub("", key.removeprefix(_PREFIX)), adapter)] = key
                continue
            module = found["module"].removeprefix(_PREFIX)
            target = self._place(f"{module}.weight", adapter)
            halves.setdefault(target, {"module": module})[found["side"]] = key
            if found["embedding"]:
                halves[target]["embedding"] = "yes"
        problems = ErrorCollector()
        factors = {}
        for target, sides in halves.items():
            with problems.collect():
                factors[target] = self._pair(target, sides, settings, adapter)
        for target, key in replaced.items():
            with problems.collect():
                if self._file.headers[key].shape != self.headers[target].shape:
                    raise CheckpointError(
                        f"{adapter}: {key}: expected {list(self.headers[target].shape)}, got {list(self._file.headers[key].shape)}; "
                        "if tokens were added to its model, merge it into the resized model with peft first"
                    )
        problems.raise_if_any()
        return factors, replaced

    def _pair(
        self, target: str, sides: Mapping[str, str], settings: Mapping[str, Any], adapter: str
    ) -> _Factors:
        if not {"A", "B"} <= set(sides):
            raise CheckpointError(
                f"{adapter}: {target}: expected lora_A and lora_B, got one of them"
            )
        left, right = self._file.operand(sides["B"]), self._file.operand(sides["A"])
        if len(left.shape) != 2 or len(right.shape) != 2 or not right.shape[0]:
            raise CheckpointError(
                f"{adapter}: {target}: expected two matrices, got B {list(left.shape)} and A {list(right.shape)}"
            )
        rank = _pattern(
            settings, "rank_pattern", sides["module"], settings.get("r", right.shape[0]), adapter
        )
        alpha = _pattern(
            settings, "alpha_pattern", sides["module"], settings.get("lora_alpha", rank), adapter
        )
        if rank != right.shape[0]:
            raise CheckpointError(
                f"{adapter}: {target}: expected factors of rank {rank}, as adapter_config.json says; got {right.shape[0]}"
            )
        scale = alpha / rank**0.5 if settings.get("use_rslora") else alpha / rank
        swapped = "embedding" in sides or bool(settings.get("fan_in_fan_out"))
        factors = _Factors(left, right, float(scale), swapped)
        if left.shape[1] != right.shape[0] or factors.shape != self.headers[target].shape:
            raise CheckpointError(
                f"{adapter}: {target}: expected factors for {list(self.headers[target].shape)}, got B {list(left.shape)} and "
                f"A {list(right.shape)}; was the adapter trained on this model?"
            )
        return factors

    def _place(self, name: str, adapter: str) -> str:
        """The model's own name of a tensor; a model saved without its head's prefix has shorter names."""
        candidates = (
            name,
            name.removeprefix("model."),
            f"model.{name}",
            name.removeprefix("transformer."),
        )
        place = next((c for c in candidates if c in self.headers), None)
        if place is None:
            raise CheckpointError(
                f"{adapter}: {name}: the model has no such tensor; was the adapter trained on this model?"
            )
        return place


def _check_kind(settings: Mapping[str, Any], adapter: str) -> None:
    kind = settings.get("peft_type")
    start = settings.get(
        "init_lora_weights"
    )  # these change the model's own weights, too, when the adapter is put on
    changes = isinstance(start, str) and start.lower().startswith(
        ("pissa", "olora", "corda", "loftq", "lora_ga")
    )
    if kind != "LORA" or changes or any(settings.get(key) for key in _OTHER_KINDS):
        got = (
            start
            if changes
            else next((what for key, what in _OTHER_KINDS.items() if settings.get(key)), kind)
        )
        raise CheckpointError(
            f"{adapter}: expected a LoRA adapter, got {got}; merge it into its model with peft first"
        )


def _pattern(
    settings: Mapping[str, Any], key: str, module: str, default: Any, adapter: str
) -> float:
    """peft's per-module exceptions: the first key that is the module's name or its end."""
    try:
        patterns = (settings.get(key) or {}).items()
        value = next(
            (v for pattern, v in patterns if re.match(rf"(.*\.)?({pattern})$", module)), default
        )
    except (AttributeError, TypeError, re.error) as error:
        raise CheckpointError(
            f"{adapter}: adapter_config.json: {key}: expected numbers by pattern, got {error}"
        ) from error
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not abs(value) < 1e9:
        raise CheckpointError(
            f"{adapter}: adapter_config.json: expected numbers for r, lora_alpha and {key}, got {shorten(value)}"
        )
    return value
