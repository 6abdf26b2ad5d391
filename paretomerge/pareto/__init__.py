"""Mathematics of many objectives on arrays `(n, m)`, everything maximised."""
