"""What rows of results say of where they come from and of how they ended: shapes, commits, failures."""

import json
import time
from pathlib import Path

import pytest
import torch

from decoding.decoder import BUNDLED as FOLDER
from kernels import reference
from profiling import machine
from profiling.kernels import SPENT, Setting, count_failures, guarded
from profiling.rows import Rows
from profiling.shapes import BUNDLED

CPU = torch.device("cpu")


def test_what_there_was_no_time_for_is_no_failure():
    """It has a row that says so; what raised, and a red check, count."""
    rows = Rows(None, "", {"rehearsal": True, "commit": "abc"})
    late, in_time = (
        Setting(torch.device("cpu"), torch.float32, reference, 1, 1, time.monotonic() + seconds, rows)
        for seconds in (-1.0, 60.0)
    )

    def broken(setting, described):
        raise RuntimeError("no kernel image")

    guarded(late, broken, {"operation": "a"})
    assert rows.rows[-1]["failure"] == SPENT and count_failures(rows.rows) == 0
    guarded(in_time, broken, {"operation": "b"})
    assert "no kernel image" in rows.rows[-1]["failure"] and count_failures(rows.rows) == 1
    rows.add(operation="c", check="red")
    rows.add(operation="d", check="green")
    assert count_failures(rows.rows) == 2


@pytest.mark.parametrize("name", BUNDLED)
def test_the_bundled_shapes_are_those_of_the_models(name):
    config = json.loads((FOLDER / name / "config.json").read_text())
    fields = ("n_layer", "n_embd", "n_head", "vocab_size", "n_positions")
    shape = BUNDLED[name]
    assert [config[field] for field in fields] == [shape.layers, shape.width, shape.heads, shape.vocab, shape.positions]


def test_a_tree_without_git_is_named_by_the_environment(monkeypatch):
    """As on a machine that got the files alone: the commit that was told, or none; with git, that of the tree."""
    monkeypatch.setenv(machine.COMMIT, "abc1234")
    assert machine.describe(CPU)["commit"] != "abc1234" or not (Path(machine.__file__).parent.parent / ".git").exists()

    def no_git(*args, **kwargs):
        raise FileNotFoundError("git")

    monkeypatch.setattr(machine.subprocess, "run", no_git)
    assert machine.describe(CPU)["commit"] == "abc1234"
    monkeypatch.delenv(machine.COMMIT)
    assert machine.describe(CPU)["commit"] == "unknown"


def test_a_row_names_the_device_it_is_of(monkeypatch):
    """Not the GPU that is there as well."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    assert machine.describe(CPU)["device"] != "a card"
    assert machine.describe(torch.device("cuda"))["device"] == "a card"
