"""Prompt sets from a folder: HumanEval and MBPP, in the formats in which they are published."""

import gzip
import json
from pathlib import Path


def humaneval(folder: Path) -> list[str]:
    """The 164 prompts of ``humaneval/HumanEval.jsonl.gz`` below ``folder``."""
    with gzip.open(folder / "humaneval" / "HumanEval.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line)["prompt"] for line in file]


def mbpp(folder: Path, count: int) -> list[str]:
    """``count`` evenly spaced problems of ``mbpp/mbpp.jsonl``: the task as a docstring and a third of the solution."""
    with open(folder / "mbpp" / "mbpp.jsonl", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    chosen = rows[:: max(1, len(rows) // count)][:count]
    return [
        f'"""{row["text"]}"""\n' + row["code"].replace("\r", "")[: max(20, len(row["code"]) // 3)] for row in chosen
    ]


def of_length(prompt_ids: list[list[int]], length: int) -> list[list[int]]:
    """A prompt of just ``length`` tokens from each one: cut at its end, or continued by those after it, in a circle."""
    whole = []
    for start in range(len(prompt_ids)):
        following, joined = start, []
        while len(joined) < length:
            joined += prompt_ids[following % len(prompt_ids)]
            following += 1
        whole.append(joined[:length])
    return whole
