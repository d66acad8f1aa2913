"""The command ``staged``: what it prints, and one line where the user has made a mistake."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from decoding import cli
from decoding.config import METHODS

ROOT = Path(__file__).parent.parent


def staged(*arguments: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "decoding", *arguments]
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | (environment or {})
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=variables)


def test_command_line_json(capsys):
    cli.main(["generate", "def add(a, b):", "--max-new-tokens", "8", "--json", "--do-sample", "--seed", "5"])
    out = json.loads(capsys.readouterr().out)
    assert out["seed"] == 5 and len(out["new_token_ids"]) == 8 == len(out["token_stages"])
    assert {"sequences", "text", "finish_reason", "stats"} <= out.keys()


def test_sampling_flags_of_greedy_decoding_are_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["generate", "import os", "--temperature", "0.7", "--top-k", "5"])
    assert "--temperature, --top-k: no effect without --do-sample" in capsys.readouterr().err


def test_command_line_colour_and_compare(capsys):
    cli.main(["generate", "def add(a, b):", "--max-new-tokens", "8", "--color"])
    shown = capsys.readouterr().out
    assert "\x1b[" in shown and "tokens proposed by" in shown
    cli.main(["compare", "def add(a, b):", "--max-new-tokens", "8", "--json", "--hf"])
    rows = json.loads(capsys.readouterr().out)
    assert [row["method"] for row in rows] == ["HF generate", *METHODS]
    assert all(row["identical"] == "1 of 1" for row in rows[1:])


@pytest.mark.parametrize("arguments", [["generate", ""], ["compare", "x", "--oracle", "./no"]])
def test_command_line_errors_are_one_line_and_exit_two(arguments, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(arguments)
    assert exit.value.code == 2 and len(capsys.readouterr().err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--max-new-tokens", "0"], "--max-new-tokens must be at least 1, got 0"),
        (["--do-sample", "--top-p", "7"], "--top-p must be a number in (0, 1], got 7.0"),
        (["--stop", ""], "--stop must be non-empty strings, got ''"),
        (
            ["--draft", "none", "--draft-quantization", "int8"],
            "--draft-quantization='int8' needs a draft, and there is none",
        ),
        (["--plan", "plan/none.json"], "plan/none.json is not a plan that 'staged plan' wrote: "),
        (["--seed", "3"], "--seed: no effect without --do-sample and a temperature above 0"),
    ],
    ids=["length", "filter", "stop", "draft", "path", "seed"],
)
def test_errors_name_the_flag(arguments, said, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["generate", "x", *arguments])
    assert capsys.readouterr().err.startswith(f"staged generate: {said}")


def test_the_command_itself_ends_with_one_line_too():
    run = staged("generate", "x", "--top-p", "7")
    assert run.returncode == 2 and len(run.stderr.strip().splitlines()) == 1 and "Traceback" not in run.stderr


def test_a_reader_that_has_seen_enough_is_no_error(tmp_path):
    """Neither where it is printed, at once or when all is done, nor where rich shows colours, which has a way of its
    own to end."""
    search = ["--out", str(tmp_path / "plan.json"), "--minutes", "0", "--turns", "1"]
    for name, flags in (("generate", ()), ("generate", ("--color",)), ("generate", ("--json",)), ("plan", search)):
        command = [sys.executable, "-m", "decoding", name, "import os", "--max-new-tokens", "2", *flags]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            process.stdout.close()
            error = process.stderr.read()
        assert process.returncode == 1 and "Broken pipe" not in error and "Traceback" not in error


def test_json_has_no_colours(capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["generate", "x", "--json", "--color"])
    assert "--color: no effect on --json" in capsys.readouterr().err


def test_hugging_face_is_not_compared_where_it_cannot_be(capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["compare", "x", "--hf", "--do-sample"])
    assert "only greedy text" in capsys.readouterr().err


def test_the_interpreter_of_triton_does_what_the_message_promises():
    """Without a GPU the Triton backend runs in a process of its own, on no test's preparations, in float32."""
    asked = staged("generate", "x", "--backend", "triton", "--device", "cpu")
    assert asked.returncode == 2 and "TRITON_INTERPRET=1" in asked.stderr
    tokens = []
    for backend, interprets in (("torch", "0"), ("triton", "1")):
        command = ["generate", "import os", "--backend", backend, "--device", "cpu", "--max-new-tokens", "3", "--json"]
        dtype = ["--dtype", "float32"] if backend == "torch" else []
        run = staged(*command, *dtype, environment={"TRITON_INTERPRET": interprets})
        tokens.append(json.loads(run.stdout)["new_token_ids"])
    assert tokens[0] == tokens[1] and len(tokens[0]) == 3
    refused = staged(*command, "--dtype", "bfloat16", environment={"TRITON_INTERPRET": "1"})
    assert refused.returncode == 2 and "bfloat16 wrongly" in refused.stderr
