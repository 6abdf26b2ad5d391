"""The one table of samplers: what `sampler: nsga2` in a study.yaml, the benchmarks and the documentation mean by a name.

A preset knows how long a search is and what is known before it: Optuna's own defaults are made for hundreds of trials.
"""

import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from math import comb
from types import MappingProxyType
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler

from paretomerge.errors import ConfigError, shorten, unknown_name
from paretomerge.search.baselines.evolver import Evolver
from paretomerge.search.baselines.kinship import Kinship
from paretomerge.search.baselines.m2n2 import M2N2
from paretomerge.search.baselines.map import Quadratic
from paretomerge.search.baselines.scalarised import cma
from paretomerge.search.options import check_option, resolve_seed
from paretomerge.search.point_sampler import PointSampler
from paretomerge.types import Conditions

Options = Mapping[str, Any]
_UNFIT = {
    "BaseSampler",
    "BaseGASampler",
    "BruteForceSampler",
    "GridSampler",
    "PartialFixedSampler",
}  # no searches of a given space


@dataclass(frozen=True)
class SearchProblem:
    """What a preset is fitted to.

    space, conditions: as for `Encoding`. objectives: m. starts: trials that are enqueued before the first proposal, the
    first `sources` of them the sources alone. trials: how many evaluations there will be. start: a good point, if known.
    importance: relative size of what a parameter moves.
    """

    space: Mapping[str, BaseDistribution]
    objectives: int
    seed: int = 0
    conditions: Conditions = field(default_factory=dict)
    starts: int = 0
    sources: int = 0
    trials: int = 60
    start: Mapping[str, Any] | None = None
    importance: Mapping[str, float] = field(default_factory=dict)

    @property
    def n_startup(self) -> int:
        """Trials before a model of the scores is first trusted."""
        return self.starts + 2 if self.starts else 10


Build = Callable[[SearchProblem, Options], BaseSampler]


@dataclass(frozen=True)
class Preset:
    """A row: the short name, problem and options -> sampler, how it proposes in one line, where that comes from."""

    name: str
    build: Build
    rule: str
    paper: str


def make(name: str, problem: SearchProblem, options: Options | None = None) -> BaseSampler:
    """The sampler of that name, a preset's or a class of `optuna.samplers`, with the user's options.

    Raises ConfigError for a name, an option or a value of one that it does not know.
    """
    if name in PRESETS:
        build = PRESETS[name].build
    elif name == "MMMOSampler":
        build = PRESETS["mmmo"].build
    elif name in _optuna_names():
        if name == "CmaEsSampler" and problem.objectives > 1:
            raise ConfigError(
                "sampler: CmaEsSampler takes one objective; for several choose `cma`, which shows it their weighted sum"
            )
        build = _optuna(name)
    else:
        raise ConfigError(
            f"sampler: {unknown_name('name', name, [*PRESETS, 'MMMOSampler', *_optuna_names()])}"
        )
    given = dict(options or {})
    if "seed" in given:
        check_option(f"sampler: {name}: seed", 0, given["seed"])
        given["seed"] = resolve_seed(given["seed"])
    try:
        return build(replace(problem, seed=resolve_seed(problem.seed)), given)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"sampler: {name}: expected options that it can take, got {shorten(given)}: {error}"
        ) from error


def _optuna_names() -> list[str]:
    return [
        name for name in optuna.samplers.__all__ if name.endswith("Sampler") and name not in _UNFIT
    ]


def _called(name: str, function: Callable[..., Any], defaults: Options, options: Options) -> Any:
    """`function` with the options, and with those of `defaults` that it takes; one that takes `**` checks its own."""
    accepted = inspect.signature(function).parameters
    if not any(p.kind == p.VAR_KEYWORD for p in accepted.values()):
        _check(name, options, accepted)
        for option, value in options.items():
            check_option(f"sampler: {name}: {option}", accepted[option].default, value)
        defaults = {key: value for key, value in defaults.items() if key in accepted}
    return function(**{**defaults, **options})


