"""A model with a LoRA adapter in peft's format added to it, tensor by tensor, in memory only."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from paretomerge.checkpoint.adapter_names import ModelNames, Packed
from paretomerge.checkpoint.adapter_options import check_plain_lora, stores_transposed
from paretomerge.checkpoint.architecture import Architecture
from paretomerge.checkpoint.gathered import GatheredTensor
from paretomerge.checkpoint.header import Header, read_header
from paretomerge.checkpoint.json_file import JsonObject, ReadOnlyJson, read_json
from paretomerge.checkpoint.model_config import untied_config, with_vocab_size
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
_ORIGINAL = ".original_module."
_BASE_LAYER = ".base_layer."
_WRAPPED = ".base_layer"
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

    def pairs(self) -> "list[tuple[torch.Tensor, torch.Tensor]]":
        """Read the factors of all matrices that W consists of: there is one."""
        return [self.read()]


@dataclass(frozen=True)
class _ExpertFactors:
    """Low-rank factors of an update of stacked experts, as peft's `ParamWrapper` has them.

    Attributes:
        b: (output, rank x experts), the experts next to each other.
        a: (experts x rank, input), the ranks next to each other.
        scale: See `_Factors`.
        n_experts: Number of experts.
        transposed: Whether W is (experts, input, output) instead of (experts, output, input).
    """

    b: StoredTensor
    a: StoredTensor
    scale: float
    n_experts: int
    transposed: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of W."""
        rows = self.b.shape[0]
        columns = self.a.shape[1]
        size = (columns, rows) if self.transposed else (rows, columns)
        return (self.n_experts, *size)

    def pairs(self) -> "list[tuple[torch.Tensor, torch.Tensor]]":
        """Read the factors (left, right) of each expert, in float32."""
        b = self.b.rows(0, self.b.shape[0])
        a = self.a.rows(0, self.a.shape[0])
        all_b = b.view(b.shape[0], -1, self.n_experts)
        all_a = a.view(self.n_experts, -1, a.shape[1])
        pairs = []
        for expert in range(self.n_experts):
            left = all_b[:, :, expert].contiguous()
            right = all_a[expert]
            if self.transposed:
                left, right = right.T.contiguous(), left.T.contiguous()
            pairs.append((left, right))
        return pairs


