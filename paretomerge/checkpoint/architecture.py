"""Where a tensor sits in the network, told from its name and the config, not from a list of known models."""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from paretomerge.errors import CheckpointError

ROLES = ("attention", "mlp", "other")
"""Norms, embeddings and the head are `other`."""

_DEPTH_KEYS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_ATTENTION = re.compile(r"attn|attention")
_MLP = re.compile(r"mlp|ffn|feed_forward|moe|expert|intermediate|dense")
_NORM = re.compile(r"norm|ln_")
_EMBEDDING = re.compile(r"embed|wte|wpe|embd")


@dataclass(frozen=True)
class Architecture:
    """Tensor names of one decoder, with the prefix under which its numbered layers are found.

    `prefix` ends before the layer's number (`model.layers.`); `depth` is the number of layers, L.
    """

    names: tuple[str, ...]
    prefix: str
    depth: int

    @classmethod
    def infer(cls, names: Iterable[str], config: Mapping[str, Any]) -> "Architecture":
        """The outermost numbered list in the names that is as long as the config says the network is deep."""
        names = tuple(names)
        expected = next((config[k] for k in _DEPTH_KEYS if isinstance(config.get(k), int)), None)
        if expected is None and isinstance(config.get("text_config"), Mapping):
            return cls.infer(names, config["text_config"])
        numbers: dict[str, set[int]] = defaultdict(set)
        for name in names:
            for match in re.finditer(r"(?<=\.)\d+(?=\.)", name):
                numbers[name[: match.start()]].add(int(match.group()))
                break  # experts are numbered inside layers: only the outermost list counts
        for prefix, found in sorted(numbers.items(), key=lambda item: len(item[0])):
            if found == set(range(expected or 0)):
                return cls(names, prefix, len(found))
        raise CheckpointError(
            f"expected {expected} numbered layers, as the config says; got "
            f"{ {prefix: len(found) for prefix, found in numbers.items()} or 'none' }"
        )

    def layer(self, name: str) -> int | None:
        """The layer a tensor belongs to; None outside the layers."""
        if not name.startswith(self.prefix):
            return None
        number = name[len(self.prefix) :].split(".", 1)[0]
        return int(number) if number.isdigit() else None

    def at_layer(self, name: str, layer: int) -> str:
        """The same tensor in another layer."""
        rest = name[len(self.prefix) :].split(".", 1)[1]
        return f"{self.prefix}{layer}.{rest}"

    def part(self, name: str) -> str:
        """The block inside the layer: `self_attn` of `model.layers.3.self_attn.q_proj.weight`; '' outside."""
        return name[len(self.prefix) :].split(".")[1] if self.layer(name) is not None else ""

    def role(self, name: str) -> str:
        """One of ROLES."""
        part = self.part(name)
        if not part or _NORM.search(part):
            return "other"
        return "attention" if _ATTENTION.search(part) else "mlp" if _MLP.search(part) else "other"

    def is_embedding(self, name: str) -> bool:
        """Whether a tensor outside the layers comes before them (it takes the parameters of the first slice)."""
        return self.layer(name) is None and bool(_EMBEDDING.search(name))

    def filters(self, role: str) -> tuple[str, ...]:
        """mergekit filters (substrings of tensor names) that together select `role` and nothing else."""
        parts = {self.part(n) for n in self.names if self.role(n) == role and self.part(n)}
        return tuple(f".{part}." for part in sorted(parts))
