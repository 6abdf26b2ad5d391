"""The table of samplers: what a name such as `sampler: nsga2` in a study.yaml means.

To add a sampler:

1. Write it: a `Proposer` in `paretomerge/search/baselines/` if it proposes points of the unit cube
   (a dataclass; its fields are the options), or any `optuna.samplers.BaseSampler`.
2. Add a row to `_TABLE`: its name, how it is built, how it proposes in one line, and its paper.
3. How it is built: `_from_proposer(MyProposer)`, `_from_optuna("MySampler")`, or a function of your
   own that takes a `SearchProblem` and the user's options and returns a sampler.
4. If its options depend on the problem, pass `defaults`, a function of the `SearchProblem`.
5. Add its row to `docs/samplers.md`; a test compares the two tables.
6. Run `pytest tests/search/test_registry.py`: it checks the contract of every row.
"""

import inspect
import warnings
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module
from types import MappingProxyType
from typing import Any, Literal

import optuna
from optuna.samplers import BaseSampler

from paretomerge.errors import ConfigError, shorten, unknown_name
from paretomerge.pareto.preference import MEAN, Prefer
from paretomerge.search.baselines.evolver import EvolverProposer
from paretomerge.search.baselines.m2n2 import M2N2Proposer
from paretomerge.search.baselines.map import MAPProposer
from paretomerge.search.baselines.model_kinship import KinshipProposer
from paretomerge.search.baselines.nsga3 import largest_divisions
from paretomerge.search.baselines.scalarised import cma
from paretomerge.search.encoding import Space
from paretomerge.search.options import check_option, resolve_seed
from paretomerge.search.point_sampler import PointSampler, Proposer
from paretomerge.search.preferring import PreferringSampler
from paretomerge.types import Conditions, Params

Options = Mapping[str, Any]
"""Options of a sampler: name -> value, as they stand in a study.yaml."""

PREFER_SHARE = 0.1
"""The share of the trials, the last ones, that improve a preference (docs/lab/picks.md)."""

# Trials before a sampler is first asked, where there are no baseline recipes.
_DEFAULT_STARTUP = 10
# Classes of Optuna that do not search a given space.
_UNSUITABLE = {
    "BaseSampler",
    "BaseGASampler",
    "BruteForceSampler",
    "GridSampler",
    "PartialFixedSampler",
}
# Classes of Optuna -> the library that each imports when it first proposes, in the middle of a
# search. Without greenlet, GPSampler would only say so and propose more slowly.
_IMPORTED_LATE = {"GPSampler": "greenlet", "CmaEsSampler": "cmaes"}


@dataclass(frozen=True)
class SearchProblem:
    """What a sampler is set up for.

    Attributes:
        space: The parameters.
        objectives: The number of objectives.
        seed: Any integer.
        conditions: When each parameter is active.
        starts: The number of trials that are enqueued before the first proposal.
        sources: How many of these, the first ones, are the sources alone.
        trials: The number of trials of the search, `starts` included.
        start: A good point, if one is known.
        importance: The relative size of what each parameter changes.
        prefer: What the user wants: weights `(m,)` of the objectives, or `mean`.
    """

    space: Space
    objectives: int
    seed: int = 0
    conditions: Conditions = field(default_factory=dict)
    starts: int = 0
    sources: int = 0
    trials: int = 60
    start: Params | None = None
    importance: Mapping[str, float] = field(default_factory=dict)
    prefer: Prefer | None = None

    @property
    def prefer_after(self) -> int:
        """The number of trials before the first one that improves the preference."""
        return round((1 - PREFER_SHARE) * self.trials)

    @property
    def n_startup(self) -> int:
        """The number of trials before a sampler first relies on a model of the scores."""
        if self.starts:
            return self.starts + 2
        return _DEFAULT_STARTUP


Build = Callable[[SearchProblem, Options], BaseSampler]
"""Builds a sampler for a problem with the user's options."""

Defaults = Callable[[SearchProblem], Options]
"""The options that depend on the problem."""


@dataclass(frozen=True)
class Preset:
    """A row of the table.

    Attributes:
        name: The name in a study.yaml.
        build: Builds the sampler.
        rule: How it proposes, in one line.
        paper: Where it comes from.
        prefers: How a preference changes its proposals. `own`: the sampler takes it itself.
            `shared`: the last trials are proposed by MM-MO on the preference alone. `ignored`: not
            at all.
    """

    name: str
    build: Build
    rule: str
    paper: str
    prefers: Literal["own", "shared", "ignored"] = "shared"


