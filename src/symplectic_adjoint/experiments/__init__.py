"""Experiments that run the library on real data and report what they measured.

These modules need the packages of the extra ``cli``; importing them without says how to install it.
"""

from symplectic_adjoint._extras import require

for _module in ("numpy", "matplotlib", "typer", "rich"):
    require(_module)
