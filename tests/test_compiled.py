"""The loops of the twins do as they should without numba, too, and what they are made of does as it says."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

import kernels.reference.compiled as compiled_module
from kernels.layout import Sampling
from kernels.reference import draw, exponential, sampling
from kernels.reference.noise import keyed_noise
from tests.laws import GREEDY, clear_rows, sampled

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


RULES = {
    "greedy": GREEDY,
    "plain": sampled(seed=1),
    "tempered": sampled(seed=2, temperature=0.3),
    "top_k=1": sampled(seed=3, top_k=1),
    "top_k=50": sampled(seed=4, top_k=50, temperature=1.3),
    "top_k=300": sampled(seed=5, top_k=300),  # more than lanes tell apart
    "top_p": sampled(seed=6, top_p=0.9),
    "top_p=0.9999": sampled(seed=7, top_p=0.9999),  # more than are looked at first
    "min_p": sampled(seed=8, min_p=0.3),
    "all": sampled(seed=9, temperature=0.8, top_k=70, top_p=0.8, min_p=0.01),
}


@pytest.mark.parametrize("size", [3, 1000, 8192])
@pytest.mark.parametrize("values", ["random", "ties", "equal", "NaN", "-NaN", "-inf"])
@pytest.mark.parametrize(("width", "dtype"), [(0, torch.float32), (8, torch.bfloat16), (1, torch.float16)])
@pytest.mark.parametrize("sampling_rule", RULES.values(), ids=RULES)
def test_rows_draw_as_the_specification(size, values, width, dtype, sampling_rule):
    """Tokens, children, edge scores and log-probabilities of the loops and of torch's operations."""
    generator = torch.Generator().manual_seed(size)
    logits = 3 * torch.randn(6, size, generator=generator)
    if values == "ties":
        logits = logits.round()
    elif values == "equal":
        logits = torch.zeros(6, size)
    elif values != "random":
        value = {"NaN": torch.nan, "-NaN": -torch.tensor(torch.nan), "-inf": -torch.inf}[values]
        logits[torch.rand(6, size, generator=generator) < 0.01] = value
        logits[2, size // 2] = logits[4] = value
    logits, positions = logits.to(dtype), torch.arange(6, dtype=torch.int32) + 90
    clear = clear_rows(logits.float().nan_to_num(0.0, neginf=-1e9), sampling_rule) | logits.isnan().any(1)
    if values in ("ties", "equal") and sampling_rule.top_p < 1:
        clear[:] = True  # in an order that Hugging Face does not define
    log_probs, of_children = torch.empty(6), torch.empty(6, min(width, size))
    found = *draw(logits, positions, sampling_rule, width, 0.85, None, log_probs, of_children), log_probs, of_children
    wanted = sampling.by_torch(logits, positions, sampling_rule, max(1, width), 0.85)
    wanted = wanted[0], wanted[1][:, :width], wanted[2][:, :width], wanted[3][:, 0], wanted[3][:, :width]
    live = (wanted[2] > -torch.inf) & clear[:, None]
    assert torch.equal(found[0][clear], wanted[0][clear])
    assert torch.equal(found[1][live], wanted[1][live])
    for mine, theirs in zip(found[2:], wanted[2:], strict=True):
        torch.testing.assert_close(mine[clear], theirs[clear], rtol=1e-5, atol=2e-5, equal_nan=True)


def test_draw_of_no_rows():
    tokens, children, edges = draw(torch.empty(0, 100), torch.empty(0, dtype=torch.int32), sampled(top_k=5), 4)
    assert tokens.shape == (0,) and children.shape == edges.shape == (0, 4)


@pytest.mark.parametrize("count", [1, 2, 3, 100, 8191, 8192])
def test_sum_of_exp(count):
    """Against float64, and the exponential by itself: at most two units of the last place away."""
    x = -30 * np.random.default_rng(count).random(count).astype(np.float32)
    exact = np.exp(x.astype(np.float64))
    assert exponential.sum_of_exp(x, np.float32(0), np.float32(1)) == pytest.approx(exact.sum(), rel=1e-6)
    shifted = exponential.sum_of_exp(x + 5, np.float32(5), np.float32(0.5))
    assert shifted == pytest.approx((exact**2).sum(), rel=1e-5)
    mine = np.array([exponential.exp(value) for value in x], dtype=np.float32)
    np.testing.assert_allclose(mine, exact, rtol=2.4e-7)


def test_noise_as_python():
    """The logarithms of machine code are other ones than numpy's: at most the last bit differs, and seldom."""
    tokens, positions = np.random.default_rng(0).integers(50257, size=(2, 100_000))
    mine, python = (
        keyed_noise(5, 7, positions, tokens),
        getattr(keyed_noise, "py_func", keyed_noise)(5, 7, positions, tokens),
    )
    np.testing.assert_allclose(mine, python, rtol=2e-7, atol=2e-7)
    assert (mine != python).mean() < 1e-4


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


def test_numpy_views_of_a_structure_are_kept_by_identity():
    """They share its memory, other members stay; equal tensors in another structure are others; few are kept."""

    def structure(number: float) -> Sampling:
        return Sampling(False, torch.full((2,), number), 1.0, 0, 1.0, 0.0)

    first, second = structure(1.0), structure(1.0)
    views = compiled_module.in_numpy(first)
    assert isinstance(views, Sampling) and views[2:] == first[2:]
    assert compiled_module.in_numpy(first) is views and compiled_module.in_numpy(second) is not views
    first.seed.fill_(7.0)
    assert views.seed.tolist() == [7.0, 7.0] and compiled_module.in_numpy(second).seed.tolist() == [1.0, 1.0]
    for number in range(1000):  # of which most are gone, and others stand where they stood
        assert compiled_module.in_numpy(structure(number)).seed.tolist() == [number, number]
    assert len(compiled_module._views) <= compiled_module._MOST_VIEWS
    assert compiled_module.in_numpy(first).seed.tolist() == [7.0, 7.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_bits_of_tensors_are_kept_while_they_live(dtype):
    """A view that shares their memory, the same one every time; it goes with the first of them, and others that stand
    where they stood have views of their own."""
    first, second = torch.ones(3, dtype=dtype), torch.zeros(3, dtype=dtype)
    kept = compiled_module.kept_bits(first, second)
    assert compiled_module.kept_bits(first, second) is kept and any(pair is kept for pair in _kept_bits())
    kept[1][1] = kept[0][0]
    assert second.tolist() == [0.0, 1.0, 0.0]
    del first
    assert not any(pair is kept for pair in _kept_bits())
    for number in range(100):  # of which most stand where another stood
        one = torch.full((3,), float(number), dtype=dtype)
        assert np.array_equal(compiled_module.kept_bits(one, second)[0], compiled_module.as_bits(one))


def _kept_bits() -> list:
    return list(compiled_module._bits.values())


@pytest.mark.skipif(not compiled_module.COMPILES, reason="needs numba, which keeps machine code")
def test_whether_machine_code_lies_ready(tmp_path, monkeypatch):
    """A note of the sources, which every import leaves, is not machine code yet; what numba has kept is."""
    monkeypatch.setattr(compiled_module, "_folders", {tmp_path})
    (tmp_path / "sources.sha256").touch()
    assert compiled_module.is_cold()
    (tmp_path / "verify._walk-1.py311.nbi").touch()
    assert not compiled_module.is_cold()
