"""Launches that may start before the one ahead has finished: every kernel waits first, and nothing else changes.

Without a GPU: from source, recorded launches and machine code. The last three tests compare bits, on a GPU for real; in
Triton's interpreter they show that the setting changes nothing there.
"""

import ast
import functools
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from decoding import StagedDecoder
from kernels import gpu
from kernels.gpu.launch import early_launches, record
from kernels.gpu.linear import linear
from profiling import passes
from profiling.iteration import iteration
from profiling.machine_code import launches
from profiling.shapes import BUNDLED, SHAPES, Shape
from tests.gpu_helpers import REAL_SHAPE, same_bits
from tests.interpreter import DEVICE, INTERPRETING
from tests.recorded_graph import said

SHAPE = BUNDLED["draft"]
TINY = Shape("tiny", 1, 64, 1, vocab=97, positions=256)
BEFORE_THE_WAIT = {"program_id", "arange", "cdiv", "zeros", "to", "starts_early", "prefetch_rows"}
OF_ATTENTION = {"prefetch_keys", "minimum", "maximum"}  # where its keys lie: see the rules


@functools.cache
def between_passes() -> list:
    return list(iteration(SHAPE.vocab, "meta").calls.values())


def recorded(arch: str) -> list:
    """Every launch of a pass, of a prefill, and of what lies between passes."""
    found = [launch for rows in (5, 256) for _, launch in launches(SHAPE, rows, torch.bfloat16, arch, draws=rows == 5)]
    for call in between_passes():
        with record(arch) as made:
            call()
        found += made
    return found


def test_every_kernel_waits_before_it_touches_memory():
    """In all kernels that are launched, nothing but addresses and requests for the L2 cache comes before the wait."""
    kernels = {launch.kernel for launch in recorded("sm_90")}
    assert len(kernels) >= 14
    for kernel in kernels:
        body = ast.parse(inspect.getsource(kernel.fn)).body[0].body
        waits = [i for i, statement in enumerate(body) if ast.unparse(statement) == "wait_for_previous()"]
        assert len(waits) == 1, f"{kernel.fn.__name__} waits in {len(waits)} places, not one"
        calls = [node for statement in body[: waits[0]] for node in ast.walk(statement) if isinstance(node, ast.Call)]
        called = {node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id for node in calls}
        allowed = BEFORE_THE_WAIT | (OF_ATTENTION if kernel.fn.__name__ == "_tree_attention_kernel" else set())
        assert called <= allowed, f"{kernel.fn.__name__} calls {called - allowed} before it waits"


@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90", "sm_100", "gfx942"])
def test_only_gpus_that_have_it_get_another_launch(arch):
    """What selects a binary is the same as without the setting, but for one option where the GPU knows it."""
    with early_launches(False):
        plain = [launch.options for launch in recorded(arch)]
    default = [launch.options for launch in recorded(arch)]
    with early_launches(True):
        early = [launch.options for launch in recorded(arch)]
    added = {"launch_pdl": True} if arch in ("sm_90", "sm_100") else {}
    assert early == default == [options | added for options in plain]
    assert not any("launch_pdl" in options for options in plain)


