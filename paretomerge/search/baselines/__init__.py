"""Samplers from the literature, to compare MM-MO with on equal terms.

Most are a `Proposer` (see `paretomerge.search.point_sampler`): `MAPProposer`, `KinshipProposer`,
`EvolverProposer`, `M2N2Proposer` and `PolicyProposer`. `ScalarisedSampler` and `LLMSampler` are
Optuna samplers. `paretomerge.search.registry` gives each its short name.
"""
