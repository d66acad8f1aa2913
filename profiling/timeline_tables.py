"""Markdown of ``profiling.timeline``: parts of an iteration, bytes beside GB/s, what the time outside is, charts."""

from decoding.config import METHODS
from profiling.markdown import number, table

STRICT = """\
"In" is whose code the thread was in, of its processor time, by samples of its instruction pointer; the C library \
allocates, copies and computes for any of the others; full garbage collections, one in some hundred iterations, are \
kept out. The interpreter's share is split by a second run, with the stand-ins that time each operation, which are \
Python themselves. "Outside torch operators" is measured under torch.profiler, whose own work and numpy's count as \
outside: an upper bound."""


def markdown(document: dict[str, list[dict]], conditions: str, charts: dict[str, str]) -> str:
    """Conditions; per setting a table of parts, of traffic and of facts; then the charts."""
    lines = ["# Where an iteration's time goes", "", f"{conditions}. Milliseconds of one iteration and their share."]
    for setting in dict.fromkeys(row["setting"] for row in document["rows"]):
        chosen = {name: [row for row in rows if row["setting"] == setting] for name, rows in document.items()}
        methods = [method for method in METHODS if any(row["method"] == method for row in chosen["rows"])]
        lines += ["", f"## {setting}", "", _parts(chosen["rows"], methods)]
        lines += ["", _facts(chosen["facts"], methods), "", _traffic(chosen["traffic"])]
    if any("outside torch operators" in row for row in document["facts"]):
        lines += ["", STRICT]
    lines += ["", "## The iteration of median length, first prompt"]
    for title, drawn in charts.items():
        lines += ["", f"{title}", "", "```", drawn.rstrip("\n"), "```"]
    return "\n".join(lines) + "\n"


def _parts(rows: list[dict], methods: list[str]) -> str:
    lines = []
    for part in [*sorted({row["part"] for row in rows} - {"total"}), "total"]:
        cells = []
        for method in methods:
            found = [row for row in rows if (row["method"], row["part"]) == (method, part)]
            cells.append(f"{found[0]['milliseconds']:.2f} ({found[0]['share']:.0%})" if found else "")
        lines.append([part, *cells])
    return table(["part", *methods], lines)


def _facts(rows: list[dict], methods: list[str]) -> str:
    """Shares in percent, everything else as a number."""
    names = sorted({name for row in rows for name in row} - {"setting", "method"})
    lines, by_method = [], {row["method"]: row for row in rows}
    for name in names:
        form = ".0%" if name.startswith(("in: ", "outside")) else ".2f"
        lines.append([name, *(number(by_method[method].get(name, 0.0), form) for method in methods)])
    return table(["of an iteration", *methods], lines)


def _traffic(rows: list[dict]) -> str:
    header = ["method", "stage", "passes", "MB by arithmetic", "ms of its operations", "GB/s"]
    figures = ("passes", "megabytes", "milliseconds", "gb_per_s")
    lines = [[row["method"], row["stage"], *(number(row[name]) for name in figures)] for row in rows]
    return table(header, lines, "llrrrr")
