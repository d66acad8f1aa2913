"""``profiling.suite``: what a call of limited time leaves on disk, how the next one goes on, what its report shows."""

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from decoding import cli
from profiling import latency, prompts, suite, timeline
from profiling.suite import Suite, run_all, run_process
from profiling.suite_report import fitting_files, outcomes, summary, write_report
from profiling.suite_steps import Step, plan

FACTS = {
    "device": "cpu",
    "torch": "2",
    "triton": "3",
    "commit": "abc",
    "date": "today",
    "command": "c",
    "rehearsal": True,
}
HOUR = 3600.0


def python(name: str, code: str, **fields) -> Step:
    return Step(name, ("-c", code), fields.pop("share", 1.0), **fields)


def call(out: Path, steps: list[Step], seconds: float = HOUR) -> list[tuple[str, str]]:
    """One call of the suite on ``steps``: name and status of the rows that it added."""
    made = Suite(out, steps, FACTS)
    before = len(made.rows)
    run_all(made, seconds, time.monotonic() + seconds)
    return [(row["step"], row["status"]) for row in made.rows[before:]]


def flags(tmp_path: Path, *given: str):
    parsed = suite.parser().parse_args(["--budget-minutes", "10", "--out", str(tmp_path), *given])
    return parsed


def test_a_failure_stops_nothing_and_is_shown_first(tmp_path):
    steps = [python("tests", "print('t.py::a PASSED'); print('t.py::b[x y] FAILED'); raise SystemExit(1)")]
    steps += [python("kernels", "print('reached')")]
    assert call(tmp_path, steps) == [("tests", "failed"), ("kernels", "ok")]
    text = (tmp_path / "summary.md").read_text()
    assert text.index("- t.py::b[x y]") < text.index("- tests: failed (1)") < text.index("## Steps")
    assert "1 passed, 1 failed" in text and "reached" in text


def test_the_next_call_leaves_out_what_has_finished(tmp_path):
    """Finished steps, failed ones too, do not run again; one whose product has gone does."""
    made = tmp_path / "made"
    steps = [python("a", "raise SystemExit(3)"), python("b", f"open({str(made)!r}, 'w')", makes=(made,))]
    assert call(tmp_path, steps) == [("a", "failed"), ("b", "ok")]
    assert call(tmp_path, steps) == []
    made.unlink()
    assert call(tmp_path, steps) == [("b", "ok")]
    rows = json.loads((tmp_path / "suite.json").read_text())["rows"]
    assert [row["call"] for row in rows] == [1, 1, 2] and rows[0]["returncode"] == 3


def test_a_step_is_stopped_at_its_limit(tmp_path):
    """Its output until then is kept; a child that ignores SIGTERM is stopped too."""
    log = tmp_path / "log.txt"
    code = "import os, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(os.getpid()); time.sleep(60)"
    assert run_process(("-c", code), 1.5, log) == ("timed out", None)
    child = int(log.read_text().splitlines()[-1])
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


def test_what_ran_out_of_time_comes_last_but_training_goes_on(tmp_path):
    """After a call in which all three ran out of time: what resumes keeps its place, what starts anew is put back."""
    steps = [python("slow", "pass"), python("train", "pass", goes_on=True), python("new", "pass")]
    made = Suite(tmp_path, steps, FACTS)
    made.rows = [
        {
            "step": name,
            "status": "timed out",
            "call": 1,
            "seconds": 1.0,
            "limit": 1.0,
            "returncode": None,
            "command": "",
        }
        for name in ("slow", "train")
    ]
    made.write()
    assert call(tmp_path, steps) == [("train", "ok"), ("new", "ok"), ("slow", "ok")]


def test_a_step_waits_for_what_it_needs(tmp_path):
    missing = tmp_path / "models" / "oracle"
    steps = [python("latency", "pass", needs=(missing,)), python("last", "pass")]
    assert call(tmp_path, steps) == [("last", "ok")]
    assert "| latency | | needs models/oracle |" in (tmp_path / "summary.md").read_text()


