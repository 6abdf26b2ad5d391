"""What a config says about each layer, and the config of a model made of other models' layers.

Some configs list a value per layer (`layer_types`). Others state a rule (`first_k_dense_replace`):
what a rule says of a layer is called a *fact* here. When layers move, lists and facts move with
them, and rules are solved for values that give the new facts.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from paretomerge.checkpoint.json_file import JsonObject, ReadOnlyJson
from paretomerge.errors import CheckpointError

Route = Sequence[tuple[ReadOnlyJson, int]]
"""For each output layer: the config of the model that it comes from, and its number there."""

Facts = Sequence[object]
"""What a rule says of each layer."""

DEQUANTIZED_FROM = "dequantized_from"
"""Our own key of config.json: the quantised weights that a checkpoint was made from."""

_KeyPath = tuple[str, ...]
_Values = tuple[object, ...]

_TEXT_CONFIG_KEYS = ("text_config", "language_config", "llm_config", "thinker_config")
_DEPTH_KEYS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "layers")
_DECODER_DEPTH_KEYS = ("decoder_layers", "num_decoder_layers")
_ENCODER_DEPTH_KEYS = ("encoder_layers", "num_encoder_layers")
_LAYER_LIST_KEYS = ("layer_types", "layers_block_type")
_DTYPE_KEYS = ("dtype", "torch_dtype")
_PREDICTOR_COUNT_KEYS = (
    "num_nextn_predict_layers",
    "num_mtp_layers",
    "mtp_num_layers",
    "mtp_num_hidden_layers",
    "num_mtp_modules",
    "n_predict_layers",
)
_FLOAT_KEY = "__float__"
_FLOAT_NAMES = {"inf": "Infinity", "-inf": "-Infinity", "nan": "NaN"}
_SCALED_IF_TIED = ("t5", "mt5", "umt5", "longt5", "switch_transformers", "udop")
# Lists under these keys may have as many entries as there are layers by chance.
_NOT_PER_LAYER = re.compile(
    r"token|^m?rope|section|factor|architectures|kernel|patch|image|label|limit"
)
_LAYER_NUMBERS = re.compile(r"layers|layer_i|_idxs|_indexes|_indices|block_i")


def text_config(config: ReadOnlyJson) -> ReadOnlyJson:
    """Return the part of a config that describes the language model; often the config itself."""
    return _text_path(config)[-1]


def with_plain_floats(part: Any) -> Any:
    """Return a deep copy of a config with infinity and NaN as floats.

    transformers 5 writes them as `{"__float__": "Infinity"}`, for JSON has no such numbers.
    """
    if isinstance(part, Mapping):
        if set(part) == {_FLOAT_KEY} and part[_FLOAT_KEY] in _FLOAT_NAMES.values():
            return float(part[_FLOAT_KEY])
        return {key: with_plain_floats(value) for key, value in part.items()}
    if isinstance(part, (list, tuple)):
        return [with_plain_floats(value) for value in part]
    return part


def with_tagged_floats(part: Any) -> Any:
    """Return a deep copy of a config with infinity and NaN as transformers 5 writes them."""
    if isinstance(part, Mapping):
        return {key: with_tagged_floats(value) for key, value in part.items()}
    if isinstance(part, (list, tuple)):
        return [with_tagged_floats(value) for value in part]
    if isinstance(part, float) and not math.isfinite(part):
        return {_FLOAT_KEY: _FLOAT_NAMES[str(part)]}
    return part


def without_predictors(config: ReadOnlyJson) -> JsonObject:
    """Return the config of a model whose predictors of further tokens are not stored."""
    result = _with_changed_text(config, without_predictors)
    for key in _PREDICTOR_COUNT_KEYS:
        if result.get(key):
            result[key] = 0
    return result


def ties_always(config: ReadOnlyJson) -> bool:
    """Whether transformers ties embeddings whatever `tie_word_embeddings` says.

    In the T5 family the key tells whether the output of the decoder is scaled.
    """
    return config.get("model_type") in _SCALED_IF_TIED


def declares_own_head(config: ReadOnlyJson) -> bool:
    """Whether a config says that the head is a tensor of its own.

    transformers always writes the key where a class ties by default and the model does not, or the
    other way round, so a config without it says nothing.
    """
    if ties_always(config):
        return False
    text = text_config(config)
    is_tied = config.get("tie_word_embeddings", text.get("tie_word_embeddings"))
    return is_tied is False


def untied_config(config: ReadOnlyJson) -> JsonObject:
    """Return the config of a model whose head is no longer the input embedding."""
    # Here the key says something else: transformers keeps the tensors apart all the same, as all
    # are stored with values of their own.
    if ties_always(config):
        return dict(config)
    result = _with_changed_text(config, untied_config)
    result["tie_word_embeddings"] = False
    return result


def with_vocab_size(config: ReadOnlyJson, vocab_size: int) -> JsonObject:
    """Return the config of a model with another number of tokens."""
    result = _with_changed_text(config, partial(with_vocab_size, vocab_size=vocab_size))
    # The whole of a multimodal config need not repeat it.
    if text_config(config) is config or "vocab_size" in result:
        result["vocab_size"] = vocab_size
    return result


def _with_changed_text(
    config: ReadOnlyJson, change: Callable[[ReadOnlyJson], JsonObject]
) -> JsonObject:
    """A copy of a config in which its text config, if it has one, is changed."""
    result = dict(config)
    path = _text_path(config)
    if len(path) > 1:
        for key, value in config.items():
            if value is path[1]:
                result[key] = change(value)
    return result


def depths(text: ReadOnlyJson) -> tuple[int, ...]:
    """Return the numbers of layers that a text config gives.

    Two numbers for an encoder and a decoder of different depths; () without any.
    """
    keys = (*_DEPTH_KEYS, *_DECODER_DEPTH_KEYS, *_ENCODER_DEPTH_KEYS)
    values = [text.get(key) for key in keys]
    numbers = [value for value in values if isinstance(value, int)]
    # NemotronH gives a list with an entry per layer and no number.
    if not numbers:
        lists = [text.get(key) for key in _LAYER_LIST_KEYS]
        numbers = [len(value) for value in lists if isinstance(value, list)]
    return tuple(dict.fromkeys(numbers))


def _text_path(config: ReadOnlyJson) -> list[ReadOnlyJson]:
    """The config and the nested configs on the way to its text part, which comes last."""
    values = [config.get(key) for key in _TEXT_CONFIG_KEYS]
    candidates = [value for value in values if isinstance(value, Mapping)]
    if not candidates and not depths(config):
        # Remote code may use any key; a depth and a vocabulary show which one is the text part.
        parts = [part for part in config.values() if isinstance(part, Mapping)]
        candidates = [part for part in parts if depths(part) and "vocab_size" in part]
    for part in candidates:
        if depths(text_config(part)) or "vocab_size" in part:
            return [config, *_text_path(part)]
    return [config]


@dataclass(frozen=True)
class LayerRule:
    """Keys of a config that say something about every layer without listing the layers.

    Attributes:
        defaults: The keys of the rule with their default values.
        fact: (layer, depth, *values) -> what the rule says of the layer.
        candidates: (facts) -> values of the keys that may express the facts, in the order in
            which they are tried.
        overridden_by: A list with an entry per layer that takes the place of the rule.
    """

    defaults: ReadOnlyJson
    fact: Callable[..., object]
    candidates: Callable[[Facts], Iterable[_Values]]
    overridden_by: str = ""

    def facts(self, text: ReadOnlyJson, depth: int) -> Facts | None:
        """Return what a config says of each layer; None if it does not use the rule."""
        is_used = False
        values = []
        for key, default in self.defaults.items():
            value = text.get(key)
            if value is None:
                value = default
            else:
                is_used = True
            values.append(value)
        if not is_used or text.get(self.overridden_by) is not None:
            return None
        # DeepSeek's moe_layer_freq may be a list with an entry per layer and not a number.
        takes_lists = all(
            isinstance(default, list) for default in self.defaults.values()
        )
        if isinstance(values[0], list) and not takes_lists:
            return None
        return self.evaluate(depth, tuple(values))

    def evaluate(self, depth: int, values: _Values) -> Facts:
        """Return what the rule says of each layer for some values of its keys."""
        facts = [self.fact(layer, depth, *values) for layer in range(depth)]
        return tuple(facts)

    def solve(self, facts: Facts) -> JsonObject | None:
        """Return values of the keys that express the facts; None if there are none."""
        for values in self.candidates(facts):
            if self.evaluate(len(facts), values) == facts:
                return dict(zip(self.defaults, values, strict=True))
        return None


def _is_dense(
    layer: int,
    _: int,
    step: int,
    dense_layers: Sequence[int],
) -> bool:
    ends_step = (layer + 1) % step == 0
    return layer in dense_layers or not ends_step


def _has_experts(
    layer: int,
    _: int,
    interval: int,
    start: int,
    end: int,
) -> bool:
    is_before_end = end < 0 or layer <= end
    ends_interval = (layer + 1) % interval == 0
    return ends_interval and layer >= start and is_before_end


def _is_before(
    layer: int,
    _: int,
    threshold: int,
) -> bool:
    return layer < threshold


def _is_multiple(
    layer: int,
    _: int,
    period: int,
) -> bool:
    return layer % period == 0


def _ends_period(
    layer: int,
    _: int,
    period: int,
) -> bool:
    return (layer + 1) % period == 0


def _is_at_offset(
    layer: int,
    _: int,
    period: int,
    offset: int,
) -> bool:
    return layer % period == offset


def _is_among_last(
    layer: int,
    depth: int,
    count: int,
) -> bool:
    return layer >= depth - count


def _is_listed(
    layer: int,
    _: int,
    listed: Sequence[int],
) -> bool:
    return layer in listed


def _in_cycle(
    layer: int,
    _: int,
    cycle: Sequence[object],
) -> object:
    return cycle[layer % len(cycle)] if cycle else None


def _true_layers(facts: Facts) -> list[int]:
    return [layer for layer, fact in enumerate(facts) if fact]


def _dense_candidates(facts: Facts) -> Iterator[_Values]:
    yield 1, _true_layers(facts)


def _expert_candidates(facts: Facts) -> Iterator[_Values]:
    depth = len(facts)
    for interval in range(1, depth + 1):
        for start in range(depth):
            for end in range(start, depth):
                yield interval, start, end


def _thresholds(facts: Facts) -> Iterator[_Values]:
    for threshold in range(len(facts) + 1):
        yield (threshold,)


def _periods(facts: Facts) -> Iterator[_Values]:
    # A period beyond the depth says that no layer ends one.
    for period in range(1, len(facts) + 2):
        yield (period,)


def _periods_and_offsets(facts: Facts) -> Iterator[_Values]:
    for period in range(1, len(facts) + 2):
        for offset in range(period):
            yield period, offset


def _listed_candidates(facts: Facts) -> Iterator[_Values]:
    yield (_true_layers(facts),)


def _cycle_candidates(facts: Facts) -> Iterator[_Values]:
    yield (list(facts),)


def _threshold_rule(key: str, overridden_by: str) -> LayerRule:
    return LayerRule({key: 0}, _is_before, _thresholds, overridden_by)


def _period_rule(key: str, overridden_by: str) -> LayerRule:
    return LayerRule({key: 1}, _ends_period, _periods, overridden_by)


def _offset_rule(period_key: str, offset_key: str) -> LayerRule:
    return LayerRule(
        {period_key: 1, offset_key: 0}, _is_at_offset, _periods_and_offsets
    )


def _listed_rule(key: str, overridden_by: str = "") -> LayerRule:
    return LayerRule({key: []}, _is_listed, _listed_candidates, overridden_by)


_QWEN_MOE = LayerRule(
    {"decoder_sparse_step": 1, "mlp_only_layers": []}, _is_dense, _dense_candidates
)
_ERNIE_MOE = LayerRule(
    {"moe_layer_interval": 1, "moe_layer_start_index": 0, "moe_layer_end_index": -1},
    _has_experts,
    _expert_candidates,
)
_DEEPSEEK_MOE = LayerRule(
    {"moe_layer_freq": 1}, _is_multiple, _periods, "mlp_layer_types"
)
_RECURRENT_GEMMA = LayerRule({"block_types": []}, _in_cycle, _cycle_candidates)
_SHARED_KEYS_AND_VALUES = LayerRule(
    {"num_kv_shared_layers": 0}, _is_among_last, _thresholds
)

RULES = (
    _QWEN_MOE,
    _ERNIE_MOE,
    _threshold_rule("first_k_dense_replace", "mlp_layer_types"),
    _threshold_rule("num_dense_layers", "mlp_layer_types"),
    _DEEPSEEK_MOE,
    _period_rule("interleave_moe_layer_step", "moe_layers"),
    _offset_rule("attn_layer_period", "attn_layer_offset"),  # Jamba
    _offset_rule("expert_layer_period", "expert_layer_offset"),
    _period_rule("sliding_window_pattern", "layer_types"),
    _period_rule("global_attn_every_n_layers", "layer_types"),
    _period_rule("full_attention_interval", "layer_types"),
    _threshold_rule("max_window_layers", "layer_types"),
    _period_rule("no_rope_layer_interval", "no_rope_layers"),
    _RECURRENT_GEMMA,
    _SHARED_KEYS_AND_VALUES,
    _listed_rule("moe_layers"),
    _listed_rule("cross_attention_layers"),
    _listed_rule("rope_scaling_layers"),
    _listed_rule("hybrid_layer_ids"),
    _listed_rule("full_attn_idxs", "layer_types"),
    _listed_rule("attn_layer_indices", "layer_types"),
    _listed_rule("local_layer_ids", "layer_types"),
)
"""The rules of all architectures; a config uses those whose keys it has."""

_RULE_LIST_KEYS: set[str] = set()
for _rule in RULES:
    _RULE_LIST_KEYS |= {key for key, default in _rule.defaults.items() if default == []}


def routed_config(
    config: ReadOnlyJson,
    route: Route,
    dtype: str,
) -> JsonObject:
    """Return a config whose depth, dtype and per-layer values follow a route.

    Args:
        config: The config.json that the result follows in everything else.
        route: The layers of the result; an empty route changes only the dtype.
        dtype: Dtype of the merged weights.

    Raises:
        CheckpointError: If no config can express what the route needs.
    """
    result = _copy_with_dtype(config, dtype)
    assert isinstance(result, dict)
    depth = _depth(text_config(config), len(route))
    layers = [layer for _, layer in route]
    is_straight = layers == list(range(depth))
    has_one_source = all(source is config for source, _ in route)
    # An empty route has one source, too, and changes nothing but the dtype.
    if not route or (is_straight and has_one_source):
        return result
    # If layers move, their facts move with them: values that the config leaves to its class must
    # then be known, too. Configs are dicts and not hashable, hence `id`.
    distinct = {id(config): config}
    for source, _ in route:
        distinct[id(source)] = source
    per_layer = {
        key: _PerLayer.read(source, len(route), with_defaults=not is_straight)
        for key, source in distinct.items()
    }
    current = per_layer[id(config)]
    per_layer_route = []
    for source, layer in route:
        values = per_layer[id(source)]
        per_layer_route.append((values, layer))
    wanted = current.follow(per_layer_route)
    if is_straight and wanted == current:
        return result
    if not is_straight:
        _check_movable(current)
        for part in _text_path(result):
            _set_depth(part, depth, len(route))
    text = text_config(result)
    assert isinstance(text, dict)
    _write_lists(text, current, wanted)
    _write_rules(text, current, wanted)
    if not is_straight:
        _verify(result, wanted, len(route))
    return result


@dataclass(frozen=True)
class _PerLayer:
    """The per-layer values of a text config.

    Attributes:
        text: The text config.
        lists: Lists with an entry per layer, by their path in the config.
        facts: Facts of each layer, by index in `RULES`, of the rules that the config uses.
    """

    text: ReadOnlyJson
    lists: Mapping[_KeyPath, _Values]
    facts: Mapping[int, Facts]

    @classmethod
    def read(
        cls,
        config: ReadOnlyJson,
        n_routed: int,
        with_defaults: bool,
    ) -> "_PerLayer":
        text = dict(text_config(config))
        if with_defaults:
            text |= text_config(with_class_defaults(config))
        depth = _depth(text, n_routed)
        facts: dict[int, Facts] = {}
        for index, rule in enumerate(RULES):
            rule_facts = rule.facts(text, depth)
            if rule_facts is not None:
                facts[index] = rule_facts
        return cls(text, dict(_find_lists(text, depth)), facts)

    def follow(self, route: Sequence[tuple["_PerLayer", int]]) -> "_PerLayer":
        """The values of the routed layers; a source without a list or rule has this config's."""
        lists: dict[_KeyPath, _Values] = {}
        for path, own_list in self.lists.items():
            entries = []
            for source, layer in route:
                source_list = source.lists.get(path, own_list)
                entries.append(_entry(source_list, layer))
            lists[path] = tuple(entries)
        facts: dict[int, Facts] = {}
        for index, own_facts in self.facts.items():
            entries = []
            for source, layer in route:
                source_facts = source.facts.get(index, own_facts)
                entries.append(_entry(source_facts, layer))
            facts[index] = tuple(entries)
        return _PerLayer(self.text, lists, facts)


