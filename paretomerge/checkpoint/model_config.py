"""What a config says per layer, and the config of a model that is made of other models' layers."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from paretomerge.errors import CheckpointError

Route = Sequence[tuple[Mapping[str, Any], int]]
"""For each layer of the result: the config of the model it comes from, and its number there."""

_TEXT = ("text_config", "language_config", "llm_config", "thinker_config")
_DEPTH = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "layers")
_DEPTH_TOO = ("decoder_layers", "num_decoder_layers", "encoder_layers", "num_encoder_layers")
_NOT_PER_LAYER = re.compile(
    r"token|^m?rope|section|factor|architectures|kernel|patch|image|label|limit"
)
_POSITIONS = re.compile(r"layers|layer_i|_idxs|_indexes|_indices|block_i")


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config that describes the language model; the config itself if that is all it describes."""
    return _levels(config)[-1]


def depths(text: Mapping[str, Any]) -> tuple[int, ...]:
    """The numbers of layers that a text config names; two for an encoder and decoder of different depths."""
    found = [text[key] for key in (*_DEPTH, *_DEPTH_TOO) if isinstance(text.get(key), int)]
    if not found:  # NemotronH counts the entries of a list
        found = [
            len(text[key])
            for key in ("layer_types", "layers_block_type")
            if isinstance(text.get(key), list)
        ]
    return tuple(dict.fromkeys(found))