def test_machine_code():
    """Weights are asked for, then the program waits, then it lets the next one start; loads and stores come later, but
    for those by which attention finds its keys, past the L1 cache (STRONG)."""
    code = """
import re, torch
from kernels.gpu.config import LinearTiles
from kernels.gpu.launch import early_launches, record
from kernels.gpu.linear import linear
from kernels import gpu
from profiling.machine_code import binary_of, instructions_of, launches, source_of
from profiling.shapes import BUNDLED
memory = ("LD", "LDG", "LDGSTS", "ST", "STG", "ATOM", "ATOMG", "RED", "REDG", "UTMALDG", "UBLKCP")
def empty(*size):
    return torch.empty(*size, dtype=torch.bfloat16, device="meta")
x, weight, out, gain = empty(1, 256), empty(64, 256), empty(1, 64), empty(256)
for arch in ("sm_90", "sm_100"):
    with record(arch) as recorded, early_launches(True):
        moments = gpu.new_moments(1, 256, "meta")
        norm = (gain, gain, 1e-5)
        linear(x, weight, out, bias=gain[:64], norm=norm, moments=moments, tiles=LinearTiles(16, 64, 64, 2, 4, 2))
        gpu.embed(empty(3).int(), empty(3).int(), empty(97, 256), empty(64, 256))
    model = launches(BUNDLED["draft"], 5, torch.bfloat16, arch)
    for launch in recorded + [launch for operation, launch in model if operation.name == "tree_attention"][:1]:
        binary = binary_of(source_of(launch, arch), arch)
        kinds = {"CCTL": "p", "ACQBULK": "W", "PREEXIT": "L"} | dict.fromkeys(memory, "m")
        names = [name.replace("LDG.E.STRONG.GPU", "PAST") for name in instructions_of(binary.asm["cubin"])]
        text = "".join((kinds | {"PAST": "r"}).get(name.split(".")[0], "") for name in names)
        print(arch, launch.kernel.__name__, text[: text.index("m") + 1], binary.metadata.launch_pdl)
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True)
    found = [line.split() for line in done.stdout.splitlines()]
    assert [line[:2] for line in found] == [
        [arch, f"_{kernel}_kernel"] for arch in ("sm_90", "sm_100") for kernel in ("linear", "embed", "tree_attention")
    ], done.stderr
    for _, kernel, order, early in found:
        requests = order.removesuffix("WLm")
        assert requests + "WLm" == order and early == "True", order
        assert set(requests) == {"_linear_kernel": {"p"}, "_embed_kernel": set()}.get(kernel, {"r", "p"}), order
    assert all(len(order) >= 4 + 3 for _, kernel, order, _ in found if kernel == "_linear_kernel")  # all parameters


@pytest.mark.parametrize(
    "shape", [TINY, pytest.param(SHAPES["small"], marks=REAL_SHAPE), pytest.param(SHAPES["large"], marks=REAL_SHAPE)]
)
def test_a_pass_has_the_same_bits(shape):
    """Again and again, where launches overlap: weights of their own in each layer, so that none lies in the cache."""
    dtype = torch.float32 if INTERPRETING else torch.bfloat16
    with torch.no_grad():
        forward = passes.forward(
            passes.pass_of(passes.random_model(shape, dtype, torch.device(DEVICE), gpu), "model", 5, 60)
        )
        with early_launches(False):
            plain = forward()
        with early_launches(True):
            for _ in range(1 if INTERPRETING else 100):
                assert same_bits(forward(), plain)


def test_weights_may_change_just_before():
    """A request for weights that are being written keeps nothing old: the product is that of the new ones."""
    x = torch.ones(1, 256, device=DEVICE)
    weight, out = torch.empty(640, 256, device=DEVICE), torch.empty(1, 640, device=DEVICE)
    values, sums = range(1, 3 if INTERPRETING else 300), []
    with early_launches(True):
        for value in values:
            weight.fill_(value)
            sums.append(linear(x, weight, out).clone())
    assert torch.equal(
        torch.stack(sums).cpu(), torch.tensor([256.0 * i for i in values])[:, None, None].expand(-1, 1, 640)
    )


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["baseline", "staged"])
def test_captured_iterations_say_the_same(method):
    """CUDA graphs that were captured with early launches replay to the same text and statistics as those without."""
    arguments = {"prompt": "def read_lines(path):\n", "max_new_tokens": 128, "method": method}
    arguments |= {"do_sample": True, "top_k": 20, "temperature": 1.3}
    outs = []
    for wanted in (False, True):
        with early_launches(wanted):
            trio = StagedDecoder.from_pretrained(device=DEVICE, dtype="bfloat16", backend="triton")
            outs.append([said(trio.generate(**arguments, seed=seed)) for seed in range(4)])
            assert trio.execution.name == "captured"
    assert outs[0] == outs[1]
