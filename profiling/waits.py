"""A static model of the small launches of an iteration: draws, the tree, look-ups, verification.

    seconds = launch + rounds * (trips to memory + reductions + instructions of one program) + bytes / L2 rate

They move few bytes; what costs is that one thing waits for another. So the model counts, from the source, the loads
whose address or mask needs an earlier load, the reductions and barriers, which Triton puts one after another, and the
instructions of wide vectors. Each count carries its reason, and ``wait_table`` prints them. Tables of draft² are read
from DRAM, everything else from the L2 cache, where the launch before has left it; a line that this program has already
loaded is in its L1 cache. AMD's GPU is charged NVIDIA's cycles. Nothing here was fitted to a measurement.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from kernels import gpu
from kernels.gpu.launch import Launch, record
from kernels.layout import VOCAB_TILE, Sampling
from profiling.cost import LAUNCH, MACHINES, SCHEDULERS, Machine
from profiling.iteration import iteration
from profiling.shapes import MAX_DEPTH

VOCAB = 50257
NODES, DEPTH, ACCEPTED = 64, MAX_DEPTH, 4  # the tree, and how far the walk goes

# Clock cycles of one wait. Estimates: what sm_90 code does for each (in the comment), at the latencies that
# microbenchmarks of NVIDIA GPUs report: about 30 cycles for shared memory, a shuffle, or a barrier, 5 for arithmetic.
CYCLES = {
    "L1": 35,
    "barrier": 30,
    "int": 220,  # over all warps: REDUX, shared memory, barrier, REDUX, barrier, ten of arithmetic
    "float": 330,  # over all warps, and every running sum: five shuffles, shared memory, barrier, three, barrier
    "warp int": 60,  # at most 32 lanes: one REDUX
    "warp float": 140,  # at most 32 lanes: five shuffles
    "noise": 350,  # ten rounds of Philox, a polynomial of degree eight, two logarithms
}
MEMORY, REDUCTIONS = ("DRAM", "L2", "L1"), ("barrier", "int", "float", "warp int", "warp float")


class Wait(NamedTuple):
    """``count`` waits of one kind: one of CYCLES, "DRAM", "L2", or "issue", instructions of single lanes."""

    count: float
    kind: str
    reason: str

    def seconds(self, machine: Machine) -> float:
        trips = {"DRAM": machine.dram_latency, "L2": machine.l2_latency}
        if self.kind in trips:
            return self.count * trips[self.kind]
        cycles = 1 / (machine.warp_size * SCHEDULERS) if self.kind == "issue" else CYCLES[self.kind]
        return self.count * cycles / machine.clock


# What each kernel of kernels/gpu waits for, in the order of its source; ``c`` are its constants.


def _narrow(c: dict, launch: Launch) -> list[Wait]:
    lanes = c["TILES"] * c["TILE"]
    return [
        Wait(5, "L2", "tile maxima; tiles chosen; their logits; survivors; the position"),
        Wait(2 * c["BITS"], "int", "a step of each bisection: of the maxima, of the logits"),
        Wait(2 * c["BITS"] * lanes, "issue", "a step compares and counts every logit of the chosen tiles"),
        Wait(16 * lanes, "issue", "addresses, order, ties and running sum of those logits"),
        Wait(5, "int", "NaN; tiles; survivors; the first of the largest; its id"),
        Wait(6, "float", "ties and places among tiles, and among logits; largest logit, largest score"),
        Wait(2, "barrier", "scratch is written, then read"),
        Wait(1, "noise", "of the survivors, side by side"),
        *([Wait(1, "float", "mass of all survivors")] if c["CHILDREN"] else []),
        Wait(c["CHILDREN"], "float", "each child: the next largest"),
        Wait(2 * c["CHILDREN"], "int", "each child: its lane, its id"),
    ]


def _wide(c: dict, launch: Launch) -> list[Wait]:
    if launch.arguments["overflow_ptr"] is not None:
        return [Wait(1, "L2", "the row is done already: survivors do not overflow the narrow kernel")]
    blocks = math.ceil(c["V"] / c["BLOCK"])
    sweeps = 2 + (34 if c["NUCLEUS"] else 0) + (1 + c["CHILDREN"] if c["CHILDREN"] else 0)
    return [
        Wait(sweeps * blocks, "L2", "every sweep reads the row again, block by block; 32 bisect the nucleus"),
        Wait(sweeps * blocks, "float", "every block of a sweep: its largest or its mass"),
        Wait(sweeps * blocks * 12 * c["BLOCK"], "issue", "temperature, comparison, exponential"),
        Wait(blocks * (4 if c["NUCLEUS"] else 2), "int", "NaN, first of the largest; ties of the nucleus"),
        Wait(blocks * (3 if c["NUCLEUS"] else 2), "float", "mass, the best one's score; rank among ties"),
        Wait(blocks, "noise", "of a block"),
        Wait(blocks * 120 * c["BLOCK"], "issue", "noise of every token"),
    ]


def _select(c: dict, launch: Launch) -> list[Wait]:
    return [
        Wait(2, "L2", "number of nodes; scores, depths, stages"),
        Wait(32, "int", "a step of the bisection"),
        Wait(2, "int", "room for ties; number chosen"),
        Wait(2, "float", "running sums: rank among ties, place"),
    ]


def _sum_paths(depth: int) -> list[Wait]:
    return [
        Wait(1, "L2", "path scores: depths of all nodes"),
        Wait(1, "int", "path scores: the deepest node"),
        Wait(2 * depth, "L1", "path scores, each depth: the ancestor, then its edge"),
    ]


def _insert(c: dict, launch: Launch) -> list[Wait]:
    chunks = math.ceil(NODES / c["CHUNK"])
    return [
        Wait(3, "L2", "nodes; their children, scores and depths; sources of known children"),
        Wait(1, "int", "NaN"),
        Wait(chunks, "L2", "chunk of the tree: parents and tokens"),
        Wait(2 * chunks, "int", "chunk of the tree: who is below, which child is known"),
        Wait(12 * chunks * c["CHUNK"] * c["BLOCK_ENTRIES"], "issue", "chunk of the tree against every entry"),
        Wait(1, "float", "running sum: places of the newcomers"),
        Wait(1, "int", "number of newcomers"),
        Wait(2 * chunks, "L2", "chunk of newcomers: depth and parent, the parent's path"),
        Wait(12 * chunks * c["CHUNK"] * c["BLOCK_PATH"], "issue", "chunk of newcomers: paths"),
        Wait(3, "barrier", "edges; columns; paths are written, then read"),
        *_sum_paths(DEPTH),
    ]


def _stage_rows(c: dict, launch: Launch) -> list[Wait]:
    return [
        Wait(1, "L2", "length, reach, what the cache has"),
        Wait(3, "L2", "nodes; their paths; marks and cached nodes"),
        Wait(2, "L2", "rows of the paths; depths of the nodes"),
        Wait(2, "L2", "committed tokens; their slots"),
        Wait(4, "L2", "node of each row; its token and depth; its slot; its path"),
        Wait(1, "float", "running sum: rows of the nodes that the cache has not"),
        Wait(1, "int", "the last row of each path"),
        Wait(3, "barrier", "marks cleared; marks set; rows numbered"),
        Wait(24 * c["BLOCK_W"] * c["BLOCK_PATH"], "issue", "paths of the nodes, paths of the rows"),
    ]


def _lookup(c: dict, launch: Launch) -> list[Wait]:
    waits = [
        Wait(3, "L2", "the node; its token and parent, the length; the token before it"),
        Wait(3, "DRAM", "probes; the row's number; the row"),
        Wait(2, "warp int", "the probe that hits; its bucket"),
        Wait(2, "warp float", "largest score; mass"),
        Wait(c["CHILDREN"], "warp float", "each child: the next largest"),
        Wait(2 * c["CHILDREN"], "warp int", "each child: its lane, its token"),
    ]
    if launch.arguments["recent_keys_ptr"] is not None:
        waits.append(Wait(2, "L2", "the recent table: its key; its row"))
    if c["NOISE"]:
        waits += [Wait(1, "L2", "depth of the node"), Wait(1, "noise", "of the row's tokens, side by side")]
    return waits


def _extend(c: dict, launch: Launch) -> list[Wait]:
    bodies = _select(c, launch) + _lookup(c, launch) + _insert(c, launch)
    bodies.append(Wait(3, "barrier", "nodes, children and tree are written, then read"))
    return [wait._replace(count=wait.count * launch.arguments["rounds"]) for wait in bodies]


def _learn(c: dict, launch: Launch) -> list[Wait]:
    return [
        Wait(4, "L2", "nodes and length; tokens and parents; the token before; children and log-probabilities"),
        Wait(2, "int", "whether a row has children; whether a later row has its bucket"),
        Wait(1, "float", "mass of the children"),
        Wait(6, "barrier", "vectors of rows change their layout"),
    ]


def _verify(c: dict, launch: Launch) -> list[Wait]:
    caches, left = launch.arguments["num_caches"], DEPTH - ACCEPTED - 1
    chunks = math.ceil(NODES / c["CHUNK"])
    return [
        Wait(4, "L2", "state; rows of the pass; tokens drawn; the rows' tokens, parents and sources"),
        Wait(1, "warp int", "NaN"),
        Wait(5 * (ACCEPTED + 1), "warp int", "a step of the walk: draw, child, source, end of text, stages tried"),
        Wait(ACCEPTED + 1, "int", "a step of the walk: which stages proposed"),
        Wait(2, "warp int", "next token; end of text"),
        Wait(1, "int", "nodes by stage"),
        Wait(1, "L1", "tokens of the path"),
        Wait(4, "L2", "limits; number of nodes; columns of the tree; who is below the new root"),
        Wait(3, "int", "new root; its depth; the deepest node"),
        Wait(2 * left, "L1", "each depth below the new root: the ancestor, then whether it is rejected"),
        Wait(1, "int", "number kept"),
        Wait(1, "float", "running sum: new numbers"),
        Wait(3 * caches, "L2", "each cache: what it has; slots to exchange; slots of all nodes"),
        Wait(caches, "float", "each cache, running sum: the path without a gap"),
        Wait(caches, "int", "each cache: committed positions"),
        Wait(3 * caches, "barrier", "each cache: slots are read, written, read, written"),
        Wait(4, "L2", "tokens, sources, stages, new numbers of the parents"),
        Wait(3 * chunks, "L2", "chunk of paths: number, path, its new numbers"),
        Wait(12 * chunks * c["CHUNK"] * c["BLOCK_PATH"], "issue", "chunk of paths: renumbered"),
        Wait(6 + chunks, "barrier", "columns and paths are read, then written"),
        *_sum_paths(left),
    ]


WAITS: dict[str, Callable[[dict, Launch], list[Wait]]] = {
    "_draw_narrow_kernel": _narrow,
    "draw_wide_kernel": _wide,
    "_select_kernel": _select,
    "_insert_kernel": _insert,
    "_stage_rows_kernel": _stage_rows,
    "_lookup_kernel": _lookup,
    "_extend_kernel": _extend,
    "_learn_kernel": _learn,
    "_verify_kernel": _verify,
}


class WaitCost(NamedTuple):
    """MODELLED, not measured; seconds."""

    launches: float
    memory: float  # trips
    reductions: float  # and barriers
    instructions: float  # and noise
    moved: float

    @property
    def seconds(self) -> float:
        return sum(self)


def waits_of(launch: Launch) -> list[Wait]:
    """Raises ValueError for a kernel whose waits nobody has counted."""
    name = launch.kernel.__name__
    if name not in WAITS:
        raise ValueError(f"waits are counted of {sorted(WAITS)}, not of {name}")
    return [wait for wait in WAITS[name](launch.constants, launch) if wait.count]


def wait_cost(launches: list[Launch], machine: Machine) -> WaitCost:
    """Cost of launches that follow each other. A multiprocessor holds one program at a time."""
    parts = [0.0] * 3
    moved = 0
    for launch in launches:
        rounds = math.ceil(launch.grid[0] / machine.multiprocessors)
        for wait in waits_of(launch):
            kind = 0 if wait.kind in MEMORY else 1 if wait.kind in REDUCTIONS else 2
            parts[kind] += rounds * wait.seconds(machine)
        moved += launch.grid[0] * _bytes(launch)
    return WaitCost(LAUNCH * len(launches), *parts, moved / machine.l2)


def _bytes(launch: Launch) -> int:
    """Of the logits that one program reads; all else is small."""
    c = launch.constants
    if launch.kernel.__name__ != "_draw_narrow_kernel":
        return 0
    return 4 * math.ceil(c["V"] / c["TILE"]) + c["TILES"] * c["TILE"] * launch.arguments["logits_ptr"].element_size()


def draw_launches(num_rows: int, top_k: int = 50, top_p: float = 1.0, num_children: int = 0) -> list[Launch]:
    """What a draw from GPT-2's bfloat16 logits launches; the output head has left the maxima of tiles."""
    tiles = math.ceil(VOCAB / VOCAB_TILE)
    logits = torch.empty(num_rows, tiles * VOCAB_TILE, dtype=torch.bfloat16, device="meta")[:, :VOCAB]
    positions = torch.empty(num_rows, dtype=torch.int32, device="meta")
    maxima = torch.empty(num_rows, tiles, dtype=torch.float32, device="meta")
    sampling = Sampling(True, gpu.new_seed(7, "meta"), 1.0, top_k, top_p, 0.0)
    with record("sm_90") as recorded:
        gpu.draw(logits, positions, sampling, num_children, tile_maxima=maxima)
    return recorded


