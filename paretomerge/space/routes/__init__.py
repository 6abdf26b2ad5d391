"""Search spaces of routes through layers."""
