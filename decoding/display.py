"""What a terminal shows: a completion coloured by the stage that produced each token, and the table of methods."""

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text
from tokenizers import Tokenizer

ORACLE_STYLE = "bold red"
LOWER_STYLES = ("green", "blue", "yellow", "magenta")  # cheapest stage first


def stage_styles(names: list[str]) -> dict[str, str]:
    """A style per stage; ``names`` are the lower stages, cheapest first. draft2 is green, the draft blue."""
    shift = 0 if "draft2" in names else 1
    styles = {name: LOWER_STYLES[(i + shift) % len(LOWER_STYLES)] for i, name in enumerate(names)}
    return styles | {"oracle": ORACLE_STYLE}


def legend(styles: dict[str, str]) -> Text:
    """One line that says which colour means which stage."""
    line = Text("tokens proposed by: ")
    for name, style in styles.items():
        line.append(name if name != "oracle" else "nobody (the oracle's own)", style=style)
        line.append("  ")
    return line


def pieces(tokenizer: Tokenizer, token_ids: list[int]) -> list[str]:
    """The text that each token adds; bytes of a character cut in two are shown with the token that completes it."""
    shown, parts = "", []
    for i in range(len(token_ids)):
        text = tokenizer.decode(token_ids[: i + 1], skip_special_tokens=False)
        complete = text if i + 1 == len(token_ids) else text.rstrip("\ufffd")
        complete = complete if complete.startswith(shown) else shown
        parts.append(complete[len(shown) :])
        shown = complete
    return parts


def coloured(tokenizer: Tokenizer, prompt: str, token_ids: list[int], stages: list[str], styles: dict) -> Text:
    """The prompt, dim, and the completion with a colour per token."""
    text = Text(prompt, style="dim")
    for piece, stage in zip(pieces(tokenizer, token_ids), stages, strict=True):
        text.append(piece, style=styles[stage])
    return text


def print_comparison(console: Console, rows: list[dict], caption: str) -> None:
    """``rows`` as ``compare`` returns them, one line per method."""
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    table.add_column("method", no_wrap=True)
    for header in ("tokens/s", "speed-up", "tokens per\npass", "passes vs\nbaseline", "bytes vs\nbaseline"):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("identical", no_wrap=True)
    for row in rows:
        table.add_row(
            row["method"],
            f"{row['tokens_per_second']:.1f}",
            f"{row['speedup']:.2f}x",
            f"{row['tokens_per_oracle_pass']:.2f}",
            f"{row['relative_oracle_passes']:.2f}",
            "" if row["relative_bytes"] is None else f"{row['relative_bytes']:.2f}",
            row["identical"],
        )
    console.print(table)
    console.print(caption, style="dim")
    for row in rows:
        for place in row.get("differences", ()):
            apart = f"its own two best logits are {place['gap']:.1e} apart there"
            console.print(f"{row['method']} first differs at new token {place['token']}: {apart}", style="dim")
