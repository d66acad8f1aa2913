"""How often stages agree."""

import torch

from decoding import StagedDecoder
from profiling import agreement
from tests.helpers import hf_model

PROMPTS = [[1, 2, 3, 4], [5, 6, 7]]


def test_a_stage_agrees_with_itself():
    """With the oracle as its own draft every drawn token is the draft's best; with another model it is not."""
    oracle, other = hf_model(), hf_model(n_layer=2)
    decoders = {
        "same": StagedDecoder.from_pretrained(oracle, oracle, None, dtype="float32"),
        "other": StagedDecoder.from_pretrained(oracle, other, None, dtype="float32"),
    }
    rows = agreement.measure(decoders, PROMPTS, 8)
    found = {(row["setting"], row["stages"]): row["best"] for row in rows}
    assert found["greedy", "same"] == found["top-k 50, T = 1", "same"] == 1.0
    assert found["greedy", "other"] < 1.0 and found["top-k 50, T = 1", "other"] < 1.0


def test_share_counts_the_best_and_the_best_four():
    lower = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8], [9, 1, 2, 3], [4, 4, 4, 4]])
    upper = torch.tensor([[1, 0, 0, 0], [7, 0, 0, 0], [3, 0, 0, 0], [0, 0, 0, 0]])
    assert agreement.share(lower, upper) == (0.25, 0.75)
