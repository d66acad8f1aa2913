"""Captured iterations on the Triton backend: tokens, stages and statistics of eager ones, one capture for all seeds.

In the interpreter the stand-in of ``recorded_graph`` replays by calling what it captured, on static buffers; with
a GPU the same tests use CUDA graphs, and torch raises where the host would wait for the device.
"""

from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from decoding import StagedDecoder
from decoding.config import METHODS, SpeculationConfig
from decoding.execution import Captured, Eager
from decoding.katz import KatzTrigram, save
from model.capture import CudaGraph
from profiling.equality import noisy_copy
from tests.helpers import hf_model, random_tokens
from tests.interpreter import DEVICE, INTERPRETING
from tests.recorded_graph import RecordedGraph, said

pytestmark = pytest.mark.usefixtures("hostile_scratch")
SAMPLED = {"do_sample": True, "top_k": 20, "temperature": 1.3}


def new_graph():
    return RecordedGraph() if INTERPRETING else CudaGraph(torch.device(DEVICE))


@pytest.fixture(scope="module")
def decoder(tmp_path_factory) -> StagedDecoder:
    """Table, the oracle plus noise as draft, and the oracle, on the Triton backend."""
    directory, oracle = tmp_path_factory.mktemp("table"), hf_model(n_positions=96)
    save(KatzTrigram(np.array(random_tokens(1000)), 97).bake(100), directory)
    return StagedDecoder.from_pretrained(oracle, noisy_copy(oracle, 0.2), directory, DEVICE, "float32", "triton")


def run(decoder: StagedDecoder, execution, *arguments, **named):
    decoder.execution = execution
    return decoder.generate(*arguments, **named)


@pytest.mark.parametrize("sampling", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("method", ["baseline", "staged"])
def test_captured_is_eager(method, sampling, decoder):
    """Prompts of several lengths, ends and seeds through one captured iteration: all that eager iterations say."""
    captured = Captured(new_graph)
    cases = (
        [([5, 17, 40], 3, 2**40 + 1), (random_tokens(40), 3, 7)]
        if INTERPRETING
        else [(random_tokens(length), 60, 2**40 + length) for length in (1, 3, 33, 70)]
    )
    shape = decoder.plan(method)
    if INTERPRETING and method == "staged":
        shape = SpeculationConfig(("draft2", "draft"), (2, 1), (2, 3), (2, 2), budget=4, max_depth=4)
    for prompt, length, seed in cases:
        arguments = {"seed": seed, "speculation": shape} | sampling
        replayed, eager = (run(decoder, way, prompt, length, **arguments) for way in (captured, Eager(ahead=1)))
        assert said(replayed) == said(eager)
    assert replayed.stats["iteration"] == "captured" and len(captured._plans) == 1


def test_another_seed_is_read_by_the_graph(decoder):
    """The seed is not part of what was captured: with the same prompt another one gives another text."""
    captured = Captured(new_graph)
    texts = {
        tuple(run(decoder, captured, [5, 17], 4, seed=seed, method="baseline", **SAMPLED).new_token_ids)
        for seed in (1, 2)
    }
    assert len(texts) == 2 and len(captured._plans) == 1


@contextmanager
def no_synchronisation():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", METHODS)
def test_cuda_graphs(method, dtype):
    """The bundled trio by default captures on a GPU, waits for nothing while it replays, and gives the eager text."""
    trio = StagedDecoder.from_pretrained(device=DEVICE, dtype=dtype, backend="triton")
    arguments = {"prompt": "def read_lines(path):\n", "max_new_tokens": 128, "method": method} | SAMPLED
    trio.generate(**arguments, seed=1)
    assert trio.execution.name == "captured"
    outs = [trio.generate(**arguments, seed=seed) for seed in (2, 3)]
    eager = StagedDecoder.from_pretrained(device=DEVICE, dtype=dtype, backend="triton", graphs=False)
    assert [said(out) for out in outs] == [said(eager.generate(**arguments, seed=seed)) for seed in (2, 3)]
    pipeline = _pipeline(trio, arguments)
    pipeline.next()
    with no_synchronisation():
        for _ in range(8):
            pipeline._launch()


def _pipeline(trio: StagedDecoder, arguments: dict):
    """That of a generation which has begun, prefill done."""
    started = []

    class Watching(Captured):
        def begin(self, generation):
            started.append(super().begin(generation))
            return started[-1]

    trio.execution = Watching(new_graph)
    trio.generate(**arguments, seed=4)
    return started[0]


@pytest.mark.gpu
def test_generations_of_two_streams_stand_in_one_line():
    """Two threads, a decoder and a stream each: the texts that they give one after the other."""
    decoders = [StagedDecoder.from_pretrained(device=DEVICE, graphs=True) for _ in range(2)]

    def texts(decoder: StagedDecoder) -> list:
        with torch.cuda.stream(torch.cuda.Stream()):
            return [said(decoder.generate("import os", 60, seed=seed, **SAMPLED)) for seed in range(5)]

    wanted = texts(decoders[0])
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(texts, decoders)) == [wanted, wanted]
