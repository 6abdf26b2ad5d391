"""All recipes of the suite by name: those by hand (corners) and those drawn at random from a fixed seed.

A recipe is YAML in which `$name` stands for the folder of a model of `checkpoints.build`.
"""

import random
import re
import textwrap
from pathlib import Path
from typing import Any

import yaml

DRAWN = 48


def models(
    method: str,
    sources: dict[str, dict[str, Any]],
    base: str | None,
    parameters: dict[str, Any] | None = None,
    **top: Any,
) -> str:
    """A recipe with `models:`, computed in float32."""
    listed = [
        {"model": name, **({"parameters": settings} if settings else {})}
        for name, settings in sources.items()
    ]
    return dump(
        {
            "merge_method": method,
            "base_model": base,
            "models": listed,
            "parameters": parameters,
            **top,
        }
    )


def dump(recipe: dict[str, Any]) -> str:
    """YAML without empty entries; `dtype: float32` unless the recipe says otherwise."""
    return yaml.safe_dump(
        {"dtype": "float32"}
        | {key: value for key, value in recipe.items() if value is not None},
        sort_keys=False,
    )


def write(text: str, folder: Path, file: Path) -> Path:
    """Put the recipe into `file`, with `$name` replaced by the model of that name in `folder`."""
    text = re.sub(
        r"\$([\w-]+)", lambda found: str(folder / found.group(1)), textwrap.dedent(text)
    )
    file.write_text(text, encoding="utf-8")
    return file


def all_recipes() -> dict[str, str]:
    from tests.conformance.grammar_recipes import GRAMMAR
    from tests.conformance.method_recipes import AVERAGES, DELTAS
    from tests.conformance.tokenizer_recipes import TOKENIZERS

    return AVERAGES | DELTAS | GRAMMAR | TOKENIZERS | drawn()


def drawn(count: int = DRAWN) -> dict[str, str]:
    """Random recipes, the same in every run; each method in turn so that none is left to luck."""
    generator = random.Random(0)
    methods = list(_DRAW)
    return {
        f"drawn-{i:02d}-{methods[i % len(methods)]}": _draw_one(
            generator, methods[i % len(methods)]
        )
        for i in range(count)
    }


# Method -> settings of a source, settings of the whole merge, least and most sources besides the base; base: needed, one of the two, or none.
_DRAW: dict[str, tuple[tuple[str, ...], tuple[str, ...], int, int, bool]] = {
    "linear": (("weight",), ("normalize",), 1, 3, False),
    "slerp": ((), ("t",), 1, 1, True),
    "nuslerp": (("weight",), ("nuslerp_flatten", "nuslerp_row_wise"), 2, 2, False),
    "multislerp": (("weight",), (), 2, 3, False),
    "karcher": ((), ("max_iter",), 2, 3, False),
    "task_arithmetic": (("weight",), ("lambda", "normalize"), 1, 3, True),
    "ties": (("weight", "density"), ("lambda", "normalize"), 1, 3, True),
    "breadcrumbs": (
        ("weight", "density", "gamma"),
        ("lambda", "normalize"),
        1,
        3,
        True,
    ),
    "breadcrumbs_ties": (
        ("weight", "density", "gamma"),
        ("lambda", "normalize"),
        1,
        3,
        True,
    ),
    "sce": ((), ("select_topk",), 2, 3, True),
    "model_stock": ((), ("filter_wise",), 2, 3, True),
    "passthrough": (("scale",), (), 1, 1, False),
}
_FAMILIES = {"": 4, "wide-": 2, "qwen-": 3, "gpt2-": 3}
_FILTERS = {
    "gpt2-": ("attn", "mlp", "ln_1", "h.1."),
    "": ("self_attn", "mlp.up_proj", "norm", "layers.1."),
}
_RANGES = {
    # weights may be negative but not sum to 0, where methods differ on purpose (see deviations.py)
    "weight": lambda r: r.choice(
        (round(r.uniform(0.2, 1.5), 2), round(r.uniform(-0.15, 0.0), 2))
    ),
    "density": lambda r: round(r.uniform(0.1, 0.9), 2),
    "gamma": lambda r: round(r.uniform(0.01, 0.3), 3),
    "lambda": lambda r: round(r.uniform(0.3, 1.5), 2),
    "t": lambda r: round(r.uniform(0.0, 1.0), 2),
    "select_topk": lambda r: round(r.uniform(0.1, 1.0), 2),
    "scale": lambda r: round(r.uniform(0.5, 2.0), 2),
    "max_iter": lambda r: r.randint(1, 12),
}


def _draw_one(generator: random.Random, method: str) -> str:
    own, whole, least, most, with_base = _DRAW[method]
    family = generator.choice(list(_FAMILIES))
    experts = generator.sample(("ada", "bob", "cyd"), generator.randint(least, most))
    recipe: dict[str, Any] = {"merge_method": method}
    if with_base:
        recipe["base_model"] = f"${family}base"
    parameters = {
        name: _setting(generator, name, family)
        for name in whole
        if generator.random() < 0.7 or name == "t"
    }
    if parameters:
        recipe["parameters"] = parameters

    def source(expert: str, first: bool) -> dict[str, Any]:
        # the first weight is 1, the others small if negative: no sum is 0
        settings = {
            name: 1.0
            if first and name == "weight"
            else _setting(generator, name, family)
            for name in own
        }
        return {
            "model": f"${family}{expert}",
            **({"parameters": settings} if settings else {}),
        }

    if generator.random() < 0.5:
        recipe["models"] = [source(expert, i == 0) for i, expert in enumerate(experts)]
        return dump(recipe)
    listed = (
        [*experts, "base"] if with_base else experts
    )  # mergekit adds an unlisted base to `models` only
    ranges = _cut(generator, _FAMILIES[family])
    if family == "qwen-":
        # Its depth must stay: see `stacked-qwen` in deviations.py.
        ranges = [(0, _FAMILIES[family])]
    pieces = []
    for first, end in ranges:
        sources = [
            source(e, i == 0) if e != "base" else {"model": f"${family}base"}
            for i, e in enumerate(listed)
        ]
        pieces.append({"sources": [s | {"layer_range": [first, end]} for s in sources]})
    return dump(recipe | {"slices": pieces})


def _cut(generator: random.Random, depth: int) -> list[tuple[int, int]]:
    """One to three ranges of layers, overlapping or repeated as luck has it."""
    ranges = []
    for _ in range(generator.randint(1, 3)):
        first = generator.randrange(depth)
        ranges.append((first, generator.randint(first + 1, depth)))
    return ranges


def _setting(generator: random.Random, name: str, family: str) -> Any:
    """A scalar, a gradient, or filters; options that are not numbers stay scalars."""
    if name not in _RANGES:
        return generator.choice((True, False))
    if name == "max_iter":
        return _RANGES[name](generator)
    kind = generator.random()
    if kind < 0.4:
        return _RANGES[name](generator)
    gradient = [_RANGES[name](generator) for _ in range(generator.randint(2, 5))]
    if kind < 0.7:
        return gradient
    filters = generator.sample(
        _FILTERS.get(family, _FILTERS[""]), generator.randint(1, 2)
    )
    entries: list[dict[str, Any]] = [
        {"filter": f, "value": _RANGES[name](generator)} for f in filters
    ]
    return [*entries, {"value": generator.choice((gradient, _RANGES[name](generator)))}]
