"""One command for a GPU that is there for a fixed time: tests, benchmarks, models, figures, in order of value.

    python -m profiling.suite --budget-minutes 10 --out DIR                    # call it again: it goes on
    python -m profiling.suite --budget-minutes 10 --out DIR --oracle ID --draft ID --draft2 DIR
    python -m profiling.suite --budget-minutes 10 --out DIR --models-first     # a chain is trained before the rest
    python -m profiling.suite --mini --budget-minutes 3 --out DIR              # the whole flow on a CPU, toy sizes

Device tests of kernels, whole generations and captured iterations. With no models given: latency of the bundled ones,
grown to the paper's sizes (``profiling.grown``). Microbenchmarks of kernels and sampling (of tiles with ``--tune``),
the timeline of an iteration. Timeline, latency and the paper's report with the models given or, without any, with a
chain of GPT-2 Large's shape, trained where the budget is 25 minutes or more (``--models-first``: all of this before
everything else, trained however small the budget). Last, the paper's report on the grown models, or on the bundled
ones where others are given, latency of these, and all other device tests.
Every step is a process of its own with a time limit, its output in
``DIR/logs``. A row in ``DIR/suite.json`` says how it ended, ``DIR/summary.md`` holds all tables, what failed first,
and ``DIR/suite.tar.gz`` everything but weights, below 15 MB; all three are written after every step, so a killed run
keeps what it had. Another call with the same flags leaves out what has finished (not what ``--again`` names), puts
what ran out of time last, and takes training up where it stopped. Exit code 1 where a step failed or is missing, 2
where nothing can be run.
"""

import argparse
import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import torch

from profiling import machine, prompts
from profiling.flags import at_least, count, positive
from profiling.rows import about, write_whole
from profiling.suite_report import write_report
from profiling.suite_steps import ROOT, Step, plan

OK, FAILED, TIMED_OUT, RUNNING, INTERRUPTED = "ok", "failed", "timed out", "running", "interrupted"
SPARE = 5.0  # seconds of a call kept for the report
LEAST = 10.0  # seconds without which no step is begun
MINI = {
    "layers": 1,
    "width": 64,
    "vocab_size": 300,
    "draft_layers": 1,
    "draft_width": 64,
    "tokens_per_step": 256,
    "tokens_per_pass": 0,
    "samples": 500,
    "data": [str(ROOT / name) for name in ("decoding", "kernels", "profiling", "tests")],
}


class Suite:
    """The steps of one directory: what has run, what is next, and the files that say so."""

    def __init__(self, out: Path, steps: list[Step], facts: dict):
        self.out, self.steps = out, steps
        self.path, self.facts = out / "suite.json", facts
        (out / "logs").mkdir(parents=True, exist_ok=True)
        self.rows = json.loads(self.path.read_text(encoding="utf-8"))["rows"] if self.path.exists() else []
        for row in self.rows:
            if row["status"] == RUNNING:  # whoever ran it was killed
                row["status"] = INTERRUPTED
        self.call = max((row["call"] for row in self.rows), default=0) + 1

    def latest(self, step: Step) -> dict | None:
        """The last row of a step."""
        return next((row for row in reversed(self.rows) if row["step"] == step.name), None)

    def has_finished(self, step: Step) -> bool:
        row = self.latest(step)
        if row is None or row["status"] not in (OK, FAILED):
            return False
        return row["status"] == FAILED or all(path.exists() for path in step.makes)

    def next_step(self) -> Step | None:
        """The first step that can run and was not tried in this call; what ran out of time before comes last."""
        tried = {row["step"] for row in self.rows if row["call"] == self.call}
        open_steps = [
            step
            for step in self.steps
            if step.name not in tried and not self.has_finished(step) and all(path.exists() for path in step.needs)
        ]
        return min(open_steps, key=self._ran_out_of_time, default=None)

    def _ran_out_of_time(self, step: Step) -> bool:
        row = self.latest(step)
        return row is not None and row["status"] == TIMED_OUT and not step.goes_on

    def run(self, step: Step, seconds: float) -> None:
        """Run ``step`` for at most ``seconds``; what is known is on disk before and after."""
        started = time.monotonic()
        row = {
            "step": step.name,
            "status": RUNNING,
            "returncode": None,
            "seconds": None,
            "limit": round(seconds, 1),
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "call": self.call,
            "command": " ".join(("python", *step.arguments)),
        }
        self.rows.append(row)
        self.write()
        print(f"{step.name}: at most {seconds:.0f} s", end=" ... ", flush=True)
        try:
            row["status"], row["returncode"] = run_process(
                step.arguments, seconds, self.out / "logs" / f"{step.name}.txt"
            )
        except BaseException:
            row["status"] = INTERRUPTED
            raise
        finally:
            row["seconds"] = round(time.monotonic() - started, 1)
            self.write()
        print(f"{row['status']} after {row['seconds']:.0f} s", flush=True)
        write_report(self.out, self.document(), self.steps)

    def document(self) -> dict:
        return {"about": self.facts, "rows": self.rows}

    def write(self) -> None:
        write_whole(self.path, json.dumps(self.document(), indent=1) + "\n")


