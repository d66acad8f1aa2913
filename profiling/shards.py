"""A long run in parts: which process has which prompts, and a journal from which a killed run goes on.

Started by ``torchrun``, every process takes every n-th prompt and appends its cases to a file of its own; in the end
the first process collects all of them over gloo, so machines need no common folder. Without ``torchrun`` there is one
process, and the same code. A case is one line, written in one go: it is there as a whole or not at all.
"""

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

PATIENCE = timedelta(days=1)  # how long the first to finish waits for the last


@dataclass(frozen=True)
class Shard:
    """This process among those of the run, as ``torchrun`` numbers them."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @classmethod
    def from_environment(cls) -> "Shard":
        """What ``torchrun`` says in the environment; without it, one process."""
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        given = [os.environ.get(name) for name in names]
        if None in given:
            return cls()
        return cls(*(int(value) for value in given))

    def start(self) -> None:
        """Meet the other processes, and take the GPU of this one."""
        if torch.cuda.is_available() and self.world_size > 1:
            torch.cuda.set_device(self.local_rank)
        if self.world_size > 1:
            dist.init_process_group("gloo", timeout=PATIENCE)

    def device(self, asked: str) -> str:
        """``asked``, or this process's GPU where several share a machine and it is not the CPU that was asked for."""
        if self.world_size > 1 and asked in ("auto", "cuda") and torch.cuda.is_available():
            return f"cuda:{self.local_rank}"
        return asked

    def part(self, items: Sequence) -> list:
        """The items of this process; those of all processes together are all, each once."""
        return list(items[self.rank :: self.world_size])

    def gather(self, value: Any) -> list[Any] | None:
        """``value`` of every process, in the first one; None in the others. All of them have to call it."""
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size if self.rank == 0 else None
        dist.gather_object(value, values, dst=0)
        return values

    def stop(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()


class Journal:
    """The cases that were measured: ``folder/rows-<rank>.jsonl``, one line a case, appended as they come.

    The first line of a file says what was measured with which code; a run goes on from files that say the same.
    """

    def __init__(self, folder: Path, shard: Shard, about: dict[str, Any], resume: bool):
        """Raises ValueError naming the first field in which a journal to go on from was made otherwise."""
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"rows-{shard.rank:03d}.jsonl"
        self.cases: dict[tuple, list[dict]] = {}
        about = json.loads(json.dumps(about, default=str))
        if resume:
            for file in sorted(folder.glob("rows-*.jsonl")):
                self._read(file, about, own=file == self.path)
        elif shard.rank == 0:
            for file in folder.glob("rows-*.jsonl"):  # of a run with more processes than this one
                if int(file.stem.split("-")[1]) >= shard.world_size:
                    file.unlink()
        if not resume or not self.path.exists() or not self.path.stat().st_size:
            self.path.write_text(json.dumps({"about": about}) + "\n", encoding="utf-8")

    def _read(self, file: Path, about: dict[str, Any], own: bool) -> None:
        text = file.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]  # what a killed process had begun to write is measured again
        if own and whole != text:
            file.write_text(whole, encoding="utf-8")
        lines = [json.loads(line) for line in whole.splitlines()]
        if not lines:
            return
        made = lines[0]["about"]
        for field in about.keys() | made.keys():
            if made.get(field) != about.get(field):
                raise ValueError(
                    f"{file} was made with {field} = {made.get(field)!r}, this run has {about.get(field)!r}: "
                    "give the same arguments, or leave --resume out to begin anew"
                )
        self.cases |= {tuple(line["case"]): line["rows"] for line in lines[1:]}

    def __contains__(self, case: Iterable) -> bool:
        return tuple(case) in self.cases

    def add(self, case: Iterable, rows: list[dict]) -> None:
        """Keep the rows of a case and append them to the file."""
        self.cases[tuple(case)] = rows
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"case": list(case), "rows": rows}) + "\n")


def merged(journals: Sequence[dict[tuple, list[dict]]]) -> list[dict]:
    """The rows of all cases of several journals, each case once, in the order of their keys."""
    cases = {case: rows for journal in journals for case, rows in journal.items()}
    return [row for case in sorted(cases) for row in cases[case]]
