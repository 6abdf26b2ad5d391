"""From a front to one checkpoint: picking, comparing, and how optimistic the search scores are."""
