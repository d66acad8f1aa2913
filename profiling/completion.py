"""Figure 3 of the paper: a completion, each token in the colour of the stage that proposed it.

The colours are those of ``staged generate --color``; written as HTML, SVG, PNG and as text for a terminal (``cat``).
"""

import io
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from rich.console import Console
from rich.text import Text

from profiling.demo import picture

WIDTH = 100  # characters of a line
INK = {"green": "#1b7f3b", "blue": "#1f4fbf", "red": "#b3261e", "yellow": "#8a6d00", "magenta": "#8e24aa"}
PAPER = {"green": "#d9f2df", "blue": "#dbe6fb", "red": "#fadcd9", "yellow": "#f7efcf", "magenta": "#f1dcf5"}


def write(text: Text, key: Text, stem: Path) -> list[Path]:
    """Write ``stem`` .html, .svg, .png and .txt (with terminal colours); ``key`` says what the colours mean."""
    console = Console(record=True, width=WIDTH, file=io.StringIO(), highlight=False, force_terminal=True)
    console.print(text)
    console.print()
    console.print(key)
    page, terminal = console.export_html(inline_styles=True, clear=False), console.export_text(styles=True)
    files = {".html": page, ".txt": terminal, ".svg": picture(text, key)}
    for ending, content in files.items():
        stem.with_suffix(ending).write_text(content, encoding="utf-8")
    return [*(stem.with_suffix(ending) for ending in files), _png(text, key, stem.with_suffix(".png"))]


def _png(text: Text, key: Text, file: Path, size: float = 9.0) -> Path:
    """The same by matplotlib. Tokens stand on a tint of their colour, so that a stage's white space is seen."""
    console = Console(width=WIDTH, file=io.StringIO(), highlight=False)
    lines = [line for part in (text, Text(""), key) for line in console.render_lines(part, pad=False)]
    character = 0.602 * size / 72  # inches that a character of DejaVu Sans Mono is wide
    figure = Figure(figsize=(character * (WIDTH + 2), (len(lines) + 1) * 1.35 * size / 72))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(-1, WIDTH + 1), ylim=(len(lines) + 0.5, -0.5))
    axes.set_axis_off()
    for y, segments in enumerate(lines):
        x = 0
        for segment in segments:
            name = segment.style.color.name if segment.style and segment.style.color else None
            if name:
                axes.add_patch(Rectangle((x, y), segment.cell_length, 1, color=PAPER[name], lw=0))
            weight = "bold" if segment.style and segment.style.bold else "normal"
            look = {"family": "DejaVu Sans Mono", "fontsize": size, "weight": weight, "va": "center"}
            shown = "".join(letter if letter.isprintable() else "·" for letter in segment.text)
            axes.text(x, y + 0.5, shown, color=INK.get(name, "#777777"), parse_math=False, **look)
            x += segment.cell_length
    figure.savefig(file, dpi=130)
    return file
