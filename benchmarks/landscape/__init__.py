"""A merge landscape: real merges of the shipped specialists, each scored, and a surrogate fitted to them.

An optimiser can be tried on it in seconds, without a model (docs/landscape.md). From the repository's root:

    python -m benchmarks.landscape make      # merges and scores, 0.9 s each; stops and goes on as you like -> merges.npz
    python -m benchmarks.landscape fit       # the surrogate and its front -> surrogate.npz; minutes
    python -m benchmarks.landscape probe     # merges where the surrogate sees its front, so that `fit` learns better
    python -m benchmarks.landscape check     # cross-validation: the tables of docs/landscape.md
    python -m benchmarks.landscape verify    # merges a dozen points of the surrogate's front, and scores them
"""

from .landscape import Landscape
from .merges import Merges

__all__ = ["Landscape", "Merges"]
