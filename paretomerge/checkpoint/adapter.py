"""A model with a LoRA adapter in peft's format added to it, tensor by tensor, in memory only."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from paretomerge.checkpoint.architecture import Architecture
from paretomerge.checkpoint.header import Header, read_header
from paretomerge.checkpoint.json_file import JsonObject, ReadOnlyJson, read_json
from paretomerge.checkpoint.operand import Operand, StoredTensor, matrix_shape
from paretomerge.checkpoint.reader import Checkpoint, Shards, shard_path
from paretomerge.checkpoint.reference import resolve_folder
from paretomerge.errors import CheckpointError, ErrorCollector, shorten

if TYPE_CHECKING:
    import torch

_PREFIX = "base_model.model."
_WEIGHTS_FILE = "adapter_model.safetensors"
_FACTOR_NAME = re.compile(
    r"^(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(\.default)?(\.weight)?$"
)
_WRAPPER = re.compile(r"\.(modules_to_save(\.default)?|base_layer)(?=\.)")
_UNSUPPORTED_OPTIONS = {
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "layer_replication": "one with replicated layers",
}
_UNSUPPORTED_INITIALISATIONS = ("pissa", "olora", "corda", "loftq", "lora_ga")
# Elements of a product that are computed together. The chunks are fixed, whatever rows are read:
# products of other shapes round differently, and a merge must not depend on its blocks.
_CHUNK_ELEMENTS = 1 << 16
_MAX_NUMBER = 1e9


@dataclass(frozen=True)
class _Factors:
    """Low-rank factors of an update: delta W = scale B A (Hu et al. 2021, section 4.1).

    Attributes:
        b: (rows of W, rank).
        a: (rank, columns of W).
        scale: lora_alpha / rank, or lora_alpha / sqrt(rank) with rsLoRA (Kalajdzievski 2023).
        transposed: Whether B A is the update of the transpose (embeddings, Conv1D).
    """

    b: StoredTensor
    a: StoredTensor
    scale: float
    transposed: bool

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of W."""
        rows = self.b.shape[0]
        columns = self.a.shape[1]
        return (columns, rows) if self.transposed else (rows, columns)

    def read(self) -> "tuple[torch.Tensor, torch.Tensor]":
        """Read the factors (left, right) whose product has the shape of W, in float32."""
        b = self.b.rows(0, self.b.shape[0])
        a = self.a.rows(0, self.a.shape[0])
        if self.transposed:
            return a.T.contiguous(), b.T.contiguous()
        return b, a


