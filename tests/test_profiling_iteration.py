"""The state on which ``profiling.sampler`` times an iteration's operations, and what they do to it."""

import pytest
import torch

from kernels import gpu, reference
from kernels.layout import Record
from profiling import iteration
from tests.interpreter import DEVICE, INTERPRETING

VOCAB = 97


def bits(value) -> list[torch.Tensor]:
    """The tensors of a result, copied."""
    parts = value if isinstance(value, tuple) else (value,)
    return [part.clone() for part in parts if torch.is_tensor(part)]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


def test_the_tree_is_a_chain_with_other_children():
    tree = iteration.working_tree()
    count = int(tree.num_nodes)
    assert count == iteration.NODES and int(tree.depths[:count].max()) == iteration.DEPTH
    assert tree.tokens[: iteration.DEPTH + 1].tolist() == list(range(iteration.DEPTH + 1))
    assert tree.scored[iteration.NODES - iteration.WIDTH : count].tolist() == [-1] * iteration.WIDTH


def test_every_call_finds_the_same_state():
    """Four tokens are accepted each time, not once; what changes the state begins with its restoration."""
    work = iteration.iteration(VOCAB, "cpu", reference)
    before = work.state.clone()
    for name, call in work.calls.items():
        first = bits(call()), work.state.clone()
        changed = not torch.equal(first[1], before)
        again = bits(call()), work.state.clone()
        assert torch.equal(first[1], again[1]) and same(first[0], again[0]), name
        work.restore()
        assert torch.equal(work.state, before) and changed == (name in work.restored), name
    for _ in range(2):
        assert int(work.calls["verify_and_commit"]()[Record.EMITTED]) == iteration.ACCEPTED + 1


@pytest.mark.parametrize("width", [1, 2, 4, 5, 16])
def test_launches_repeat_their_bits(width):
    """A hundred launches of every operation on one state, few rows included, where barriers are few: the same bits."""
    ours = iteration.iteration(VOCAB, DEVICE, gpu, width)
    for name, call in ours.calls.items():
        expected = bits(call()), ours.state.clone()
        for _ in range(1 if INTERPRETING else 100):
            found = bits(call()), ours.state.clone()
            assert same(found[0], expected[0]) and torch.equal(found[1], expected[1]), name
        ours.restore()
