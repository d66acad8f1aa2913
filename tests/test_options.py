"""Options of the tests themselves."""

import subprocess
import sys
from pathlib import Path

import pytest


def test_prompts_that_are_no_directory(tmp_path):
    """A wrong ``--prompts`` ends the run before any test, with what is wrong in one line."""
    command = [sys.executable, "-m", "pytest", __file__, f"--prompts={tmp_path / 'nowhere'}"]
    run = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    assert run.returncode == pytest.ExitCode.USAGE_ERROR
    assert run.stderr.strip() == f"ERROR: --prompts: {tmp_path / 'nowhere'} is not a directory"