@dataclass(frozen=True)
class AdaptedTensor:
    """A stored tensor plus the product of its adapter's factors.

    Attributes:
        stored: The model's own tensor.
        factors: The factors of the update.
    """

    stored: StoredTensor
    factors: _Factors

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor."""
        return self.stored.shape

    @property
    def dtype(self) -> str:
        """Dtype of the stored tensor, as torch names it."""
        return self.stored.dtype

    @cached_property
    def _left_and_right(self) -> "tuple[torch.Tensor, torch.Tensor]":
        return self.factors.read()

    def rows(
        self,
        first: int,
        end: int,
        device: str = "cpu",
    ) -> "torch.Tensor":
        """Read rows [first, end) in float32; see `Operand.rows`."""
        left, right = self._left_and_right
        n_rows, n_columns = matrix_shape(self.shape)
        chunk = max(1, _CHUNK_ELEMENTS // max(1, n_columns))
        merged = self.stored.rows(first, end, device)
        chunk_of_first = first // chunk * chunk
        for start in range(chunk_of_first, end, chunk):
            stop = min(start + chunk, n_rows)
            # The factors are small, so the product is computed on the CPU for every device.
            product = left[start:stop] @ right
            product.mul_(self.factors.scale)
            low = max(first, start)
            high = min(end, stop)
            update = product[low - start : high - start]
            target = merged[low - first : high - first]
            target.add_(update.to(device))
        return merged


class AdaptedCheckpoint:
    """A checkpoint with an adapter added to it; tensors without an update stay as they are.

    Args:
        checkpoint: The model that the adapter was trained on.
        adapter: Folder or Hub name of the adapter.

    Attributes:
        checkpoint: The model.
        name: `model+adapter`.
        adapter: The folder of the adapter.

    Raises:
        CheckpointError: If the adapter is not LoRA, is damaged or does not fit the model.
    """

    def __init__(self, checkpoint: Checkpoint, adapter: str) -> None:
        self.checkpoint = checkpoint
        self.name = f"{checkpoint.name}+{adapter}"
        self.adapter = resolve_folder(adapter)
        config = read_json(
            self.adapter / "adapter_config.json", f"{adapter}: adapter_config.json"
        )
        _check_plain_lora(config, adapter)
        if not (self.adapter / _WEIGHTS_FILE).is_file():
            raise CheckpointError(
                f"{adapter}: the folder has no {_WEIGHTS_FILE}; save the adapter as safetensors"
            )
        adapter_headers = read_header(shard_path(self.adapter, _WEIGHTS_FILE))
        self._shards = Shards(adapter, adapter_headers, checkpoint.shards.allow_nan)
        matcher = _AdapterMatcher(checkpoint.headers, self._shards, config)
        self._factors, self._replacements = matcher.match()

    @property
    def folder(self) -> Path:
        """The folder of the model, with its tokenizer."""
        return self.checkpoint.folder

    @property
    def config(self) -> JsonObject:
        """config.json of the model."""
        return self.checkpoint.config

    @property
    def headers(self) -> Mapping[str, Header]:
        """Tensor name -> header entry, those of the model."""
        return self.checkpoint.headers

    @property
    def architecture(self) -> Architecture:
        """What the names of the tensors say about the network."""
        return self.checkpoint.architecture

    @property
    def dtype(self) -> str:
        """The dtype of most of the model's float tensors, as torch names it."""
        return self.checkpoint.dtype

    def operand(self, name: str) -> Operand:
        """Return the tensor, to be read a few rows at a time."""
        if name in self._replacements:
            return self._shards.operand(self._replacements[name])
        stored = self.checkpoint.operand(name)
        if name in self._factors:
            return AdaptedTensor(stored, self._factors[name])
        return stored

    def check_unchanged(self) -> None:
        """Check that every file is still the one whose header was read.

        Raises:
            CheckpointError: If a file was changed, replaced or removed.
        """
        self.checkpoint.check_unchanged()
        self._shards.check_unchanged()


@dataclass
class _FactorKeys:
    """The keys of an adapter's file that belong to one tensor of the model."""

    module: str
    sides: dict[str, str]
    is_embedding: bool = False