def test_no_step_begins_without_time(tmp_path, capsys):
    """What there was no time for is said, on the terminal and in the summary."""
    steps = [python("a", "pass"), python("b", "pass")]
    assert call(tmp_path, steps, seconds=suite.SPARE + suite.LEAST - 1) == []
    assert "no time left for a" in capsys.readouterr().out
    assert "| b | | no time yet |" in summary(tmp_path, {"about": FACTS, "rows": []}, steps, [])


def test_the_archive_stays_small(tmp_path):
    """Weights stay out without a word, the largest trace with one; everything small is in."""
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "tests.txt").write_text("t.py::a PASSED\n")
    (tmp_path / "model.safetensors").write_bytes(b"w" * 100)
    (tmp_path / "trace-a.json.gz").write_bytes(os.urandom(9_000_000))
    (tmp_path / "trace-b.json.gz").write_bytes(os.urandom(9_000_001))
    (tmp_path / "zeros.json").write_bytes(
        bytes(9_000_002)
    )  # packs well, but what is larger than a left-out file is out
    write_report(tmp_path, {"about": FACTS, "rows": []}, [])
    archive = tmp_path / "suite.tar.gz"
    assert archive.stat().st_size < 15_000_000
    with tarfile.open(archive) as file:
        names = {Path(name).name for name in file.getnames()}
    assert names == {"summary.md", "tests.txt", "trace-a.json.gz"}
    assert "Too large for suite.tar.gz: trace-b.json.gz (9.0 MB), zeros.json" in (tmp_path / "summary.md").read_text()
    assert archive not in fitting_files(tmp_path)[0]  # nor does it grow by itself when it is written again


def test_the_plan_without_models_trains_them(tmp_path):
    """A chain of GPT-2 Large's shape is trained between the microbenchmarks and what is measured with it."""
    steps = plan(flags(tmp_path, "--budget-minutes", "30"))
    names = [step.name for step in steps]
    assert names[:4] == ["tests-kernels", "tests-captured", "grow", "latency-grown"]
    assert names[4:7] == ["kernels", "sampler", "timeline-grown"]
    assert names[7:10] == ["train-oracle", "train-draft", "build-draft2"]
    assert names[10:13] == ["timeline-trained", "latency-trained", "paper-trained"]
    assert names[13:] == ["paper-grown", "latency-bundled", "tests-others"]
    assert sum(step.share for step in steps[:7]) < 0.9, "the rest is for the models"
    oracle = steps[7].arguments
    sizes = dict(zip(oracle, oracle[1:], strict=False))
    assert (sizes["--layers"], sizes["--width"], sizes["--minutes"]) == ("36", "1280", "9")


def test_a_short_budget_trains_nothing_and_has_time_for_every_kind_of_figure(tmp_path):
    """Nine minutes: tests, latency, microbenchmarks and timeline fit, each at its limit; the rest has what is left."""
    steps = plan(flags(tmp_path, "--budget-minutes", "9"))
    names = [step.name for step in steps]
    assert names[2:4] == ["grow", "latency-grown"] and names[-3:] == ["paper-grown", "latency-bundled", "tests-others"]
    assert steps[2].makes == steps[3].needs, "the models are there before they are measured"
    assert not any(step.name.startswith(("train", "build")) for step in steps)
    assert sum(step.share for step in steps[:-3]) < 1.0
    kernels = next(step for step in steps if step.name == "kernels").arguments
    assert "--no-flex" in kernels


def test_no_step_is_given_a_budget_that_it_refuses(tmp_path):
    for minutes in ("0.01", "10"):
        arguments = [step.arguments for step in plan(flags(tmp_path, "--budget-minutes", minutes))]
        given = [float(one[one.index("--budget-seconds") + 1]) for one in arguments if "--budget-seconds" in one]
        assert given and min(given) >= 1


