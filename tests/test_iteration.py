"""What surrounds the passes of an iteration, worked by hand and run on both backends: the state at the start, the rows
of a pass, the contexts of look-ups, verification with commit, and the statistics made of its record.

The state of most cases, after the text 1 2 7; token, source and edge score beside each node's index:

    0 root 7 ── 1 "10" stage 0 -0.5 ── 3 "30" stage 1 -0.25 ── 5 "50" stage 1 -1.0
             │                      └─ 4 "40" stage 1 -2.0
             └─ 2 "20" stage 0 -1.0 ── 6 "10" stage 0 -0.125

Stages: 0 a table, 1 a draft with cache 0, 2 the oracle with cache 1. The slot of position p is 100 + p in the draft's
cache, 200 + p in the oracle's; that of node i is 120 + i and 220 + i.
"""

import math
from types import ModuleType
from typing import NamedTuple

import pytest
import torch

from decoding.stages import State
from decoding.stats import Statistics
from kernels import gpu, reference
from kernels.layout import DEPTH_LIMIT, EOS, LENGTH, MAX_PROBES, RECORD, RUNNING, Record, Rows, SuccessorTable
from kernels.reference import hash_context
from tests.gpu_helpers import poison_scratch
from tests.laws import GREEDY

from tests.interpreter import DEVICE  # isort: skip

CAPACITY, CONTEXT = 16, 16
TABLE, DRAFT, ORACLE = 0, 1, 2


@pytest.fixture(autouse=True)
def hostile_scratch(monkeypatch):
    poison_scratch(monkeypatch)


@pytest.fixture(params=[reference, gpu], ids=["torch", "triton"])
def ops(request) -> ModuleType:
    return request.param


def int32(*values, ops: ModuleType = reference) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=home(ops))


def home(ops: ModuleType) -> str:
    return DEVICE if ops is gpu else "cpu"


def moved(part, ops: ModuleType):
    """A copy of a structure where ``ops`` works."""
    return type(part)(*(value.to(home(ops), copy=True) if torch.is_tensor(value) else value for value in part))


def insert(tree, stage: int, node: int, children: dict[int, float]) -> None:
    scores = torch.tensor([list(children.values())])
    reference.insert_children(tree, stage, int32(node), int32(list(children)), scores, DEPTH_LIMIT)


def state(
    ops: ModuleType,
    end: int = 15,
    eos: tuple[int, ...] = (),
    cached_lens: tuple[int, int] = (3, 3),
    draft_has: tuple[int, ...] = (1, 3),
    oracle_has: tuple[int, ...] = (1, 2, 3, 4, 5, 6),
    contexts: tuple[int, ...] = (2**30, CONTEXT, CONTEXT),
) -> State:
    """The state of the module docstring; each cache has the K/V of these committed positions and nodes."""
    tree = reference.new_tree(CAPACITY, root=7)
    insert(tree, TABLE, 0, {10: -0.5, 20: -1.0})
    insert(tree, DRAFT, 1, {30: -0.25, 40: -2.0})
    insert(tree, DRAFT, 3, {50: -1.0})
    insert(tree, TABLE, 2, {10: -0.125})
    positions, nodes = torch.arange(CONTEXT, dtype=torch.int32), torch.arange(CAPACITY, dtype=torch.int32)
    chain = reference.new_chain([100 + positions, 200 + positions], [120 + nodes, 220 + nodes], list(cached_lens))
    chain.cached[0, list(draft_has)] = chain.cached[1, list(oracle_has)] = 1
    progress = reference.new_progress([1, 2, 7], end, 8, list(contexts), eos)
    return State(*(moved(part, ops) for part in (tree, progress, chain)))


def live(column: torch.Tensor, tree) -> list:
    return column[: int(tree.num_nodes)].tolist()


def has(chain, cache: int) -> list[int]:
    """The nodes whose K/V a cache has."""
    return chain.cached[cache].nonzero().flatten().tolist()


# --- the start


