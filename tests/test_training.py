"""Training in miniature: that it learns, keeps its budget, goes on where it was, and ends when it is asked to."""

import itertools
import os
import platform
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from model import growth, loss, samples, signals, training
from model.training_config import TrainingConfig

CONFIG = TrainingConfig(
    layers=1, width=64, vocab_size=50, context=64, steps=60, tokens_per_step=256, short_window=16, warmup_steps=5
)


def periodic_ids(seed: int) -> np.ndarray:
    """A text that a model can learn: three random cycles over 50 tokens."""
    cycles = np.random.default_rng(seed).permuted(np.tile(np.arange(1, 50), (3, 1)), axis=1)
    return np.concatenate([np.tile(cycle, 40) for cycle in cycles]).astype(np.uint16)


def run(trainer: training.Trainer, out) -> list[dict]:
    out.mkdir(exist_ok=True)
    return list(training.train(trainer, trainer.ids, out))


def test_training_learns_and_a_student_follows_its_teacher(tmp_path):
    """The loss falls far below that of guessing; so does a student's that sees its teacher's law alone."""
    ids = periodic_ids(0)
    teacher = training.Trainer(CONFIG, ids, compiled=False)
    *_, row = run(teacher, tmp_path / "teacher")
    assert row["heldout_loss"] < 0.5 * np.log(50) and row["tokens"] == 60 * 256
    student = training.Trainer(replace(CONFIG, teacher_share=1.0, seed=1), ids, teacher.model, compiled=False)
    *_, row = run(student, tmp_path / "student")
    assert row["heldout_loss"] < 0.6 * np.log(50)


def test_gradients_of_several_passes_are_those_of_one():
    """``tokens_per_pass`` bounds memory and changes nothing else, up to the order of sums; the last may be smaller."""
    trainers = [
        training.Trainer(replace(CONFIG, tokens_per_pass=size), periodic_ids(0), compiled=False) for size in (0, 48)
    ]
    losses = [[trainer.train_step() for _ in range(3)] for trainer in trainers]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


@pytest.mark.parametrize(("layers", "width"), [(5, 64), (2, 192), (3, 128)])
def test_a_larger_model_begins_as_the_one_it_starts_from(layers, width):
    """The same logits, whether it is deeper or wider; then every column of every matrix learns."""
    small = training.Trainer(replace(CONFIG, layers=2, learning_rate=0.02), periodic_ids(0), compiled=False)
    for _ in range(10):
        small.train_step()
    config = replace(CONFIG, layers=layers, width=width, warmup_steps=1)
    large = training.Trainer(config, periodic_ids(0), compiled=False, start=small.model)
    tokens = torch.from_numpy(periodic_ids(1)[:64].astype(np.int64))[None]
    torch.testing.assert_close(large.model(tokens).logits, small.model(tokens).logits, rtol=0, atol=1e-2)
    before = {name: value.clone() for name, value in large.model.named_parameters()}
    for _ in range(2):
        large.train_step()
    for name, value in large.model.named_parameters():
        assert value.ndim == 1 or (value != before[name]).any(0).all(), f"a column of {name} learnt nothing"


def test_layers_between_are_copies_that_add_nothing():
    small = training.Trainer(replace(CONFIG, layers=2), periodic_ids(0), compiled=False).model
    deep = training.build(replace(CONFIG, layers=5))
    growth.grow(deep, small)
    layers, given = deep.transformer.h, small.transformer.h
    for layer, origin, repeated in zip(layers, (0, 0, 0, 1, 1), (False, True, True, False, True), strict=True):
        assert torch.equal(layer.mlp.c_fc.weight, given[origin].mlp.c_fc.weight)
        assert bool((layer.mlp.c_proj.weight == 0).all()) == repeated


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [("vocab_size", 60, "60"), ("context", 32, "32"), ("layers", 1, "only 1"), ("width", 64, "only 64")],
)
def test_a_model_to_start_from_must_fit(field, value, message):
    start = training.build(replace(CONFIG, layers=2, width=128))
    config = replace(CONFIG, **{"layers": 2, "width": 128, field: value})
    with pytest.raises(ValueError, match=rf"the model to start from has \w+ \d+, this one {message}"):
        training.Trainer(config, periodic_ids(0), compiled=False, start=start)


