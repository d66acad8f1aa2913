"""What the reports' Markdown is made of: tables, figures that may be missing, and where a finished report goes."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any


def table(header: Sequence[str], lines: Iterable[Sequence], columns: str = "") -> str:
    """A Markdown table; ``columns`` has l or r for each, where it stands; by default the first l, all others r."""
    rule = [{"l": "---", "r": "---:"}[side] for side in columns or "l" + "r" * (len(header) - 1)]
    return "\n".join("| " + " | ".join(map(str, cells)) + " |" for cells in (header, rule, *lines))


def number(value: float | None, form: str = ".2f", unit: str = "") -> str:
    """Empty where there is no value."""
    return "" if value is None else format(value, form) + unit


def publish(text: str, document: dict[str, Any], out: Path | None, name: str) -> None:
    """Print a report; where ``out`` is given, also write it there, beside the rows that it was made from."""
    print(text)
    if out:
        (out / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n")
        (out / f"{name}.md").write_text(text)