def make(
    name: str,
    problem: SearchProblem,
    options: Options | None = None,
) -> BaseSampler:
    """Build a sampler by its name.

    Args:
        name: A preset, or the name of a class in `optuna.samplers`.
        problem: What the sampler is set up for.
        options: The user's options. They override those that follow from the problem.

    Returns:
        The sampler.

    Raises:
        ConfigError: The name, an option or its value is invalid.
    """
    build = _find_build(name, problem)
    options = dict(options or {})
    # Optuna's samplers take seeds of 32 bits only, so any other integer is mapped to one.
    if "seed" in options:
        check_option(f"sampler: {name}: seed", 0, options["seed"])
        options["seed"] = resolve_seed(options["seed"])
    seed = resolve_seed(problem.seed)
    seeded = replace(problem, seed=seed)
    try:
        sampler = build(seeded, options)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"sampler: {name}: invalid options {shorten(options)}: {error}"
        ) from error
    if problem.prefer is not None and prefers(name) == "shared":
        return preferring(sampler, seeded)
    return sampler


def prefers(name: str) -> str:
    """How a preference changes a sampler's proposals; see `Preset.prefers`.

    Args:
        name: A preset, or the name of a class in `optuna.samplers`.

    Returns:
        `own`, `shared` or `ignored`.
    """
    if name in ("RandomSampler", "QMCSampler"):
        return "ignored"
    if name == "MMMOSampler":
        return "own"
    return PRESETS[name].prefers if name in PRESETS else "shared"


def preferring(sampler: BaseSampler, problem: SearchProblem) -> BaseSampler:
    """Let a sampler leave its last trials to MM-MO on a preference alone.

    Args:
        sampler: The sampler.
        problem: What it is set up for, with a preference.

    Returns:
        A sampler that asks one, and then the other.
    """
    toward = _mmmo(problem, {})
    return PreferringSampler(sampler, toward, problem.prefer_after)


def _find_build(name: str, problem: SearchProblem) -> Build:
    if name in PRESETS:
        return PRESETS[name].build
    if name == "MMMOSampler":
        return PRESETS["mmmo"].build
    optuna_names = []
    for sampler in optuna.samplers.__all__:
        if sampler.endswith("Sampler") and sampler not in _UNSUITABLE:
            optuna_names.append(sampler)
    if name not in optuna_names:
        names = [*PRESETS, "MMMOSampler", *optuna_names]
        raise ConfigError(f"sampler: {unknown_name('name', name, names)}")
    if name == "CmaEsSampler" and problem.objectives > 1:
        raise ConfigError(
            "sampler: CmaEsSampler takes one objective; for several choose `cma`, which shows it "
            "their weighted sum"
        )
    return _from_optuna(name)


# How samplers are built.


def _no_defaults(problem: SearchProblem) -> Options:
    return {}


def _from_optuna(name: str, defaults: Defaults = _no_defaults) -> Build:
    """Build the class of that name in `optuna.samplers`."""

    def build(problem: SearchProblem, options: Options) -> BaseSampler:
        _check_library(name)
        sampler = getattr(optuna.samplers, name)
        values = {"seed": problem.seed, **defaults(problem)}
        with warnings.catch_warnings():
            # Experimental classes are chosen here, so the user need not be warned.
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return _call(name, sampler, values, options)

    return build


def _from_proposer(
    proposer: Callable[..., Proposer], defaults: Defaults = _no_defaults
) -> Build:
    """Build a `PointSampler` that asks the proposer; each option goes to the one that takes it."""

    def build(problem: SearchProblem, options: Options) -> BaseSampler:
        outer = {"seed": problem.seed, "n_startup": problem.n_startup}
        # Each option goes to the proposer or to the `PointSampler`; `seed` may go to both.
        accepted = set(inspect.signature(proposer).parameters)
        known = accepted | set(outer)
        _check_names(proposer.__name__, options, known)
        values = {**outer, **defaults(problem), **options}
        inner = _restricted(values, accepted)
        return _point_sampler(problem, proposer(**inner), values)

    return build


def _point_sampler(
    problem: SearchProblem, proposer: Proposer | None, values: Options
) -> PointSampler:
    return PointSampler(
        proposer,
        space=problem.space,
        conditions=problem.conditions,
        seed=values["seed"],
        n_startup=values["n_startup"],
    )


def _qmc(problem: SearchProblem, options: Options) -> BaseSampler:
    """A `PointSampler` without a proposer continues through its Sobol sequence."""
    values = {"seed": problem.seed, "n_startup": problem.n_startup}
    _check_names("qmc", options, values)
    return _point_sampler(problem, None, {**values, **options})


