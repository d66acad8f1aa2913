"""Verification with commit, worked by hand and run on both backends: what is emitted, what becomes of text, tree and
caches, how a generation ends, and the statistics made of its records. The state is that of ``worked_iteration``."""

from typing import NamedTuple

import pytest
import torch

from decoding.stages import State
from decoding.stats import Statistics
from kernels import gpu, reference
from kernels.layout import DEPTH_LIMIT, EOS, LENGTH, RECORD, RUNNING, Record
from tests.worked_iteration import (
    CAPACITY,
    DRAFT,
    ORACLE,
    Pass,
    has,
    home,
    insert,
    int32,
    live,
    moved,
    pass_rows,
    state,
)

pytestmark = pytest.mark.usefixtures("hostile_scratch")


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
    assert pass_rows(ops, given, [0]) == Pass([50, 60], [5, 6], [105, 106], [], [0], [1], [7])
    children, scores = int32([11, 12], ops=ops), torch.tensor([[-1.0, -2.0]], device=home(ops))
    reach = given.progress.reach[ORACLE]
    ops.insert_children(given.tree, DRAFT, int32(0, ops=ops), children, scores, reach)
    assert pass_rows(ops, given, [1], num_head=0).slots == [103], "node 1's slot is the one that position 3 gave for it"
    assert pass_rows(ops, given, [0, 1, 2], num_head=1, cache=1).slots == [206, 203, 222]
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


def test_of_equal_siblings_the_first_is_walked(ops):
    """As the tree's growth never makes them: their K/V and sources differ, so both backends must choose alike."""
    tree = reference.new_tree(16, root=1)
    insert(tree, 0, 0, {5: -1.0, 6: -2.0})
    tree.tokens[2], tree.sources[2] = 5, DRAFT
    slots = torch.arange(16, dtype=torch.int32)
    chain = reference.new_chain([slots] * 2, [16 + slots] * 2, [2, 2])
    chain.cached[:, 1:3] = 1
    progress = reference.new_progress([3, 1], 12, 8, [99, 99, 16], ())
    tree, progress, chain = (moved(part, ops) for part in (tree, progress, chain))
    ops.verify_and_commit(tree, int32(0, 1, 2, ops=ops), int32(5, 9, 9, ops=ops), progress, chain)
    record = progress.record.tolist()
    assert record[Record.TOKENS : Record.TOKENS + 2] == [5, 9] and record[Record.SOURCES] == 0
    assert chain.page_tables[0, 2] == 17, "the slot of node 1"


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
    assert first.tried == [0b01, 0b10, 0b10, 0b00]
    assert second.tried == [0b01]
    assert [stats._acceptance(stages)["tried"] for stages in ([0], [1], [0, 1])] == [2, 2, 4]
    assert first.sources == [0, 1, 1, 2] and second.sources == [2]
