"""How often a stage names the very token that the stage above it draws: the depth-1 acceptance of each pair of models.

    python -m profiling.agreement [--oracle DIR] [--draft DIR ...] [--draft2 DIR ...] [--prompts DIR] [--count 40]

Along the oracle's own text, greedy and sampled, every stage draws at every position with the same noise. Reported per
pair: how often the lower stage's best token, or one of its best four, is the token that the upper one draws. Several
drafts or tables are compared with each other: this is how the bundled ones were chosen. Loops flatter speculation, so
the share of 8-grams that repeat stands beside every figure.
"""

import argparse
import sys
from pathlib import Path

import torch
from rich.progress import track

from decoding import StagedDecoder
from decoding.compare import DEMO_PROMPTS
from decoding.config import SamplingConfig
from decoding.decoder import BUNDLED
from kernels.layout import SuccessorTable
from kernels.reference import lookup
from model.gpt2 import GPT2
from profiling import machine, prompts
from profiling.acceptance import repeated_share
from profiling.flags import count, in_one_line
from profiling.markdown import number, publish, table
from profiling.prompts import SETTINGS

BEST = 4


def draws(model: GPT2, text: list[int], num_new: int, sampling) -> torch.Tensor:
    """What ``model`` ranks best at each of the last ``num_new`` positions of ``text``: int32 [num_new, BEST]."""
    cache = model.new_cache(len(text))
    hidden = model.prefill(text[:-1], cache)[-num_new:]
    positions = torch.arange(len(text) - num_new, len(text), dtype=torch.int32, device=model.device)
    logits = model.logits(hidden)
    rule, parts = sampling.to(model.device), zip(logits.split(64), positions.split(64), strict=True)
    return torch.cat([model.ops.draw(rows, at, rule, BEST)[1] for rows, at in parts]).cpu()


def table_draws(stage, text: list[int], num_new: int, sampling) -> torch.Tensor:
    """The same from a draft² table, its baked rows alone."""
    ids = torch.tensor([-1, *text], dtype=torch.int32)
    first = len(text) - num_new
    positions = torch.arange(first, len(text), dtype=torch.int32)
    table = SuccessorTable(*(part.cpu() if torch.is_tensor(part) else part for part in stage.table))
    return lookup(table, ids[first - 1 : -2], ids[first:-1], positions, sampling, BEST)[0]


def share(lower: torch.Tensor, upper: torch.Tensor) -> tuple[float, float]:
    """How often the best of ``lower`` is the best of ``upper``, and how often any of its best four is."""
    hit = lower == upper[:, :1]
    return hit[:, 0].float().mean().item(), hit.any(1).float().mean().item()


def measure(decoders: dict[str, StagedDecoder], prompt_ids: list[list[int]], num_tokens: int) -> list[dict]:
    """One row per setting and pair; ``decoders`` differ in their lower stages alone."""
    rows, first = [], next(iter(decoders.values()))
    for setting, arguments in SETTINGS.items():
        found: dict[tuple[str, str], list] = {}
        repeated = []
        for seed, ids in enumerate(track(prompt_ids, setting, disable=not sys.stderr.isatty())):
            out = first.generate(ids, num_tokens, seed=seed, ignore_eos=True, method="baseline", **arguments)
            text, num_new = ids + out.new_token_ids, len(out.new_token_ids)
            repeated.append(repeated_share(out.new_token_ids))
            sampling = SamplingConfig(**arguments).with_seed(seed)
            above = draws(first.oracle.model, text, num_new, sampling)
            for name, decoder in decoders.items():
                stages = {stage.name: stage for stage in decoder.lower}
                own = draws(stages["draft"].model, text, num_new, sampling)
                found.setdefault((name, "draft by oracle"), []).append(share(own, above))
                if "draft2" in stages:
                    guessed = table_draws(stages["draft2"], text, num_new, sampling)
                    found.setdefault((name, "draft2 by draft"), []).append(share(guessed, own))
                    found.setdefault((name, "draft2 by oracle"), []).append(share(guessed, above))
        for (name, pair), shares in found.items():
            best, any_of_four = (sum(column) / len(shares) for column in zip(*shares, strict=True))
            rows.append(
                {
                    "setting": setting,
                    "stages": name,
                    "pair": pair,
                    "best": best,
                    "best_4": any_of_four,
                    "repeated_8_grams": sum(repeated) / len(repeated),
                }
            )
    return rows


def markdown(rows: list[dict], conditions: str) -> str:
    header = ["decoding", "stages", "pair", "its best", "one of its best 4", "repeated 8-grams"]
    figures = {"best": ".3f", "best_4": ".3f", "repeated_8_grams": ".2f"}
    lines = [
        [row["setting"], row["stages"], row["pair"], *(number(row[name], form) for name, form in figures.items())]
        for row in rows
    ]
    title = "# How often a lower stage names the token that is drawn"
    return f"{title}\n\n{conditions}.\n\n{table(header, lines, 'lllrrr')}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--oracle", default="bundled")
    parser.add_argument("--draft", action="append", help="may be repeated; default: the bundled one")
    parser.add_argument("--draft2", action="append", help="may be repeated; default: the bundled one")
    parser.add_argument(
        "--prompts", type=prompts.folder_with(prompts.MBPP), help="folder with mbpp/mbpp.jsonl; default: three prompts"
    )
    parser.add_argument("--count", type=count, default=40, help="of --prompts (default: 40)")
    parser.add_argument("--tokens", type=count, default=64)
    parser.add_argument("--out", type=Path, help="folder for agreement.json and agreement.md")
    flags = parser.parse_args()
    decoders = {}
    with in_one_line("agreement", flags.out):
        for draft in flags.draft or [str(BUNDLED / "draft")]:
            for draft2 in flags.draft2 or [str(BUNDLED / "draft2")]:
                name = " + ".join("/".join(Path(source).parts[-2:]) for source in (draft2, draft))
                decoders[name] = StagedDecoder.from_pretrained(flags.oracle, draft, draft2)
    decoder = next(iter(decoders.values()))
    texts = prompts.mbpp(flags.prompts, flags.count) if flags.prompts else list(DEMO_PROMPTS)
    rows = measure(decoders, [decoder.encode(text) for text in texts], flags.tokens)
    about = machine.describe(decoder.oracle.model.device)
    conditions = (
        f"{len(texts)} prompts x {flags.tokens} tokens of the oracle's own text, {decoder.runtime}; "
        f"{about['device']}, {machine.signature(about)}"
    )
    publish(markdown(rows, conditions), {"about": about, "rows": rows}, flags.out, "agreement")


if __name__ == "__main__":
    main()
