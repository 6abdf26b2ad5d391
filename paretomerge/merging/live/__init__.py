"""Merges written into a loaded model, without touching the disk."""