def _check(name: str, options: Options, accepted: Iterable[str]) -> None:
    known = set(accepted)
    for option in options:
        if option not in known:
            raise ConfigError(f"sampler: {unknown_name(f'option of {name}', option, known)}")


def _check_length(name: str, option: str, problem: SearchProblem, options: Options) -> None:
    given = options.get(option)
    if isinstance(given, (list, tuple)) and len(given) != problem.objectives:
        raise ConfigError(
            f"sampler: {name}: {option}: expected {problem.objectives} numbers, one per objective, got {len(given)}"
        )


def _optuna(
    name: str, defaults: Callable[[SearchProblem], dict[str, Any]] = lambda problem: {}
) -> Build:
    """A class of `optuna.samplers`."""

    def build(problem: SearchProblem, options: Options) -> BaseSampler:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", optuna.exceptions.ExperimentalWarning
            )  # our choice, not the user's
            made: BaseSampler = _called(
                name,
                getattr(optuna.samplers, name),
                {"seed": problem.seed} | defaults(problem),
                options,
            )
        return made

    return build


def _proposer(
    kind: type[Any] | None, defaults: Callable[[SearchProblem], dict[str, Any]] = lambda problem: {}
) -> Build:
    """A `PointSampler` with a proposer of that kind, or with none; an option is the one's or the other's."""
    name = kind.__name__ if kind else "qmc"
    own = {f.name for f in fields(kind) if f.init} if kind else set()

    def build(problem: SearchProblem, options: Options) -> BaseSampler:
        outer: dict[str, Any] = {"seed": problem.seed, "n_startup": problem.n_startup}
        _check(name, options, own | set(outer))
        proposer = (
            kind(**{**defaults(problem), **{k: v for k, v in options.items() if k in own}})
            if kind
            else None
        )
        outer |= {key: value for key, value in options.items() if key in outer or key not in own}
        return PointSampler(proposer, space=problem.space, conditions=problem.conditions, **outer)

    return build


def _mmmo(problem: SearchProblem, options: Options) -> BaseSampler:
    from paretomerge.search.mmmo.sampler import MMMOSampler, Settings

    _check(
        "mmmo",
        options,
        [
            "seed",
            "reference",
            "reference_trials",
            "importance",
            *(f.name for f in fields(Settings)),
        ],
    )
    _check_length("mmmo", "reference", problem, options)
    defaults = {
        "seed": problem.seed,
        "space": dict(problem.space),
        "conditions": problem.conditions,
        "n_startup": problem.n_startup,
        "reference_trials": problem.sources or None,
        "importance": problem.importance,
    }
    made: BaseSampler = _called("MMMOSampler", MMMOSampler, defaults, options)
    return made


def _cma(problem: SearchProblem, options: Options) -> BaseSampler:
    _check_length("cma", "weights", problem, options)
    made: BaseSampler = _called(
        "cma", cma, {"seed": problem.seed, "space": problem.space, "start": problem.start}, options
    )
    return made


def _llm(problem: SearchProblem, options: Options) -> BaseSampler:
    """`inner`, another preset's name, proposes when it is not the language model's turn."""
    from paretomerge.endpoint import Endpoint
    from paretomerge.search.baselines.llm import LLMSampler

    accepted = {
        *inspect.signature(LLMSampler).parameters,
        *inspect.signature(Endpoint).parameters,
    } - {"connection"}
    _check("llm", options, accepted)
    inner = options.get("inner", "mmmo")
    if inner == "llm":
        raise ConfigError("sampler: llm: inner: expected the name of another sampler, got 'llm'")
    rest = {key: value for key, value in options.items() if key != "inner"}
    defaults = {
        "seed": problem.seed,
        "space": dict(problem.space),
        "conditions": problem.conditions,
    }
    return LLMSampler(make(inner, problem), **{**defaults, **rest})