def run_process(arguments: tuple[str, ...], seconds: float, log: Path) -> tuple[str, int | None]:
    """How the interpreter with ``arguments`` ended, and its exit code; its group is stopped after ``seconds``."""
    with log.open("a", encoding="utf-8") as file:
        print("$ python", *arguments, file=file, flush=True)
        process = subprocess.Popen(
            [sys.executable, "-u", *arguments],
            stdout=file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            cwd=ROOT,
            start_new_session=True,
            preexec_fn=_ends_with_parent(),
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            _stop(process)
            return TIMED_OUT, None
        except BaseException:
            _stop(process)
            raise
    return (OK if code == 0 else FAILED), code


def _ends_with_parent() -> Callable[[], object] | None:
    """What a child calls to be killed when the suite is, rather than go on holding the GPU."""
    if not sys.platform.startswith("linux"):
        return None
    prctl, set_parent_death_signal = ctypes.CDLL(None).prctl, 1
    return lambda: prctl(set_parent_death_signal, signal.SIGKILL)


def _stop(process: subprocess.Popen) -> None:
    """Ask the process's group to end, then end it."""
    for sent in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, sent)
        with suppress(subprocess.TimeoutExpired):
            process.wait(3.0)


def run_all(suite: Suite, budget_seconds: float, deadline: float) -> None:
    """Every step that there is time for before ``deadline`` (``time.monotonic``)."""
    while (step := suite.next_step()) is not None:
        left = deadline - SPARE - time.monotonic()
        if left < LEAST:
            print(f"no time left for {step.name} and what follows")
            return
        suite.run(step, min(left, step.share * budget_seconds))


def parser() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--budget-minutes", type=positive, required=True, help="of this call")
    flags.add_argument("--out", type=Path, required=True, metavar="DIR", help="what is there already is gone on with")
    flags.add_argument("--mini", action="store_true", help="toy sizes, on a CPU: whether the flow works")
    flags.add_argument("--only", nargs="+", metavar="STEP", help="leave out all others")
    flags.add_argument("--again", nargs="+", default=[], metavar="STEP", help="run these although they have finished")
    flags.add_argument("--tune", action="store_true", help="also tune tiles")
    flags.add_argument("--models-first", action="store_true", help="make and measure models before everything else")
    flags.add_argument("--paper-prompts", type=count, default=16, metavar="N", help="of profiling.paper")
    flags.add_argument(
        "--prompts",
        type=prompts.folder_with(prompts.HUMANEVAL),
        metavar="DIR",
        help="folder with humaneval/HumanEval.jsonl.gz",
    )
    flags.add_argument("--commit", help="what to record where the tree has no .git")
    models = flags.add_argument_group("models: given ...")
    models.add_argument("--oracle", help="hub id or directory; without it a chain is trained")
    models.add_argument("--draft", default="none")
    models.add_argument("--draft2", default="none")
    training = flags.add_argument_group("... or trained")
    training.add_argument("--data", action="append", metavar="DIR", help="of text; default: installed Python source")
    training.add_argument("--layers", type=count, default=36)
    training.add_argument("--width", type=count, default=1280)
    training.add_argument("--vocab-size", type=count, default=50257)
    training.add_argument("--draft-layers", type=count, default=4)
    training.add_argument("--draft-width", type=count, default=512)
    training.add_argument("--oracle-minutes", type=positive, help="default: 0.3 of the budget")
    training.add_argument("--draft-minutes", type=positive, help="default: 0.15 of the budget")
    training.add_argument("--tokens-per-step", type=count, default=32768)
    training.add_argument("--tokens-per-pass", type=at_least(0), default=16384)
    training.add_argument("--samples", type=count, default=300_000, help="tokens that the draft writes for draft2")
    return flags


def main(arguments: list[str] | None = None) -> int:
    began, command = time.monotonic(), parser()
    flags = command.parse_args(arguments)
    if flags.mini:
        command.set_defaults(**MINI)
        flags = command.parse_args(arguments)
    if flags.commit:
        os.environ[machine.COMMIT] = flags.commit  # every step inherits it
    if not flags.mini and not torch.cuda.is_available():
        print("no GPU here: --mini runs the flow on a CPU", file=sys.stderr)
        return 2
    flags.out = flags.out.resolve()
    steps = plan(flags)
    unknown = {*(flags.only or ()), *flags.again} - {step.name for step in steps}
    if unknown:
        print(f"no step {sorted(unknown)}; there are {[step.name for step in steps]}", file=sys.stderr)
        return 2
    steps = [step for step in steps if not flags.only or step.name in flags.only]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    facts = about(torch.device("cpu" if flags.mini else "cuda"), flags.mini)
    suite = Suite(flags.out, steps, facts)
    suite.rows = [row for row in suite.rows if row["step"] not in flags.again]
    try:
        run_all(suite, flags.budget_minutes * 60, began + flags.budget_minutes * 60)
    finally:
        suite.write()
        write_report(suite.out, suite.document(), steps)
    print(f"summary in {suite.out / 'summary.md'}")
    return 0 if all(suite.has_finished(step) and suite.latest(step)["status"] == OK for step in steps) else 1


if __name__ == "__main__":
    sys.exit(main())
