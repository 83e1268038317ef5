"""This library and its peers on the same problems: ``python -m benchmarks``."""
