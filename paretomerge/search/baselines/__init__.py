"""Other samplers of the field, under the same interface."""