def test_operations_of_a_token_by_hand():
    """One layer of width 64, 50 tokens, windows of 16: 6 (12 * 64^2 + 50 * 64) + 12 * 64 * 16."""
    assert training.Trainer(CONFIG, periodic_ids(0), compiled=False).flops_per_token == 326_400


def test_the_budget_in_minutes_ends_a_run(tmp_path):
    trainer = training.Trainer(replace(CONFIG, steps=0, minutes=0.02), periodic_ids(0), compiled=False)
    rows = run(trainer, tmp_path / "out")
    assert 1.2 <= trainer.seconds < 6 and rows[-1]["progress"] == 1.0 and len(rows) == trainer.step > 3


def test_learning_rate_warms_up_stays_and_decays():
    trainer = training.Trainer(replace(CONFIG, steps=100), periodic_ids(0), compiled=False)
    rates = []
    for trainer.step in range(101):
        rates.append(trainer.rate())
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0]) and rates[-1] == pytest.approx(0.02)
    assert all(rate == 1.0 for rate in rates[5:55]) and all(
        a > b for a, b in zip(rates[56:99], rates[57:], strict=False)
    )


def test_windows_come_once_an_epoch_and_are_cut_elsewhere_each_time():
    ids = np.arange(1000, dtype=np.uint16)
    epochs = [training.windows(ids, 16, epoch * 61, 61, seed=0) for epoch in range(2)]
    for epoch in epochs:
        assert torch.equal(epoch - epoch[:, :1], torch.arange(16).expand(61, 16))
        assert len(epoch[:, 0].unique()) == 61 and len(epoch.unique()) == 61 * 16
    assert not torch.equal(*epochs)
    assert torch.equal(training.windows(ids, 16, 50, 30, seed=0), torch.cat(epochs)[50:80])
    with pytest.raises(ValueError, match="20 tokens of text are too few for windows of 16"):
        training.windows(ids[:20], 16, 0, 1, seed=0)


def test_a_resumed_run_repeats_the_losses(tmp_path):
    """Stopped after 25 of 60 steps and resumed by a fresh trainer: the losses and weights of a run in one go."""
    ids = periodic_ids(0)
    whole = training.Trainer(CONFIG, ids, compiled=False)
    losses = [row["loss"] for row in run(whole, tmp_path / "whole")]
    part = training.Trainer(CONFIG, ids, compiled=False)
    first = [round(part.train_step(), 4) for _ in range(25)]
    part.save(tmp_path / training.LATEST)
    resumed = training.Trainer(CONFIG, ids, compiled=False)
    assert resumed.resume(tmp_path) and resumed.step == 25 and resumed.tokens == 25 * 256
    assert first + [row["loss"] for row in run(resumed, tmp_path)] == losses
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_a_larger_budget_goes_on_from_before_the_decay(tmp_path):
    ids = periodic_ids(0)
    run(training.Trainer(CONFIG, ids, compiled=False), tmp_path)
    same, longer = (training.Trainer(replace(CONFIG, steps=steps), ids, compiled=False) for steps in (60, 90))
    assert same.resume(tmp_path) and same.step == 60
    assert longer.resume(tmp_path) and longer.step == 34  # the first of the decay (0.45 of 60) comes next
    longer.save(tmp_path / training.LATEST)  # killed here, before its own decay
    for _ in range(3):
        longer.train_step()
    longer.save(tmp_path / training.LATEST)
    longest = training.Trainer(replace(CONFIG, steps=120), ids, compiled=False)
    assert longest.resume(tmp_path) and longest.step == 37, "nothing has decayed since, so nothing is to be taken back"
    other = training.Trainer(replace(CONFIG, learning_rate=1e-3), ids, compiled=False)
    with pytest.raises(ValueError, match="learning_rate 0.003, not 0.001"):
        other.resume(tmp_path)
    with pytest.raises(ValueError, match=f"a run on {len(ids)} tokens of text, not {len(ids) - 1}"):
        training.Trainer(CONFIG, ids[1:], compiled=False).resume(tmp_path)


