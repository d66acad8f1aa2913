"""The commands that made the bundled models, in miniature: they go on when killed, refuse wrong flags."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from decoding import StagedDecoder, cli, make
from decoding.decoder import BUNDLED
from model import bundle, training
from tests.test_corpus import source, write

TINY = "--layers 1 --width 64 --context 64 --short-window 16 --tokens-per-step 64 --steps 2 --no-compile"
DRAFT = ["train-draft", *TINY.split(), "--own-text", "64"]


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("text")
    return str(write(folder, **{f"file_{i}": source(f"name_{i}") for i in range(120)}))


@pytest.fixture(scope="module")
def trained(text, tmp_path_factory) -> Path:
    """An oracle after two steps; do not change it."""
    out = tmp_path_factory.mktemp("trained") / "oracle"
    cli.main(["train-oracle", "--data", text, "--out", str(out), *TINY.split(), "--vocab-size", "300"])
    return out


@pytest.fixture(scope="module")
def drafted(text, trained, tmp_path_factory) -> Path:
    """A draft of it; do not change it."""
    out = tmp_path_factory.mktemp("drafted")
    cli.main([*DRAFT, "--oracle", str(trained), "--data", text, "--out", str(out)])
    return out


def test_a_kill_after_the_last_step_costs_no_model(text, trained, tmp_path, monkeypatch, capsys):
    """Whatever it leaves of the model, the same command writes what an undisturbed run does."""
    command = ["train-oracle", "--data", text, "--out", str(tmp_path), *TINY.split(), "--vocab-size", "300"]

    def killed(model, folder):
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(SystemExit, match="130"):
        patched.setattr(GPT2LMHeadModel, "save_pretrained", killed)
        cli.main(command)
    assert (tmp_path / training.LATEST).exists() and not (tmp_path / "model.safetensors").exists()
    (tmp_path / ".unfinished").mkdir()
    (tmp_path / ".unfinished" / "of_a_kill.json").touch()
    cli.main(command)
    assert "100% of the budget" in capsys.readouterr().out
    assert {file.name for file in tmp_path.iterdir()} == {file.name for file in trained.iterdir()}
    one, other = (load_file(folder / "model.safetensors") for folder in (trained, tmp_path))
    assert all(torch.equal(one[name], other[name]) for name in one)
    ends = [json.loads((folder / "training.json").read_text())["log"][-1] for folder in (trained, tmp_path)]
    assert ends[0]["heldout_loss"] == ends[1]["heldout_loss"] and ends[1]["progress"] == 1.0


def written_by_hand(folder: Path, tokenizer: Path, **sizes) -> Path:
    """A random GPT-2 with the tokenizer of another one."""
    config = {"vocab_size": 300, "n_positions": 64, "n_embd": 64, "n_layer": 1, "n_head": 1} | sizes
    GPT2LMHeadModel(GPT2Config(**config)).save_pretrained(folder)
    shutil.copy(tokenizer / "tokenizer.json", folder)
    return folder


def refused(capsys, *command) -> str:
    """The one line that the command ends with."""
    with pytest.raises(SystemExit, match="2"):
        cli.main([*map(str, command)])
    return capsys.readouterr().err.splitlines()[-1]


def test_a_padded_vocabulary_is_that_of_all_stages(text, trained, tmp_path):
    oracle = written_by_hand(tmp_path / "oracle", trained, vocab_size=320)
    draft, table = tmp_path / "draft", tmp_path / "table"
    command = ["train-draft", "--oracle", str(oracle), "--out", str(draft), "--data", text, *TINY.split()]
    cli.main([*command, "--own-text", "64", "--teacher-share", "1"])
    assert json.loads((draft / "config.json").read_text())["vocab_size"] == 320
    cli.main(["build-draft2", "--tokenizer", str(oracle), "--out", str(table), "--data", text])
    assert json.loads((table / "table.json").read_text())["vocab_size"] == 320


def test_an_oracle_that_cannot_teach_is_refused_at_once(text, trained, tmp_path, capsys):
    small = written_by_hand(tmp_path / "small", trained, vocab_size=290)
    short = written_by_hand(tmp_path / "short", trained, n_positions=32)
    holed, endless = (written_by_hand(tmp_path / name, trained) for name in ("holed", "endless"))
    tokenizer = json.loads((trained / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    last = max(vocabulary, key=vocabulary.get)
    unread = written_by_hand(tmp_path / "unread", trained, activation_function="relu")
    broken, partial = (written_by_hand(tmp_path / name, trained) for name in ("broken", "partial"))
    tensors = load_file(broken / "model.safetensors")
    save_file(tensors | {"transformer.ln_f.bias": torch.full((64,), torch.nan)}, broken / "model.safetensors")
    del tensors["transformer.ln_f.bias"]
    save_file(tensors, partial / "model.safetensors")
    vocabulary[last] = 70000
    (holed / "tokenizer.json").write_text(json.dumps(tokenizer))
    vocabulary[last], vocabulary["<end>"] = 299, vocabulary.pop("<|endoftext|>")
    (endless / "tokenizer.json").write_text(json.dumps(tokenizer | {"added_tokens": []}))
    for oracle, why in (
        (small, f"290 tokens in {small} must hold the tokenizer's 300 ids and be at most 65536"),
        (short, "--context must be at most the oracle's, 32, got 64"),
        (holed, f"300 tokens in {holed} must hold the tokenizer's 70001 ids and be at most 65536"),
        (endless, "has no <|endoftext|>"),
        (unread, "activation_function must be one of"),
        (broken, "ln_f.bias holds NaN"),
        (partial, "1 weights are missing"),
    ):
        command = ["train-draft", "--oracle", oracle, "--out", tmp_path / "out", "--data", text, *TINY.split()]
        assert why in refused(capsys, *command) and not (tmp_path / "out").exists()
    (holed / "config.json").unlink()
    for command in (("build-draft2",), ("train-oracle", *TINY.split())):
        assert "70001" in refused(capsys, *command, "--tokenizer", holed, "--out", tmp_path / "out", "--data", text)
    tokenizer = json.loads((trained / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"][last] = 400
    (holed / "tokenizer.json").write_text(json.dumps(tokenizer))
    command = ["train-oracle", "--tokenizer", holed, "--out", tmp_path / "out", "--data", text, *TINY.split()]
    cli.main([*map(str, command)])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 401


def test_text_that_was_chosen_otherwise_is_not_trained_on(text, tmp_path, capsys):
    problems = tmp_path / "problems.jsonl"
    problems.write_text(json.dumps({"prompt": "def name_1_2(argument):"}) + "\n")
    out = tmp_path / "out"
    command = ["train-oracle", "--out", out, "--data", text, *TINY.split(), "--vocab-size", "300"]
    given = ["--exclude", problems]
    cli.main([*map(str, [*command, *given])])
    card = json.loads((out / "training.json").read_text())
    assert card["exclude"] == "problems.jsonl" and card["suffix"] == ".py" and card["excluded_files"] == 1
    assert "--exclude was problems.jsonl when the text in" in refused(capsys, *command)
    assert "--suffix was .py when the text in" in refused(capsys, *command, *given, "--suffix", ".txt")
    cli.main([*map(str, [*command, *given])])


@pytest.mark.parametrize("name", ["tokens.npz", "own_text.npy", training.LATEST, "sources.json"])
@pytest.mark.parametrize("size", [0, 100])
def test_a_file_that_is_cut_is_named(text, trained, drafted, tmp_path, capsys, name, size):
    shutil.copytree(drafted, tmp_path, dirs_exist_ok=True)
    os.truncate(tmp_path / name, size)
    error = refused(capsys, *DRAFT, "--oracle", trained, "--data", text, "--out", tmp_path)
    assert f"cannot read {tmp_path / name}" in error


@pytest.mark.parametrize(("what", "room"), [*(("draft", room) for room in (100, 50_000, 200_000)), ("draft2", 100)])
def test_a_full_disk_is_one_line(text, trained, tmp_path, capsys, what, room):
    """Wherever it fills; where there is room again the same command goes on."""
    command = [*DRAFT, "--oracle", trained] if what == "draft" else ["build-draft2", "--tokenizer", trained]
    command += ["--data", text, "--out", tmp_path]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        assert "cannot write" in refused(capsys, *command)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    cli.main([*map(str, command)])


def test_models_of_others_are_not_lost(text, trained, tmp_path, capsys):
    theirs = written_by_hand(tmp_path / "theirs", trained)
    before = {file.name: file.read_bytes() for file in theirs.iterdir()}
    more = ["--data", text, *TINY.split()]
    for command, why in (
        (("train-draft", "--oracle", theirs, "--out", tmp_path / "." / "more" / ".." / "theirs"), "folder of --oracle"),
        (("train-oracle", "--start", trained, "--out", trained), "folder of --start"),
        (("train-oracle", "--out", theirs), "holds a config.json that was not made here"),
    ):
        assert why in refused(capsys, *command, *more)
    assert before == {file.name: file.read_bytes() for file in theirs.iterdir()}


def test_a_loss_that_is_no_number_ends_a_run(text, tmp_path, capsys):
    command = ["train-oracle", "--out", tmp_path, "--data", text, *TINY.split(), "--learning-rate", "1e30"]
    command += ["--warmup-steps", "1", "--vocab-size", "300"]
    assert "loss at step 2 is nan: is --learning-rate too high?" in refused(capsys, *command)
    assert not (tmp_path / "training.json").exists() and not (tmp_path / training.LATEST).exists()
    assert "held-out loss at step 1 is" in refused(capsys, *command, "--steps", "1")
    assert not (tmp_path / "training.json").exists() and not (tmp_path / training.LATEST).exists()


def test_the_command_survives_a_kill_at_any_moment(tmp_path):
    """``train-oracle``, killed while it runs and started again, ends with the weights of an undisturbed run."""
    write(tmp_path / "text", **{f"file_{i}": source(f"name_{i}") for i in range(120)})
    sizes = "--layers 1 --width 64 --vocab-size 300 --context 64 --short-window 16 --tokens-per-step 256 --steps 40"
    command = [sys.executable, "-m", "decoding", "train-oracle", "--data", str(tmp_path / "text"), "--no-compile"]
    command += [*sizes.split(), "--checkpoint-minutes", "0", "--out"]
    subprocess.run([*command, str(tmp_path / "whole")], check=True, capture_output=True, timeout=300)
    killed = tmp_path / "killed"
    with subprocess.Popen([*command, str(killed)], stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if "step 12 " in line:
                process.kill()
    ended = subprocess.run([*command, str(killed)], check=True, capture_output=True, text=True, timeout=300)
    assert "goes on after step" in ended.stdout
    one, other = (load_file(folder / "model.safetensors") for folder in (tmp_path / "whole", killed))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    card = json.loads((killed / "training.json").read_text())
    assert card["sources"][0]["files"] == 120 and card["log"][-1]["progress"] == 1.0


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_asked_to_end_saves_first(sent, tmp_path, keyboard):
    """Long before its next checkpoint: the step it is in is finished, kept, and gone on from."""
    text = write(tmp_path / "text", **{f"file_{i}": source(f"name_{i}") for i in range(120)})
    command = [sys.executable, "-u", "-m", "decoding", "train-oracle", "--data", str(text)]
    sizes = "--layers 1 --width 64 --context 64 --short-window 16 --tokens-per-step 256 --no-compile"
    budget = "--vocab-size 300 --minutes 0.5 --checkpoint-minutes 60"
    command += [*sizes.split(), *budget.split(), "--out", str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if " step " in line:
                process.send_signal(sent)
                break
        lines += process.stdout.readlines()
    assert process.returncode == (130 if sent == signal.SIGINT else 128 + sent)
    step = int(lines[-1].split("stopped and saved after step ")[1].split(":")[0])
    state = torch.load(tmp_path / "run" / training.LATEST, weights_only=True)
    assert state["step"] == step > 0 and 0.0 < state["seconds"] < 30.0


def test_text_of_another_tokenizer_is_not_trained_on(tmp_path, capsys):
    text = write(tmp_path / "text", **{f"file_{i}": source(f"name_{i}") for i in range(120)})
    sizes = "--layers 1 --width 64 --context 64 --short-window 16 --tokens-per-step 256 --steps 2 --no-compile"
    run, other = tmp_path / "run", tmp_path / "other"
    common = ["train-oracle", "--data", str(text), *sizes.split()]
    cli.main([*common, "--out", str(run), "--vocab-size", "300"])
    cli.main([*common, "--out", str(other), "--vocab-size", "310"])
    assert "text as stored" not in capsys.readouterr().out
    given = tmp_path / "given"
    cli.main([*common, "--out", str(given), "--tokenizer", str(other)])
    assert "is the folder of --tokenizer" in refused(capsys, *common, "--out", run, "--tokenizer", run)
    for folder, *wrong in (
        (run, "--vocab-size", "320"),
        (run,),
        (run, "--tokenizer", str(other)),
        (given, "--vocab-size", "310"),
        (given, "--tokenizer", str(run)),
    ):
        with pytest.raises(SystemExit):
            cli.main([*common, "--out", str(folder), *wrong])
        assert "in the tokens of another tokenizer" in capsys.readouterr().err
    for folder, *right in (
        (run, "--vocab-size", "300"),
        (given, "--tokenizer", str(other)),
    ):
        cli.main([*common, "--out", str(folder), *right])
        assert "text as stored" in capsys.readouterr().out
    for size in ("256", "-5", "65537"):
        with pytest.raises(SystemExit):
            cli.main([*common, "--out", str(tmp_path / "none"), "--vocab-size", size])
        assert "vocab-size must be from 257" in capsys.readouterr().err and not (tmp_path / "none").exists()


def test_the_three_commands_make_a_trio_that_decodes(tmp_path, capsys):
    """Oracle, a draft that also learns from the oracle's own text, a table counted on what the draft writes."""
    text = write(tmp_path / "text", **{f"file_{i}": source(f"name_{i}") for i in range(120)})
    oracle, draft, draft2 = (str(tmp_path / name) for name in ("oracle", "draft", "draft2"))
    sizes = "--layers 1 --width 64 --context 64 --short-window 16 --tokens-per-step 256 --steps 4"
    sizes = [*sizes.split(" "), "--no-compile"]
    data = ["--data", str(text)]
    cli.main(["train-oracle", "--out", oracle, *data, *sizes, "--vocab-size", "300"])
    with pytest.raises(SystemExit):
        cli.main(["train-draft", "--oracle", str(tmp_path / "absent"), "--out", draft, *data, *sizes])
    assert "no trained model in" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["train-oracle", "--out", draft, *data, "--tokenizer", oracle, "--vocab-size", "300"])
    assert "give one of --tokenizer and --vocab-size" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["train-oracle", "--out", draft, *data, "--width", "96"])
    assert "width must be a multiple of 64" in capsys.readouterr().err and not Path(draft).exists()
    with pytest.raises(SystemExit):
        cli.main(["train-oracle", "--out", draft, *data, "--minutes", "0"])
    assert "minutes must be above 0 and finite, or steps given" in capsys.readouterr().err and not Path(draft).exists()
    for flag, value, why in (
        ("--checkpoint-minutes", "nan", "checkpoint-minutes must be at least 0"),
        ("--learning-rate", "inf", "both above 0: got learning_rate inf"),
        ("--seed", "-1", "seed must be in"),
        ("--start", str(tmp_path / "absent"), "no trained model in"),
    ):
        with pytest.raises(SystemExit):
            cli.main(["train-oracle", "--out", draft, *data, *sizes, flag, value])
        assert why in capsys.readouterr().err and not Path(draft).exists()
    for share in ("0", "1", "nan"):
        with pytest.raises(SystemExit):
            cli.main(["train-draft", "--oracle", oracle, "--out", draft, *data, *sizes, "--own-share", share])
        assert "own-share must be above 0 and below 1" in capsys.readouterr().err and not Path(draft).exists()
    cli.main(["train-draft", "--oracle", oracle, "--out", draft, *data, *sizes, "--own-text", "64"])
    stored = np.load(tmp_path / "draft" / "own_text.npy")
    assert stored.dtype == np.uint16 and len(stored) >= 64 and stored.max() < 300
    with np.load(tmp_path / "draft" / "tokens.npz") as tokens:  # too little of its own for half of what is learnt from
        learnt = json.loads((tmp_path / "draft" / "training.json").read_text())["text_tokens"]
        assert learnt == len(tokens["train"]) + make.MOST_REPEATS * len(stored)
    assert "the oracle's own text is" in capsys.readouterr().out
    table = ["build-draft2", "--tokenizer", oracle, *data]
    for wrong, why in (
        (["--model", draft, "--samples", "64", "--out", str(tmp_path / "draft" / "config.json")], "--out: "),
        (["--model", str(BUNDLED / "draft"), "--out", draft2], "has 8192 tokens, the tokenizer 300"),
        (["--model", draft, "--temperature", "inf", "--out", draft2], "must be above 0 and finite"),
        (["--model", draft, "--contexts", "-1", "--out", draft2], "--contexts must be at least 0, got -1"),
        (["--exclude", str(text / "file_1.py"), "--out", draft2], " as JSON lines with prompts: JSONDecodeError "),
    ):
        with pytest.raises(SystemExit, match="2"):
            cli.main([*table, *wrong])
        assert why in capsys.readouterr().err
    cli.main([*table, "--model", draft, "--samples", "64", "--out", draft2])
    cli.main(["build-draft2", "--tokenizer", oracle, "--out", draft2 + "_text", *data])
    origins = [json.loads((tmp_path / name / "table.json").read_text()) for name in ("draft2", "draft2_text")]
    assert origins[0]["estimated_from"] == "text that draft wrote at temperature 1.5"
    assert origins[1]["estimated_from"] == "text" and origins[0]["tokens"] < origins[1]["tokens"]
    assert json.loads((tmp_path / "oracle" / "config.json").read_text())["eos_token_id"] == 0, "that of the tokenizer"
    decoder = StagedDecoder.from_pretrained(oracle, draft, draft2)
    prompt = "def name_1_2(argument):"
    outs = [decoder.generate(prompt, 12, method=method, ignore_eos=True) for method in ("baseline", "staged")]
    assert outs[0].new_token_ids == outs[1].new_token_ids
    size = bundle.pack(tmp_path / "oracle", tmp_path / "packed")
    card = (tmp_path / "packed" / "README.md").read_text()
    assert size < 1e6 and "| text | unknown | 120 |" in card and "held-out loss" in card
    assert card.count("```python") == 2 * len(bundle.PROMPTS) and "def read_lines(path):" in card


def test_share_of_the_oracles_own_text():
    """A thousand tokens of its own beside ten thousand are a part of what is learnt, and are not learnt by heart."""
    text, own = np.zeros(10_000, np.uint16), np.ones(1000, np.uint16)
    assert make.blend(text, own, 0.2).mean() == pytest.approx(0.2, abs=0.04)
    assert make.blend(text, own, 0.5).sum() == 4000, "never more than four times"
    assert make.blend(text, own, 0.001).sum() == 1000, "never less than once"
    assert make.blend(text, own, 0.5).dtype == np.uint16
