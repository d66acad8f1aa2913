"""The loops of the twins do as they should without numba, too, and what they are made of does as it says."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

import kernels.reference.compiled as compiled_module
from kernels.reference.sampling import _finish, _finish_many, by_topk, keyed_noise, largest

WORKED_BY_HAND = [
    "tree",
    "tree_invariants",
    "rows_of_a_pass",
    "verify_and_commit",
    "lookup_nodes",
    "attention_by_hand",
    "noise",
]


def test_without_numba():
    """Where numba is not installed the same loops run as Python: every case worked by hand, indices checked."""
    run = "import sys, pytest; sys.modules['numba'] = None; sys.exit(pytest.main(sys.argv[1:]))"
    files = [f"tests/test_{name}.py" for name in WORKED_BY_HAND]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    done = subprocess.run(
        [sys.executable, "-c", run, "-q", "-p", "no:cacheprovider", "-k", "not triton", *files],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@pytest.mark.parametrize("size", [64, 65, 1000, 8192])
@pytest.mark.parametrize("values", ["random", "ties", "equal", "NaN", "-inf"])
@pytest.mark.parametrize(("count", "survivors"), [(1, 1), (8, 3), (50, 50), (64, 1)])
@pytest.mark.parametrize("way", ["tiles", "topk"])
@pytest.mark.parametrize(("dtype", "temperature"), [(torch.float32, 1.0), (torch.float32, 0.7), (torch.bfloat16, 0.3)])
def test_largest(size, values, count, survivors, way, dtype, temperature):
    """Against a stable sort: what is at least the ``count``-th, by rising index; below the ``survivors``-th -inf."""
    logits = torch.randn(5, size)
    if values == "ties":
        logits = logits.mul(2).round()
    elif values == "equal":
        logits = torch.zeros(5, size)
    elif values != "random":
        logits[torch.rand(5, size) < 0.3] = float(values)
        logits[4] = float(values)
    logits = logits.to(dtype)
    scores = logits.float() / temperature
    if way == "tiles":
        found, ids = largest(logits, count, survivors, temperature)
    else:
        found, ids = by_topk(scores, count, survivors)
    assert found.shape == ids.shape and (ids.diff(dim=1) >= 0).all()
    for row, mine, places in zip(scores, found, ids, strict=True):
        ordered = row.sort(descending=True).values  # NaN first
        wanted = (~(row < ordered[count - 1])).nonzero().flatten()
        expected = row[wanted].masked_fill(row[wanted] < ordered[survivors - 1], -torch.inf)
        assert places[: len(wanted)].tolist() == wanted.tolist()
        torch.testing.assert_close(mine[: len(wanted)], expected, rtol=0, atol=0, equal_nan=True)
        assert (mine[len(wanted) :] == -torch.inf).all()


@pytest.mark.parametrize("way", [largest, by_topk])
def test_largest_of_no_rows(way):
    found, ids = way(torch.empty(0, 100), 5, 5)
    assert found.shape == ids.shape == (0, 5)


def test_noise_as_python():
    """The logarithms of machine code are other ones than numpy's: at most the last bit differs, and seldom."""
    tokens, positions = np.random.default_rng(0).integers(50257, size=(2, 100_000))
    mine, python = (
        keyed_noise(5, 7, positions, tokens),
        getattr(keyed_noise, "py_func", keyed_noise)(5, 7, positions, tokens),
    )
    np.testing.assert_allclose(mine, python, rtol=2e-7, atol=2e-7)
    assert (mine != python).mean() < 1e-4


@pytest.mark.parametrize("noise", [False, True])
@pytest.mark.parametrize("shift", [0.0, -300.0])
@pytest.mark.parametrize("width", [1, 8])
def test_few_candidates_end_as_many_do(noise, shift, width):
    """Tokens, children and scores of the loop and of torch's operations, ties, dead candidates and NaN among them."""
    plain = torch.randn(6, 50).mul(8).round() / 4 + shift
    plain[1, 7:], plain[2] = -torch.inf, shift
    scores = plain + torch.randn(6, 50).round() if noise else plain
    scores[3, 20] = plain[3, 20] = torch.nan
    ids = torch.arange(50).expand(6, 50) + 100
    tokens, children, *in_float32 = _finish_many(scores, plain, ids, width, 0.85, True)
    in_float64 = _finish_many(scores.double(), plain.double(), ids, width, 0.85, True)[2:]
    found = _finish(scores.numpy(), plain.numpy(), ids.numpy(), width, np.float32(0.85))
    assert np.array_equal(found[0], tokens) and np.array_equal(found[1], children)
    for mine, rounded, exact in zip(map(torch.from_numpy, found[2:]), in_float32, in_float64, strict=True):
        torch.testing.assert_close(rounded, exact.float(), rtol=1e-5, atol=1e-4, equal_nan=True)
        torch.testing.assert_close(mine, exact.float(), rtol=1e-6, atol=1e-6, equal_nan=True)  # wherever they lie
    assert found[0][3] == -1 and found[0][2] >= 100


def test_machine_code_of_other_sources_is_dropped(tmp_path):
    """All of it, once; what was made from the sources as they are stays, and so does every other file."""
    forget = compiled_module._forget_what_is_stale.__wrapped__
    code, other = [tmp_path / "tree.select-1.nbi", tmp_path / "tree.select-1.1.nbc"], tmp_path / "tree.pyc"
    for path in (*code, other):
        path.write_bytes(b"")
    forget(tmp_path)
    assert not any(path.exists() for path in code) and other.exists()
    code[0].write_bytes(b"")
    forget(tmp_path)
    assert code[0].exists()
    (tmp_path / "sources.sha256").write_text("of another day")
    forget(tmp_path)
    assert not code[0].exists()
