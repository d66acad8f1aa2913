"""Roofline picture of a run of ``profiling.kernels``: operations as points below the ceilings measured in that run.

x: operations per byte that must move; y: operations per second. Left of the ridge the copy rate is the limit. Hollow
marks are what torch offers for the same work, and marks grow with the rows of the pass.
"""

from pathlib import Path
from typing import Any

from profiling.kernel_tables import OURS, WAITING

NAMES = ("layer_norm_qkv", "tree_attention", "attn_proj", "mlp_fc_gelu", "mlp_proj", "lm_head", "pass")


def points(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of the run that have a time and products to count; of ours those that were started as passes start them."""
    wanted = [row for row in document["rows"] if row["kind"] in ("operation", "pass") and row["operation"] in NAMES]
    wanted = [row for row in wanted if row["implementation"] != WAITING]
    return [row for row in wanted if row.get("microseconds") and row.get("flops")]


def draw(document: dict[str, Any], stem: Path) -> list[Path]:
    """Write ``stem.png`` and ``stem.svg``. Raises ValueError for a run without points or without ceilings."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    rows, about, ceilings = points(document), document["about"], document["ceilings"]
    if not rows or not ceilings:
        raise ValueError(f"nothing to draw: {len(rows)} timed operations, ceilings {ceilings}")
    figure = Figure(figsize=(9, 6))
    axes = figure.subplots()
    intensity = [row["flops"] / row["bytes"] for row in rows]
    left, right = min(intensity) / 2, max(*intensity, ceilings["matrix"] / ceilings["copy"]) * 4
    for name, rate, style in (("copy", ceilings["copy"], "-"), ("read", ceilings["read"], ":")):
        ridge = ceilings["matrix"] / rate
        axes.plot([left, ridge], [left * rate, ridge * rate], "k" + style, lw=1, label=f"{name} {rate * 1e-9:.0f} GB/s")
    level = ceilings["matrix"]
    axes.plot([level / ceilings["copy"], right], [level, level], "k--", lw=1)
    axes.annotate(
        f"{ceilings['matrix_dtype']} product {level * 1e-12:.0f} TFLOP/s", (right, level), ha="right", va="bottom"
    )
    colours = {name: f"C{i}" for i, name in enumerate(NAMES)}
    for row, x in zip(rows, intensity, strict=True):
        colour, size = colours[row["operation"]], 12 + 10 * row["rows"] ** 0.5
        filled = {"c": colour} if row["implementation"] == OURS else {"facecolors": "none", "edgecolors": colour}
        axes.scatter(x, row["flops"] / row["microseconds"] * 1e6, s=size, alpha=0.8, linewidths=0.9, **filled)
    seen = [name for name in NAMES if any(row["operation"] == name for row in rows)]
    marks = [Line2D([], [], color=colours[name], marker="o", ls="", label=name) for name in seen]
    marks.append(Line2D([], [], color="grey", marker="o", ls="", mfc="none", label="torch, same work"))
    axes.legend(handles=[*axes.get_lines()[:2], *marks], fontsize=8, loc="lower right")
    axes.set(xscale="log", yscale="log", xlabel="operations per byte that must move", ylabel="operations per second")
    shapes = ", ".join(dict.fromkeys(row["shape"] for row in rows))
    rehearsal = "REHEARSAL on a CPU, no result: " if about["rehearsal"] else ""
    axes.set_title(
        f"{rehearsal}{about['device']}, commit {about['commit']}\n{shapes}; larger marks, more rows", fontsize=9
    )
    figure.tight_layout()
    files = [stem.with_name(f"{stem.name}.{ending}") for ending in ("png", "svg")]
    for file in files:
        figure.savefig(file, dpi=150)
    return files
