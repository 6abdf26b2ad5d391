"""Fast batched inference on the resident model."""