def _entry(entries: Sequence[object], layer: int) -> object:
    # A shorter list belongs to a model of another depth.
    if layer >= len(entries):
        raise CheckpointError(
            f"config.json: expected entries for layer {layer}, got {len(entries)}; "
            "do the models come from one base?"
        )
    return entries[layer]


def _depth(text: ReadOnlyJson, n_routed: int) -> int:
    """The depth of the stack that is routed; if there are two, of the one that the route fits."""
    known = depths(text)
    if not known or n_routed in known:
        return n_routed
    return known[0]


def with_class_defaults(config: ReadOnlyJson) -> ReadOnlyJson:
    """Return the config with every value that its class in transformers derives, if there is one.

    Raises:
        CheckpointError: If the class rejects a value.
    """
    # Imported here: transformers takes seconds to load, and most merges move no layers.
    from transformers import CONFIG_MAPPING

    model_type = config.get("model_type")
    if model_type not in CONFIG_MAPPING:
        return config
    try:
        config_class = CONFIG_MAPPING[model_type]
        full: JsonObject = config_class.from_dict(dict(config)).to_dict()
    except Exception as error:  # config classes raise exceptions of any class
        raise CheckpointError(
            f"config.json: transformers rejects these values of {model_type}: {error}"
        ) from error
    return full


