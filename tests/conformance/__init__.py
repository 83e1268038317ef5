"""Suites that every method and every gradient strategy inherits from the registries."""