def _mmmo(problem: SearchProblem, options: Options) -> BaseSampler:
    # Imported here because BoTorch takes seconds to import.
    from paretomerge.search.mmmo.sampler import MMMOSampler, Settings

    settings = inspect.signature(Settings).parameters
    accepted = [
        "seed",
        "reference",
        "reference_trials",
        "importance",
        "prefer",
        *settings,
    ]
    _check_names("mmmo", options, accepted)
    _check_length("mmmo", "reference", problem, options)
    defaults = {
        "seed": problem.seed,
        "space": dict(problem.space),
        "conditions": problem.conditions,
        "n_startup": problem.n_startup,
        # The default reference point comes from the sources alone.
        "reference_trials": problem.sources or None,
        "importance": problem.importance,
        "prefer": problem.prefer,
        "prefer_after": problem.prefer_after,
    }
    return _call("MMMOSampler", MMMOSampler, defaults, options)


def _nsga3(problem: SearchProblem, options: Options) -> BaseSampler:
    """NSGA-III with no more reference directions than members."""
    values = {**_genetic_defaults(problem), **options}
    population_size = int(values["population_size"])
    divisions = largest_divisions(problem.objectives, population_size)
    build = _from_optuna("NSGAIIISampler", _genetic_defaults)
    return build(problem, {"dividing_parameter": divisions, **options})


def _cma(problem: SearchProblem, options: Options) -> BaseSampler:
    _check_library("CmaEsSampler")
    _check_length("cma", "weights", problem, options)
    defaults: dict[str, Any] = {
        "seed": problem.seed,
        "space": problem.space,
        "start": problem.start,
    }
    # It has one goal anyway: the preference, unless the user has set weights.
    if problem.prefer is not None and problem.prefer != MEAN:
        defaults |= {"weights": list(problem.prefer), "kind": "tchebycheff"}
    return _call("cma", cma, defaults, options)


def _policy(problem: SearchProblem, options: Options) -> BaseSampler:
    # Imported here because it imports torch.
    from paretomerge.search.baselines.policy import PolicyProposer

    return _from_proposer(PolicyProposer, _policy_defaults)(problem, options)


def _llm(problem: SearchProblem, options: Options) -> BaseSampler:
    """The option `inner` is the name of the preset that makes the other proposals."""
    from paretomerge.endpoint import Endpoint
    from paretomerge.search.baselines.llm import LLMSampler

    # `connection` stands for the arguments of `Endpoint`.
    accepted = set(inspect.signature(LLMSampler).parameters) - {"connection"}
    connection = set(inspect.signature(Endpoint).parameters)
    _check_names("llm", options, accepted | connection)
    values = {
        "seed": problem.seed,
        "space": dict(problem.space),
        "conditions": problem.conditions,
        **options,
    }
    inner = values.pop("inner", "mmmo")
    if inner == "llm":
        raise ConfigError(
            "sampler: llm: inner: expected the name of another sampler, got 'llm'"
        )
    return LLMSampler(make(inner, problem), **values)


# Options that depend on the problem. Optuna's own defaults are made for hundreds of trials.