def test_new_progress(ops):
    progress = ops.new_progress([5, 6, 7], 9, 4, [2**30, 5, 20], (3, 8), home(ops))
    assert progress.text.tolist() == [5, 6, 7, 0, 0, 0, 0, 0, 0, 0]
    assert progress.length.tolist() == [3] and progress.end.tolist() == [9]
    assert progress.reach[:, 0].tolist() == [3, 2, 4], "a node's child is one deeper; 5 positions end 2 below the root"
    assert progress.contexts.tolist() == [2**30, 5, 20] and progress.depths.tolist() == [4]
    assert progress.eos.tolist() == [3, 8] and progress.state.tolist() == [RUNNING]
    assert progress.record.tolist() == [0] * RECORD
    assert {column.dtype for column in progress} == {torch.int32}


@pytest.mark.parametrize(
    ("end", "contexts", "reach"),
    [
        (4, [99, 99, 99], [-1, -1, 0]),  # one token to draw: the oracle scores the root, nobody proposes
        (6, [99, 99, 99], [1, 1, 2]),
        (30, [99, 3, 99], [7, 0, 8]),  # the draft can be fed the root alone
        (30, [99, 2, 99], [7, -1, 8]),  # the text has outgrown the draft
    ],
)
def test_reach_at_the_start(end, contexts, reach):
    assert reference.new_progress([5, 6, 7], end, 8, contexts, ()).reach[:, 0].tolist() == reach


def test_no_eos_is_no_token():
    assert reference.new_progress([5], 9, 4, [9], ()).eos.tolist() == [-1]


def test_prompt_that_fills_the_context():
    """The last token of the context has no position after it: the text holds one more token than positions."""
    progress = reference.new_progress([5] * 8, 9, 4, [8], ())
    assert len(progress.text) == 10 and progress.reach[:, 0].tolist() == [0]


def test_new_chain(ops):
    """Tables of different lengths, padded to rows of 16 numbers; no node is cached."""
    tables, slots = [int32(*range(1, 18)), int32(4, 5, 6)], [int32(18, 19), int32(7, 8)]
    chain = ops.new_chain(tables, slots, [2, 3], home(ops))
    assert chain.page_tables.tolist() == [[*range(1, 18)] + [0] * 15, [4, 5, 6] + [0] * 29]
    assert chain.node_slots.tolist() == [[18, 19], [7, 8]] and chain.cached.tolist() == [[0, 0], [0, 0]]
    assert chain.cached_len.tolist() == [2, 3]
    assert all(column.dtype == torch.int32 and column.device.type == home(ops) for column in chain)


# --- the rows of a pass


class Pass(NamedTuple):
    """The live rows of a pass, and where in them the nodes to score are."""

    tokens: list[int]
    positions: list[int]
    slots: list[int]
    paths: list[list[int]]  # of rows that are nodes
    nodes: list[int]
    row_of: list[int]
    draw_positions: list[int]


def run(ops, state: State, nodes: list[int], num_head: int = 9, num_rows: int = 8, cache: int = 0) -> Pass:
    """``stage_rows`` for ``nodes``, one of them dead; dead rows and nodes left out, whose values must be harmless."""
    padded = int32(*nodes, -1, ops=ops) if ops is gpu else int32(*nodes)
    tree, progress, chain = state
    given = ops.stage_rows(tree, padded, progress, chain, cache, progress.reach[cache + 1], num_head, num_rows)
    rows = Rows(*(column.cpu() for column in given))
    lives, kept = rows.slot_mapping >= 0, rows.nodes >= 0
    assert ops is reference or len(rows.tokens) == num_head + num_rows
    assert not rows.tokens[~lives].any() and not rows.positions[~lives].any()
    assert (rows.row_of >= 0).all() and (rows.row_of < max(1, len(rows.tokens))).all()
    place = lives.cumsum(0) - 1
    paths = [[node for node in path if node >= 0] for path in rows.paths[lives].tolist()]
    num_nodes = sum(slot % 100 >= 20 for slot in rows.slot_mapping[lives].tolist())
    return Pass(
        rows.tokens[lives].tolist(),
        rows.positions[lives].tolist(),
        rows.slot_mapping[lives].tolist(),
        paths[len(paths) - num_nodes :],
        rows.nodes[kept].tolist(),
        place[rows.row_of[kept].long()].tolist(),
        rows.draw_positions[kept].tolist(),
    )


