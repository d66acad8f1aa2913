"""What the reports' flags have in common: types of numbers, and what the user can mend said in one line."""

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


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


@contextmanager
def in_one_line(command: str, out: Path | None = None) -> Iterator[None]:
    """Exit code 2 and one line on standard error for what the user can mend: around what loads and checks, not around
    hours of work, whose errors need their traceback. The folder ``out`` is made first, so that nothing is
    lost for want of it."""
    try:
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
        yield
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"profiling.{command}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
