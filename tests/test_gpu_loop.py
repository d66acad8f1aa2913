"""The whole loop on the Triton backend: for one seed every method gives the tokens of plain decoding and, in float32,
the tokens and the stages that the torch backend gives.
"""

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from decoding import SpeculationConfig, StagedDecoder
from decoding.config import METHODS
from decoding.decoder import GenerateOutput
from decoding.katz import KatzTrigram, save
from kernels.layout import MAX_ROWS
from profiling.equality import noisy_copy
from tests.gpu_helpers import DTYPES, HALVES, REAL_SHAPE
from tests.helpers import random_tokens
from tests.interpreter import DEVICE

pytestmark = pytest.mark.usefixtures("hostile_scratch")
VOCAB = 97
SAMPLINGS = {
    "greedy": {"seed": 1},
    "sampled": {"do_sample": True, "top_k": 20, "top_p": 0.95, "min_p": 0.01, "temperature": 1.3, "seed": 2**63 + 11},
}
# One pass; a text that fills a window of attention; one whose prefill has a pass of more than MAX_ROWS rows.
PROMPTS = {"short": [5, 17, 40], "window": random_tokens(170), "long": random_tokens(2 * MAX_ROWS + 9)}


@functools.cache
def oracle() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCAB, n_positions=301, n_embd=64, n_layer=1, n_head=1, bos_token_id=0, eos_token_id=None
    )
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter *= 4
    return model


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> Path:
    """A draft2 table estimated from the oracle's own samples."""
    decoder = StagedDecoder.from_pretrained(oracle(), draft=None, draft2=None, device="cpu", dtype="float32")
    runs = [decoder.generate([1 + i], max_new_tokens=100, do_sample=True, top_k=0, seed=i) for i in range(6)]
    directory = tmp_path_factory.mktemp("table")
    save(KatzTrigram(torch.cat([run.sequences[0] for run in runs]).numpy(), VOCAB).bake(512), directory)
    return directory


@pytest.fixture(scope="module")
def decoder(table):
    """``decoder(backend, dtype)``: table, a good draft (the oracle plus noise), the oracle."""

    @functools.cache
    def load(backend: str, dtype: torch.dtype = torch.float32) -> StagedDecoder:
        device = DEVICE if backend == "triton" else "cpu"
        draft = noisy_copy(oracle(), 0.2)
        return StagedDecoder.from_pretrained(oracle(), draft, table, device=device, dtype=dtype, backend=backend)

    return load


def said(out: GenerateOutput) -> tuple[list[int], list[str], str]:
    return out.new_token_ids, out.token_stages, out.finish_reason


@pytest.mark.parametrize(
    ("prompt", "method", "sampling"),
    [
        *(("short", method, sampling) for method in METHODS for sampling in ("greedy", "sampled")),
        ("window", "staged", "sampled"),
        ("long", "tree", "sampled"),
        ("long", "staged", "greedy"),
    ],
)
def test_same_as_the_torch_backend(prompt, method, sampling, decoder):
    """Tokens, and which stage proposed each of them, in float32 and with trees of one shape (the default one depends
    on the device; that of a CPU is small); the methods that should speculate do.
    """
    shape = decoder("torch").plan(method)
    triton, torch_ = (
        decoder(backend).generate(PROMPTS[prompt], 4, speculation=shape, **SAMPLINGS[sampling])
        for backend in ("triton", "torch")
    )
    assert said(triton) == said(torch_)
    assert triton.stats["mean_acceptance_length"] > 1 or method == "baseline"


def test_a_tree_of_several_passes(decoder):
    """More rows than a pass has: what the head picks of the second one has that one's moments."""
    wide = SpeculationConfig(("draft",), (2,), (12,), (12,), budget=MAX_ROWS + 2, max_depth=2)
    triton, torch_ = (decoder(backend).generate([5, 17, 40], 2, speculation=wide) for backend in ("triton", "torch"))
    assert said(triton) == said(torch_)
    assert triton.stats["stages"]["draft"]["accepted"] and triton.stats["stages"]["oracle"]["passes"] == 2


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_methods_agree(sampling, dtype, decoder):
    """In half precision: one text for plain decoding, a chain and a tree of odd width and budget, above a filled
    window."""
    odd = SpeculationConfig(("draft2", "draft"), (2, 2), (3, 5), (3, 4), budget=13, max_depth=5)
    shapes = [decoder("torch").plan("baseline"), decoder("torch").plan("speculative"), odd]
    outs = [
        decoder("triton", dtype).generate(PROMPTS["window"], 3, speculation=shape, **SAMPLINGS[sampling])
        for shape in shapes
    ]
    assert len({tuple(out.new_token_ids) for out in outs}) == 1, [out.new_token_ids for out in outs]
    assert len(outs[0].new_token_ids) == 3


def test_four_stages(table):
    """A chain of table, poor draft, good draft and oracle, to the end of the context."""
    drafts = [noisy_copy(oracle(), 1.0), noisy_copy(oracle(), 0.2)]
    chain = SpeculationConfig(("draft2", "draft_1", "draft_2"), (1, 1, 2), (3, 5, 6), (3, 3, 4), budget=10, max_depth=6)
    prompt = random_tokens(296)
    texts = {}
    for backend, device in (("triton", DEVICE), ("torch", "cpu")):
        four = StagedDecoder.from_pretrained(oracle(), drafts, table, device, "float32", backend)
        texts[backend] = said(four.generate(prompt, 100, speculation=chain, **SAMPLINGS["sampled"]))
    assert texts["triton"] == texts["torch"]
    assert len(texts["triton"][0]) == 301 + 1 - len(prompt), "the context ends, and so does the text"


@REAL_SHAPE
@DTYPES
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_bundled_models(sampling, dtype):
    """The bundled trio: every method gives one text, in float32 that of the torch backend."""
    arguments = {"prompt": "def read_lines(path):\n", "max_new_tokens": 64} | SAMPLINGS[sampling]
    trio = StagedDecoder.from_pretrained(device=DEVICE, dtype=dtype, backend="triton")
    texts = [trio.generate(**arguments, method=method).new_token_ids for method in METHODS]
    assert all(text == texts[0] for text in texts)
    if dtype == torch.float32:
        twin = StagedDecoder.from_pretrained(device="cpu", dtype=dtype, backend="torch")
        assert texts[0] == twin.generate(**arguments, method="baseline").new_token_ids


def test_no_gpu_and_no_interpreter():
    """On a CPU the Triton backend is refused with one line that says what to do, not with a crash in Triton."""
    code = "from decoding import StagedDecoder; StagedDecoder.from_pretrained(device='cpu', backend='triton')"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent.parent, env=environment, capture_output=True, text=True
    )
    assert run.returncode != 0
    last = run.stderr.strip().splitlines()[-1]
    assert last.startswith("ValueError: backend 'triton' needs a GPU") and "TRITON_INTERPRET=1" in last


def test_unknown_backend():
    with pytest.raises(ValueError, match="backend must be 'auto', 'torch' or 'triton', got 'cuda'"):
        StagedDecoder.from_pretrained(oracle(), None, None, backend="cuda")


def test_auto_picks_by_device():
    """ "auto" is Triton on a CUDA device and torch elsewhere, and the decoder says which."""
    chosen = StagedDecoder.from_pretrained(oracle(), None, None, device=DEVICE).runtime
    assert chosen.startswith(f"{'triton' if DEVICE == 'cuda' else 'torch'} backend on {DEVICE}")