def _find_lists(
    part: ReadOnlyJson,
    depth: int,
    path: _KeyPath = (),
) -> Iterator[tuple[_KeyPath, _Values]]:
    """Find lists with an entry per layer, and mappings by layer number (`per_layer_config`)."""
    for key, value in part.items():
        is_nested_config = key.endswith("_config") and key != "per_layer_config"
        if _NOT_PER_LAYER.search(key) or key in _RULE_LIST_KEYS or is_nested_config:
            continue
        key_path = (*path, key)
        if isinstance(value, (list, tuple)) and len(value) == depth:
            yield key_path, tuple(value)
        elif (
            isinstance(value, Mapping)
            and "layer" in key
            and _has_numbers_as_keys(value)
        ):
            by_layer = {int(number): entry for number, entry in value.items()}
            entries = [by_layer.get(layer) for layer in range(depth)]
            yield key_path, tuple(entries)
        elif isinstance(value, Mapping):
            yield from _find_lists(value, depth, key_path)


def _has_numbers_as_keys(value: ReadOnlyJson) -> bool:
    return bool(value) and all(str(key).isdecimal() for key in value)


def _check_movable(current: _PerLayer) -> None:
    """Check that nothing in the config belongs to a place in the network and not to a layer."""
    # Gemma 3n: each layer reads its own columns of the table.
    if current.text.get("hidden_size_per_layer_input"):
        raise CheckpointError(
            "config.json: layers of this architecture cannot move: it has one table of embeddings "
            "for all layers (hidden_size_per_layer_input); merge it without layer ranges"
        )
    for key, value in current.text.items():
        if (
            key in _RULE_LIST_KEYS
            or (key,) in current.lists
            or not _LAYER_NUMBERS.search(key)
        ):
            continue
        if (
            isinstance(value, list)
            and value
            and all(isinstance(entry, int) for entry in value)
        ):
            raise CheckpointError(
                f"config.json: {key}: expected a list with one entry per layer, got {value}; it "
                "is not known how it changes when layers move: merge this architecture without "
                "layer ranges"
            )


