"""Types of the reports' flags, so that a number nothing can be made of is refused before a model is loaded."""

import argparse
import math
from collections.abc import Callable


def at_least(least: int) -> Callable[[str], int]:
    """A whole number of at least ``least``. It raises ArgumentTypeError, which argparse prints, and ValueError."""

    def number(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {text}")
        return value

    return number


count = at_least(1)


def positive(text: str) -> float:
    """A finite number above 0. Raises like ``at_least``."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be above 0 and finite, got {text}")
    return value


def counts(text: str) -> list[int]:
    """Several, with commas between them."""
    return [count(part) for part in text.split(",")]
