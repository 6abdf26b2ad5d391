"""A model with a LoRA adapter in peft's format added to it, tensor by tensor, in memory only."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from paretomerge.checkpoint.adapter_options import check_plain_lora, stores_transposed
from paretomerge.checkpoint.architecture import Architecture
from paretomerge.checkpoint.header import Header, read_header
from paretomerge.checkpoint.json_file import JsonObject, ReadOnlyJson, read_json
from paretomerge.checkpoint.loaded_names import LoadedNames, loaded_names
from paretomerge.checkpoint.model_config import text_config, ties_always, untied_config
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
_BASE_LAYER = ".base_layer."
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

    def is_equal(self, other: "_Factors") -> bool:
        """Whether two updates have the same factors, transposed or not."""
        if self.shape != other.shape or self.scale != other.scale:
            return False
        left, right = self.read()
        other_left, other_right = other.read()
        return left.equal(other_left) and right.equal(other_right)

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
        check_plain_lora(config, adapter)
        if not (self.adapter / _WEIGHTS_FILE).is_file():
            raise CheckpointError(
                f"{adapter}: the folder has no {_WEIGHTS_FILE}; save the adapter as safetensors"
            )
        adapter_headers = read_header(shard_path(self.adapter, _WEIGHTS_FILE))
        self._shards = Shards(adapter, adapter_headers, checkpoint.shards.allow_nan)
        matcher = _AdapterMatcher(
            config=config,
            shards=self._shards,
            names=_ModelNames(checkpoint, adapter),
        )
        self._factors, self._replacements = matcher.match()
        # Tensors that the model ties, once the adapter makes them differ: name -> the stored
        # tensor whose values they have without the adapter.
        self._separated: dict[str, str] = {}
        for group in matcher.tied_groups():
            if self._differ(group):
                self._separated |= group

    @property
    def folder(self) -> Path:
        """The folder of the model."""
        return self.checkpoint.folder

    @property
    def tokenizer_folder(self) -> Path:
        """The folder of the adapter if it holds a tokenizer of its own, else the model's."""
        names = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
        if any((self.adapter / name).is_file() for name in names):
            return self.adapter
        return self.checkpoint.tokenizer_folder

    @cached_property
    def config(self) -> JsonObject:
        """config.json of the model, without tied embeddings if the adapter unties them."""
        if self._separated:
            return untied_config(self.checkpoint.config)
        return self.checkpoint.config

    @cached_property
    def headers(self) -> Mapping[str, Header]:
        """Tensor name -> header entry: those of the model, and of tensors that were tied."""
        own_headers = self.checkpoint.headers
        headers = dict(own_headers)
        for name, stored_name in self._separated.items():
            headers.setdefault(name, own_headers[stored_name])
        return headers

    @cached_property
    def architecture(self) -> Architecture:
        """What the names of the tensors say about the network."""
        if not self._separated:
            return self.checkpoint.architecture
        architecture = Architecture.infer(self.headers, self.config)
        return replace(architecture, separated=frozenset(self._separated))

    @property
    def dtype(self) -> str:
        """The dtype of most of the model's float tensors, as torch names it."""
        return self.checkpoint.dtype

    def operand(self, name: str) -> Operand:
        """Return the tensor, to be read a few rows at a time."""
        if name in self._replacements:
            stored = self._shards.operand(self._replacements[name])
        else:
            stored = self.checkpoint.operand(self._separated.get(name, name))
        if name in self._factors:
            return AdaptedTensor(stored, self._factors[name])
        return stored

    def _differ(self, group: Mapping[str, str]) -> bool:
        """Whether the adapter gives tied tensors values that are not the same for all."""
        first, *others = group
        return not all(self._has_same_changes(first, other) for other in others)

    def _has_same_changes(self, name: str, other: str) -> bool:
        key, other_key = self._replacements.get(name), self._replacements.get(other)
        factors, other_factors = self._factors.get(name), self._factors.get(other)
        if (key is None) != (other_key is None):
            return False
        if (factors is None) != (other_factors is None):
            return False
        has_same_factors = True
        if factors is not None and other_factors is not None:
            has_same_factors = factors.is_equal(other_factors)
        if key is None or other_key is None:
            return has_same_factors
        return has_same_factors and self._is_equal(key, other_key)

    def _is_equal(self, key: str, other_key: str) -> bool:
        """Whether two tensors of the adapter hold the same values."""
        if key == other_key:
            return True
        tensor = self._shards.operand(key).read()
        return tensor.equal(self._shards.operand(other_key).read())

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
class _ModelNames:
    """Finds the tensors of a model by the names that peft has for them.

    Attributes:
        checkpoint: The model.
        adapter: Name of the adapter, for error messages.
    """

    checkpoint: Checkpoint
    adapter: str

    def find(self, name: str) -> str:
        """Return the model's own name of a tensor.

        A model that was saved without its head has names without the prefix of the base model, and
        some models have other names in memory, which are those of peft. A tied tensor that is not
        stored keeps its name in memory.
        """
        candidates = (
            name,
            name.removeprefix("model."),
            f"model.{name}",
            name.removeprefix("transformer."),
        )
        for candidate in candidates:
            if candidate in self.checkpoint.headers:
                return candidate
        if self._loaded is not None:
            loaded = self._loaded.find(name)
            if loaded is not None and loaded in self._stored_by_loaded:
                return self._stored_by_loaded[loaded]
            if loaded is not None and self._loaded.tied_group(loaded):
                return loaded
        elif self.checkpoint.architecture.is_tied_head(name):
            raise self._untold_ties(name)
        raise CheckpointError(
            f"{self.adapter}: {name}: the model has no such tensor; "
            "was the adapter trained on this model?"
        )

    def tied_group(self, name: str) -> dict[str, str]:
        """Return the tensors that share their values with a tensor, and where these are stored.

        Args:
            name: The model's own name of a tensor.

        Returns:
            Name -> name of a stored tensor with its values; {} if the tensor is not tied.
        """
        if not self.checkpoint.architecture.can_be_tied(name):
            return {}
        if self._stores_heads:
            return {}
        if self._loaded is None:
            raise self._untold_ties(name)
        loaded = self._loaded.find(name)
        members = self._loaded.tied_group(loaded) if loaded else ()
        stored = [self._stored_by_loaded.get(member) for member in members]
        stored_name = next((entry for entry in stored if entry), None)
        if stored_name is None:
            return {}
        group = {}
        for member, own_name in zip(members, stored, strict=True):
            group[own_name or member] = own_name or stored_name
        return group

    def stored_name(self, name: str) -> str:
        """Return the name of the stored tensor with the values of a tensor."""
        if name in self.checkpoint.headers:
            return name
        return self.tied_group(name)[name]

    @property
    def _stores_heads(self) -> bool:
        """Whether the config says that nothing is tied, or nothing else is known of the model."""
        config = self.checkpoint.config
        # The T5 family ties its embeddings whatever its config says.
        if config.get("tie_word_embeddings") is False and not ties_always(config):
            return True
        is_tied = text_config(config).get("tie_word_embeddings")
        has_head = self.checkpoint.architecture.has_head
        return self._loaded is None and has_head and not is_tied

    @cached_property
    def _loaded(self) -> LoadedNames | None:
        return loaded_names(self.checkpoint.config)

    @cached_property
    def _stored_by_loaded(self) -> Mapping[str, str]:
        assert self._loaded is not None
        return self._loaded.by_loaded_name(self.checkpoint.headers)

    def _untold_ties(self, name: str) -> CheckpointError:
        return CheckpointError(
            f"{self.adapter}: {name}: the adapter changes an embedding that the model may share "
            "with others, and transformers has no class that tells with which; merge it into its "
            "model with peft first, and save the model with tie_word_embeddings: false"
        )


