"""What a run of ``profiling.suite`` leaves to read: ``summary.md``, and all of it in one small ``suite.tar.gz``."""

import os
import re
import tarfile
import zlib
from pathlib import Path

from profiling.machine import signature
from profiling.markdown import number, table
from profiling.rows import write_whole
from profiling.suite_steps import Step

MAX_BYTES = 15_000_000
TESTS = "tests"  # the names of steps whose output is pytest's begin so
TABLE_LINES, LOG_LINES = 150, 25
WEIGHTS = (".safetensors", ".pt", ".npz", ".npy")
PACKED = (".gz", ".png")
SUMMARY, ARCHIVE = "summary.md", "suite.tar.gz"
_ENDED = "PASSED|FAILED|ERROR|SKIPPED|XFAIL"
_OUTCOME = re.compile(rf"^(\S+::\S.*?) ({_ENDED})", re.MULTILINE)
_OUTCOME_OF_WORKER = re.compile(rf"^\[gw\d+\] (?:\[ *\d+%\] )?({_ENDED}) (\S+::.*?) *$", re.MULTILINE)


def write_report(out: Path, document: dict, steps: list[Step]) -> None:
    """``summary.md`` and ``suite.tar.gz`` of the directory ``out``, which holds what the steps have written so far."""
    chosen, left_out = fitting_files(out)
    write_whole(out / SUMMARY, summary(out, document, steps, left_out))
    part = out / f"{ARCHIVE}.part"
    with tarfile.open(part, "w:gz") as archive:
        for path in [out / SUMMARY, *chosen]:
            archive.add(path, Path(out.name) / path.relative_to(out))
    os.replace(part, out / ARCHIVE)


def fitting_files(out: Path) -> tuple[list[Path], list[Path]]:
    """Files for the archive, smallest first, and the largest ones, which would make it too large; weights are neither.

    Half a megabyte is kept for the summary and what an archive adds.
    """
    files = [path for path in out.rglob("*") if path.is_file() and path.suffix not in (*WEIGHTS, ".part")]
    files = [path for path in files if path.name not in (SUMMARY, ARCHIVE)]
    chosen, left_out, total = [], [], 500_000
    for path in sorted(files, key=lambda path: path.stat().st_size):
        total += packed_size(path) if not left_out else 0
        (left_out if left_out or total > MAX_BYTES else chosen).append(path)
    return chosen, left_out


def packed_size(path: Path) -> int:
    """About what a file takes in the archive; one too large for it in any case is not read."""
    size = path.stat().st_size
    if path.suffix in PACKED or size > 50 * MAX_BYTES:
        return size
    return len(zlib.compress(path.read_bytes()))


def summary(out: Path, document: dict, steps: list[Step], left_out: list[Path]) -> str:
    """Conditions, failures, what ran and for how long, what did not, then the tables of each step."""
    facts, rows = document["about"], document["rows"]
    latest = {row["step"]: row for row in rows}
    title = "# Suite in miniature: toy sizes on a CPU, no result" if facts["rehearsal"] else "# Suite"
    lines = [title, "", f"{facts['device']}, {signature(facts, 'Triton')}"]
    names = [name for name in latest if name.startswith(TESTS)]
    failing = [test for name in names for test in failing_tests(out / "logs" / f"{name}.txt")]
    failed = [name for name, row in latest.items() if row["status"] != "ok"]
    if failing or failed:
        lines += ["", "## Failures", *(f"- {test}" for test in failing)]
        lines += [f"- {name}: {_ending(latest[name])}" for name in failed]
    ended = [
        [row["step"], row["call"], _ending(row), number(row["seconds"], ".0f"), number(row["limit"], ".0f")]
        for row in rows
    ]
    lines += ["", "## Steps", "", table(["step", "call", "ended", "seconds", "of at most"], ended, "lrlrr")]
    for step in steps:
        if step.name not in latest:
            missing = [str(path.relative_to(out)) for path in step.needs if not path.exists()]
            lines.append(f"| {step.name} | | {'needs ' + ', '.join(missing) if missing else 'no time yet'} | | |")
    if left_out:
        sizes = ", ".join(f"{path.relative_to(out)} ({path.stat().st_size / 1e6:.1f} MB)" for path in left_out)
        lines += ["", f"Too large for {ARCHIVE}: {sizes}."]
    for name in latest:
        lines += ["", f"## {name}", "", *_tables(out, name)]
    return "\n".join(lines) + "\n"


def _ending(row: dict) -> str:
    return row["status"] + (f" ({row['returncode']})" if row["returncode"] else "")


def outcomes(log: Path) -> dict[str, str]:
    """How each test ended, from pytest's -v output, which is there even where pytest was stopped."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    return dict(_OUTCOME.findall(text)) | {test: ended for ended, test in _OUTCOME_OF_WORKER.findall(text)}


def failing_tests(log: Path) -> list[str]:
    return [test for test, outcome in outcomes(log).items() if outcome in ("FAILED", "ERROR")]


def _tables(out: Path, name: str) -> list[str]:
    """The step's Markdown, or the end of its log where it wrote none."""
    log = out / "logs" / f"{name}.txt"
    if name.startswith(TESTS):
        found = list(outcomes(log).values())
        return [", ".join(f"{found.count(kind)} {kind.lower()}" for kind in dict.fromkeys(found)) or "none has ended"]
    tables = sorted((out / name).rglob("*.md"))
    if tables:
        texts = [path.read_text(encoding="utf-8").splitlines() for path in tables]
        return [_demoted(line) for text in texts for line in [*text[:TABLE_LINES], ""]]
    text = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
    return ["```", *text[-LOG_LINES:], "```"]


def _demoted(line: str) -> str:
    """Headings of a table below that of its step."""
    return f"##{line}" if line.startswith("#") else line
