"""The record of a study on disk."""