@dataclass(frozen=True)
class _AdapterMatcher:
    """Finds the model's tensor that each tensor of an adapter belongs to.

    Attributes:
        config: adapter_config.json.
        shards: Tensors of the adapter.
        names: Names of the model's tensors.
    """

    config: ReadOnlyJson
    shards: Shards
    names: _ModelNames

    def match(self) -> tuple[dict[str, _Factors], dict[str, str]]:
        """Return (tensor of the model -> factors, tensor of the model -> key that replaces it)."""
        factor_keys: dict[str, _FactorKeys] = {}
        replacements: dict[str, str] = {}
        problems = ErrorCollector()
        for key in self.shards.headers:
            with problems.collect():
                self._assign(key, factor_keys, replacements)
        factors = {}
        for target, keys in factor_keys.items():
            with problems.collect():
                factors[target] = self._make_factors(target, keys)
        for target, key in replacements.items():
            with problems.collect():
                self._check_replacement(target, key)
        problems.raise_if_any()
        return factors, self._shared_among_tied(replacements)

    def _assign(
        self,
        key: str,
        factor_keys: dict[str, _FactorKeys],
        replacements: dict[str, str],
    ) -> None:
        target = self._target(key)
        match = _FACTOR_NAME.match(key)
        # `modules_to_save` and trained biases are whole tensors.
        if match is None:
            replacements[target] = key
            return
        module = match["module"].removeprefix(_PREFIX)
        keys = factor_keys.setdefault(target, _FactorKeys(module, {}))
        keys.sides[match["side"]] = key
        keys.is_embedding |= bool(match["embedding"])

    def _target(self, key: str) -> str:
        """The model's tensor that a key of the adapter's file changes."""
        match = _FACTOR_NAME.match(key)
        if match is None:
            return self.names.find(_WRAPPER.sub("", key.removeprefix(_PREFIX)))
        module = match["module"].removeprefix(_PREFIX)
        return self.names.find(f"{module}.weight")

    def tied_groups(self) -> list[dict[str, str]]:
        """The groups of tied tensors that the adapter touches; see `_ModelNames.tied_group`."""
        groups: dict[tuple[str, ...], dict[str, str]] = {}
        for key in self.shards.headers:
            group = self.names.tied_group(self._target(key))
            if group:
                groups[tuple(group)] = group
        return list(groups.values())

    def _shared_among_tied(self, replacements: Mapping[str, str]) -> dict[str, str]:
        """The replacements of all tensors, also of those that share a replaced one's memory.

        peft gives modules of `modules_to_save` memory of their own. Every other whole tensor, such
        as a stored base layer, is loaded into the memory that tied tensors share.
        """
        result = dict(replacements)
        for target, key in replacements.items():
            if self._has_own_memory(key):
                continue
            for name in self.names.tied_group(target):
                result.setdefault(name, key)
        return result

    def _has_own_memory(self, key: str) -> bool:
        if _BASE_LAYER in key:
            return False
        module = _WRAPPER.sub("", key).rpartition(".")[0]
        saved = self.config.get("modules_to_save") or ()
        return any(module == name or module.endswith(f".{name}") for name in saved)

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
        wanted = self._stored_shape(target)
        product_shape = (b.shape[0], a.shape[1])
        transposed = keys.is_embedding or stores_transposed(
            model_config=self.names.checkpoint.config,
            config=self.config,
            shape=wanted,
            factor_shape=product_shape,
        )
        factors = _Factors(
            b=b,
            a=a,
            scale=float(scale),
            transposed=transposed,
        )
        if b.shape[1] != actual_rank or factors.shape != wanted:
            raise CheckpointError(
                f"{where}: expected factors for {list(wanted)}, "
                f"got B {list(b.shape)} and A {list(a.shape)}; "
                "was the adapter trained on this model?"
            )
        return factors

    def _stored_shape(self, target: str) -> tuple[int, ...]:
        stored_name = self.names.stored_name(target)
        return self.names.checkpoint.headers[stored_name].shape

    def _check_replacement(self, target: str, key: str) -> None:
        wanted = self._stored_shape(target)
        actual = self.shards.headers[key].shape
        if actual != wanted:
            raise CheckpointError(
                f"{self.shards.name}: {key}: expected {list(wanted)}, got {list(actual)}; if "
                "tokens were added to its model, merge it into the resized model with peft first"
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