@dataclass(frozen=True)
class AdaptedTensor:
    """A tensor of a model plus the products of its adapter's factors.

    Attributes:
        stored: The model's own tensor.
        factors: The factors of the update.
    """

    stored: Operand
    factors: _Factors | _ExpertFactors

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor."""
        return self.stored.shape

    @property
    def dtype(self) -> str:
        """Dtype of the stored tensor, as torch names it."""
        return self.stored.dtype

    @cached_property
    def _pairs(self) -> "list[tuple[torch.Tensor, torch.Tensor]]":
        return self.factors.pairs()

    def rows(
        self,
        first: int,
        end: int,
        device: str = "cpu",
    ) -> "torch.Tensor":
        """Read rows [first, end) in float32; see `Operand.rows`."""
        merged = self.stored.rows(first, end, device)
        n_rows = matrix_shape(self.shape)[0] // len(self._pairs)
        if not n_rows:
            return merged
        for k in range(first // n_rows, math.ceil(end / n_rows)):
            # The rows of matrix k.
            start = k * n_rows
            low = max(first, start)
            high = min(end, start + n_rows)
            self._add_product(k, merged[low - first : high - first], low - start)
        return merged

    def _add_product(self, k: int, target: "torch.Tensor", first: int) -> None:
        """Add the update of matrix k to some of its rows, which begin at row `first` of it."""
        left, right = self._pairs[k]
        n_rows, n_columns = left.shape[0], right.shape[1]
        end = first + len(target)
        chunk = max(1, _CHUNK_ELEMENTS // max(1, n_columns))
        chunk_of_first = first // chunk * chunk
        for start in range(chunk_of_first, end, chunk):
            stop = min(start + chunk, n_rows)
            # The factors are small, so the product is computed on the CPU for every device.
            product = left[start:stop] @ right
            product.mul_(self.factors.scale)
            low = max(first, start)
            high = min(end, stop)
            update = product[low - start : high - start]
            target[low - first : high - first].add_(update.to(target.device))


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
            names=ModelNames(checkpoint, adapter),
        )
        self._factors, self._replacements = matcher.match()
        # Stored tensor -> the stored tensors that the adapter changes together with it, because
        # in memory they are other tensors.
        self._packed: dict[str, Packed] = {}
        for name in (*self._factors, *self._replacements):
            packed = matcher.names.packed(name)
            if packed is not None:
                self._packed |= dict.fromkeys(packed.stored, packed)
        # Tensors that the model ties, once the adapter makes them differ: name -> the stored
        # tensor whose values they have without the adapter.
        self._separated: dict[str, str] = {}
        for group in matcher.tied_groups():
            if self._differ(group):
                self._separated |= group
        self._resized = self._find_resized()

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
        """config.json of the model, without tied embeddings if the adapter unties them.

        `vocab_size` is that of the adapter if it brings embeddings of more or fewer tokens.
        """
        config = self.checkpoint.config
        if self._separated:
            config = untied_config(config)
        if self.resized is not None:
            config = with_vocab_size(config, self.resized)
        return config

    @property
    def resized(self) -> int | None:
        """The number of tokens if the adapter changes it; else None."""
        return next(iter(self._resized.values()), None)

    @cached_property
    def headers(self) -> Mapping[str, Header]:
        """Tensor name -> header entry: those of the model, and of tensors that were tied."""
        own_headers = self.checkpoint.headers
        headers = dict(own_headers)
        for name, stored_name in self._separated.items():
            headers.setdefault(name, own_headers[stored_name])
        for name, n_rows in self._resized.items():
            if name in headers:
                shape = (n_rows, *headers[name].shape[1:])
                headers[name] = replace(headers[name], shape=shape)
        return headers

    @cached_property
    def architecture(self) -> Architecture:
        """What the names of the tensors say about the network."""
        if not self._separated and not self._resized:
            return self.checkpoint.architecture
        architecture = Architecture.infer(self.headers, self.config)
        return replace(architecture, separated=frozenset(self._separated))

    @property
    def dtype(self) -> str:
        """The dtype of most of the model's float tensors, as torch names it."""
        return self.checkpoint.dtype

    def operand(self, name: str) -> Operand:
        """Return the tensor, to be read a few rows at a time."""
        packed = self._packed.get(name)
        if packed is None:
            stored = self.checkpoint.operand(self._separated.get(name, name))
            return self._adapted(name, stored)
        index = packed.stored.index(name)
        return GatheredTensor(
            shape=packed.moves.stored_shapes[index],
            dtype=self.checkpoint.headers[name].dtype,
            parts=self._loaded_operands(packed),
            moves=packed.moves,
            index=index,
            is_loaded=False,
        )

    def _loaded_operands(self, packed: Packed) -> tuple[Operand, ...]:
        """Tensors as they are in memory, with the adapter."""
        stored = tuple(self.checkpoint.operand(name) for name in packed.stored)
        operands = []
        for index, name in enumerate(packed.loaded):
            loaded = GatheredTensor(
                shape=packed.moves.loaded_shapes[index],
                dtype=stored[0].dtype,
                parts=stored,
                moves=packed.moves,
                index=index,
                is_loaded=True,
            )
            operands.append(self._adapted(name, loaded))
        return tuple(operands)

    def _adapted(self, name: str, stored: Operand) -> Operand:
        """A tensor of the model as the adapter changes it."""
        if name in self._replacements:
            stored = self._shards.operand(self._replacements[name])
        if name in self._factors:
            return AdaptedTensor(stored, self._factors[name])
        return stored

    def _find_resized(self) -> dict[str, int]:
        """Embeddings and heads whose number of tokens the adapter changes: name -> rows.

        Raises:
            CheckpointError: If it changes some of them only.
        """
        stored = self.checkpoint.headers
        resized = {}
        for name, key in self._replacements.items():
            shape = self._shards.headers[key].shape
            old = stored.get(self._separated.get(name, name))
            if old is not None and old.shape != shape:
                resized[name] = shape[0]
        architecture = self.checkpoint.architecture
        for name in (*stored, *self._separated):
            header = stored[self._separated.get(name, name)]
            axis = architecture.vocabulary_axis(name, header.shape)
            if axis is None or not resized:
                continue
            n_rows = resized.get(name, header.shape[axis])
            if n_rows != next(iter(resized.values())):
                other = next(iter(resized))
                raise CheckpointError(
                    f"{self.name}: the adapter brings {resized[other]} tokens for {other}, but "
                    f"{name} has {n_rows}, and peft does not store those that were added to it; "
                    "merge it into the resized model with peft first"
                )
        return resized

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
        # Embeddings and heads, which are all that models tie, are single matrices.
        if isinstance(factors, _Factors) and isinstance(other_factors, _Factors):
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
    """The keys of an adapter's file that belong to one tensor of the model.

    Attributes:
        module: The name that peft's patterns match: of the module, or of the parameter.
        sides: A and B -> the key.
        is_parameter: Whether the adapter is on a parameter instead of a module.
        is_embedding: Whether the module is an embedding.
    """

    module: str
    sides: dict[str, str]
    is_parameter: bool
    is_embedding: bool = False


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
    names: ModelNames

    def match(
        self,
    ) -> tuple[dict[str, _Factors | _ExpertFactors], dict[str, str]]:
        """Return (tensor of the model -> factors, tensor of the model -> key that replaces it)."""
        factor_keys: dict[str, _FactorKeys] = {}
        replacements: dict[str, str] = {}
        problems = ErrorCollector()
        for key in self._keys:
            with problems.collect():
                self._assign(key, factor_keys, replacements)
        factors: dict[str, _Factors | _ExpertFactors] = {}
        for target, keys in factor_keys.items():
            with problems.collect():
                shape = self._shape(target, replacements)
                factors[target] = self._make_factors(target, keys, shape)
        for target, key in replacements.items():
            with problems.collect():
                self._check_replacement(target, key)
        problems.raise_if_any()
        return factors, self._shared_among_tied(replacements)

    @property
    def _keys(self) -> list[str]:
        """The keys that count: peft also stores what a saved module was before the training."""
        return [key for key in self.shards.headers if _ORIGINAL not in key]

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
        parameter = self._parameter(module)
        new_keys = _FactorKeys(parameter or module, {}, parameter is not None)
        keys = factor_keys.setdefault(target, new_keys)
        keys.sides[match["side"]] = key
        keys.is_embedding |= bool(match["embedding"])

    def _target(self, key: str) -> str:
        """The model's tensor that a key of the adapter's file changes."""
        match = _FACTOR_NAME.match(key)
        if match is None:
            return self.names.find(_WRAPPER.sub("", key.removeprefix(_PREFIX)))
        module = match["module"].removeprefix(_PREFIX)
        parameter = self._parameter(module)
        if parameter is None:
            return self.names.find(f"{module}.weight")
        if self.names.packed(parameter) is not None:
            return parameter
        return self.names.find(parameter)

    def _parameter(self, wrapped: str) -> str | None:
        """The parameter that a module's factors change; None if that is the module's weight."""
        targets = self.config.get("target_parameters")
        if not targets:
            return None
        # peft wraps several parameters of one module one around the other.
        module = wrapped
        while module.endswith(_WRAPPED):
            module = module.removesuffix(_WRAPPED)
        n_wrappers = (len(wrapped) - len(module)) // len(_WRAPPED)
        return self.names.find_parameter(module, n_wrappers, targets)

    def tied_groups(self) -> list[dict[str, str]]:
        """The groups of tied tensors that the adapter touches; see `ModelNames.tied_group`."""
        groups: dict[tuple[str, ...], dict[str, str]] = {}
        for key in self._keys:
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

    def _make_factors(
        self, target: str, keys: _FactorKeys, wanted: tuple[int, ...]
    ) -> _Factors | _ExpertFactors:
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
        is_stacked = keys.is_parameter and len(wanted) > 2
        n_matrices = max(1, wanted[0]) if is_stacked else 1
        scale = self._scale(where, keys.module, a.shape[0] / n_matrices)
        factors: _Factors | _ExpertFactors
        if is_stacked:
            transposed = self.names.stores_input_first(keys.module)
            factors = _ExpertFactors(b, a, scale, n_matrices, transposed)
        else:
            transposed = keys.is_embedding or self._stores_transposed(keys, wanted)
            factors = _Factors(b, a, scale, transposed)
        if b.shape[1] != a.shape[0] or factors.shape != wanted:
            raise CheckpointError(
                f"{where}: expected factors for {list(wanted)}, "
                f"got B {list(b.shape)} and A {list(a.shape)}; "
                "was the adapter trained on this model?"
            )
        return factors

    def _scale(self, where: str, module: str, actual_rank: float) -> float:
        rank = self._number("r", "rank_pattern", module, default=actual_rank)
        alpha = self._number("lora_alpha", "alpha_pattern", module, default=rank)
        if rank != actual_rank:
            raise CheckpointError(
                f"{where}: adapter_config.json says rank {rank}, "
                f"the factors have rank {actual_rank:g}"
            )
        # rsLoRA divides by the root of the rank, so that the updates of high ranks do not shrink.
        divisor = rank**0.5 if self.config.get("use_rslora") else rank
        return float(alpha / divisor)

    def _stores_transposed(self, keys: _FactorKeys, shape: tuple[int, ...]) -> bool:
        # A parameter is taken as it is, whatever its module does with it.
        if keys.is_parameter:
            return False
        b = self.shards.headers[keys.sides["B"]]
        a = self.shards.headers[keys.sides["A"]]
        return stores_transposed(
            model_config=self.names.checkpoint.config,
            config=self.config,
            shape=shape,
            factor_shape=(b.shape[0], a.shape[1]),
        )

    def _shape(self, target: str, replacements: Mapping[str, str]) -> tuple[int, ...]:
        """Shape of a tensor, with the rows that the adapter gives it."""
        shape = self.names.shape(target)
        if target not in replacements:
            return shape
        saved = self.shards.headers[replacements[target]].shape
        return saved if self._is_resized(target, saved, shape) else shape

    def _is_resized(
        self, target: str, saved: tuple[int, ...], stored: tuple[int, ...]
    ) -> bool:
        """Whether the adapter's tensor is the model's with another number of tokens."""
        architecture = self.names.checkpoint.architecture
        has_tokens = architecture.vocabulary_axis(target, stored) == 0
        return has_tokens and saved[1:] == stored[1:]

    def _check_replacement(self, target: str, key: str) -> None:
        wanted = self.names.shape(target)
        actual = self.shards.headers[key].shape
        if actual != wanted and not self._is_resized(target, actual, wanted):
            raise CheckpointError(
                f"{self.shards.name}: {key}: expected {list(wanted)}, got {list(actual)}; was the "
                "adapter trained on this model?"
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
