"""Bad arguments of the operations of an iteration: refused with the name of the tensor, before any launch."""

from collections.abc import Callable

import pytest
import torch

from kernels import gpu
from kernels.gpu.launch import architecture, record
from kernels.layout import MAX_STAGES, Tree
from tests.interpreter import DEVICE
from tests.laws import GREEDY
from tests.lockstep import SHAPES, Lockstep, int32

pytestmark = pytest.mark.usefixtures("hostile_scratch")


def arguments(op: str) -> dict:
    """Of each operation, on the state of a lockstep."""
    tree, progress, chain = Lockstep(SHAPES["full"], GREEDY, 0).device
    nodes, table = int32(0, -1, device=DEVICE), Lockstep(SHAPES["full"], GREEDY, 0).table[1]
    given = {"tree": tree, "nodes": nodes, "progress": progress, "chain": chain, "table": table, "stage": 1, "width": 4}
    given |= {"cache": 0, "reach": progress.reach[1], "max_depth": progress.reach[2], "num_head": 3, "num_rows": 2}
    given |= {"sampling": GREEDY, "num_children": 2, "tau": 1.0, "rows": nodes, "drawn": nodes.clone()}
    given |= {
        "children": torch.zeros(2, 3, dtype=torch.int32, device=DEVICE),
        "scores": torch.zeros(2, 3, device=DEVICE),
    }
    given |= {"recent": gpu.new_recent(16, 3, DEVICE), "log_probs": given["scores"], "levels": nodes.clone()}
    names = {
        "select_nodes": "tree stage width max_depth",
        "insert_children": "tree stage nodes children scores max_depth levels",
        "stage_rows": "tree nodes progress chain cache reach num_head num_rows",
        "verify_and_commit": "tree rows drawn progress chain",
        "lookup_nodes": "table tree nodes progress sampling num_children tau recent",
        "learn": "recent tree nodes progress children log_probs",
    }
    return {name: given[name] for name in names[op].split()}


def replaced(value, column: str, change: Callable[[torch.Tensor], torch.Tensor]):
    return value._replace(**{column: change(getattr(value, column))}) if column else change(value)


# Operation, argument, and the name in the message.
TENSORS = [
    *((op, "tree.tokens", "tokens") for op in ("select_nodes", "insert_children", "stage_rows", "verify_and_commit")),
    *(("insert_children", f"tree.{column}", column) for column in Tree._fields),
    ("lookup_nodes", "tree.paths", "paths"),
    ("learn", "tree.depths", "depths"),
    ("select_nodes", "max_depth", "max_depth"),
    *(("insert_children", name, name) for name in ("nodes", "children", "scores", "max_depth", "levels")),
    *(("stage_rows", name, name) for name in ("nodes", "reach")),
    ("stage_rows", "chain.page_tables", "page_tables"),
    ("stage_rows", "chain.node_slots", "node_slots"),
    *(("verify_and_commit", name, name) for name in ("rows", "drawn")),
    *(("verify_and_commit", f"progress.{name}", name) for name in ("reach", "record")),
    *(("verify_and_commit", f"chain.{name}", name) for name in ("node_slots", "cached")),
    ("lookup_nodes", "nodes", "nodes"),
    ("lookup_nodes", "sampling.seed", "seed"),
    *(("lookup_nodes", f"table.{name}", name) for name in ("keys", "rows", "tokens", "log_probs", "log_rest")),
    *(("lookup_nodes", f"recent.{name}", "recent") for name in ("keys", "tokens", "log_probs", "log_rest", "levels")),
    *(("learn", name, name) for name in ("nodes", "children", "log_probs")),
    *(("learn", f"recent.{name}", "recent") for name in ("keys", "tokens", "log_probs", "log_rest")),
]
FAULTS = {
    "dtype": lambda tensor: tensor.double() if tensor.is_floating_point() else tensor.short(),
    "strided": lambda tensor: torch.stack([tensor, tensor], -1)[..., 0],
    "aligned": lambda tensor: torch.cat([tensor.flatten()[:1], tensor.flatten()])[1:].view(tensor.shape),
}
ONE_NUMBER = ("num_nodes", "failed")  # contiguous however they lie


@pytest.mark.parametrize(
    ("fault", "op", "argument", "message"),
    [
        (fault, *tensor)
        for fault in FAULTS
        for tensor in TENSORS
        if not (fault == "strided" and tensor[-1] in ONE_NUMBER)
    ],
)
def test_bad_tensor(fault, op, argument, message):
    """Each in turn of another dtype, strided or misaligned: ValueError naming it, and nothing is launched."""
    given = arguments(op)
    name, _, column = argument.partition(".")
    given[name] = replaced(given[name], column, FAULTS[fault])
    with record(architecture(torch.device(DEVICE))) as launches:
        with pytest.raises(ValueError, match=rf"^{message}"):
            getattr(gpu, op)(**given)
        assert not launches


@pytest.mark.parametrize(
    ("op", "changed", "message"),
    [
        ("insert_children", {"scores": (2, 2)}, r"scores must have shape \[2, 3\], got \[2, 2\]"),
        ("insert_children", {"children": (3, 3)}, r"children must have shape \[2, any\], got \[3, 3\]"),
        ("verify_and_commit", {"drawn": (3,)}, r"drawn must have shape \[2\], got \[3\]"),
        ("learn", {"log_probs": (2, 4)}, r"log_probs must have shape \[2, 3\], got \[2, 4\]"),
        ("stage_rows", {"nodes": (2, 1)}, r"nodes must have shape \[any\], got \[2, 1\]"),
    ],
)
def test_bad_shape(op, changed, message):
    given = arguments(op)
    for name, shape in changed.items():
        given[name] = torch.zeros(shape, dtype=given[name].dtype, device=DEVICE)
    with pytest.raises(ValueError, match=message):
        getattr(gpu, op)(**given)


def test_too_many_stages():
    given = arguments("verify_and_commit")
    contexts = [99] * (MAX_STAGES + 1)
    given["progress"] = gpu.new_progress([1, 2], 9, 4, contexts, (), DEVICE)
    with pytest.raises(ValueError, match=f"a chain has at most {MAX_STAGES} stages, got {MAX_STAGES + 1}"):
        gpu.verify_and_commit(**given)
