"""Errors of the data layer."""

from __future__ import annotations

from symplectic_adjoint._errors import ArgumentError


class DataError(ArgumentError):
    """Data that cannot be used: the message says where, why and what to do."""


class DataNotFoundError(DataError, FileNotFoundError):
    """Neither the name of a known data set nor an existing file."""
