"""Entry point of the command ``symplectic-adjoint``."""

from __future__ import annotations

import sys

from symplectic_adjoint._extras import MissingExtraError


def main() -> None:
    """Runs the command line, or says how to install what it needs."""
    try:
        from symplectic_adjoint.experiments.commands import app
    except MissingExtraError as error:
        sys.exit(f"error: {error}")
    app()


if __name__ == "__main__":
    main()
