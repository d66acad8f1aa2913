"""Prompt sets: HumanEval and MBPP from a folder or the hub, as they are published, and a small set of our own; the two
ways in which figures are decoded."""

import argparse
import gzip
import json
from collections.abc import Callable
from pathlib import Path

from decoding.compare import DEMO_PROMPTS

GREEDY, TOP_K = "greedy", "top-k 50, T = 1"
SETTINGS = {GREEDY: {}, TOP_K: {"do_sample": True, "top_k": 50, "temperature": 1.0}}  # arguments of ``generate``

# Beginnings of the kind that HumanEval has, written for this project: no network, no data set.
OWN = (
    *DEMO_PROMPTS,
    "def average(values: list[float]) -> float:\n"
    '    """ Return the mean of a non-empty list.\n    >>> average([1.0, 2.0, 3.0])\n    2.0\n    """',
    "def count_words(text: str) -> dict[str, int]:\n"
    '    """ Count how often each word occurs, upper and lower case alike.\n'
    "    >>> count_words('a b A')\n    {'a': 2, 'b': 1}\n    \"\"\"",
    'def is_sorted(items):\n    """ Whether no item is smaller than the one before it.\n'
    '    >>> is_sorted([1, 2, 2, 5])\n    True\n    """',
    "import json\n\n\ndef load_config(path, default=None):\n"
    '    """Read a JSON file; return ``default`` where there is no such file."""\n    try:',
    "import argparse\n\n\ndef parse_arguments():\n    parser = argparse.ArgumentParser(description=__doc__)",
    "from dataclasses import dataclass\n\n\n@dataclass\nclass Point:\n    x: float\n    y: float\n\n"
    "    def distance(self, other):",
    "def merge(first: list[int], second: list[int]) -> list[int]:\n"
    '    """ Merge two sorted lists into one sorted list.\n    >>> merge([1, 4], [2, 3])\n    [1, 2, 3, 4]\n    """',
    "import unittest\n\n\nclass TestQueue(unittest.TestCase):\n    def setUp(self):\n        self.queue = Queue()\n\n"
    "    def test_empty(self):",
    "def longest_common_prefix(words):\n    if not words:\n        return ''\n    prefix = words[0]\n"
    "    for word in words[1:]:",
)
HUMANEVAL, MBPP = "humaneval/HumanEval.jsonl.gz", "mbpp/mbpp.jsonl"
HUB = ("openai/openai_humaneval", "openai_humaneval/test-00000-of-00001.parquet")


def folder_with(name: str) -> Callable[[str], Path]:
    """The type of a command's flag: a folder that holds ``name``."""

    def folder(text: str) -> Path:
        if not (Path(text) / name).is_file():
            raise argparse.ArgumentTypeError(f"no {name} in {text}")
        return Path(text)

    return folder


def check_length(longest: int, new_tokens: int, context: int) -> None:
    """Raises ValueError where a prompt of ``longest`` tokens leaves no room for as many new ones in the oracle's
    context; the last one is drawn, and fed to nobody."""
    if longest + new_tokens > context + 1:
        raise ValueError(f"a prompt of {longest} tokens and {new_tokens} new ones exceed the context, {context}")


def humaneval(folder: Path) -> list[str]:
    """The 164 prompts of HUMANEVAL below ``folder``."""
    with gzip.open(folder / HUMANEVAL, "rt", encoding="utf-8") as file:
        return [json.loads(line)["prompt"] for line in file]


def humaneval_from_hub() -> list[str]:
    """The 164 prompts as the hub has them. Raises ValueError without a network or without pyarrow, which reads them."""
    from huggingface_hub import hf_hub_download

    try:
        from pyarrow import parquet
    except ImportError as error:
        raise ValueError("the hub's HumanEval is a Parquet file, which needs pyarrow: pip install pyarrow") from error
    repository, name = HUB
    try:
        path = hf_hub_download(repository, name, repo_type="dataset")
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{repository} cannot be reached: {reason}") from error
    return parquet.read_table(path, columns=["prompt"])["prompt"].to_pylist()


def mbpp(folder: Path, count: int) -> list[str]:
    """``count`` evenly spaced problems of MBPP below ``folder``: the task as a docstring, a third of the solution."""
    with open(folder / MBPP, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    count = min(count, len(rows))
    chosen = [rows[i * len(rows) // count] for i in range(count)]
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
