"""Spaces of routes over the small models of the tests."""

from paretomerge.checkpoint.fold import FOLDS
from paretomerge.checkpoint.reader import Checkpoint
from paretomerge.space.sources import named_sources


def route_space(kind, pico, names, **settings):
    """A space of a kind over some of the `pico` models, in four blocks."""
    sources = named_sources([str(pico / name) for name in names])
    depths = {
        name: Checkpoint(path).architecture.depth for name, path in sources.items()
    }
    defaults = {"fold": FOLDS["llama"], "blocks": 4}
    return kind(str(pico / "base"), sources, depths, **(defaults | settings))
