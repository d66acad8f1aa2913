"""Types of the reports' flags, so that a number nothing can be made of is refused before a model is loaded."""

import argparse


def count(text: str) -> int:
    """A whole number of at least 1. Raises ArgumentTypeError, which argparse prints beside the flag, and ValueError."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


def counts(text: str) -> list[int]:
    """The same, several with commas between them."""
    return [count(part) for part in text.split(",")]