def test_a_budget_that_is_spent_already_has_a_last_row_too(tmp_path):
    """Given less than was spent, a run ends with the held-out loss of the weights there are."""
    part = training.Trainer(CONFIG, periodic_ids(0), compiled=False)
    for _ in range(3):
        part.train_step()
    part.save(tmp_path / training.LATEST)
    for _ in range(2):
        shorter = training.Trainer(replace(CONFIG, steps=2), periodic_ids(0), compiled=False)
        assert shorter.resume(tmp_path)
        (row,) = run(shorter, tmp_path)
        assert row["step"] == 3 and row["progress"] == 1.0 and row["heldout_loss"] > 0 and shorter.log == [row]
        shorter.save(tmp_path / training.LATEST)


def test_too_little_text_is_refused_at_once(tmp_path):
    """Text is too short for its longest windows, although the first steps take short ones; held-out text may be short,
    but not without a prediction."""
    with pytest.raises(ValueError, match="100 tokens of text are too few for windows of 64"):
        training.Trainer(CONFIG, periodic_ids(0)[:100], compiled=False)
    config = replace(CONFIG, full_window_share=0.0, steps=1)
    trainer = training.Trainer(config, periodic_ids(0)[:100], compiled=False)
    with pytest.raises(ValueError, match="1 tokens of held-out text are too few"):
        next(training.train(trainer, periodic_ids(0)[:1], tmp_path))
    assert trainer.step == 0
    (row,) = training.train(trainer, periodic_ids(0)[:2], tmp_path)
    assert 0 < row["heldout_loss"] < 10


def test_a_stopped_process_spends_no_budget(monkeypatch, tmp_path):
    """A step in which the process was told to go on counts as long as the one before; the first, and any other one, as
    it took."""
    trainer = training.Trainer(replace(CONFIG, steps=3), periodic_ids(0), compiled=False)
    loss_of, seconds, stops = training.loss_of, iter((0.2, 2.0, 0.4)), iter((True, True, False))

    def slow(*arguments):
        time.sleep(next(seconds))
        if next(stops):
            os.kill(os.getpid(), signal.SIGCONT)
        return loss_of(*arguments)

    monkeypatch.setattr(training, "loss_of", slow)
    monkeypatch.setattr(training, "heldout_loss", lambda *_: 0.0)
    before, spent = signal.getsignal(signal.SIGCONT), [0.0]
    spent += [trainer.seconds for _ in training.train(trainer, trainer.ids, tmp_path)]
    first, second, third = (later - earlier for earlier, later in itertools.pairwise(spent))
    assert 0.2 < first < 2.0 and second == pytest.approx(first) and third > 0.4
    assert signal.getsignal(signal.SIGCONT) == before


def test_the_first_signal_asks_and_a_later_one_ends(monkeypatch):
    """What a supervisor sends beside the terminal, at the same moment, is the first one still."""
    raised, now = [], iter((10.0, 10.5, 11.5))
    monkeypatch.setattr(signals.time, "monotonic", lambda: next(now))
    monkeypatch.setattr(signals.signal, "signal", lambda number, handler: raised.append(handler))
    monkeypatch.setattr(signals.signal, "raise_signal", raised.append)
    end = signals.End()
    end(signal.SIGINT, None)
    end(signal.SIGTERM, None)
    assert end.number == signal.SIGINT and not raised
    end(signal.SIGTERM, None)
    assert raised == [signal.SIG_DFL, signal.SIGTERM]


