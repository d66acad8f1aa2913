"""Files that are whole or not there, and errors that name them."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written(directory: Path) -> Iterator[Path]:
    """A folder whose files move to ``directory``, by name, once all are written; until then what lies there stays.

    Raises OSError with their names for whatever a library raises where a disk is full.
    """
    unfinished = directory / ".unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)  # of a run that was killed
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        for file in sorted(unfinished.iterdir()):
            file.replace(directory / file.name)
    except Exception as error:
        names = ", ".join(sorted(file.name for file in unfinished.iterdir())) or "files"
        raise OSError(f"cannot write {names} in {directory}: {error}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


@contextmanager
def reading(path: Path, what: str = "") -> Iterator[None]:
    """Raises ValueError with the path for whatever a library raises where a file is missing, cut or another."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"cannot read {path}{what}: {type(error).__name__} {error}") from error