def test_rows_that_catch_up(ops):
    """The draft has seen position 0: two committed tokens, the root the last of them, then the nodes."""
    given = state(ops, cached_lens=(1, 3), draft_has=())
    assert run(ops, given, [0, 1, 2]) == Pass(
        tokens=[2, 7, 10, 20],
        positions=[1, 2, 3, 3],
        slots=[101, 102, 121, 122],
        paths=[[0, 1], [0, 2]],
        nodes=[0, 1, 2],
        row_of=[1, 2, 3],
        draw_positions=[3, 4, 4],
    )
    assert has(given.chain, 0) == [1, 2] and given.chain.cached_len.tolist() == [3, 3]


def test_rows_below_a_cached_root(ops):
    """No head. Node 2 is an ancestor that only a higher stage has run: it gets a row and no draw."""
    given = state(ops, draft_has=(1,))
    assert run(ops, given, [3, 6], num_head=0) == Pass(
        tokens=[20, 30, 10],
        positions=[3, 4, 4],
        slots=[122, 123, 126],
        paths=[[0, 2], [0, 1, 3], [0, 2, 6]],
        nodes=[3, 6],
        row_of=[1, 2],
        draw_positions=[5, 5],
    )
    assert has(given.chain, 0) == [1, 2, 3, 6]
    assert has(given.chain, 1) == [1, 2, 3, 4, 5, 6], "the other cache is left alone"


def test_rows_of_nodes_already_run(ops):
    """Everything on the path has its K/V: only the deepest node has a row."""
    given = state(ops, draft_has=(1, 3))
    assert run(ops, given, [5], num_head=0) == Pass([50], [5], [125], [[0, 1, 3, 5]], [5], [0], [6])


def test_rows_without_room(ops):
    """Nodes 3, 4, 6 need five rows, there are three: 4 and 6 are dropped, the ancestor 2 has come in before them."""
    given = state(ops, draft_has=())
    assert run(ops, given, [3, 4, 6], num_head=0, num_rows=3) == Pass(
        tokens=[10, 20, 30],
        positions=[3, 3, 4],
        slots=[121, 122, 123],
        paths=[[0, 1], [0, 2], [0, 1, 3]],
        nodes=[3],
        row_of=[2],
        draw_positions=[5],
    )
    assert has(given.chain, 0) == [1, 2, 3]


@pytest.mark.parametrize("nodes", [[], [0, 1, 3]])
def test_rows_of_a_stage_out_of_reach(nodes, ops):
    """A negative reach: no row, no node, and the cache stays where it is."""
    given = state(ops, contexts=(2**30, 2, CONTEXT), cached_lens=(1, 3))
    assert given.progress.reach[DRAFT, 0] == -1
    assert run(ops, given, nodes) == Pass([], [], [], [], [], [], [])
    assert given.chain.cached_len.tolist() == [1, 3] and has(given.chain, 0) == [1, 3]


def test_rows_without_nodes(ops):
    """Nothing to score: the committed tokens are still caught up with."""
    given = state(ops, cached_lens=(2, 3))
    assert run(ops, given, []) == Pass([7], [2], [102], [], [], [], [])
    assert given.chain.cached_len.tolist() == [3, 3]


def test_rows_of_the_other_cache(ops):
    given = state(ops, cached_lens=(3, 2), oracle_has=())
    assert run(ops, given, [0, 2], num_head=1, cache=1).slots == [202, 222]
    assert has(given.chain, 1) == [2] and has(given.chain, 0) == [1, 3]


def test_more_to_catch_up_with_than_room():
    given = state(reference, cached_lens=(0, 3))
    with pytest.raises(AssertionError, match="3 committed tokens to catch up with, room for 2"):
        run(reference, given, [0], num_head=2)


# --- verification and commit