def _set_depth(
    part: ReadOnlyJson,
    old: int,
    new: int,
) -> None:
    assert isinstance(part, dict)
    for key in (*_DEPTH_KEYS, *_DECODER_DEPTH_KEYS, "num_blocks"):
        if part.get(key) == old:
            part[key] = new


def _write_lists(
    text: JsonObject,
    current: _PerLayer,
    wanted: _PerLayer,
) -> None:
    for path, entries in wanted.lists.items():
        part = text
        for key in path[:-1]:
            part = part.setdefault(key, {})
        last_key = path[-1]
        # What was a mapping by layer number stays one; layers without an entry are left out.
        if isinstance(_value_at(current.text, path), Mapping):
            part[last_key] = {}
            for layer, entry in enumerate(entries):
                if entry is not None:
                    part[last_key][str(layer)] = entry
        else:
            part[last_key] = list(entries)


def _write_rules(
    text: JsonObject,
    current: _PerLayer,
    wanted: _PerLayer,
) -> None:
    for index, facts in wanted.facts.items():
        rule = RULES[index]
        # Values that a class derives are not in `text`; they hold unless `text` replaces them.
        new_text = {**current.text, **text}
        if rule.facts(new_text, len(facts)) == facts:
            continue
        values = rule.solve(facts)
        if values is None:
            pattern = "".join("x" if fact else "." for fact in facts)
            raise CheckpointError(
                f"{' and '.join(rule.defaults)}: expected layers in a pattern that config.json can "
                f"express, got {pattern} (x: holds for the layer); take layers in the order of "
                "their kinds"
            )
        text.update(values)


