"""Every method on the same prompts: times, passes and bytes beside each other, tokens checked identical."""

import time
from contextlib import suppress
from typing import Any

import torch

from decoding.config import METHODS
from decoding.decoder import StagedDecoder

# None ends with its line: the bundled tokenizer joins the end of a line with the indentation that follows.
DEMO_PROMPTS = (
    'def read_lines(path):\n    """Return the lines of a text file."""',
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):",
    "import os\nimport sys\n\n\ndef main():\n    for name in os.listdir(sys.argv[1]):",
)


class HFGenerate:
    """Hugging Face's ``generate`` on the same oracle, dtype and device: the yardstick outside this project."""

    def __init__(self, oracle_dir: str, dtype: torch.dtype, device: torch.device):
        from transformers import GPT2LMHeadModel
        from transformers.utils import logging

        logging.disable_progress_bar()
        self.model = GPT2LMHeadModel.from_pretrained(oracle_dir, dtype=dtype).to(device).eval()

    def generate(self, prompt_ids: list[int], max_new_tokens: int, **options: Any) -> list[int]:
        """New token ids: greedy and stopped by length alone, where ``options`` of ``generate`` do not say otherwise."""
        ids = torch.tensor([prompt_ids], device=self.model.device)
        options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0} | options
        out = self.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, **options)
        return out[0, len(prompt_ids) :].tolist()

    @torch.no_grad()
    def top_two_gap(self, text: list[int]) -> float:
        """How far the best next token of ``text`` is ahead of the second, in logits."""
        best = self.model(torch.tensor([text], device=self.model.device)).logits[0, -1].float().topk(2).values
        return float(best[0] - best[1])


def first_difference(
    theirs: list[int], ours: list[int], hf: HFGenerate, prompt_ids: list[int]
) -> dict[str, int | float] | None:
    """Where two continuations part: ``token``, the index, and ``gap``, how far the oracle's best logit leads there.

    A gap of rounding size means that either token is a right one. None where the continuations are equal; where one is
    the beginning of the other they part at its end.
    """
    if theirs == ours:
        return None
    pairs = zip(theirs, ours, strict=False)
    at = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(theirs), len(ours)))
    return {"token": at, "gap": hf.top_two_gap(prompt_ids + ours[:at])}


def compare(
    decoder: StagedDecoder,
    prompts: list[str] | list[list[int]],
    max_new_tokens: int,
    sampling: dict[str, Any],
    hf: HFGenerate | None = None,
) -> tuple[list[dict], list]:
    """Rows for the table, one per method that the decoder's stages allow, and the outputs of the last method.

    All methods get the same seed; every one's tokens are compared with the baseline's, prompt by prompt. Hugging Face's
    generate is run where ``hf`` is given and decoding is greedy; where it differs, the row says from which token on and
    how close its own two best logits were there. Times include prefill; a short generation warms up each method, and
    they take turns prompt by prompt, so that a machine which is slower for a while is slower for all of them. Hugging
    Face's generate comes last.
    """
    prompt_ids = [decoder.encode(prompt) for prompt in prompts]
    sampling = {"seed": 0, "ignore_eos": True} | sampling
    available = available_methods(decoder)
    for method in available:
        decoder.generate(prompt_ids[0], max_new_tokens=min(8, max_new_tokens), method=method, **sampling)
    runs = {method: [] for method in available}
    for ids in prompt_ids:
        for method, timed in runs.items():
            timed.append(_timed(decoder, ids, max_new_tokens, method, sampling))
    baseline = runs["baseline"]
    rows = []
    if hf is not None and not sampling.get("do_sample"):
        rows.append(_hf_row(hf, prompt_ids, [len(out.new_token_ids) for out, _ in baseline], baseline))
    rows += [_row(method, runs[method], baseline) for method in available]
    return rows, [out for out, _ in runs[available[-1]]]


def available_methods(decoder: StagedDecoder) -> list[str]:
    """The methods that the decoder's stages allow, in the order of ``METHODS``."""
    available = []
    for method in METHODS:
        with suppress(ValueError):
            decoder.plan(method)
            available.append(method)
    return available


def _timed(decoder, ids, max_new_tokens, method, sampling):
    start = time.perf_counter()
    out = decoder.generate(ids, max_new_tokens=max_new_tokens, method=method, **sampling)
    return out, time.perf_counter() - start


def _row(method: str, runs: list, baseline: list) -> dict:
    tokens, seconds, passes, moved = _totals(runs)
    base_tokens, base_seconds, base_passes, base_moved = _totals(baseline)
    equal = sum(a.new_token_ids == b.new_token_ids for (a, _), (b, _) in zip(runs, baseline, strict=True))
    return {
        "method": method,
        "tokens_per_second": tokens / seconds,
        "speedup": tokens / seconds / (base_tokens / base_seconds),
        "tokens_per_oracle_pass": tokens / passes,
        "relative_oracle_passes": passes / tokens / (base_passes / base_tokens),
        "relative_bytes": moved / tokens / (base_moved / base_tokens),
        "identical": f"{equal} of {len(runs)}",
    }


def _totals(runs: list) -> tuple[int, float, int, float]:
    tokens = sum(len(out.new_token_ids) for out, _ in runs)
    seconds = sum(elapsed for _, elapsed in runs)
    passes = sum(out.stats["stages"]["oracle"]["passes"] for out, _ in runs)
    return tokens, seconds, passes, sum(out.stats["bytes_per_token"] * len(out.new_token_ids) for out, _ in runs)


def _hf_row(hf: HFGenerate, prompt_ids: list[list[int]], lengths: list[int], baseline: list) -> dict:
    hf.generate(prompt_ids[0], min(8, lengths[0]))
    tokens, equal, differences, seconds = 0, 0, [], 0.0
    for ids, length, (out, _) in zip(prompt_ids, lengths, baseline, strict=True):
        start = time.perf_counter()
        new = hf.generate(ids, length)
        seconds += time.perf_counter() - start
        tokens += len(new)
        difference = first_difference(new, out.new_token_ids, hf, ids)
        equal += difference is None
        differences += [difference] if difference else []
    base_tokens, base_seconds, _, _ = _totals(baseline)
    return {
        "method": "HF generate",
        "tokens_per_second": tokens / seconds,
        "speedup": tokens / seconds / (base_tokens / base_seconds),
        "tokens_per_oracle_pass": 1.0,
        "relative_oracle_passes": 1.0,
        "relative_bytes": None,
        "identical": f"{equal} of {len(baseline)}",
        "differences": differences,
    }
