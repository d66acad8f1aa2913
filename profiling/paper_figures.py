"""Figures 1 and 2 of the paper, from what a run measured: the roofline, and every problem's speed-up in order.

matplotlib draws; each figure becomes a PNG and an SVG.
"""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from profiling.paper_runs import BASELINE, FIXED
from profiling.paper_tables import prompt_ratios
from profiling.prompts import SETTINGS

COLOURS = {"oracle": "C3", "draft": "C0", "speculative": "C0", "tree": "C1", "staged": "C2"}


def roofline(ceilings: dict[str, Any], points: list[dict[str, Any]], title: str, stem: Path) -> list[Path]:
    """Figure 1: operations per second of passes over operations per byte, below the ceilings measured here."""
    figure = Figure(figsize=(8, 5.5))
    axes = figure.subplots()
    intensity = [point["flops"] / point["bytes"] for point in points]
    ridge = ceilings["matrix"] / ceilings["copy"]
    left, right = min(intensity) / 2, 4 * max(*intensity, ridge)
    for name, style in (("copy", "-"), ("read", ":")):
        edge, label = ceilings["matrix"] / ceilings[name], f"{name} {ceilings[name] * 1e-9:.1f} GB/s"
        axes.plot([left, edge], [left * ceilings[name], ceilings["matrix"]], "k" + style, lw=1, label=label)
    level = f"{ceilings['matrix_dtype']} product {ceilings['matrix'] * 1e-12:.3g} TFLOP/s"
    axes.plot([ridge, right], [ceilings["matrix"]] * 2, "k--", lw=1, label=level)
    for index, model in enumerate(dict.fromkeys(point["model"] for point in points)):
        own = [point for point in points if point["model"] == model]
        x, y = [p["flops"] / p["bytes"] for p in own], [p["flops"] / p["seconds"] for p in own]
        axes.plot(x, y, "o-", ms=4, lw=0.8, color=COLOURS.get(model), label=f"{model}, rows of a pass")
        for point, at_x, at_y in zip(own, x, y, strict=True):
            place = (3, -9) if index == 0 else (-8, 4)
            axes.annotate(str(point["rows"]), (at_x, at_y), place, textcoords="offset points", fontsize=7)
    axes.set(xscale="log", yscale="log", xlim=(left, right))
    axes.set(xlabel="operations per byte that must move", ylabel="operations per second")
    axes.legend(fontsize=8, loc="lower right")
    axes.set_title(title, fontsize=9)
    return _saved(figure, stem)


def sorted_problems(rows: list[dict[str, Any]], title: str, stem: Path) -> list[Path]:
    """Figure 2: every problem's tokens per second relative to the baseline's, sorted; A greedy, B top-k."""
    settings = [s for s in SETTINGS if any(row["setting"] == s for row in rows)]
    figure = Figure(figsize=(5 * len(settings), 4))
    all_axes = figure.subplots(1, len(settings), sharey=True, squeeze=False)
    for letter, axes, setting in zip("AB", all_axes[0], settings, strict=False):
        own = [row for row in rows if (row["suite"], row["setting"], row["extent"]) == ("paper", setting, FIXED)]
        baseline = [row for row in own if row["method"] == BASELINE]
        for index, method in enumerate(dict.fromkeys(row["method"] for row in own if row["method"] != BASELINE)):
            mine = [row for row in own if row["method"] == method]
            ratios = sorted(prompt_ratios(mine, baseline).values())
            place = np.linspace(0, 100, len(ratios)) if len(ratios) > 1 else [50.0]
            line = {"lw": 0.8, "ls": "--"} if mine[0]["kind"] == "peer" else {"lw": 1.8}
            line |= {} if len(ratios) > 1 else {"marker": "o"}
            axes.plot(place, ratios, color=COLOURS.get(method, f"C{index + 3}"), label=method, **line)
        axes.axhline(1, color="black", lw=0.8)
        axes.set(title=f"{letter}: {setting}", xlabel="problems, slowest first (%)")
    all_axes[0][0].set_ylabel("tokens/s relative to our baseline")
    all_axes[0][0].set_ylim(bottom=0)  # once both panels are drawn: they share the axis
    all_axes[0][-1].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.02, 1))
    figure.suptitle(title, fontsize=9)
    return _saved(figure, stem)


def _saved(figure, stem: Path) -> list[Path]:
    figure.tight_layout()
    files = [stem.with_suffix(ending) for ending in (".png", ".svg")]
    for file in files:
        figure.savefig(file, dpi=130, metadata={"Date": None} if file.suffix == ".svg" else None)
    return files
