"""Options and fixtures for every test."""

import importlib
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests import interpreter  # before anything that imports a kernel
from tests.gpu_helpers import poison_scratch
from tests.helpers import hf_model


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--prompts", metavar="DIR", default=None, help="folder with prompt sets, for tests on real text")


def pytest_configure(config: pytest.Config) -> None:
    given = config.getoption("--prompts")
    if given is not None and not Path(given).is_dir():
        raise pytest.UsageError(f"--prompts: {given} is not a directory")
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)  # a worker on each core, or they stall one another


def pytest_runtest_setup(item: pytest.Item) -> None:
    if interpreter.INTERPRETING and item.get_closest_marker("gpu"):
        pytest.skip("needs a CUDA device")


@pytest.fixture
def keyboard() -> Iterator[None]:
    """Ctrl-C reaches this process and those that it starts, also where a shell began the tests in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def prompts_dir(request: pytest.FixtureRequest) -> Path:
    """The folder given as ``--prompts``; tests that ask for it are skipped without one."""
    given = request.config.getoption("--prompts")
    if given is None:
        pytest.skip("needs --prompts DIR, a folder with humaneval/HumanEval.jsonl.gz")
    return Path(given)


@pytest.fixture
def hostile_scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scratch memory full of NaN and -1."""
    poison_scratch(monkeypatch)


@pytest.fixture
def counters_at_zero(hostile_scratch) -> Iterator[None]:
    """Hostile scratch, and arrival counters that the test leaves at zero."""
    yield
    counters = importlib.import_module("kernels.gpu.launch").arrivals(
        1, torch.zeros(0, device=interpreter.DEVICE).device
    )
    assert not counters.any(), "an arrival counter was left behind"


@pytest.fixture(params=["reference", "gpu"], ids=["torch", "triton"])
def ops(request: pytest.FixtureRequest) -> ModuleType:
    """Each backend in turn."""
    return importlib.import_module(f"kernels.{request.param}")


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same state of torch's generator."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``checkpoint(**fields)``: a directory with ``hf_model(**fields)``, saved once per session; do not change it."""
    saved: dict[tuple, Path] = {}

    def save(**fields) -> Path:
        key = tuple(sorted(fields.items()))
        if key not in saved:
            saved[key] = tmp_path_factory.mktemp("checkpoint")
            hf_model(**fields).save_pretrained(saved[key])
        return saved[key]

    return save


@pytest.fixture
def copied(checkpoint, tmp_path) -> Callable[..., Path]:
    """``copied(**fields)``: a checkpoint directory of this test's own, to be damaged."""

    def copy(**fields) -> Path:
        return shutil.copytree(checkpoint(**fields), tmp_path / "checkpoint")

    return copy
