"""Numbers that a report can make nothing of are refused by its flags, before anything is loaded."""

import argparse
import importlib
import sys

import pytest

from profiling.flags import at_least, count, counts, positive
from profiling.prompts import check_length


@pytest.mark.parametrize(
    "report, flag",
    [
        ("agreement", "--count"),
        ("demo", "--repeats"),
        ("kernels", "--rows"),
        ("sampler", "--samples"),
        ("paper", "--seeds"),
        ("suite", "--samples"),
        ("timeline", "--tokens"),
    ],
)
def test_no_report_counts_to_nothing(report, flag, monkeypatch, capsys):
    module = importlib.import_module(f"profiling.{report}")
    monkeypatch.setattr(sys, "argv", [report, flag, "0"])
    with pytest.raises(SystemExit) as stopped:
        module.main()
    assert stopped.value.code == 2
    assert f"argument {flag}: must be at least 1, got 0" in capsys.readouterr().err


def test_counts_are_whole_numbers_with_commas():
    assert counts("32,128,512") == [32, 128, 512]
    with pytest.raises(argparse.ArgumentTypeError, match="at least 1, got -3"):
        counts("5,-3")
    for text in ("1.5", "", "two"):
        with pytest.raises(ValueError):
            count(text)
    assert at_least(0)("0") == 0
    with pytest.raises(argparse.ArgumentTypeError, match="at least 0, got -1"):
        at_least(0)("-1")


@pytest.mark.parametrize("flag", ["--budget-minutes", "--oracle-minutes", "--draft-minutes"])
def test_a_suite_has_some_time(flag, monkeypatch, capsys):
    suite = importlib.import_module("profiling.suite")
    monkeypatch.setattr(sys, "argv", ["suite", flag, "0", "--out", "unused"])
    with pytest.raises(SystemExit) as stopped:
        suite.main()
    assert stopped.value.code == 2
    assert f"argument {flag}: must be above 0 and finite, got 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    "report, arguments, said",
    [
        ("demo", ["--dtype", "foo"], "dtype"),
        ("demo", ["--tokens", "1010"], "exceed the context, 1024"),
        ("timeline", ["--tokens", "1010"], "exceed the context, 1024"),
        ("agreement", ["--oracle", "no/such/folder"], "no/such/folder"),
        *((name, ["--out", "/proc/nothing"], "/proc/nothing") for name in ("agreement", "demo", "timeline")),
        ("grown", ["--out", "/proc/nothing"], "/proc/nothing"),
    ],
)
def test_what_the_user_can_mend_is_one_line(report, arguments, said, monkeypatch, capsys):
    module = importlib.import_module(f"profiling.{report}")
    monkeypatch.setattr(sys, "argv", [report, *arguments])
    with pytest.raises(SystemExit) as stopped:
        module.main()
    error = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 2 and error.startswith(f"profiling.{report}: ") and said in error


def test_the_last_token_needs_no_place_in_the_context():
    check_length(24, 1001, 1024)
    with pytest.raises(ValueError, match="a prompt of 24 tokens and 1002 new ones exceed the context, 1024"):
        check_length(24, 1002, 1024)


def test_a_time_is_a_finite_number():
    assert positive("0.5") == 0.5
    for text in ("-1", "nan", "inf"):
        with pytest.raises(argparse.ArgumentTypeError, match="above 0"):
            positive(text)
    with pytest.raises(ValueError):
        positive("soon")
