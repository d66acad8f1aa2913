"""What compute-sanitizer watches: one staged generation on the Triton backend. Run by ``test_gpu_sanitizer``.

``out-of-bounds`` as an argument stores behind the end of a tensor, to show that the sanitizer sees it.
"""

import sys

import numpy as np
import torch
import triton
import triton.language as tl

from decoding import SpeculationConfig, StagedDecoder
from decoding.katz import KatzTrigram
from decoding.stages import KatzStage
from profiling.equality import noisy_copy
from tests.helpers import hf_model, random_tokens
from tests.lockstep import moved


@triton.jit
def _store_kernel(x_ptr, at):
    tl.store(x_ptr + at, 1.0)


def generate() -> None:
    """Every kernel of an iteration once, greedy and sampled; the tokens are the torch backend's."""
    oracle, found = hf_model(n_positions=64), {}
    for backend, device in (("torch", "cpu"), ("triton", "cuda")):
        # without torch's pool nothing can be captured
        decoder = StagedDecoder.from_pretrained(
            oracle, noisy_copy(oracle, 0.2), None, device, "float32", backend, graphs=False
        )
        table = moved(KatzTrigram(np.array(random_tokens(500)), 97).bake(50, 4), device)
        decoder.lower.insert(0, KatzStage("draft2", table, decoder.oracle.model.ops))
        config = SpeculationConfig(("draft2", "draft"), (1, 2), (3, 4), (3, 3), budget=9, max_depth=5)
        found[backend] = [
            decoder.generate(
                random_tokens(40), 8, do_sample=do_sample, seed=3, ignore_eos=True, speculation=config
            ).new_token_ids
            for do_sample in (False, True)
        ]
    assert found["torch"] == found["triton"], found


if __name__ == "__main__":
    if sys.argv[1:] == ["out-of-bounds"]:
        _store_kernel[(1,)](torch.zeros(4, device="cuda"), 1 << 20)
        torch.cuda.synchronize()
    else:
        generate()