def _verify(
    result: ReadOnlyJson,
    wanted: _PerLayer,
    depth: int,
) -> None:
    """Check that transformers reads from the new config what was written."""
    text = text_config(with_class_defaults(result))
    known = depths(text)
    if known and depth not in known:
        raise CheckpointError(
            f"config.json: cannot set the depth to {depth}: transformers still reads {known}"
        )
    # Some classes compute a list from other values and ignore the one in config.json.
    for path, entries in wanted.lists.items():
        actual = _value_at(text, path)
        if isinstance(actual, (list, tuple)) and tuple(actual) != entries:
            raise CheckpointError(
                f"config.json: {'.'.join(path)}: expected {list(entries)} for the layers of the "
                f"recipe, got {list(actual)}: the architecture fixes this pattern; take layers "
                "that follow it"
            )


def _value_at(part: object, path: _KeyPath) -> object:
    for key in path:
        part = part.get(key) if isinstance(part, Mapping) else None
    return part


def _copy_with_dtype(part: object, dtype: str) -> object:
    """A deep copy of a config with the dtype keys of every level set."""
    if isinstance(part, list):
        return [_copy_with_dtype(entry, dtype) for entry in part]
    if not isinstance(part, Mapping):
        return part
    result = {}
    for key, value in part.items():
        is_dtype = key in _DTYPE_KEYS and isinstance(value, str)
        result[key] = dtype if is_dtype else _copy_with_dtype(value, dtype)
    return result