def test_signals_of_a_run(tmp_path, keyboard):
    """An exception after the end was asked for saves, but not in the middle of an update; what is ignored stays so, and
    what was handled before is handled again."""
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCONT)]
    for is_updating in (False, True):
        trainer = training.Trainer(replace(CONFIG, steps=5), periodic_ids(0), compiled=False)
        rows = training.train(trainer, periodic_ids(0), tmp_path, 60.0)
        next(rows)
        signal.raise_signal(signal.SIGINT)
        (tmp_path / training.LATEST).unlink(missing_ok=True)

        def killed(trainer=trainer, is_updating=is_updating) -> float:
            trainer.is_updating = is_updating
            raise RuntimeError("the compiler was killed")

        trainer.train_step = killed
        with pytest.raises(RuntimeError if is_updating else KeyboardInterrupt):
            next(rows)
        assert (tmp_path / training.LATEST).exists() != is_updating
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCONT)] == before
    trainer = training.Trainer(replace(CONFIG, steps=1), periodic_ids(0), compiled=False)
    last = training.train(trainer, periodic_ids(0), tmp_path)
    assert next(last)["progress"] == 1.0
    signal.raise_signal(signal.SIGTERM)
    with pytest.raises(SystemExit, match="143"):
        next(last)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with signals.handled({signal.SIGINT: signals.End()}):
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before[0])


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"steps": -3}, "steps must be at least 0"),
        ({"layers": 0}, "layers must be at least 1"),
        ({"short_window": 0}, "short_window must be at least 2"),
        ({"short_window": 65}, "short_window must be at most context"),
        ({"tokens_per_step": 63}, "tokens_per_step must be at least context"),
        ({"decay_share": 0.0}, "decay_share must be above 0"),
        ({"decay_share": 2.0}, "decay_share must be from 0 to 1"),
        ({"teacher_share": float("nan")}, "teacher_share must be from 0 to 1"),
        ({"learning_rate": 0.0}, "got learning_rate 0.0, warmup_steps 5"),
    ],
)
def test_what_no_run_can_be_is_refused(wrong, said):
    with pytest.raises(ValueError, match=said):
        replace(CONFIG, **wrong)


def test_one_block_is_compiled_for_all(monkeypatch):
    """A graph for each kind of batch, whatever the number of layers; losses are those of an uncompiled run."""
    graphs = []
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda call, **how: compile_(call, backend=counting, **how))
    for name in ("_text_loss", "_law_loss"):
        monkeypatch.setattr(loss, name, compile_(getattr(loss, name)._torchdynamo_orig_callable, backend="eager"))

    def counting(graph, inputs):
        graphs.append(graph)
        return graph.forward

    ids, config = periodic_ids(0), replace(CONFIG, layers=3, teacher_share=0.5, full_window_share=0.0, steps=4)
    teacher = training.build(replace(CONFIG, layers=3, seed=1))
    runs = [training.Trainer(config, ids, teacher, compiled=compiled) for compiled in (False, True)]
    losses = [[run.train_step() for _ in range(4)] for run in runs]
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)
    assert len(graphs) == 2, "the student's and the teacher's"


def test_text_that_a_model_writes_follows_its_law():
    """At a temperature near zero it is greedy text; prompts are pieces of the given text."""
    trainer = training.Trainer(replace(CONFIG, steps=40), periodic_ids(0), compiled=False)
    for _ in range(40):
        trainer.train_step()
    model = trainer.model.cpu().eval()
    model.generation_config.update(repetition_penalty=1e9, suppress_tokens=list(range(1, 25)))  # of no effect
    parts = list(samples.sample_text(model, trainer.ids, 50, 1e-4, batch=2, prompt_length=8, length=16))
    assert len(parts) == 2 and all(part.shape == (2, 24) and part.dtype == np.uint16 for part in parts)
    rows = torch.from_numpy(np.concatenate(parts).astype(np.int64))
    assert torch.equal(model(rows).logits.argmax(-1)[:, 7:-1], rows[:, 8:])


FAULTS = """
import resource, sys, torch
from model.heap import keep_freed_memory

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

assert sys.argv[1] == "lets go" or keep_freed_memory()
for turn in range(40):
    torch.ones(2**24)
    if turn == 9:
        before = faults()
print(faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc, to whose malloc it speaks")
def test_freed_memory_is_used_again():
    """Pages of a tensor of 64 MB, made and freed again and again, come from the kernel each time, or at first only."""
    root = Path(__file__).parent.parent

    def faults(how: str) -> int:
        command = [sys.executable, "-c", FAULTS, how]
        return int(subprocess.run(command, check=True, capture_output=True, text=True, cwd=root).stdout)

    assert faults("keeps") < faults("lets go") / 10
