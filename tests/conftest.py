"""Options and fixtures for every test."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests import interpreter  # before anything that imports a kernel
from tests.helpers import hf_model

if interpreter.INTERPRETING:
    interpreter.install()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--prompts", metavar="DIR", default=None, help="folder with prompt sets, for tests on real text")


@pytest.fixture
def prompts_dir(request: pytest.FixtureRequest) -> Path:
    """The folder given as ``--prompts``; tests that ask for it are skipped without one."""
    given = request.config.getoption("--prompts")
    if given is None:
        pytest.skip("needs --prompts DIR")
    if not Path(given).is_dir():
        pytest.skip(f"--prompts: {given} is not a directory")
    return Path(given)


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
