"""Lineages: searches whose trials are merges of earlier trials (`space: {lineage: true}`)."""
