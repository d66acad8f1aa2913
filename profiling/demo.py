"""The figures and the picture of the README's first screen: every method on the demo prompts, one coloured completion.

    python -m profiling.demo [--dtype DTYPE] [--tokens 128] [--repeats 3] [--out DIR]

The same comparison as ``make demo``, greedy and sampled, and on a CPU the baseline without the padding of rows that
bit-exactness asks for, against a baseline that takes turns with it; the median of ``--repeats`` runs by tokens per
second. With --out, ``demo.json``, ``demo.md`` and ``demo.svg``.
"""

import argparse
import io
import re
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

from rich.console import Console
from rich.text import Text

from decoding import StagedDecoder
from decoding.compare import DEMO_PROMPTS, HFGenerate, compare
from decoding.decoder import BUNDLED
from decoding.display import coloured, legend, stage_styles
from kernels import reference
from kernels.layout import MAX_ROWS
from kernels.reference import attention, matrices
from profiling import machine
from profiling.acceptance import repeated_share
from profiling.flags import count, in_one_line
from profiling.markdown import number, publish, table
from profiling.prompts import GREEDY, SETTINGS, TOP_K, check_length


def median_rows(decoder: StagedDecoder, hf: HFGenerate, tokens: int, sampling: dict, repeats: int) -> tuple[list, list]:
    """Rows of ``compare`` with the median speed of each method; the other columns are the same in every run."""
    runs = [compare(decoder, list(DEMO_PROMPTS), tokens, sampling, hf) for _ in range(repeats)]
    rows = [dict(row) for row in runs[0][0]]
    for i, row in enumerate(rows):
        row["tokens_per_second"] = statistics.median(run[0][i]["tokens_per_second"] for run in runs)
    base = next(row["tokens_per_second"] for row in rows if row["method"] == "baseline")
    for row in rows:
        row["speedup"] = row["tokens_per_second"] / base
    return rows, runs[0][1]


@contextmanager
def free_rows() -> Iterator[None]:
    """Products of the torch backend take as many rows as there are, whether these were found to agree or not.

    All else stays: the layouts of matrices, windows at fixed positions. For decoders that are loaded and run inside;
    their text may differ where two logits are a rounding step apart.
    """
    every = tuple(range(1, MAX_ROWS + 1))
    with (
        patch.object(matrices, "agreeing_rows", lambda *how: every),
        patch.object(attention, "agreeing", lambda *how: (1, True)),
        patch.object(reference, "pad_rows", lambda x, weight: x),
    ):
        yield


def unpadded_row(decoder: StagedDecoder, dtype: str, tokens: int, repeats: int) -> dict:
    """The baseline without padding of rows, and how it compares with one that takes turns with it."""
    prompts, speeds = list(DEMO_PROMPTS), {True: [], False: []}
    with free_rows():
        free = StagedDecoder.from_pretrained(dtype=dtype, draft=None, draft2=None)
    bound = StagedDecoder([], decoder.oracle, decoder.tokenizer)
    for _ in range(repeats):
        (row,), texts = compare(bound, prompts, tokens, {})
        speeds[False].append(row["tokens_per_second"])
        with free_rows():
            (row,), others = compare(free, prompts, tokens, {})
        speeds[True].append(row["tokens_per_second"])
    speed, base = statistics.median(speeds[True]), statistics.median(speeds[False])
    equal = sum(out.new_token_ids == other.new_token_ids for out, other in zip(texts, others, strict=True))
    found = {"method": "baseline, rows not padded", "tokens_per_second": speed, "speedup": speed / base}
    return row | found | {"identical": f"{equal} of {len(texts)}"}


def markdown(tables: dict[str, list[dict]], conditions: str) -> str:
    header = ["decoding", "method", "tokens/s", "vs baseline", "tokens per oracle pass", "bytes per token", "identical"]
    lines = []
    for setting, rows in tables.items():
        for row in rows:
            cells = [number(row["tokens_per_second"], ".0f"), number(row["speedup"], unit="x")]
            cells += [number(row["tokens_per_oracle_pass"]), number(row["relative_bytes"])]
            lines.append([setting, row["method"], *cells, row["identical"]])
    places = [place for rows in tables.values() for row in rows for place in row.get("differences", ())]
    ties = "; ".join(f"token {place['token']}, gap {place['gap']:.1e}" for place in places)
    note = f"\n\nHF generate first differs at {ties}: the gap is between its own two best logits." if places else ""
    measured = f"{conditions}. Bytes per token (arithmetic) are relative to the baseline.{note}"
    return f"{table(header, lines, 'llrrrrl')}\n\n{measured}\n"


def picture(text: Text, key: Text) -> str:
    """An SVG of a coloured completion; fonts are the reader's own, nothing is fetched."""
    console = Console(record=True, width=100, file=io.StringIO(), highlight=False)
    console.print(text)
    console.print()
    console.print(key)
    return re.sub(r"@font-face \{.*?\}", "", console.export_svg(title="staged generate --color"), flags=re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="auto", help="float32 or bfloat16; default: what suits this processor")
    parser.add_argument("--tokens", type=count, default=128)
    parser.add_argument("--repeats", type=count, default=3)
    parser.add_argument("--out", type=Path, metavar="DIR", help="also write the rows there")
    flags = parser.parse_args()
    with in_one_line("demo", flags.out):
        decoder = StagedDecoder.from_pretrained(dtype=flags.dtype)
        longest = max(len(decoder.encode(prompt)) for prompt in DEMO_PROMPTS)
        check_length(longest, flags.tokens, decoder.oracle.model.config.n_positions)
    hf = HFGenerate(str(BUNDLED / "oracle"), decoder.oracle.model.dtype, decoder.oracle.model.device)
    tables, outputs = {}, {}
    for setting, sampling in SETTINGS.items():
        tables[setting], outputs[setting] = median_rows(decoder, hf, flags.tokens, sampling, flags.repeats)
    if decoder.oracle.model.ops is reference and decoder.oracle.model.device.type == "cpu":
        tables[GREEDY].append(unpadded_row(decoder, flags.dtype, flags.tokens, flags.repeats))
    about = machine.describe(decoder.oracle.model.device)
    repeated = {
        setting: statistics.mean(repeated_share(out.new_token_ids) for out in outs) for setting, outs in outputs.items()
    }
    conditions = (
        f"{len(DEMO_PROMPTS)} prompts x {flags.tokens} tokens, batch 1, {decoder.runtime}; {about['device']}, "
        f"{machine.signature(about)}. "
        "8-grams that repeat: " + ", ".join(f"{setting} {part:.0%}" for setting, part in repeated.items())
    )
    styles = stage_styles([stage.name for stage in decoder.lower])
    prompt, out = DEMO_PROMPTS[1], outputs[TOP_K][1]  # greedy text of a small model loops
    shown = coloured(decoder.tokenizer, prompt, out.new_token_ids, out.token_stages, styles)
    document = {"about": about, "repeated_8_grams": repeated, "tables": tables}
    publish(markdown(tables, conditions), document, flags.out, "demo")
    if flags.out:
        (flags.out / "demo.svg").write_text(picture(shown, legend(styles)))


if __name__ == "__main__":
    main()