class Case(NamedTuple):
    drawn: dict[int, int]  # by node; the others draw 30, which is a child of node 1 alone
    emitted: list[int]
    sources: list[int]
    tried: list[int]  # bit i: stage i had proposed a child
    draft_table: list[int]  # slots of positions 3, 4, ...
    oracle_table: list[int]
    cached_lens: list[int]
    draft_slots: dict[int, int] = {}  # nodes whose slot changed
    oracle_slots: dict[int, int] = {}
    state_after: int = RUNNING
    rows: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 6)
    proposed: tuple[int, int] = (3, 3)
    tree: tuple[tuple[int, int], ...] = ()  # token and parent of each node; () = the last emitted token alone
    draft_keeps: tuple[int, ...] = ()  # nodes of the new tree that each cache has
    oracle_keeps: tuple[int, ...] = ()
    given: dict = {}  # changes to ``state``


_NONE, _DRAFT_LAGS = [103, 104, 105], {"cached_lens": (2, 3)}
_KEPT = {"tree": ((30, -1), (50, 0)), "draft_slots": {0: 104, 1: 125, 2: 120, 3: 103, 4: 122, 5: 124}}
CASES = {
    "nothing": Case({0: 99}, [99], [ORACLE], [0b01], _NONE, [203, 204, 205], [3, 3]),
    "part": Case(
        {0: 10, 1: 99}, [10, 99], [0, 2], [0b01, 0b10], [121, 104, 105], [221, 204, 205], [4, 4], {1: 103}, {1: 203}
    ),
    "all": Case(  # the draft never ran node 5
        {0: 10, 1: 30, 3: 50, 5: 60},
        [10, 30, 50, 60],
        [0, 1, 1, 2],
        [0b01, 0b10, 0b10, 0],
        [121, 123, 105],
        [221, 223, 225],
        [5, 6],
        {1: 103, 3: 104},
        {1: 203, 3: 204, 5: 205},
    ),
    "sibling": Case(  # which the draft never ran
        {0: 20, 2: 10, 6: 8},
        [20, 10, 8],
        [0, 0, 2],
        [0b01, 0b01, 0],
        _NONE,
        [222, 226, 205],
        [3, 5],
        {},
        {2: 203, 6: 204},
    ),
    "second-child": Case(
        {0: 10, 1: 40, 4: 1},
        [10, 40, 1],
        [0, 1, 2],
        [0b01, 0b10, 0],
        [121, 104, 105],
        [221, 224, 205],
        [4, 5],
        {1: 103},
        {1: 203, 4: 204},
    ),
    "draft-lags": Case(  # and so it links nothing
        {0: 10, 1: 99}, [10, 99], [0, 2], [1, 2], _NONE, [221, 204, 205], [2, 4], {}, {1: 203}, given=_DRAFT_LAGS
    ),
    # node 3 was not in the oracle's pass: it becomes the root, 5 its child, and what the draft has of them stays
    "kept": Case(
        {0: 10, 1: 30},
        [10, 30],
        [0, 2],
        [0b01, 0],
        [121, 123, 105],
        [221, 204, 205],
        [5, 4],
        oracle_slots={0: 223, 1: 225, 2: 220, 3: 203, 4: 222, 5: 224},
        rows=(0, 1, 2),
        proposed=(2, 0),
        draft_keeps=(1,),
        given={"draft_has": (1, 3, 5), "oracle_has": (1, 2)},
        **_KEPT,
    ),
    "eos-inside": Case(
        {0: 10, 1: 30, 3: 50, 5: 60},
        [10, 30],
        [0, 1],
        [0b01, 0b10],
        [121, 123, 105],
        [221, 223, 205],
        [5, 5],
        {1: 103, 3: 104},
        {1: 203, 3: 204},
        state_after=EOS,
        given={"eos": (77, 30)},
    ),
    "eos-next": Case(
        {0: 10, 1: 99}, [10, 99], [0, 2], [1, 2], [121, 104, 105], [221, 204, 205], [4, 4], {1: 103}, {1: 203}, EOS,
        given={"eos": (99, 77)},
    ),
    "eos-off-the-walk": Case(
        {0: 10, 1: 99}, [10, 99], [0, 2], [1, 2], [121, 104, 105], [221, 204, 205], [4, 4], {1: 103}, {1: 203},
        given={"eos": (40,)},
    ),
    # two new tokens are left: node 1 and the token drawn there, though that one was a node of the pass as well
    "clipped": Case(
        {0: 10, 1: 30, 3: 50},
        [10, 30],
        [0, 2],
        [0b01, 0b10],
        [121, 123, 105],
        [221, 223, 205],
        [5, 5],
        oracle_slots={0: 204, 1: 225, 2: 220, 3: 203, 4: 222, 5: 224},
        state_after=LENGTH,
        oracle_keeps=(1,),
        given={"end": 5},
        **_KEPT,
    ),
    "clipped-at-once": Case(
        {0: 99}, [99], [2], [1], _NONE, [203, 204, 205], [3, 3], state_after=LENGTH, given={"end": 4}
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_verification(name, ops):
    case = CASES[name]
    tree, progress, chain = state(ops, **case.given)
    before = moved(chain, reference)
    rows, drawn = list(case.rows), [case.drawn.get(node, 30) for node in case.rows]
    if ops is gpu:  # the full width, dead rows with whatever was drawn there
        rows, drawn = rows + [-1, -1], drawn + [10, -1]
    ops.verify_and_commit(tree, int32(*rows, ops=ops), int32(*drawn, ops=ops), progress, chain)

    count, running = len(case.emitted), case.state_after == RUNNING
    record = [0] * RECORD
    record[Record.EMITTED], record[Record.STATE] = count, case.state_after
    record[Record.PROPOSED : Record.PROPOSED + 2] = case.proposed
    for field, values in ((Record.TOKENS, case.emitted), (Record.SOURCES, case.sources), (Record.TRIED, case.tried)):
        record[field : field + count] = values
    assert progress.record.tolist() == record

    length = 3 + count
    assert progress.text.tolist()[:length] == [1, 2, 7, *case.emitted] and progress.length.tolist() == [length]
    assert progress.state.tolist() == [case.state_after]
    assert progress.reach[:, 0].tolist() == ([min(7, 13 - length)] * 2 + [min(8, 14 - length)] if running else [-1] * 3)

    assert chain.page_tables[:, :6].tolist() == [
        [100, 101, 102, *case.draft_table],
        [200, 201, 202, *case.oracle_table],
    ]
    assert torch.equal(chain.page_tables[:, 6:].cpu(), before.page_tables[:, 6:])
    for cache, slots in ((0, case.draft_slots), (1, case.oracle_slots)):
        wanted = [slots.get(node, 120 + 100 * cache + node) for node in range(CAPACITY)]
        assert chain.node_slots[cache].tolist() == wanted
    assert chain.cached_len.tolist() == case.cached_lens
    assert has(chain, 0) == list(case.draft_keeps) and has(chain, 1) == list(case.oracle_keeps)

    if case.state_after != EOS:  # after that no tree is needed
        nodes = case.tree or ((case.emitted[-1], -1),)
        assert live(tree.tokens, tree) == [token for token, _ in nodes]
        assert live(tree.parents, tree) == [parent for _, parent in nodes]
        assert live(tree.depths, tree) == list(range(len(nodes)))
        assert tree.paths[0, :3].tolist() == [0, -1, -1]
    if case.tree:
        assert live(tree.edge_scores, tree) == live(tree.path_scores, tree) == [0.0, -1.0]
        assert live(tree.sources, tree) == [1, 1] and live(tree.scored, tree) == [1, -1]
        assert tree.paths[1, :3].tolist() == [0, 1, -1]


@pytest.mark.parametrize(
    ("drawn", "failed", "expected"),
    [({2: -1}, 0, -3), ({}, 2, -2), ({2: -1}, 1, -1)],
    ids=["oracle", "draft", "table-first"],
)
def test_nan(drawn, failed, expected, ops):
    """A NaN ends the generation: nothing is emitted or committed, nobody may score any more, and the state names the
    stage, a lower one first."""
    given = state(ops)
    given.tree.failed[0] = failed
    before = State(*(moved(part, reference) for part in given))
    draws = int32(*(drawn.get(node, 10) for node in range(7)), ops=ops)
    given_rows = int32(*range(7), ops=ops)
    ops.verify_and_commit(given.tree, given_rows, draws, given.progress, given.chain)
    record = [0] * RECORD
    record[Record.STATE] = expected
    assert given.progress.record.tolist() == record and given.progress.state.tolist() == [expected]
    assert given.progress.reach[:, 0].tolist() == [-1] * 3
    after = State(*(moved(part, reference) for part in given))
    assert all(map(torch.equal, after.chain, before.chain)) and all(map(torch.equal, after.tree, before.tree))
    assert torch.equal(after.progress.text, before.progress.text) and after.progress.length == 3


@pytest.mark.parametrize("last", [EOS, LENGTH, -1, -3])
def test_after_the_end(last, ops):
    """Further calls clear the record but for the state, and change nothing else."""
    given = state(ops)
    given.progress.state[0] = last
    given.progress.record.fill_(9)
    before = State(*(moved(part, reference) for part in given))
    ops.verify_and_commit(given.tree, int32(0, 1, ops=ops), int32(10, 30, ops=ops), given.progress, given.chain)
    record = [0] * RECORD
    record[Record.STATE] = last
    assert given.progress.record.tolist() == record
    given.progress.record.fill_(9)
    for part, old in zip(given, before, strict=True):
        assert all(torch.equal(column.cpu(), column_before) for column, column_before in zip(part, old, strict=True))


def test_two_iterations(ops):
    """After "all", the draft catches up with the two tokens it has not seen, through the slots that the commit left it;
    a second commit then links them."""
    case, given = CASES["all"], state(ops)
    draws = int32(*(case.drawn.get(node, 30) for node in range(7)), ops=ops)
    ops.verify_and_commit(given.tree, int32(*range(7), ops=ops), draws, given.progress, given.chain)
    assert run(ops, given, [0]) == Pass([50, 60], [5, 6], [105, 106], [], [0], [1], [7])
    children, scores = int32([11, 12], ops=ops), torch.tensor([[-1.0, -2.0]], device=home(ops))
    reach = given.progress.reach[ORACLE]
    ops.insert_children(given.tree, DRAFT, int32(0, ops=ops), children, scores, reach)
    assert run(ops, given, [1], num_head=0).slots == [103], "node 1's slot is the one that position 3 gave for it"
    assert run(ops, given, [0, 1, 2], num_head=1, cache=1).slots == [206, 203, 222]
    ops.verify_and_commit(given.tree, int32(0, 1, 2, ops=ops), int32(11, 13, 14, ops=ops), given.progress, given.chain)
    assert given.progress.text[:9].tolist() == [1, 2, 7, 10, 30, 50, 60, 11, 13]
    assert given.chain.page_tables[:, :9].tolist() == [
        [100, 101, 102, 121, 123, 105, 106, 103, 108],
        [200, 201, 202, 221, 223, 225, 206, 203, 208],
    ]
    assert given.chain.node_slots[:, :6].tolist() == [[120, 107, 122, 104, 124, 125], [220, 207, 222, 204, 224, 205]]
    assert given.chain.cached_len.tolist() == [8, 8]


def test_deepest_path(ops):
    """A chain of DEPTH_LIMIT nodes, all of it accepted: DEPTH_LIMIT + 1 tokens at once."""
    tree = reference.new_tree(48, root=7)
    for node in range(DEPTH_LIMIT):
        insert(tree, DRAFT, node, {100 + node: -1.0})
    positions, nodes = torch.arange(64, dtype=torch.int32), torch.arange(48, dtype=torch.int32)
    chain = reference.new_chain([positions], [64 + nodes], [1])
    chain.cached[0, 1 : DEPTH_LIMIT + 1] = 1
    progress = reference.new_progress([7], 60, DEPTH_LIMIT, [99, 99, 64], ())
    tree, progress, chain = (moved(part, ops) for part in (tree, progress, chain))
    width = DEPTH_LIMIT + 1
    rows, drawn = int32(*range(width), ops=ops), int32(*range(100, 100 + width), ops=ops)
    ops.verify_and_commit(tree, rows, drawn, progress, chain)
    assert progress.text[: width + 1].tolist() == [7, *range(100, 100 + width)]
    record = progress.record.tolist()
    assert record[Record.EMITTED] == width and record[Record.TOKENS : Record.TOKENS + width] == drawn.tolist()
    assert record[Record.TRIED : Record.TRIED + width] == [2] * DEPTH_LIMIT + [0]
    assert chain.page_tables[0, : width + 1].tolist() == [0, *range(65, 65 + DEPTH_LIMIT), width]
    assert chain.cached_len.tolist() == [width]


# --- statistics of records


def test_statistics_of_a_record():
    """The record of "all" and then that of "nothing": what a user sees of them."""
    stats = Statistics(["draft2", "draft", "oracle"])
    for name in ("all", "nothing"):
        tree, progress, chain = state(reference)
        draws = int32(*(CASES[name].drawn.get(node, 30) for node in range(7)))
        reference.verify_and_commit(tree, int32(*range(7)), draws, progress, chain)
        assert stats.record(progress.record.tolist()) == CASES[name].emitted
    assert stats.token_stages == ["draft2", "draft", "draft", "oracle", "oracle"]
    first, second = stats.iterations
    assert first.proposed == second.proposed == [3, 3]
    assert first.tried == [frozenset({0}), frozenset({1}), frozenset({1}), frozenset()]
    assert second.tried == [frozenset({0})]
    assert first.sources == [0, 1, 1, 2] and second.sources == [2]


# --- look-ups

SIZE = 4  # tokens; rows 0..3 of the table are the contexts of one token, row 4 is that of 1, 2


@pytest.fixture
def table(ops) -> SuccessorTable:
    """Row r says token r with probability 1/2, then the next one with 1/4; row 4 says 0 and 3. An empty bucket's row is
    4: whoever takes an empty bucket for a hit shows."""
    keys, rows = torch.full((16,), -1, dtype=torch.int64), torch.full((16,), 4, dtype=torch.int32)
    keys[hash_context(torch.tensor(1 * SIZE + 2), 16)] = 1 * SIZE + 2
    tokens = [[token, (token + 1) % SIZE] for token in range(SIZE)] + [[0, 3]]
    log_probs = torch.tensor([[0.5, 0.25]] * 5).log()
    table = SuccessorTable(keys, rows, int32(*tokens), log_probs, torch.full((5,), 0.25).log(), SIZE)
    return moved(table, ops)


@pytest.mark.parametrize(
    ("text", "node", "row"),
    [
        ([1, 2], 0, 4),  # the token before the root comes from the text
        ([0, 2], 0, 2),  # a context of two that the table does not hold
        ([2], 0, 2),  # no token before the root
        ([3], 0, 3),  # nor here, where its key would be that of an empty bucket
        ([1, 2, 1], 2, 4),  # 2 below the root 1
        ([0, 2], 2, 2),  # 2 below 2
        ([0, 2], 4, 4),  # 2 below 1 below the root
        ([0, 2], 1, 1),
    ],
)
def test_contexts(text, node, row, table, ops):
    tree = reference.new_tree(16, root=text[-1])
    insert(tree, 0, 0, {1: -1.0, 2: -2.0, 3: -3.0})
    insert(tree, 0, 1, {2: -1.0})
    tree, progress = moved(tree, ops), moved(reference.new_progress(text, 30, 8, [99, 99], ()), ops)
    padding = [-1] if ops is gpu else []
    children, scores = ops.lookup_nodes(table, tree, int32(node, *padding, ops=ops), progress, GREEDY, 2, 1.0)
    assert children[0].tolist() == table.tokens[row].tolist()
    torch.testing.assert_close(scores[0].cpu(), torch.tensor([0.5, 0.25]).log(), atol=1e-6, rtol=0)
    assert all(score == -math.inf for score in scores[1:].flatten().tolist())


@pytest.mark.parametrize("distance", [1, MAX_PROBES - 1])
def test_probes(distance, table, ops):
    """A key that stands ``distance`` buckets after its first one, around the end of the table, is found."""
    start = int(hash_context(torch.tensor(1 * SIZE + 2), 16))
    for step in range(distance):
        table.keys[(start + step) % 16] = 10**6 + step
    table.keys[(start + distance) % 16] = 1 * SIZE + 2
    tree, progress = (
        moved(part, ops) for part in (reference.new_tree(16, root=2), reference.new_progress([1, 2], 30, 8, [9], ()))
    )
    children, _ = ops.lookup_nodes(table, tree, int32(0, ops=ops), progress, GREEDY, 2, 1.0)
    assert children[0].tolist() == [0, 3]


def root_of(text: list[int], ops) -> tuple:
    """The tree and the progress of a text whose last token has the children 1, 2 and 3."""
    tree = reference.new_tree(16, root=text[-1])
    insert(tree, TABLE, 0, {1: -1.0, 2: -2.0, 3: -3.0})
    return moved(tree, ops), moved(reference.new_progress(text, 30, 8, [99, 99], ()), ops)


def remember(recent, text: list[int], nodes: list[int], children: list, probabilities: list, ops) -> None:
    tree, progress = root_of(text, ops)
    if ops is gpu:  # a dead row
        nodes, children, probabilities = nodes + [-1], children + [[2, 2, 2]], probabilities + [[0.9, 0.05, 0.05]]
    log_probs = torch.tensor(probabilities, device=home(ops)).log()
    ops.learn(recent, tree, int32(*nodes, ops=ops), progress, int32(*children, ops=ops), log_probs)


def recall(recent, table, text: list[int], ops) -> tuple[list[int], list[float]]:
    tree, progress = root_of(text, ops)
    children, scores = ops.lookup_nodes(table, tree, int32(0, ops=ops), progress, GREEDY, 2, 1.0, recent)
    return children[0].tolist(), scores[0].exp().tolist()


def test_what_is_remembered_comes_before_the_table(table, ops):
    """The two best children of a context; what is left of the mass competes with them. A newer row replaces it."""
    recent = ops.new_recent(2**10, 2, SIZE, home(ops))
    assert recall(recent, table, [1, 2], ops) == ([0, 3], [0.5, 0.25])
    remember(recent, [1, 2], [0, 1], [[3, 1, 0], [0, 1, 2]], [[0.6, 0.3, 0.1], [0.2, 0.2, 0.2]], ops)
    assert recall(recent, table, [1, 2], ops) == ([3, 1], pytest.approx([0.6, 0.3]))
    assert recall(recent, table, [2, 1], ops) == ([0, 1], pytest.approx([0.2, 0.2])), "node 1 is token 1 after 2"
    assert recall(recent, table, [0, 2], ops) == ([2, 3], [0.5, 0.25]), "another context still has the table's row"
    remember(recent, [1, 2], [0], [[1, 2, 0]], [[0.7, 0.0, 0.0]], ops)
    children, probabilities = recall(recent, table, [1, 2], ops)
    assert children[0] == 1 and probabilities == [pytest.approx(0.7), 0.0]


def test_what_is_not_remembered(table, ops):
    """A context of one token, a node without a possible child, and one with NaN."""
    recent = ops.new_recent(16, 2, SIZE, home(ops))
    for text in ([2], [3]):
        remember(recent, text, [0], [[1, 2, 0]], [[0.6, 0.3, 0.1]], ops)
    remember(recent, [1, 2], [0, 3], [[1, 2, 0]] * 2, [[0.0] * 3, [math.nan] * 3], ops)
    assert (recent.keys == -1).all() and (recent.log_probs == -math.inf).all()
    assert recall(recent, table, [3], ops) == ([3, 0], [0.5, 0.25]), "its key would be that of an empty bucket"


def test_the_later_of_two_nodes_in_a_bucket_is_remembered(table, ops):
    recent = ops.new_recent(1, 2, SIZE, home(ops))
    remember(recent, [1, 2], [0, 1, 2], [[1, 2, 0], [3, 1, 0], [0, 3, 1]], [[0.6, 0.3, 0.1]] * 3, ops)
    assert recent.keys.tolist() == [2 * SIZE + 2] and recent.tokens.tolist() == [[0, 3]]
    assert recall(recent, table, [2, 2], ops) == ([0, 3], pytest.approx([0.6, 0.3]))
    assert recall(recent, table, [1, 2], ops) == ([0, 3], [0.5, 0.25])