def _genetic_defaults(problem: SearchProblem) -> Options:
    """A third of the trials, so that there are at least two generations of children."""
    share = max(problem.trials // 3, 10)
    return {"population_size": min(share, 50)}


def _tpe_defaults(problem: SearchProblem) -> Options:
    return {"multivariate": True, "group": True, "n_startup_trials": problem.n_startup}


def _gp_defaults(problem: SearchProblem) -> Options:
    return {"n_startup_trials": problem.n_startup, "warn_independent_sampling": False}


def _evolver_defaults(problem: SearchProblem) -> Options:
    share = max(problem.trials // 5, 8)
    return {"population_size": min(share, 40)}


def _m2n2_defaults(problem: SearchProblem) -> Options:
    share = max(problem.trials // 4, 8)
    return {"archive_size": min(share, 20)}


def _policy_defaults(problem: SearchProblem) -> Options:
    # Where there are baseline recipes, random points would add little to them.
    return {"n_startup": problem.starts or problem.n_startup}


# Checks of the installation and of the user's options.


def _check_library(sampler: str) -> None:
    """Check that the library is installed that a class of Optuna imports late."""
    library = _IMPORTED_LATE.get(sampler)
    if library is None:
        return
    try:
        import_module(library)
    except ImportError as error:
        raise ConfigError(
            f"sampler: Optuna's {sampler} needs the library {library}, which is not installed: "
            "pip install 'paretomerge[search]'"
        ) from error


def _call(
    name: str, function: Callable[..., BaseSampler], defaults: Options, options: Options
) -> BaseSampler:
    """Call `function` with the options, and with those defaults that it accepts."""
    accepted = inspect.signature(function).parameters
    takes_any_option = any(p.kind == p.VAR_KEYWORD for p in accepted.values())
    # A function that takes any option checks them itself.
    if not takes_any_option:
        _check_names(name, options, accepted)
        for option, value in options.items():
            default = accepted[option].default
            check_option(f"sampler: {name}: {option}", default, value)
        defaults = _restricted(defaults, accepted)
    return function(**{**defaults, **options})


def _restricted(options: Options, accepted: Container[str]) -> Options:
    """The options with these names."""
    restricted = {}
    for name, value in options.items():
        if name in accepted:
            restricted[name] = value
    return restricted


def _check_names(
    name: str,
    options: Options,
    accepted: Iterable[str],
) -> None:
    names = set(accepted)
    for option in options:
        if option not in names:
            raise ConfigError(
                f"sampler: {unknown_name(f'option of {name}', option, names)}"
            )


def _check_length(
    name: str,
    option: str,
    problem: SearchProblem,
    options: Options,
) -> None:
    value = options.get(option)
    if isinstance(value, (list, tuple)) and len(value) != problem.objectives:
        raise ConfigError(
            f"sampler: {name}: {option}: expected {problem.objectives} numbers, one per "
            f"objective, got {len(value)}"
        )


_TABLE = (
    Preset(
        name="mmmo",
        build=_mmmo,
        rule="expected hypervolume improvement; MM-MO, mended",
        prefers="own",
        paper="Li et al. 2024, arXiv 2407.00487",
    ),
    Preset(
        name="random",
        build=_from_optuna("RandomSampler"),
        rule="every parameter uniformly at random",
        prefers="ignored",
        paper="Bergstra & Bengio 2012, JMLR 13",
    ),
    Preset(
        name="qmc",
        build=_qmc,
        rule="a scrambled Sobol sequence: fills the space evenly",
        prefers="ignored",
        paper="Sobol 1967; Owen 1998",
    ),
    Preset(
        name="nsga2",
        build=_from_optuna("NSGAIISampler", _genetic_defaults),
        rule="genetic, by front and crowding",
        paper="Deb et al. 2002, IEEE TEVC 6(2)",
    ),
    Preset(
        name="nsga3",
        build=_nsga3,
        rule="genetic, by front and directions",
        paper="Deb & Jain 2014, IEEE TEVC 18(4)",
    ),
    Preset(
        name="tpe",
        build=_from_optuna("TPESampler", _tpe_defaults),
        rule="ratio of the densities of good and bad points",
        paper="Ozaki et al. 2022, JAIR 73",
    ),
    Preset(
        name="gp",
        build=_from_optuna("GPSampler", _gp_defaults),
        rule="Gaussian processes, expected hypervolume improvement",
        paper="Optuna's GPSampler",
    ),
    Preset(
        name="cma",
        build=_cma,
        rule="CMA-ES on a weighted sum or Tchebycheff scalar",
        prefers="own",
        paper="Hansen & Ostermeier 2001; Akiba et al. 2025, arXiv 2403.13187",
    ),
    Preset(
        name="map",
        build=_from_proposer(MAPProposer),
        rule="a quadratic per objective, NSGA-III on them",
        paper="Li et al. 2024, arXiv 2406.07529",
    ),
    Preset(
        name="kinship",
        build=_from_proposer(KinshipProposer),
        rule="means of the best pairs, and of the best and its least kin",
        paper="Hu et al. 2024, arXiv 2410.12613",
    ),
    Preset(
        name="evolver",
        build=_from_proposer(EvolverProposer, _evolver_defaults),
        rule="differential evolution, children against their parents",
        paper="Du et al. 2024, arXiv 2406.12208; Kukkonen & Lampinen 2005",
    ),
    Preset(
        name="m2n2",
        build=_from_proposer(M2N2Proposer, _m2n2_defaults),
        rule="examples as shared resources, mates that complement",
        paper="Abrantes et al. 2025, arXiv 2508.16204",
    ),
    Preset(
        name="policy",
        build=_policy,
        rule="a recurrent network decides one by one, trained by PPO",
        paper="HM3, arXiv 2409.18893",
    ),
    Preset(
        name="llm",
        build=_llm,
        rule="a language model reads the log and proposes",
        paper="Liu et al. 2023, arXiv 2310.12541",
    ),
)

PRESETS: Mapping[str, Preset] = MappingProxyType(
    {preset.name: preset for preset in _TABLE}
)
"""Short name -> preset."""
