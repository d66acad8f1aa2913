"""What ``profiling.paper`` times: one prompt, every method in turn, tokens compared before any time is kept.

Methods take turns prompt by prompt, each prompt beginning with another one, so that whatever slows the machine down
slows all of them. One timer for everybody: the host's clock around a call that returns token ids.
"""

import hashlib
import time
from typing import Any, NamedTuple

import torch

from decoding.compare import first_difference
from model.gpt2 import GPT2
from profiling.acceptance import repeated_share
from profiling.peers import Stop, System

STOP_STRINGS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")  # where HumanEval cuts a completion
FIXED, STOPPED = "fixed length", "up to the stop"
BASELINE = "baseline"


class TokensDiffer(Exception):
    """A method of this project gave other tokens than its baseline: nothing of the run may be published."""


class Case(NamedTuple):
    """What all methods do before the next begins. ``suite`` is "paper" or "ablations"; ``prompt`` an index."""

    suite: str
    prompt: int
    setting: str
    seed: int
    extent: str


class OwnGap:
    """How close the two best logits of an oracle are after a text, for ``first_difference``."""

    def __init__(self, model: GPT2):
        self.model = model

    @torch.inference_mode()
    def top_two_gap(self, text: list[int]) -> float:
        hidden = self.model.prefill(text, self.model.new_cache(len(text)))
        best = self.model.logits(hidden[-1:])[0].float().topk(2).values
        return float(best[0] - best[1])


def run_case(
    case: Case,
    ids: list[int],
    methods: list[System],  # the first is the baseline
    num_tokens: int,
    setting: dict[str, Any],
    stop: Stop,
    gap: OwnGap,
) -> list[dict[str, Any]]:
    """A row per method. Raises TokensDiffer where one of ours is not the baseline's text to the last token."""
    device, sampling = gap.model.device, {**setting, "seed": case.seed}
    turn = case.prompt % len(methods)
    texts, rows = {}, {}
    for method in methods[turn:] + methods[:turn]:
        start = time.perf_counter()
        texts[method.name] = new = method.generate(ids, num_tokens, sampling, stop)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - start
        rows[method.name] = {
            **case._asdict(),
            "method": method.name,
            "kind": method.kind,
            "tokens": len(new),
            "seconds": round(seconds, 6),
            "digest": digest(new),
            "repeated_8_grams": round(repeated_share(new), 4),
            **method.columns(),
        }
    want = texts[methods[0].name]
    for method in methods:
        if not (method.greedy_only and setting.get("do_sample")):
            rows[method.name] |= _compared(case, method, texts[method.name], want, ids, gap)
    return [rows[method.name] for method in methods]


def _compared(case: Case, method: System, new: list[int], want: list[int], ids: list[int], gap: OwnGap) -> dict:
    """Columns ``equal``, and where a peer's tokens first differ."""
    if new == want:
        return {"equal": True}
    place = first_difference(new, want, gap, ids)
    if method.kind != "peer":
        at = place["token"]
        raise TokensDiffer(
            f"{case}: {method.name} gives {new[at : at + 1]} for new token {at}, the baseline {want[at : at + 1]}; "
            f"the oracle's two best logits are {place['gap']:.1e} apart there"
        )
    return {"equal": False, "first_difference": place["token"], "gap": place["gap"]}


def digest(token_ids: list[int]) -> str:
    """A short name of these tokens, so that rows show which texts are the same."""
    return hashlib.sha256(str(token_ids).encode()).hexdigest()[:12]
