"""study.yaml as data, and the objects that it describes."""
