"""Commands that look at stages on a CPU: where an iteration's time goes, how often stages agree."""

from collections import Counter

import pytest
import torch

from decoding import StagedDecoder
from decoding.config import METHODS
from profiling import agreement, cpu
from tests.helpers import hf_model

PROMPTS = [[1, 2, 3, 4], [5, 6, 7]]


@pytest.fixture
def bundled() -> StagedDecoder:
    return StagedDecoder.from_pretrained(dtype="float32")


def test_the_parts_of_an_iteration_add_up(bundled):
    """Shares of all parts sum to one; a part that a method has no use for is absent."""
    rows = cpu.measure(bundled, PROMPTS, 6)
    for setting in cpu.SETTINGS:
        for method in METHODS:
            parts = {r["part"]: r["share"] for r in rows if (r["setting"], r["method"]) == (setting, method)}
            assert parts.pop("total") == 1.0 and sum(parts.values()) == pytest.approx(1.0)
            assert 0 < parts["Python between operations"] < 0.6
            assert ("draft2" in parts) == (method == "staged")
            assert ("draft: linear" in parts) == (method != "baseline")
    table = cpu.markdown(rows, "conditions")
    assert table.count("| total |") == 2 and "| draft2 |  |  |  |" in table


def test_every_call_is_counted_once():
    """The stand-in adds a call's time to its part, and hands constants and results through."""
    seconds = Counter()

    class Operations:
        LIMIT = 3

        @staticmethod
        def draw(x):
            return x + 1

        @staticmethod
        def lm_head(x):
            return 2 * x

    timed = cpu.Timed(Operations, "oracle", seconds)
    assert (timed.LIMIT, timed.draw(1), timed.lm_head(4), timed.lm_head(x=5)) == (3, 2, 8, 10)
    assert set(seconds) == {"sampling", "oracle: linear"} and all(value > 0 for value in seconds.values())


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