def _population(problem: SearchProblem) -> dict[str, Any]:
    """A third of the trials, so that there are at least two generations of children."""
    return {"population_size": min(max(problem.trials // 3, 10), 50)}


def _nsga3(problem: SearchProblem, options: Options) -> BaseSampler:
    """No more reference directions than members."""
    size, m = int((_population(problem) | dict(options))["population_size"]), problem.objectives
    parts = max((p for p in range(1, size + 1) if comb(p + m - 1, m - 1) <= size), default=1)
    return _optuna("NSGAIIISampler", _population)(
        problem, {"dividing_parameter": parts if m > 1 else 1, **options}
    )


def _tpe(problem: SearchProblem) -> dict[str, Any]:
    return {"multivariate": True, "group": True, "n_startup_trials": problem.n_startup}


def _gp(problem: SearchProblem) -> dict[str, Any]:
    return {"n_startup_trials": problem.n_startup, "warn_independent_sampling": False}


def _evolver(problem: SearchProblem) -> dict[str, Any]:
    return {"population": min(max(problem.trials // 5, 8), 40)}


def _policy(problem: SearchProblem, options: Options) -> BaseSampler:
    from paretomerge.search.baselines.policy import Policy  # and with it torch

    known = {
        "n_startup": problem.starts or problem.n_startup,
        **options,
    }  # where starts are known, a random point would tell little
    build = _proposer(Policy, lambda problem: {"starts": known["n_startup"], "seed": problem.seed})
    return build(problem, known)


def _m2n2(problem: SearchProblem) -> dict[str, Any]:
    return {"members": min(max(problem.trials // 4, 8), 20)}


_TABLE = (
    Preset(
        "mmmo",
        _mmmo,
        "expected hypervolume improvement; MM-MO, mended",
        "Li et al. 2024, arXiv 2407.00487",
    ),
    Preset(
        "random",
        _optuna("RandomSampler"),
        "every parameter uniformly at random",
        "Bergstra & Bengio 2012, JMLR 13",
    ),
    Preset(
        "qmc",
        _proposer(None),
        "a scrambled Sobol sequence: fills the space evenly",
        "Sobol 1967; Owen 1998",
    ),
    Preset(
        "nsga2",
        _optuna("NSGAIISampler", _population),
        "genetic, by front and crowding",
        "Deb et al. 2002, IEEE TEVC 6(2)",
    ),
    Preset("nsga3", _nsga3, "genetic, by front and directions", "Deb & Jain 2014, IEEE TEVC 18(4)"),
    Preset(
        "tpe",
        _optuna("TPESampler", _tpe),
        "ratio of the densities of good and bad points",
        "Ozaki et al. 2022, JAIR 73",
    ),
    Preset(
        "gp",
        _optuna("GPSampler", _gp),
        "Gaussian processes, expected hypervolume improvement",
        "Optuna's GPSampler",
    ),
    Preset(
        "cma",
        _cma,
        "CMA-ES on a weighted sum or Tchebycheff scalar",
        "Hansen & Ostermeier 2001; Akiba et al. 2025, arXiv 2403.13187",
    ),
    Preset(
        "map",
        _proposer(Quadratic),
        "a quadratic per objective, NSGA-III on them",
        "Li et al. 2024, arXiv 2406.07529",
    ),
    Preset(
        "kinship",
        _proposer(Kinship),
        "means of the best pairs, and of the best and its least kin",
        "Hu et al. 2024, arXiv 2410.12613",
    ),
    Preset(
        "evolver",
        _proposer(Evolver, _evolver),
        "differential evolution, children against their parents",
        "Du et al. 2024, arXiv 2406.12208; Kukkonen & Lampinen 2005",
    ),
    Preset(
        "m2n2",
        _proposer(M2N2, _m2n2),
        "examples as shared resources, mates that complement",
        "Abrantes et al. 2025, arXiv 2508.16204",
    ),
    Preset(
        "policy",
        _policy,
        "a recurrent network decides one by one, trained by PPO",
        "HM3, arXiv 2409.18893",
    ),
    Preset(
        "llm",
        _llm,
        "a language model reads the log and proposes",
        "Liu et al. 2023, arXiv 2310.12541",
    ),
)

PRESETS: Mapping[str, Preset] = MappingProxyType({preset.name: preset for preset in _TABLE})
"""Short name -> preset."""
