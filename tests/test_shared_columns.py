"""Attention of the torch backend over columns that rows share: what agrees is found out rightly, and used so."""

import threading

import pytest
import torch
import torch.nn.functional as F

from kernels import reference
from kernels.layout import ROW_BLOCK, ROW_MULTIPLE, SHARED_WINDOW, TAIL_WINDOW
from kernels.reference import attention
from kernels.reference.route import Route


@pytest.mark.parametrize(
    ("spoilt", "found"),
    [
        ("nothing", (ROW_MULTIPLE, True)),
        ("columns", (ROW_MULTIPLE, False)),
        ("gaps", (ROW_MULTIPLE, False)),
        ("rows", (ROW_BLOCK, True)),
        ("few", (ROW_MULTIPLE, False)),
        ("width", (ROW_MULTIPLE, False)),
        ("stride", (ROW_MULTIPLE, False)),
    ],
)
def test_what_agrees_is_found_out(spoilt, found, monkeypatch):
    """Against a product that agrees by construction, and ones that depend on the column of a key, on which values have
    a weight, on how many rows there are, on how few columns a product has, on how many follow that have no weight, and
    on how far apart the rows of weights lie."""

    def bmm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        sums = (a[:, :, None].double() * b.transpose(1, 2)[:, None].double()).sum(-1).float()
        if spoilt == "columns":
            sums = sums * (1 + 1e-6 * torch.arange(sums.shape[2]))
        if spoilt == "gaps":
            sums = sums * (1 + 1e-6 * ((a != 0) * torch.arange(a.shape[2])).amax(-1, keepdim=True))
        if spoilt == "few" and a.shape[2] == 64 and sums.shape[2] < 64:
            sums = sums * (1 + 1e-6)
        return sums * (1 + 1e-6 * sums.shape[1]) if spoilt == "rows" else sums

    def baddbmm(sums: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        far = a.stride(1) > TAIL_WINDOW + SHARED_WINDOW
        return sums.add_(bmm(a, b) * (1 + 1e-6 * (a.shape[2] * (spoilt == "width") + far * (spoilt == "stride"))))

    monkeypatch.setattr(attention.torch.Tensor, "baddbmm_", baddbmm)
    monkeypatch.setattr(attention.torch, "bmm", bmm)
    assert attention.agreeing.__wrapped__(2, 64, 1) == found


def committed_pass(num_rows: list[int], start: int):
    """The arguments of a route: so many consecutive committed rows of each sequence, all from position ``start``."""
    count, length = len(num_rows), start + max(num_rows)
    table = torch.arange(1, 1 + count * length, dtype=torch.int32).view(count, length)
    sequences = torch.arange(count, dtype=torch.int32).repeat_interleave(torch.tensor(num_rows))
    positions = torch.cat([torch.arange(start, start + rows, dtype=torch.int32) for rows in num_rows])
    paths, nodes = torch.zeros(len(positions), 1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    slots = table[sequences.long(), positions.long()]
    return table, torch.full((count,), length, dtype=torch.int32), sequences, positions, paths, nodes, slots


@pytest.mark.parametrize("found", [(ROW_MULTIPLE, True), (ROW_BLOCK, True), (ROW_MULTIPLE, False), (ROW_BLOCK, False)])
@pytest.mark.parametrize(
    ("num_rows", "start"),
    [([21], 5), ([19], 300), ([4] * 4, 40), ([4] * 5, 40), ([5] * 3, 170), ([2] * 3, 560), ([1, 16], 47), ([37], 1065)],
)
def test_attention_in_blocks(found, num_rows, start, monkeypatch):
    """Whatever was found to agree: softmax of the row's own prefix, and the same bits as the row by itself. Tails of
    several sequences are too many for the columns of one block, their windows for one product; the last block may be
    full where the pass is padded."""
    multiple, agree = attention.agreeing(3, 16, torch.get_num_threads())
    if found[1] and not (agree and found[0] >= multiple):
        pytest.skip("needs products that do not depend on columns, which this processor's library has not")
    monkeypatch.setattr(attention, "agreeing", lambda *_: found)
    table, committed, sequences, positions, *rest = committed_pass(num_rows, start)
    k, v = (torch.randn(1 + table.numel(), 3, 16) for _ in range(2))
    k[0] = v[0] = 0.0
    q = torch.randn(len(positions), 3, 16)

    def attend(rows: slice) -> torch.Tensor:
        chosen = (sequences[rows], positions[rows], rest[0][rows], rest[1], rest[2][rows])
        padded = F.pad(q[rows], (0, 0, 0, 0, 0, -len(q[rows]) % ROW_MULTIPLE))
        mixed = reference.tree_attention(padded, k, v, reference.route(table, 1, committed, *chosen), 0.3)
        assert len(mixed) == len(padded) and not mixed[len(q[rows]) :].any()
        return mixed

    together = attend(slice(None))
    blocks = reference.route(table, 1, committed, sequences, positions, *rest).blocks
    assert all(len(range(len(together))[block.rows]) == len(block.ends) <= ROW_BLOCK for block in blocks)
    assert all((len(block.on_device()[0]) - TAIL_WINDOW) % SHARED_WINDOW == 0 for block in blocks), "row by row"
    assert [i for block in blocks for i in range(len(q))[block.rows]] == list(range(len(q)))
    for row, (sequence, position) in enumerate(zip(sequences.tolist(), positions.tolist(), strict=True)):
        held = table[sequence, : position + 1].long()
        weights = torch.softmax(0.3 * torch.einsum("hd,nhd->hn", q[row].double(), k[held].double()), -1)
        wanted = torch.einsum("hn,nhd->hd", weights, v[held].double()).flatten()
        assert (together[row] - wanted).abs().max() < 1e-5
        assert torch.equal(attend(slice(row, row + 1))[0], together[row])


def test_threads_attend_beside_one_another():
    """Passes of one shape in two threads, each over a cache of its own, give what they give one after the other."""
    table, committed, sequences, positions, *rest = committed_pass([16], 200)
    inputs = [[torch.randn(n, 3, 64) for n in (16, 1 + table.numel(), 1 + table.numel())] for _ in range(2)]

    def mixed(index: int) -> torch.Tensor:
        route = reference.route(table, 1, committed, sequences, positions, *rest)
        return reference.tree_attention(*inputs[index], route, 0.3)

    wanted, wrong = [mixed(0), mixed(1)], []

    def attend(index: int) -> None:
        for _ in range(300):
            if not torch.equal(mixed(index), wanted[index]):
                wrong.append(index)

    threads = [threading.Thread(target=attend, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize(("length", "end"), [(171, 128), (187, 144)])
def test_sequences_that_share_the_end_of_their_text(length, end):
    """Their tails are the same few slots, so one block holds both; each row sees the windows of its own sequence, cut
    as they are cut when it is alone."""
    table = torch.arange(1, 1 + 2 * length, dtype=torch.int32).view(2, length)
    table[1, 100:] = table[0, 100:]
    k, v, q = torch.randn(1 + 2 * length, 3, 16), torch.randn(1 + 2 * length, 3, 16), torch.randn(2, 3, 16)
    k[0] = v[0] = 0.0
    positions, sequences = int32(length - 1, length - 1), int32(0, 1)
    paths, nodes, slots_of_rows = torch.zeros(2, 1, dtype=torch.int32), int32(0), table[:, length - 1]

    def route_of(rows: slice) -> Route:
        arguments = (sequences[rows], positions[rows], paths[rows], nodes, slots_of_rows[rows])
        return reference.route(table, 1, int32(length, length), *arguments)

    route = route_of(slice(None))
    assert len(route.blocks) == 1 and route.blocks[0].ends.tolist() == [end, end]
    for row, mixed in enumerate(reference.tree_attention(q, k, v, route, 0.3)):
        itself = slice(row, row + 1)
        assert torch.equal(reference.tree_attention(q[itself], k, v, route_of(itself), 0.3)[0], mixed)
        slots = table[row].long()
        weights = torch.softmax(0.3 * torch.einsum("hd,khd->hk", q[row].double(), k[slots].double()), -1)
        torch.testing.assert_close(
            mixed.double(), torch.einsum("hk,khd->hd", weights, v[slots].double()).flatten(), rtol=1e-5, atol=1e-5
        )


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)
