"""Where an adapter in peft's format holds the change of each parameter, and what its config says.

Read in peft 0.21: `tuners/lora/layer.py` and `model.py` (which modules have LoRA layers, and how
patterns are matched), `utils/save_and_load.py` (names of keys), `utils/other.py` (modules_to_save).
"""

import inspect
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import lru_cache
from typing import TYPE_CHECKING

from paretomerge.checkpoint.json_file import JsonObject
from paretomerge.checkpoint.loaded_names import LoadedNames
from paretomerge.checkpoint.reference import (
    canonical_name,
    is_folder,
    split_revision,
)
from paretomerge.errors import CheckpointError

if TYPE_CHECKING:
    from torch import nn

KEY_PREFIX = "base_model.model."
"""What the keys of an adapter begin with."""

# peft refuses LoRA on these: the fused kernels of Mamba read the weights and not the modules.
_MAMBA_TYPES = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")
_MAMBA_MODULES = ("out_proj", "conv1d")
# In families with stacked experts peft takes these for the experts of transformers 4, and moves the
# adapter to the stacks (`utils/transformers_weight_conversion.py`).
_EXPERT_MODULES = ("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
_STACKED = 3  # dimensions of stacked experts
_MAX_CLASSES = 1024


class Kind(Enum):
    """How an adapter holds the change of a parameter.

    LINEAR: factors B A of a weight (out, in).
    TRANSPOSED: factors of the transpose of a weight (in, out), GPT-2's `Conv1D`.
    EMBEDDING: factors of the transpose of a weight (tokens, width).
    EXPERTS: factors of each matrix in a stack (experts, out, in).
    EXPERTS_INPUT_FIRST: factors of the transpose of each in a stack (experts, in, out).
    BIAS: the whole tensor, under `bias: all`.
    SAVED: the whole tensor, with all others of its module, under `modules_to_save`.
    NONE: not at all.
    """

    LINEAR = "linear"
    TRANSPOSED = "transposed"
    EMBEDDING = "embedding"
    EXPERTS = "experts"
    EXPERTS_INPUT_FIRST = "experts, input first"
    BIAS = "bias"
    SAVED = "saved"
    NONE = "none"

    @property
    def is_stack(self) -> bool:
        """Whether the parameter is a stack of matrices."""
        return self in (Kind.EXPERTS, Kind.EXPERTS_INPUT_FIRST)

    @property
    def has_factors(self) -> bool:
        """Whether the change is held as low-rank factors."""
        return self.is_stack or self in (
            Kind.LINEAR,
            Kind.TRANSPOSED,
            Kind.EMBEDDING,
        )

    @property
    def is_transposed(self) -> bool:
        """Whether B A is the change of the transpose."""
        return self in (Kind.TRANSPOSED, Kind.EMBEDDING, Kind.EXPERTS_INPUT_FIRST)


def find_kind(names: LoadedNames, parameter: str) -> Kind:
    """Find out how an adapter holds the change of a parameter.

    Args:
        names: The names of the model in memory.
        parameter: One of them.
    """
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    module_name, _, own_name = parameter.rpartition(".")
    module = names.model.get_submodule(module_name)
    if own_name not in module._parameters or not module_name:
        return Kind.NONE
    shape = names.state[parameter]
    is_convolution = isinstance(module, nn.modules.conv._ConvNd)
    kind = Kind.SAVED
    if own_name == "weight" and _takes_lora(names, module_name):
        # The exact classes: one that inherits may do something else with its weight.
        if type(module) is nn.Linear:
            kind = Kind.LINEAR
        elif type(module) is Conv1D:
            kind = Kind.TRANSPOSED
        elif _is_embedding(module):
            kind = Kind.EMBEDDING
    elif "bias" in own_name:
        return Kind.BIAS
    elif len(shape) == _STACKED and not is_convolution:
        is_input_first = bool(getattr(module, "is_transposed", False))
        kind = Kind.EXPERTS_INPUT_FIRST if is_input_first else Kind.EXPERTS
    # peft would load the factors under another name.
    if kind.has_factors and not names.keeps(parameter):
        return Kind.NONE
    # A module with others inside would be saved or wrapped with all of them.
    return Kind.NONE if _holds_modules(module) else kind


def _holds_modules(module: "nn.Module") -> bool:
    """Whether modules with tensors of their own are inside a module."""
    return any(child.state_dict(keep_vars=True) for child in module.children())


def _takes_lora(names: LoadedNames, module_name: str) -> bool:
    """Whether peft computes the change of a module's weight rightly from factors."""
    parent_name, _, own_name = module_name.rpartition(".")
    is_mamba = getattr(names.model.config, "model_type", None) in _MAMBA_TYPES
    if is_mamba and own_name in _MAMBA_MODULES:
        return False
    if own_name in _EXPERT_MODULES and _packs_experts(names):
        return False
    # An adapter acts where a module is called, and not where its weight is read.
    parent = names.model.get_submodule(parent_name)
    return not _reads_weight(parent, own_name)


def _packs_experts(names: LoadedNames) -> bool:
    """Whether transformers 5 stacks the experts of such models, though this one may have none."""
    patterns = []
    for packing in names.packings:
        patterns += packing.target_patterns
    return any("experts" in pattern for pattern in patterns)


def _reads_weight(parent: "nn.Module", child: str) -> bool:
    """Whether the code of a module computes with `self.CHILD.weight`."""
    reads = re.compile(
        rf"(?<!isinstance\()self\.{child}\.weight\b"
        r"(?!\.(dtype|device|shape|data|ndim|_is_hf_initialized)\b|\s*=[^=])"
    )
    for kind in type(parent).__mro__:
        is_model_code = kind.__module__.startswith("transformers.models.")
        if is_model_code and reads.search(
            _class_source(kind.__module__, kind.__name__)
        ):
            return True
    return False


@lru_cache(_MAX_CLASSES)
def _class_source(module: str, name: str) -> str:
    return inspect.getsource(getattr(sys.modules[module], name))


def _is_embedding(module: "nn.Module") -> bool:
    """Whether a module is an embedding that peft computes rightly."""
    from torch import nn

    # Gemma's and BART's embeddings multiply by a scale, which peft knows. Others compute positions
    # from something else than ids (OPT).
    is_plain = type(module) is nn.Embedding
    return is_plain or (
        isinstance(module, nn.Embedding) and hasattr(module, "embed_scale")
    )


@dataclass
class AdapterLayout:
    """What an adapter holds, and under which keys.

    Attributes:
        names: The names of the model in memory.
        kinds: Parameter -> how the adapter holds its change; only of those that it holds.
        ranks: Parameter with factors -> rank.
    """

    names: LoadedNames
    kinds: dict[str, Kind] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)

    def add_factors(self, parameter: str, kind: Kind, rank: int) -> None:
        """Add the factors of a parameter."""
        self.kinds[parameter] = kind
        self.ranks[parameter] = rank

    def add_whole(self, parameters: Iterable[str]) -> None:
        """Add whole tensors, and all others of the modules that are saved with them.

        Raises:
            CheckpointError: If `modules_to_save` would also match a module that cannot be saved.
        """
        saved: set[str] = set()
        for parameter in parameters:
            kind = find_kind(self.names, parameter)
            if kind is Kind.BIAS:
                self.kinds[parameter] = kind
            else:
                saved.add(parameter.rpartition(".")[0])
        for module in sorted(self._matched_by_saving(saved)):
            for name in self.names.state:
                if name.rpartition(".")[0] == module:
                    self.kinds[name] = Kind.SAVED

    def _matched_by_saving(self, saved: Iterable[str]) -> set[str]:
        """The modules that peft saves for some names: it compares the ends of names."""
        ends = tuple(saved)
        matched: set[str] = set()
        for name, module in self.names.model.named_modules(remove_duplicate=False):
            if not ends or not name.endswith(ends):
                continue
            if _holds_modules(module):
                end = next(end for end in ends if name.endswith(end))
                raise CheckpointError(
                    f"{end}: peft would also save {name}, whose name ends alike, so the adapter "
                    "cannot hold this module"
                )
            matched.add(name)
        return matched

    @property
    def saved_modules(self) -> list[str]:
        """The modules of `modules_to_save`."""
        modules = set()
        for parameter, kind in self.kinds.items():
            if kind is Kind.SAVED:
                modules.add(parameter.rpartition(".")[0])
        return sorted(modules)

    def keys(self, parameter: str) -> tuple[str, ...]:
        """The keys of a parameter: of its factors A and B, or of the whole tensor."""
        module, _, own_name = parameter.rpartition(".")
        kind = self.kinds[parameter]
        if kind is Kind.SAVED:
            return (f"{KEY_PREFIX}{parameter}",)
        if kind is Kind.BIAS:
            wrapped = module + ".base_layer" * len(self._wrapping(module))
            path = f"{wrapped}.{own_name}" if wrapped else own_name
            return (f"{KEY_PREFIX}{path}",)
        if kind is Kind.EMBEDDING:
            stem = f"{KEY_PREFIX}{module}.lora_embedding_"
            return f"{stem}A", f"{stem}B"
        # Wrappers of one module are around each other, that of the first parameter innermost.
        wrapping = self._wrapping(module)
        outer = len(wrapping) - 1 - wrapping.index(parameter)
        stem = f"{KEY_PREFIX}{module}{'.base_layer' * outer}.lora_"
        return f"{stem}A.weight", f"{stem}B.weight"

    def _wrapping(self, module: str) -> list[str]:
        """The parameters of a module that have factors, in the module's order."""
        if not module:
            return []
        own = self.names.model.get_submodule(module).named_parameters(recurse=False)
        names = [f"{module}.{name}" for name, _ in own]
        return [name for name in names if name in self.ranks]

    def config(self, base: str) -> JsonObject:
        """The content of adapter_config.json.

        lora_alpha is the rank everywhere, so that the adapter adds exactly B A. `r` is the largest
        rank, since engines reserve memory by it.

        Args:
            base: The base model: a folder, or a Hub name with an optional `@revision`.

        Raises:
            CheckpointError: If peft would put the adapter on other modules as well.
        """
        if is_folder(base):
            repository, revision = canonical_name(base), None
        else:
            repository, revision = split_revision(base)
        modules = []
        stacks = []
        for parameter in self.ranks:
            if self.kinds[parameter].is_stack:
                stacks.append(parameter)
            else:
                modules.append(parameter.rpartition(".")[0])
        self._check_targets(modules, stacks)
        rank = max(self.ranks.values())
        patterns = self._patterns(rank)
        kinds = Counter(self.kinds.values())
        config: JsonObject = {
            "peft_type": "LORA",
            "task_type": self._task_type,
            "base_model_name_or_path": repository,
            "revision": revision,
            "r": rank,
            "lora_alpha": rank,
            "rank_pattern": patterns,
            "alpha_pattern": patterns,
            "target_modules": self._target_modules(modules),
            "modules_to_save": self.saved_modules or None,
            "bias": "all" if kinds[Kind.BIAS] else "none",
            # peft goes by the class of each module, and warns where this says otherwise.
            "fan_in_fan_out": kinds[Kind.TRANSPOSED] > kinds[Kind.LINEAR],
            "lora_dropout": 0.0,
            "init_lora_weights": True,
            "use_rslora": False,
            "use_dora": False,
            "inference_mode": True,
        }
        if stacks:
            config["target_parameters"] = stacks
        return config

    def _patterns(self, rank: int) -> dict[str, int]:
        """The ranks that differ from the general one, by patterns that match one name each.

        peft matches the end of a name; `^` makes the pattern match the whole of it.
        """
        patterns = {}
        for parameter, own_rank in self.ranks.items():
            if own_rank == rank:
                continue
            name = parameter
            if not self.kinds[parameter].is_stack:
                name = parameter.rpartition(".")[0]
            patterns[f"^{re.escape(name)}"] = own_rank
        return patterns

    def _target_modules(self, modules: Sequence[str]) -> list[str] | str:
        """The modules by name, or as one pattern if a name is also the end of another one."""
        ends = tuple(f".{module}" for module in modules)
        for name, _ in self.names.model.named_modules(remove_duplicate=False):
            if name not in modules and name.endswith(ends):
                return "|".join(re.escape(module) for module in modules)
        return list(modules)

    def _check_targets(self, modules: Sequence[str], stacks: Sequence[str]) -> None:
        ends = tuple(f".{stack}" for stack in stacks)
        for name in self.names.state:
            if name not in stacks and name.endswith(ends):
                raise CheckpointError(
                    f"{name}: peft would adapt it as well, because its name ends like that of "
                    "another stack of experts"
                )
        for saved in self.saved_modules:
            # As in peft's `check_target_module_exists`.
            excludes = re.compile(rf"(^|.*\.){saved}($|\..*)")
            for module in modules:
                if excludes.match(module):
                    raise CheckpointError(
                        f"{module}: peft would not adapt it, because the name of the saved module "
                        f"{saved} matches it"
                    )

    @property
    def _task_type(self) -> str | None:
        """The task that peft's own classes go by; None leaves the model as it is."""
        name = type(self.names.model).__name__
        is_causal = name.endswith(("ForCausalLM", "LMHeadModel"))
        return "CAUSAL_LM" if is_causal else None


def describe_ranks(ranks: Mapping[str, int]) -> str:
    """Say which ranks there are, in a few words."""
    low, high = min(ranks.values()), max(ranks.values())
    mean = sum(ranks.values()) / len(ranks)
    return f"rank {low}" if low == high else f"ranks {low} to {high}, mean {mean:.1f}"
