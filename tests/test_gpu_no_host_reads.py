"""An iteration on the Triton backend reads nothing back from the device: every way to read a tensor is guarded."""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import decoding
import kernels
import model
from decoding import StagedDecoder
from decoding.config import Limits, SamplingConfig, SpeculationConfig
from decoding.katz import KatzTrigram
from decoding.loop import Generation
from decoding.stages import KatzStage
from kernels.gpu.launch import architecture, record
from kernels.layout import LENGTH, Record
from profiling.equality import noisy_copy
from tests.helpers import hf_model, random_tokens
from tests.interpreter import DEVICE
from tests.lockstep import moved

pytestmark = pytest.mark.usefixtures("hostile_scratch")
_READS = ["item", "cpu", "tolist", "numpy", "nonzero", "__bool__", "__int__", "__index__", "__float__", "__array__"]
_OURS = tuple(str(Path(package.__file__).parent) for package in (decoding, model, kernels))


@pytest.fixture
def no_host_reads(monkeypatch) -> Callable[[], None]:
    """Called, it makes every way to read a tensor raise where our own code is the caller; Triton's interpreter and
    torch itself may."""

    def guarded(name: str):
        read = getattr(torch.Tensor, name)

        def refuse(self, *args, **kwargs):
            caller = sys._getframe(1).f_code
            assert not caller.co_filename.startswith(_OURS), f"Tensor.{name} in {caller.co_qualname}"
            return read(self, *args, **kwargs)

        return refuse

    def install() -> None:
        for name in _READS:
            monkeypatch.setattr(torch.Tensor, name, guarded(name))

    return install


def generation(backend: str) -> Generation:
    """Table, draft and oracle at work on a prompt; three tokens are to come."""
    oracle = hf_model(n_positions=64)
    device = DEVICE if backend == "triton" else "cpu"
    decoder = StagedDecoder.from_pretrained(oracle, noisy_copy(oracle, 0.2), None, device, "float32", backend)
    table = moved(KatzTrigram(np.array(random_tokens(500)), 97).bake(50, 4), device)
    lower = [KatzStage("draft2", table, decoder.oracle.model.ops), *decoder.lower]
    config = SpeculationConfig(("draft2", "draft"), (1, 2), (3, 4), (3, 3), budget=9, max_depth=5)
    sampling = SamplingConfig(do_sample=True, top_k=20).with_seed(3)
    return Generation(lower, decoder.oracle, random_tokens(20), sampling, Limits(3, (96,)), config)


def test_iteration_reads_nothing_back(no_host_reads):
    """Four iterations, at least one of them after the end, run without a look at any tensor; the text is the twins'."""
    wanted = [token for emitted in generation("torch").run() for token in emitted]
    ours, records = generation("triton"), []
    no_host_reads()
    for _ in range(4):
        ours.iterate()
        records.append(ours.state.progress.record.clone())
    records = [record.tolist() for record in records]
    tokens = [token for record in records for token in record[Record.TOKENS : Record.TOKENS + record[Record.EMITTED]]]
    assert tokens == wanted
    assert records[-1][Record.EMITTED] == 0 and records[-1][Record.STATE] == LENGTH


def test_a_pass_of_the_oracle_has_a_row_for_each_node(monkeypatch):
    """The root's is the one at the head: nodes that fill a block of a product, the root among them, fill just one."""
    ours, counts = generation("triton"), []
    forward = ours.oracle.model.forward

    def counting(query, *rest, **more):
        counts.append(len(query.tokens))
        return forward(query, *rest, **more)

    monkeypatch.setattr(ours.oracle.model, "forward", counting)
    ours.iterate()
    assert counts == [ours.config.budget + 1]


class Computing(TorchDispatchMode):
    """The operations of torch that do more than allocate or look at memory."""

    FREE = ("empty", "new_empty", "empty_like", "empty_strided", "view", "select", "slice", "split", "alias", "detach")

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket.__name__ not in self.FREE:
            self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def test_an_iteration_launches_no_kernel_of_torch(monkeypatch):
    """Such a launch starts only when all before it has finished, and nothing starts early behind it."""
    monkeypatch.undo()  # what fills scratch memory with NaN
    ours = generation("triton")
    with record(architecture(ours.oracle.model.device)) as launches, Computing() as computing:
        ours.iterate()
    assert not computing.names and len(launches) > 20
    with Computing() as computing:
        torch.zeros(2)[torch.tensor([1])].clone()
    assert any("index" in name for name in computing.names), "it would be noticed"


@pytest.mark.gpu
def test_iteration_does_not_synchronise():
    """On a GPU, torch itself raises where an iteration would wait for the device, copies to the host included."""
    ours = generation("triton")
    ours.iterate()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(4):
            ours.iterate()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(part.is_cuda for group in ours.state for part in group)


def test_reads_are_noticed(no_host_reads):
    """The guard of the test above is one: the twins, which work on the host, do not get past it."""
    ours = generation("torch")
    no_host_reads()
    with pytest.raises(AssertionError, match=r"Tensor\.\w+ in \w+"):
        ours.iterate()
