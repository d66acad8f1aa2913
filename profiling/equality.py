"""Greedy equality in float32: every method and chain depth gives Hugging Face's own tokens.

    python -m profiling.equality --prompts DIR [--tokens 64] [--limit N] [--jobs N] [--out DIR]

For each prompt, plain greedy decoding by transformers is compared with every method of the bundled trio, with chains of
one to four stages, and with drafts that are the oracle itself, the oracle plus noise, and the oracle drowned in noise
(five times as large as the matrices' own spread). A difference is allowed only where transformers' own two best logits
are closer than 1e-4; such places are listed. With --out, ``equality.json`` and ``equality.md``. Exits 1 on any other.
"""

import argparse
import copy
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from rich.progress import track

from decoding import SpeculationConfig, StagedDecoder
from decoding.compare import HFGenerate, first_difference
from decoding.config import METHODS, chain
from decoding.decoder import BUNDLED
from profiling import machine, prompts
from profiling.flags import count, in_one_line
from profiling.markdown import number, publish, table

TIE = 1e-4


def noisy_copy(model, relative_noise: float, seed: int = 0):
    """``model`` with Gaussian noise on every matrix, ``relative_noise`` times the matrix's standard deviation."""
    copied, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in copied.parameters():
            if parameter.ndim == 2:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter += relative_noise * parameter.std() * noise
    return copied


SHAPES = {"chain": chain(3), "tree": SpeculationConfig(("draft",), (3,), (4,), (3,), 15, 4)}


def decoders(
    oracle: str | Path, draft: str | Path, table: str | Path, hf_model
) -> dict[str, tuple[StagedDecoder, dict]]:
    """What is compared: name -> (decoder, arguments of ``generate``)."""
    noisy, useless = noisy_copy(hf_model, 0.3), noisy_copy(hf_model, 5.0)

    def load(draft=None, draft2=None):
        return StagedDecoder.from_pretrained(oracle, draft=draft, draft2=draft2, device="cpu", dtype="float32")

    trio = load(draft, table)
    chosen = {method: (trio, {"method": method}) for method in METHODS}
    chosen["four stages"] = (load([draft, noisy], table), {})
    for name, model in (("oracle + noise", noisy), ("oracle", hf_model), ("drowned in noise", useless)):
        decoder = load(model)
        for shape, config in SHAPES.items():
            chosen[f"{shape}, draft = {name}"] = (decoder, {"speculation": config})
    return chosen


def run(chosen: dict, hf: HFGenerate, prompts_by_index: dict[int, list[int]], num_tokens: int) -> list[dict]:
    """One row per entry of ``chosen``: how many prompts equal transformers' tokens, where the others first differ."""
    counters = {"prompts": 0, "equal": 0, "accepted": 0, "tried": 0, "tokens": 0, "passes": 0}
    rows = [{"configuration": name, **counters, "tied": [], "different": []} for name in chosen]
    for index, ids in track(prompts_by_index.items(), "equality", disable=not sys.stderr.isatty()):
        want = hf.generate(ids, num_tokens)
        for row, (decoder, arguments) in zip(rows, chosen.values(), strict=True):
            out = decoder.generate(ids, max_new_tokens=num_tokens, ignore_eos=True, **arguments)
            _count(row, out)
            place = first_difference(want, out.new_token_ids, hf, ids)
            if place is None:
                row["equal"] += 1
            else:
                row["tied" if place["gap"] < TIE else "different"].append({"prompt": index} | place)
    return rows


def merged(parts: list[list[dict]]) -> list[dict]:
    """Rows of several runs over different prompts as one: counts and lists are added."""
    return [
        {key: row[key] if key == "configuration" else sum((other[key] for other in rest), row[key]) for key in row}
        for row, *rest in zip(*parts, strict=True)
    ]


def _count(row: dict, out) -> None:
    row["prompts"] += 1
    row["tokens"] += len(out.new_token_ids)
    row["passes"] += out.stats["stages"]["oracle"]["passes"]
    row["accepted"] += out.stats["accepted"]
    row["tried"] += out.stats["tried"]


def markdown(rows: list[dict], num_tokens: int, about: dict) -> str:
    """The table that is committed."""
    header = ["configuration", "equal", "differs at a tie", "differs elsewhere", "acceptance", "tokens per oracle pass"]
    lines = []
    for row in rows:
        acceptance = number(row["accepted"] / row["tried"] if row["tried"] else None, ".3f")
        cells = [f"{row['equal']} of {row['prompts']}", len(row["tied"]), len(row["different"]), acceptance]
        lines.append([row["configuration"], *cells, number(row["tokens"] / row["passes"])])
    ties = [
        f"- tie: {row['configuration']}, prompt {place['prompt']}, token {place['token']}, gap {place['gap']:.1e}\n"
        for row in rows
        for place in row["tied"]
    ]
    return (
        "# Greedy equality with Hugging Face, float32\n\n"
        f"{rows[0]['prompts']} HumanEval prompts x {num_tokens} tokens; {about['device']}, "
        f"{machine.signature(about, 'transformers')}.\n"
        f"A first difference is a tie where transformers' own two best logits are closer than {TIE:g}.\n\n"
        f"{table(header, lines)}\n" + "\n" * bool(ties) + "".join(ties)
    )


def run_bundled(prompts_by_index: dict[int, list[int]], num_tokens: int, threads: int) -> list[dict]:
    """``run`` with the bundled trio, in a process of its own."""
    torch.set_num_threads(threads)
    hf = HFGenerate(str(BUNDLED / "oracle"), torch.float32, torch.device("cpu"))
    chosen = decoders("bundled", BUNDLED / "draft", BUNDLED / "draft2", hf.model)
    return run(chosen, hf, prompts_by_index, num_tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=prompts.folder_with(prompts.HUMANEVAL), required=True)
    parser.add_argument("--tokens", type=count, default=64)
    parser.add_argument("--limit", type=count, help="only the first N prompts")
    parser.add_argument("--jobs", type=count, default=os.cpu_count(), help="processes that share the prompts")
    parser.add_argument("--out", type=Path, metavar="DIR", help="also write the rows there")
    flags = parser.parse_args()
    with in_one_line("equality", flags.out):
        decoder = StagedDecoder.from_pretrained(device="cpu", dtype="float32")
    room = max(1, decoder.oracle.model.config.n_positions - flags.tokens)
    texts = prompts.humaneval(flags.prompts)[: flags.limit]
    ids = {i: decoder.tokenizer.encode(text).ids[-room:] for i, text in enumerate(texts)}
    shares = [dict(list(ids.items())[job :: flags.jobs]) for job in range(min(flags.jobs, len(ids)))]
    threads = max(1, os.cpu_count() // len(shares))
    with ProcessPoolExecutor(len(shares), mp_context=multiprocessing.get_context("spawn")) as pool:
        parts = [pool.submit(run_bundled, share, flags.tokens, threads) for share in shares]
        rows = merged([part.result() for part in parts])
    about = machine.describe(torch.device("cpu"))
    publish(markdown(rows, flags.tokens, about), {"about": about, "rows": rows}, flags.out, "equality")
    sys.exit(any(row["different"] for row in rows))


if __name__ == "__main__":
    main()