def test_a_short_budget_that_is_for_models(tmp_path):
    """They and the paper's tables on them come first, and leave something for the timeline and the rest."""
    steps = plan(flags(tmp_path, "--budget-minutes", "10", "--models-first"))
    names = [step.name for step in steps]
    assert names[:4] == ["train-oracle", "train-draft", "build-draft2", "paper-trained"]
    assert names[4:7] == ["timeline-trained", "latency-trained", "tests-kernels"]
    assert sorted(names[6:]) == sorted(step.name for step in plan(flags(tmp_path, "--budget-minutes", "10")))
    minutes = [float(step.arguments[step.arguments.index("--minutes") + 1]) for step in steps[:2]]
    assert sum(minutes) / 10 + steps[3].share < 1.0
    paper = steps[3].arguments
    assert paper[paper.index("--tokens") + 1] == "64" and "hf-static-compile" not in paper
    given = plan(flags(tmp_path, "--models-first", "--oracle", "gpt2-large"))
    assert [step.name for step in given[:3]] == ["paper-given", "timeline-given", "latency-given"]


def test_device_tests_are_run_once(tmp_path):
    """Files of the first steps are left out of the last one, and exist."""
    steps = {step.name: step.arguments for step in plan(flags(tmp_path))}
    first = {part for name in ("tests-kernels", "tests-captured") for part in steps[name] if part.endswith(".py")}
    left_out = {part.removeprefix("--ignore=") for part in steps["tests-others"] if part.startswith("--ignore=")}
    assert first == left_out and all((suite.ROOT / path).is_file() for path in first)


def test_outcomes_of_parallel_tests(tmp_path):
    """pytest-xdist names the worker first and the test last; a test that was only begun has no outcome."""
    log = tmp_path / "tests-kernels.txt"
    log.write_text(
        "tests/a.py::one[x y] \n[gw0] [ 10%] PASSED tests/a.py::one[x y] \n[gw11] FAILED tests/b.py::two \n"
        "[gw1] [  3%] SKIPPED tests/c.py::three \ntests/d.py::four \ntests/e.py::five PASSED [ 4%]\n"
    )
    assert outcomes(log) == {
        "tests/a.py::one[x y]": "PASSED",
        "tests/b.py::two": "FAILED",
        "tests/c.py::three": "SKIPPED",
        "tests/e.py::five": "PASSED",
    }


def test_the_plan_with_models_uses_them(tmp_path):
    steps = plan(flags(tmp_path, "--oracle", "gpt2-large", "--draft", "distilgpt2", "--tune"))
    assert [step.name for step in steps[1:6]] == ["tests-captured", "kernels", "sampler", "tune", "timeline-given"]
    assert steps[-3].name == "latency-bundled" and steps[-3].share == 1.0
    assert not any(step.name.startswith(("train", "build")) for step in steps)
    paper = next(step for step in steps if step.name == "paper-given").arguments
    assert "distilgpt2" in paper and paper[paper.index("--draft2") + 1] == "none"
    latency = next(step for step in steps if step.name == "latency-given").arguments
    assert latency[latency.index("--draft2") + 1] == "none"


def test_in_miniature_no_step_has_a_limit_of_its_own(tmp_path):
    """A first call compiles for most of a minute, on a slow machine for minutes: no reason to stop a step."""
    assert {step.share for step in plan(flags(tmp_path, "--mini"))} == {1.0}
    assert max(step.share for step in plan(flags(tmp_path))[:3]) < 1
    given = [step.name for step in plan(flags(tmp_path, "--mini", "--oracle", "a"))]
    assert given[-3:] == ["timeline-given", "latency-given", "paper-given"] and "train-oracle" not in given


