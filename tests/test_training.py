"""The code that made the bundled models: what becomes training text, and that training learns, in miniature."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from model import corpus, training


def source(name: str) -> str:
    """A file of twenty functions in which every line holds ``name``."""
    return "".join(f"def {name}_{i}(argument):\n    return {name}_table[{i}]\n\n\n" for i in range(20))


BODY = source("function")


def write(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)
    return folder


def test_duplicates_near_repetitions_and_tests_are_left_out(tmp_path):
    """Of a file, its copy, a file that mostly repeats it and a file of tests, only the first is read."""
    root = write(tmp_path / "a", one=BODY, copy=BODY, near=BODY + "\nprint('a line of its own')\n")
    write(root / "tests", test_one=source("another"))
    write(tmp_path / "b", other=source("different"), large="x = 1  # comment\n" * 20000)
    texts = corpus.collect([root, tmp_path / "b"])
    assert sorted(texts.train + texts.heldout) == sorted([BODY, source("different")])


def test_held_out_files_depend_on_content_alone(tmp_path):
    """About one file in 50 is held out, the same ones wherever they lie."""
    files = {f"file_{i}": source(f"name_{i}") for i in range(300)}
    one = corpus.collect([write(tmp_path / "one", **files)])
    other = corpus.collect([write(tmp_path / "other", **{f"moved_{name}": text for name, text in files.items()})])
    assert sorted(one.heldout) == sorted(other.heldout) and 1 <= len(one.heldout) <= 20
    assert not set(one.train) & set(one.heldout)


def test_an_absent_package_is_refused():
    with pytest.raises(ValueError, match="'no_such_package' is not installed"):
        corpus.default_roots(("no_such_package",))


def test_tokenizer_round_trip_and_document_borders():
    tokenizer = corpus.train_tokenizer([BODY], 400)
    text = "def é(x):\n\treturn '😀'\n"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    ids = corpus.encode(tokenizer, [BODY, text])
    assert ids.dtype == np.uint16 and (ids == 0).sum() == 2 and ids[0] == 0


CONFIG = training.TrainingConfig(
    layers=1, width=64, vocab_size=50, context=64, minutes=0.08, tokens_per_step=256, short_window=16
)


def periodic_ids(seed: int) -> np.ndarray:
    """A text that a model can learn: three random cycles over 50 tokens."""
    cycles = np.random.default_rng(seed).permuted(np.tile(np.arange(1, 50), (3, 1)), axis=1)
    return np.concatenate([np.tile(cycle, 40) for cycle in cycles]).astype(np.uint16)


def test_training_learns_and_a_student_follows_its_teacher():
    """Within five seconds the loss falls far below that of guessing; so does a student's that sees the teacher only."""
    ids = periodic_ids(0)
    *_, (teacher, row) = training.train(CONFIG, ids, ids, compiled=False)
    guessing = float(np.log(50))
    assert row["heldout_loss"] < 0.5 * guessing and row["tokens"] > 0
    *_, (_, student_row) = training.train(replace(CONFIG, teacher_share=1.0), ids, ids, teacher, compiled=False)
    assert student_row["heldout_loss"] < 0.6 * guessing


def test_learning_rate_warms_up_and_decays():
    rates = [training.rate_at(progress, CONFIG) for progress in np.linspace(0, 1, 101)]
    assert rates[0] < 0.1 and max(rates) == 1.0 and rates[-1] == pytest.approx(0.02)
    assert all(a >= b for a, b in zip(rates[50:], rates[51:], strict=False))


def test_windows_are_cut_from_the_text():
    ids = np.arange(1000, dtype=np.uint16)
    batch = training.windows(ids, 16, 8, np.random.default_rng(0))
    assert batch.shape == (8, 16) and torch.equal(batch - batch[:, :1], torch.arange(16).expand(8, 16))
