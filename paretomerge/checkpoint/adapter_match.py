"""Finds the model's tensor that each tensor of an adapter in peft's format belongs to."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from paretomerge.checkpoint.adapter_factors import ExpertFactors, Factors
from paretomerge.checkpoint.adapter_names import ModelNames
from paretomerge.checkpoint.adapter_options import stores_transposed
from paretomerge.checkpoint.json_file import ReadOnlyJson
from paretomerge.checkpoint.reader import Shards
from paretomerge.errors import CheckpointError, ErrorCollector, shorten

_PREFIX = "base_model.model."
_FACTOR_NAME = re.compile(
    r"^(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(\.default)?(\.weight)?$"
)
_WRAPPER = re.compile(r"\.(modules_to_save(\.default)?|base_layer)(?=\.)")
_ORIGINAL = ".original_module."
_BASE_LAYER = ".base_layer."
_WRAPPED = ".base_layer"
_MAX_NUMBER = 1e9


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
class AdapterMatcher:
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
    ) -> tuple[dict[str, Factors | ExpertFactors], dict[str, str]]:
        """Return (tensor of the model -> factors, tensor of the model -> key that replaces it)."""
        factor_keys: dict[str, _FactorKeys] = {}
        replacements: dict[str, str] = {}
        problems = ErrorCollector()
        for key in self._keys:
            with problems.collect():
                self._assign(key, factor_keys, replacements)
        factors: dict[str, Factors | ExpertFactors] = {}
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
        saved = tuple(self.config.get("modules_to_save") or ())
        # A whole head may be saved (`cls`), with the modules in it. peft compares ends of names.
        parts = module.split(".")
        outer = (".".join(parts[:end]) for end in range(1, len(parts) + 1))
        return any(name.endswith(saved) for name in outer)

    def _make_factors(
        self, target: str, keys: _FactorKeys, wanted: tuple[int, ...]
    ) -> Factors | ExpertFactors:
        where = f"{self.shards.name}: {target}"
        if not {"A", "B"} <= set(keys.sides):
            raise CheckpointError(
                f"{where}: expected lora_A and lora_B, got one of them"
            )
        b = self.shards.stored(keys.sides["B"])
        a = self.shards.stored(keys.sides["A"])
        if len(b.shape) != 2 or len(a.shape) != 2 or not a.shape[0]:
            raise CheckpointError(
                f"{where}: expected two matrices, got B {list(b.shape)} and A {list(a.shape)}"
            )
        is_stacked = keys.is_parameter and len(wanted) > 2
        n_matrices = max(1, wanted[0]) if is_stacked else 1
        scale = self._scale(where, keys.module, a.shape[0] / n_matrices)
        factors: Factors | ExpertFactors
        if is_stacked:
            transposed = self.names.stores_input_first(keys.module)
            factors = ExpertFactors(b, a, scale, n_matrices, transposed)
        else:
            transposed = keys.is_embedding or self._stores_transposed(keys, wanted)
            factors = Factors(b, a, scale, transposed)
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