@pytest.mark.parametrize(
    "given",
    [[], ["--mini"], ["--models-first"], ["--oracle", "a", "--draft", "b"], ["--prompts", "/p", "--data", "/d"]],
)
def test_the_commands_understand_their_flags(tmp_path, given):
    """Whatever was given, each command whose parser can be had accepts what the plan says to it."""
    if "--prompts" in given:
        (tmp_path / "humaneval").mkdir()
        (tmp_path / prompts.HUMANEVAL).touch()
        given = [str(tmp_path) if flag == "/p" else flag for flag in given]
    parsers = {"decoding": cli.parser(), "profiling.latency": latency.parser(), "profiling.timeline": timeline.parser()}
    met = set()
    for step in plan(flags(tmp_path, *given)):
        module, *arguments = step.arguments[1:]
        if module in parsers:
            parsers[module].parse_args(arguments)
            met.add(module)
    assert met >= {"profiling.latency", "profiling.timeline"}


def test_without_a_gpu_it_says_what_to_do(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(suite.torch.cuda, "is_available", lambda: False)
    assert suite.main(["--budget-minutes", "1", "--out", str(tmp_path)]) == 2
    assert "--mini" in capsys.readouterr().err
    assert suite.main(["--budget-minutes", "1", "--out", str(tmp_path), "--mini", "--only", "no-such"]) == 2
    assert "no-such" in capsys.readouterr().err


def wait_for(condition, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def statuses(out: Path) -> dict[str, str]:
    path = out / "suite.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    return {row["step"]: row["status"] for row in rows}


def test_killed_in_the_middle_in_miniature(tmp_path):
    """kill -9 during the second step: files are whole and tell of the first, the child is gone; a second call goes on.

    The steps are real ones: sampling is timed, a model is trained. ``make mini`` runs all of them.
    """
    out, only = tmp_path / "suite", ["sampler", "train-oracle"]
    command = [sys.executable, "-m", "profiling.suite", "--mini", "--budget-minutes", "5", "--out", str(out), "--only"]
    first = subprocess.Popen([*command, *only], stdout=subprocess.DEVNULL)
    wait_for(lambda: statuses(out).get("train-oracle") == "running" or first.poll() is not None)
    assert first.poll() is None
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert statuses(out) == {"sampler": "ok", "train-oracle": "running"}
    text = (out / "summary.md").read_text()
    assert "| sampler | 1 | ok |" in text
    for name in ("restore + verify_and_commit", "select_nodes", "draw, top-k 50"):
        assert f"| {name} |" in text
    with tarfile.open(out / "suite.tar.gz") as archive:
        assert "suite/logs/sampler.txt" in archive.getnames()
    wait_for(lambda: not _still_training(out), seconds=5)
    again = subprocess.run([*command, *only], capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stdout + again.stderr
    rows = json.loads((out / "suite.json").read_text())["rows"]
    assert [(row["step"], row["status"], row["call"]) for row in rows] == [
        ("sampler", "ok", 1),
        ("train-oracle", "interrupted", 1),
        ("train-oracle", "ok", 2),
    ]
    assert "held out" in (out / "summary.md").read_text()
    assert (out / "models" / "oracle" / "model.safetensors").exists()


def _still_training(out: Path) -> bool:
    """Whether a process of this directory's training is alive."""
    if not Path("/proc").is_dir():
        return False
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(out / "models" / "oracle").encode() in entry.read_bytes():
                return True
        except OSError:
            continue
    return False


def test_a_terminated_suite_stops_its_step(tmp_path):
    """A signal whose handler exits, as that of SIGTERM does: the step's process ends, its row says interrupted."""
    steps = [python("long", "import os, time; print(os.getpid()); time.sleep(60)")]
    made, before = Suite(tmp_path, steps, FACTS), signal.signal(signal.SIGALRM, lambda *_: sys.exit(143))
    try:
        signal.setitimer(signal.ITIMER_REAL, 1.5)
        with pytest.raises(SystemExit):
            run_all(made, HOUR, time.monotonic() + HOUR)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert statuses(tmp_path) == {"long": "interrupted"} and made.next_step() is None
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "logs" / "long.txt").read_text().splitlines()[-1]), 0)
    assert Suite(tmp_path, steps, FACTS).next_step() is not None