@functools.cache
def counted() -> dict[str, tuple[list[Launch], float | None]]:
    """Launches by name, with the microseconds that they should stay below, if any."""
    found = {
        "draw, 1 row": (draw_launches(1), 15.0),
        "draw, 64 rows": (draw_launches(64), 40.0),
        "draw, 64 rows, 8 children": (draw_launches(64, num_children=8), None),
        "draw, 1 row, top-p alone": (draw_launches(1, 0, 0.9), None),
    }
    limits = {"verify_and_commit": 10.0, "lookup_nodes, greedy": 10.0, "lookup_nodes, sampled": 10.0}
    for name, call in iteration(VOCAB, "meta").calls.items():
        with record("sm_90") as recorded:
            call()
        found[name] = (recorded, limits.get(name))
    growth = found["select_nodes"][0] + found["insert_children"][0]
    return found | {"tree growth: select, insert": (growth, 15.0)}


def wait_table(arch: str) -> str:
    """Text: what each small launch should cost on one GPU."""
    machine = MACHINES[arch]
    lines = [
        f"MODELLED, not measured: between the passes, {machine.name} ({arch}), microseconds",
        f"V = {VOCAB}, bfloat16 logits, top-k 50; a tree of {NODES} nodes, {DEPTH} deep, {ACCEPTED} accepted",
        f"{'operation':<28}{'us':>8}{'target':>8}{'launch':>8}{'trips':>8}{'reduce':>8}{'other':>8}{'bytes':>8}",
    ]
    for name, (launches, limit) in counted().items():
        cost = wait_cost(launches, machine)
        parts = "".join(f"{part * 1e6:>8.2f}" for part in cost)
        lines.append(f"{name:<28}{cost.seconds * 1e6:>8.2f}{f'{limit:g}' if limit else '':>8}{parts}")
    return "\n".join(lines)


def reason_table() -> str:
    """Text: how often each operation waits, for what, and why."""
    lines = ["What each launch waits for, one after another, in one program (issue: instructions of single lanes)"]
    for name, (launches, _) in counted().items():
        if not name.startswith(("draw, 64 rows", "tree growth")) or "children" in name:
            lines.append(name)
            lines += [f"  {wait.count:>9g} {wait.kind:<11}{wait.reason}" for one in launches for wait in waits_of(one)]
    return "\n".join(lines)