@dataclass(frozen=True)
class _AdapterMatcher:
    """Finds the model's tensor that each tensor of an adapter belongs to.

    Attributes:
        headers: Header entries of the model.
        shards: Tensors of the adapter.
        config: adapter_config.json.
    """

    headers: Mapping[str, Header]
    shards: Shards
    config: ReadOnlyJson

    def match(self) -> tuple[dict[str, _Factors], dict[str, str]]:
        """Return (tensor of the model -> factors, tensor of the model -> key that replaces it)."""
        factor_keys: dict[str, _FactorKeys] = {}
        replacements: dict[str, str] = {}
        for key in self.shards.headers:
            match = _FACTOR_NAME.match(key)
            # `modules_to_save` and trained biases are whole tensors.
            if match is None:
                name = _WRAPPER.sub("", key.removeprefix(_PREFIX))
                target = self._tensor_name(name)
                replacements[target] = key
                continue
            module = match["module"].removeprefix(_PREFIX)
            target = self._tensor_name(f"{module}.weight")
            keys = factor_keys.setdefault(target, _FactorKeys(module, {}))
            keys.sides[match["side"]] = key
            keys.is_embedding |= bool(match["embedding"])
        problems = ErrorCollector()
        factors = {}
        for target, keys in factor_keys.items():
            with problems.collect():
                factors[target] = self._make_factors(target, keys)
        for target, key in replacements.items():
            with problems.collect():
                self._check_replacement(target, key)
        problems.raise_if_any()
        return factors, replacements

    def _make_factors(self, target: str, keys: _FactorKeys) -> _Factors:
        where = f"{self.shards.name}: {target}"
        if not {"A", "B"} <= set(keys.sides):
            raise CheckpointError(
                f"{where}: expected lora_A and lora_B, got one of them"
            )
        b = self.shards.operand(keys.sides["B"])
        a = self.shards.operand(keys.sides["A"])
        if len(b.shape) != 2 or len(a.shape) != 2 or not a.shape[0]:
            raise CheckpointError(
                f"{where}: expected two matrices, got B {list(b.shape)} and A {list(a.shape)}"
            )
        actual_rank = a.shape[0]
        rank = self._number("r", "rank_pattern", keys.module, default=actual_rank)
        alpha = self._number("lora_alpha", "alpha_pattern", keys.module, default=rank)
        if rank != actual_rank:
            raise CheckpointError(
                f"{where}: adapter_config.json says rank {rank}, "
                f"the factors have rank {actual_rank}"
            )
        # rsLoRA divides by the root of the rank, so that the updates of high ranks do not shrink.
        divisor = rank**0.5 if self.config.get("use_rslora") else rank
        scale = alpha / divisor
        # Conv1D of GPT-2 stores the transpose of a linear layer's weight.
        is_conv1d = bool(self.config.get("fan_in_fan_out"))
        transposed = keys.is_embedding or is_conv1d
        factors = _Factors(
            b=b,
            a=a,
            scale=float(scale),
            transposed=transposed,
        )
        wanted = self.headers[target].shape
        if b.shape[1] != actual_rank or factors.shape != wanted:
            raise CheckpointError(
                f"{where}: expected factors for {list(wanted)}, "
                f"got B {list(b.shape)} and A {list(a.shape)}; "
                "was the adapter trained on this model?"
            )
        return factors

    def _check_replacement(self, target: str, key: str) -> None:
        wanted = self.headers[target].shape
        actual = self.shards.headers[key].shape
        if actual != wanted:
            raise CheckpointError(
                f"{self.shards.name}: {key}: expected {list(wanted)}, got {list(actual)}; if "
                "tokens were added to its model, merge it into the resized model with peft first"
            )

    def _tensor_name(self, name: str) -> str:
        """The model's own name of a tensor.

        A model that was saved without its head has names without the prefix of the base model.
        """
        candidates = (
            name,
            name.removeprefix("model."),
            f"model.{name}",
            name.removeprefix("transformer."),
        )
        for candidate in candidates:
            if candidate in self.headers:
                return candidate
        raise CheckpointError(
            f"{self.shards.name}: {name}: the model has no such tensor; "
            "was the adapter trained on this model?"
        )

    def _number(
        self,
        key: str,
        pattern_key: str,
        module: str,
        default: float,
    ) -> float:
        """The value of `key` for a module, with peft's exceptions by module name."""
        general_value = self.config.get(key, default)
        value = self._pattern_value(pattern_key, module, general_value)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            is_finite = abs(value) < _MAX_NUMBER  # false for NaN as well
            if is_finite:
                return value
        raise CheckpointError(
            f"{self.shards.name}: adapter_config.json: expected numbers for r, lora_alpha "
            f"and {pattern_key}, got {shorten(value)}"
        )

    def _pattern_value(
        self,
        pattern_key: str,
        module: str,
        default: object,
    ) -> object:
        """The value of the first pattern that is the module's name or its end."""
        try:
            # The patterns are regular expressions that anyone may have written: they can be wrong.
            patterns = self.config.get(pattern_key) or {}
            for pattern, value in patterns.items():
                if re.match(rf"(.*\.)?({pattern})$", module):
                    return value
        except (AttributeError, TypeError, re.error) as error:
            raise CheckpointError(
                f"{self.shards.name}: adapter_config.json: {pattern_key}: "
                f"expected numbers by pattern, got {error}"
            ) from error
        return default


def _check_plain_lora(config: ReadOnlyJson, adapter: str) -> None:
    """Check that an adapter is LoRA without an extension that changes its mathematics."""
    kind = config.get("peft_type")
    initialisation = config.get("init_lora_weights")
    options = [label for key, label in _UNSUPPORTED_OPTIONS.items() if config.get(key)]
    unsupported = None
    if _changes_model(initialisation):
        unsupported = initialisation
    elif options:
        unsupported = options[0]
    elif kind != "LORA":
        unsupported = str(kind)
    if unsupported is not None:
        raise CheckpointError(
            f"{adapter}: expected a LoRA adapter, got {unsupported}; "
            "merge it into its model with peft first"
        )


def _changes_model(initialisation: object) -> bool:
    """Whether peft changes the model's own weights when it loads an adapter initialised so."""
    if not isinstance(initialisation, str):
        return False
    return initialisation.lower().startswith(_UNSUPPORTED_INITIALISATIONS)
