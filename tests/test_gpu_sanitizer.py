"""compute-sanitizer over a whole generation: nothing out of bounds, nothing read before it was written, no bad barrier.

It does not see races in global memory; those are left to repeated launches and to reading.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SANITIZER = shutil.which("compute-sanitizer")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(SANITIZER is None, reason="needs compute-sanitizer (CUDA toolkit)")]
ERROR = 9


def sanitize(tool: str, *arguments: str) -> subprocess.CompletedProcess:
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", str(ERROR)]
    command += [sys.executable, "-m", "tests.gpu_sanitized", *arguments]
    # without torch's pool, which would hide what lies behind the end of a tensor
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    root = Path(__file__).parent.parent
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=900)


@pytest.mark.parametrize("tool", ["memcheck", "initcheck", "synccheck", "racecheck"])
def test_a_generation_is_clean(tool):
    done = sanitize(tool)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_a_store_behind_the_end_is_seen():
    assert sanitize("memcheck", "out-of-bounds").returncode == ERROR
