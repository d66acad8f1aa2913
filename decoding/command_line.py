"""The command that made a result, as a model card or a row of results may print it."""

from pathlib import Path


def printable(program: str, arguments: list[str]) -> str:
    """``program`` with its arguments; of a path that leads out of this tree only the last part is told."""
    return " ".join([program, *map(_without_folders, arguments)])


def _without_folders(argument: str) -> str:
    return f".../{Path(argument).name}" if argument.startswith(("/", "..", "~")) else argument
