"""One iteration as a bar chart in the terminal: a line per lane, time from left to right, its share at the end."""

from rich.text import Text

from profiling.spans import Run

LEVELS = " ▁▂▃▄▅▆▇█"
COLOURS = {"draft2": "cyan", "draft": "green", "oracle": "magenta", "sample + verify": "yellow", "tree": "blue"}
OUTSIDE = {"cpu": "Python between", "cuda": "idle"}


def typical_iteration(run: Run) -> tuple[float, float]:
    """Start and end of the iteration of median length; the first is left out where there are others."""
    iterations = run.iterations()[1:] or run.iterations()
    return sorted(iterations, key=lambda window: window[1] - window[0])[len(iterations) // 2]


def coverage(run: Run, window: tuple[float, float], columns: int) -> dict[str, list[float]]:
    """Per lane, the share of each of ``columns`` equal pieces of the window that its spans fill."""
    start, end = window
    width = (end - start) / columns
    lanes: dict[str, list[float]] = {}
    for span in run.spans:
        first, last = max(span.start, start), min(span.end, end)
        if first >= last:
            continue
        lane = lanes.setdefault(span.lane, [0.0] * columns)
        for column in range(int((first - start) / width), min(columns, int((last - start) / width) + 1)):
            left = start + column * width
            lane[column] += max(0.0, min(last, left + width) - max(first, left)) / width
    return lanes


def draw(run: Run, device: str, columns: int = 72) -> Text:
    """The chart of the typical iteration of ``run``; what no lane covers is the last line."""
    window = typical_iteration(run)
    length = window[1] - window[0]
    lanes = coverage(run, window, columns)
    order = [*COLOURS, *lanes]
    lanes = dict(sorted(lanes.items(), key=lambda item: order.index(item[0])))
    lanes[OUTSIDE[device]] = [max(0.0, 1 - sum(column)) for column in zip(*lanes.values(), strict=True)]
    chart = Text()
    for name, cells in lanes.items():
        share = sum(cells) / columns
        bar = "".join(LEVELS[min(8, round(8 * cell))] for cell in cells)
        chart.append(f"{name:>16} ")
        chart.append(bar, style=COLOURS.get(name, "red"))
        chart.append(f" {1e3 * share * length:7.2f} ms {share:4.0%}\n")
    chart.append(f"{'one iteration':>16} {'':{columns}} {1e3 * length:7.2f} ms\n")
    return chart