def _levels(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The config, and what it nests on the way down to its text part."""
    inner = [config[key] for key in _TEXT if isinstance(config.get(key), Mapping)]
    if not inner and not depths(
        config
    ):  # remote code calls it what it likes; a vocabulary gives it away
        inner = [
            part
            for part in config.values()
            if isinstance(part, Mapping) and depths(part) and "vocab_size" in part
        ]
    inner = [part for part in inner if depths(text_config(part)) or "vocab_size" in part]
    return [config, *(_levels(inner[0]) if inner else [])]


@dataclass(frozen=True)
class Rule:
    """Keys of a config that say something of every layer without a list of them.

    defaults: the keys with what they are when left out. fact: (layer, depth, *values) -> what holds of the layer.
    values: (facts) -> values of the keys that may express them. unless: the list that overrides the rule.
    """

    defaults: Mapping[str, Any]
    fact: Callable[..., Any]
    values: Callable[[Sequence[Any]], Iterable[tuple[Any, ...]]]
    unless: str = ""

    def facts(self, text: Mapping[str, Any], depth: int) -> tuple[Any, ...] | None:
        """What the config says of each layer; None if it does not use the rule."""
        if all(text.get(key) is None for key in self.defaults) or text.get(self.unless) is not None:
            return None
        values = [
            default if text.get(key) is None else text[key]
            for key, default in self.defaults.items()
        ]
        if isinstance(values[0], list) and not all(
            isinstance(v, list) for v in self.defaults.values()
        ):
            return None  # DeepSeek's moe_layer_freq may be a list of every layer instead
        return tuple(self.fact(layer, depth, *values) for layer in range(depth))


def _numbers(facts: Sequence[Any]) -> Iterator[tuple[Any, ...]]:
    return ((n,) for n in range(1, len(facts) + 2))


def _threshold(facts: Sequence[Any]) -> Iterator[tuple[Any, ...]]:
    return ((n,) for n in range(len(facts) + 1))


def _phases(facts: Sequence[Any]) -> Iterator[tuple[Any, ...]]:
    return ((period, offset) for period in range(1, len(facts) + 2) for offset in range(period))


def _where(facts: Sequence[Any]) -> list[int]:
    return [i for i, fact in enumerate(facts) if fact]


def _indices(key: str, unless: str = "") -> Rule:
    return Rule(
        {key: []}, lambda i, _, listed: i in listed, lambda facts: [(_where(facts),)], unless
    )


RULES = (
    Rule(  # Qwen MoE: which layers are dense
        {"decoder_sparse_step": 1, "mlp_only_layers": []},
        lambda i, _, step, dense: i in dense or (i + 1) % step != 0,
        lambda facts: [(1, _where(facts))],
    ),
    Rule(  # ERNIE: which layers have experts
        {"moe_layer_interval": 1, "moe_layer_start_index": 0, "moe_layer_end_index": -1},
        lambda i, _, every, start, end: (
            (i + 1) % every == 0 and i >= start and (end < 0 or i <= end)
        ),
        lambda facts: (
            (every, a, b)
            for every in range(1, len(facts) + 1)
            for a in range(len(facts))
            for b in range(a, len(facts))
        ),
    ),
    Rule({"first_k_dense_replace": 0}, lambda i, _, k: i < k, _threshold, "mlp_layer_types"),
    Rule({"num_dense_layers": 0}, lambda i, _, k: i < k, _threshold, "mlp_layer_types"),
    Rule({"moe_layer_freq": 1}, lambda i, _, every: i % every == 0, _numbers, "mlp_layer_types"),
    Rule(
        {"interleave_moe_layer_step": 1},
        lambda i, _, every: (i + 1) % every == 0,
        _numbers,
        "moe_layers",
    ),
    Rule(
        {"attn_layer_period": 1, "attn_layer_offset": 0}, lambda i, _, p, o: i % p == o, _phases
    ),  # Jamba
    Rule(
        {"expert_layer_period": 1, "expert_layer_offset": 0}, lambda i, _, p, o: i % p == o, _phases
    ),
    Rule({"sliding_window_pattern": 1}, lambda i, _, p: (i + 1) % p == 0, _numbers, "layer_types"),
    Rule(
        {"global_attn_every_n_layers": 1}, lambda i, _, p: (i + 1) % p == 0, _numbers, "layer_types"
    ),
    Rule({"full_attention_interval": 1}, lambda i, _, p: (i + 1) % p == 0, _numbers, "layer_types"),
    Rule({"max_window_layers": 0}, lambda i, _, k: i < k, _threshold, "layer_types"),
    Rule(
        {"no_rope_layer_interval": 1}, lambda i, _, p: (i + 1) % p == 0, _numbers, "no_rope_layers"
    ),
    Rule(  # RecurrentGemma: a cycle
        {"block_types": []},
        lambda i, _, cycle: cycle[i % len(cycle)] if cycle else None,
        lambda facts: [(list(facts),)],
    ),
    Rule({"num_kv_shared_layers": 0}, lambda i, depth, n: i >= depth - n, _threshold),
    *(
        _indices(key)
        for key in (
            "moe_layers",
            "cross_attention_layers",
            "rope_scaling_layers",
            "hybrid_layer_ids",
        )
    ),
    *(
        _indices(key, "layer_types")
        for key in ("full_attn_idxs", "attn_layer_indices", "local_layer_ids")
    ),
)
_RULED = {key for rule in RULES for key, default in rule.defaults.items() if default == []}


def routed_config(config: Mapping[str, Any], route: Route, dtype: str) -> dict[str, Any]:
    """`config` with the depth, the dtype and everything that is told per layer made to follow the route.

    An empty route leaves all but the dtype. Raises CheckpointError where no config can say what the route needs.
    """
    result: dict[str, Any] = _with_dtype(config, dtype)
    depth = _depth(text_config(config), len(route))
    straight = [layer for _, layer in route] == list(range(depth))
    if not route or (straight and all(source is config for source, _ in route)):
        return result
    # A rule's outcome for a layer moves with the layer, so what a config leaves to its class is written out first.
    each = {id(c): c for c in (config, *(source for source, _ in route))}
    full = {key: _PerLayer.of(c, len(route), not straight) for key, c in each.items()}
    own = full[id(config)]
    wanted = own.follow([(full[id(source)], layer) for source, layer in route])
    if straight and wanted == own:
        return result
    if not straight:
        _refuse_what_has_places(own)
        for level in _levels(result):
            _set_depth(level, depth, len(route))
    text = text_config(result)
    assert isinstance(text, dict)
    _write(text, own, wanted)
    if not straight:
        _verify(result, wanted, len(route))
    return result


@dataclass(frozen=True)
class _PerLayer:
    """A text config's lists of every layer, by path in it, and the facts of each of RULES that it uses."""

    text: Mapping[str, Any]
    lists: Mapping[tuple[str, ...], tuple[Any, ...]]
    rules: Mapping[int, tuple[Any, ...]]

    @classmethod
    def of(cls, config: Mapping[str, Any], routed: int, complete: bool) -> "_PerLayer":
        text = {**text_config(config), **(text_config(_completed(config)) if complete else {})}
        depth = _depth(text, routed)
        facts = {i: rule.facts(text, depth) for i, rule in enumerate(RULES)}
        return cls(
            text, dict(_lists(text, depth)), {i: f for i, f in facts.items() if f is not None}
        )

    def follow(self, route: Sequence[tuple["_PerLayer", int]]) -> "_PerLayer":
        lists = {
            key: tuple(_entry(source.lists.get(key, mine), layer) for source, layer in route)
            for key, mine in self.lists.items()
        }
        rules = {
            i: tuple(_entry(source.rules.get(i, mine), layer) for source, layer in route)
            for i, mine in self.rules.items()
        }
        return _PerLayer(self.text, lists, rules)


def _entry(entries: Sequence[Any], layer: int) -> Any:
    if layer >= len(entries):
        raise CheckpointError(
            f"config.json: expected entries for layer {layer}, got {len(entries)}; do the models come from one base?"
        )
    return entries[layer]


def _depth(text: Mapping[str, Any], routed: int) -> int:
    """The depth that a route of `routed` layers goes through: where a model has two stacks, that of the one it fits."""
    found = depths(text)
    return routed if routed in found or not found else found[0]


def _completed(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config with everything that its class derives from the rest; as it is if transformers has no such class."""
    from transformers import CONFIG_MAPPING

    if config.get("model_type") not in CONFIG_MAPPING:
        return config
    try:
        full: dict[str, Any] = (
            CONFIG_MAPPING[config["model_type"]].from_dict(dict(config)).to_dict()
        )
    except Exception as error:  # config classes raise what they like
        raise CheckpointError(
            f"config.json: {config['model_type']}: expected values that transformers takes; it says: {error}"
        ) from error
    return full


def _lists(
    part: Mapping[str, Any], depth: int, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], tuple[Any, ...]]]:
    """Lists with an entry per layer, and mappings from layers' numbers (`per_layer_config`)."""
    for key, value in part.items():
        if (
            _NOT_PER_LAYER.search(key)
            or key in _RULED
            or (key.endswith("_config") and key != "per_layer_config")
        ):
            continue
        if isinstance(value, (list, tuple)) and len(value) == depth:
            yield (*path, key), tuple(value)
        elif isinstance(value, Mapping):
            if value and "layer" in key and all(str(k).isdecimal() for k in value):
                by_number = {int(k): v for k, v in value.items()}
                yield (*path, key), tuple(by_number.get(i) for i in range(depth))
            else:
                yield from _lists(value, depth, (*path, key))


def _refuse_what_has_places(own: _PerLayer) -> None:
    """What belongs to a place in the network that cannot move with a layer."""
    if own.text.get("hidden_size_per_layer_input"):
        raise CheckpointError(
            "expected layers in their own places: this architecture has one table of embeddings for all layers "
            "(hidden_size_per_layer_input); merge it without layer ranges"
        )
    for key, value in own.text.items():
        numbers = isinstance(value, list) and value and all(isinstance(v, int) for v in value)
        if numbers and _POSITIONS.search(key) and key not in _RULED and (key,) not in own.lists:
            raise CheckpointError(
                f"config.json: {key}: expected a list with one entry per layer, got {value}; it is not known what becomes "
                "of it when layers move: merge this architecture without layer ranges"
            )


def _set_depth(level: Mapping[str, Any], old: int, new: int) -> None:
    assert isinstance(level, dict)
    for key in (*_DEPTH, "decoder_layers", "num_decoder_layers", "num_blocks"):
        if level.get(key) == old:
            level[key] = new


def _write(text: dict[str, Any], own: _PerLayer, wanted: _PerLayer) -> None:
    for path, entries in wanted.lists.items():
        part = text
        for key in path[:-1]:
            part = part.setdefault(key, {})
        numbered = isinstance(_at(own.text, path), Mapping)
        part[path[-1]] = (
            {str(i): e for i, e in enumerate(entries) if e is not None}
            if numbered
            else list(entries)
        )
    for i, facts in wanted.rules.items():
        rule, depth = RULES[i], len(facts)
        if rule.facts({**own.text, **text}, depth) == facts:
            continue
        for values in rule.values(facts):
            if tuple(rule.fact(layer, depth, *values) for layer in range(depth)) == facts:
                text.update(zip(rule.defaults, values, strict=True))
                break
        else:
            raise CheckpointError(
                f"{' and '.join(rule.defaults)}: expected layers in a pattern that config.json can say, got "
                f"{''.join('x' if fact else '.' for fact in facts)} (x: holds for the layer); take layers in the order of their kinds"
            )


def _verify(result: Mapping[str, Any], wanted: _PerLayer, depth: int) -> None:
    full = text_config(_completed(result))
    if depth not in (depths(full) or (depth,)):
        raise CheckpointError(
            f"config.json: expected a key for the depth of {depth}, got {depths(full)}: the depth is told in another way"
        )
    for path, entries in wanted.lists.items():
        got = _at(full, path)
        if isinstance(got, (list, tuple)) and tuple(got) != entries:
            raise CheckpointError(
                f"config.json: {'.'.join(path)}: expected {list(entries)} for the layers of the recipe, got {list(got)}: "
                "the architecture fixes this pattern; take layers that follow it"
            )


def _at(part: Any, path: Sequence[str]) -> Any:
    for key in path:
        part = part.get(key) if isinstance(part, Mapping) else None
    return part


def _with_dtype(part: Any, dtype: str) -> Any:
    """A copy with the dtype keys of every level set."""
    if isinstance(part, Mapping):
        return {
            k: dtype
            if k in ("dtype", "torch_dtype") and isinstance(v, str)
            else _with_dtype(v, dtype)
            for k, v in part.items()
        }
    return [_with_dtype(entry, dtype) for entry in part] if isinstance(part, list) else part
