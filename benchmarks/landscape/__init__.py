"""What made the merge landscape of `paretomerge.problems`, and what its surrogate is worth.

    python -m benchmarks.landscape make      # merges and scores, 0.9 s each -> merges.npz
    python -m benchmarks.landscape fit       # the surrogate and its front -> surrogate.npz; minutes
    python -m benchmarks.landscape probe     # merges where the surrogate sees its front, and fits
    python -m benchmarks.landscape check     # cross-validation: the tables of docs/lab/landscape.md
    python -m benchmarks.landscape verify    # merges and scores a dozen points of its front

`make` can be interrupted and continues. The data files are in paretomerge/problems/data/.
"""
