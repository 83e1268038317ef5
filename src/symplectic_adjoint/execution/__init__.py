"""How steps and their transposes are run: by Python, or compiled."""


class Stuck(Exception):  # noqa: N818 - a signal, not an error
    """A compiled solve cannot reach its end; the eager loop finds and says why."""
