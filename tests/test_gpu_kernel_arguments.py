"""Bad arguments of the operations of a pass: refused with the name of the tensor or the number, before any launch."""

from contextlib import contextmanager

import pytest
import torch

from kernels import gpu
from kernels.gpu import launch as launches
from kernels.gpu import linear
from kernels.gpu.config import LinearTiles
from kernels.gpu.launch import architecture, record
from tests.gpu_helpers import (
    ARGUMENTS,
    SMALL,
    Shape,
    inputs,
    prefill_pass,
    tree_pass,
)
from tests.interpreter import DEVICE

pytestmark = pytest.mark.usefixtures("hostile_scratch")


def misaligned(tensor: torch.Tensor) -> torch.Tensor:
    """A copy that begins one element past a multiple of 16 bytes."""
    return torch.cat([tensor.flatten()[:1], tensor.flatten()])[1:].view(tensor.shape)


FAULTS = {
    "contiguous": lambda tensor: torch.stack([tensor, tensor], -1)[..., 0],
    "dtype": lambda tensor: tensor.to(torch.float64 if tensor.is_floating_point() else torch.int64),
    "device": lambda tensor: tensor.to("meta"),
    "aligned": misaligned,
    "empty": lambda tensor: tensor[:0],
}
# What others are compared with: where it is at fault, the first of the others may be named.
ANCHORS = {"x", "q", "wte", "page_table", "positions"}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("op", ARGUMENTS)
def test_bad_tensor(op, fault):
    """Each tensor argument in turn is bad in one way: ValueError naming it, and nothing is launched."""
    arguments = ARGUMENTS[op](gpu, inputs("3 heads", torch.float32))
    for field, tensor in arguments.items():
        if isinstance(tensor, torch.Tensor):
            named = r"\w+" if field in ANCHORS else field
            refused(rf"^{named} ", op, arguments | {field: FAULTS[fault](tensor)})


def refused(message: str, op: str, arguments: dict) -> None:
    """Assert that ``op`` raises ValueError with this ``message`` before any launch."""
    with record(architecture(torch.device(DEVICE))) as launches:  # instead of running what would be launched
        with pytest.raises(ValueError, match=message):
            getattr(gpu, op)(**arguments)
        assert not launches


@pytest.mark.parametrize(
    ("op", "field"),
    [
        ("embed", "positions"),
        ("embed", "wpe"),
        ("route", "committed"),
        ("route", "sequences"),
        ("route", "slot_mapping"),
        ("layer_norm_linear", "norm_weight"),
        ("layer_norm_linear", "norm_bias"),
        ("layer_norm_linear", "weight"),
        ("layer_norm_linear", "bias"),
        ("layer_norm_qkv", "v_cache"),
        ("tree_attention", "v_cache"),
        ("linear_residual", "weight"),
        ("linear_residual", "residual"),
        ("linear_residual", "moments"),
        ("embed", "moments"),
        ("lm_head", "tile_maxima"),
    ],
)
def test_bad_shape(op, field):
    """One column too few: ValueError naming the tensor, before any launch."""
    arguments = ARGUMENTS[op](gpu, inputs("3 heads", torch.float32))
    refused(rf"^{field} must have shape", op, arguments | {field: arguments[field][..., :-1].contiguous()})


@pytest.mark.parametrize("op", ARGUMENTS)
def test_no_rows(op):
    """A pass without rows is a ValueError, before any launch."""
    given = inputs("3 heads", torch.float32)
    no_rows = given.rows(torch.tensor([], dtype=torch.long))
    arguments = ARGUMENTS[op](gpu, given)
    if op in ("layer_norm_qkv", "tree_attention"):  # there is no route without rows
        arguments |= {"x": no_rows.x} if op == "layer_norm_qkv" else {"q": no_rows.q}
    else:
        arguments = ARGUMENTS[op](gpu, no_rows)
    refused(r"^\w+ (must|has 0 rows)", op, arguments)


def test_picked_rows_are_checked():
    """Their ids are int32, and the moments are those of all rows that may be picked."""
    given = inputs("3 heads", torch.float32)
    arguments = ARGUMENTS["lm_head"](gpu, given) | {"rows": torch.tensor([0, 2], device=DEVICE)}
    refused(r"^rows must be of torch\.int32", "lm_head", arguments)
    arguments |= {"rows": torch.tensor([0, 2], dtype=torch.int32, device=DEVICE), "tile_maxima": None}
    refused(r"^moments must have shape", "lm_head", arguments | {"moments": given.moments[:2].contiguous()})
    refused(r"^rows must not be empty", "lm_head", arguments | {"rows": arguments["rows"][:0]})


def test_too_many_rows():
    """A tree of 129 rows is refused, a prefill of as many is not."""
    arguments = ARGUMENTS["route"](gpu, tree_pass(SMALL, torch.float32, [3], 129, page_size=1))
    refused("a pass over a tree has at most 128 rows, got 129", "route", arguments)
    assert gpu.route(**ARGUMENTS["route"](gpu, prefill_pass(SMALL, torch.float32, 3, 129, 1))).tail_slots is None


def test_route_for_other_rows():
    given = inputs("3 heads", torch.float32)
    other = gpu.route(**ARGUMENTS["route"](gpu, given.rows(torch.arange(5))))
    for op in ("layer_norm_qkv", "tree_attention"):
        refused(r"^[xq] has 27 rows, the route is for 5", op, ARGUMENTS[op](gpu, given) | {"route": other})


def test_unsupported_head_dimension():
    given = tree_pass(Shape(2, 32, 100, 97), torch.float32, [9], 3, page_size=1)
    refused(
        r"head dimension must be one of \(64, 128\), got 32", "tree_attention", ARGUMENTS["tree_attention"](gpu, given)
    )


def test_unknown_activation():
    arguments = ARGUMENTS["layer_norm_linear"](gpu, inputs("1 head", torch.float32))
    refused("activation must be one of .*, got 'relu'", "layer_norm_linear", arguments | {"activation": "relu"})


def test_heads_that_do_not_fit_the_weight():
    arguments = ARGUMENTS["layer_norm_qkv"](gpu, inputs("3 heads", torch.float32))
    two_heads = {cache: arguments[cache][:, :2].contiguous() for cache in ("k_cache", "v_cache")}
    refused(r"weight \[576, 192\] does not fit 2 heads of 64", "layer_norm_qkv", arguments | two_heads)


def test_more_counters_than_there_are():
    """A launch of more tiles than there are arrival counters is refused, not run with neighbours' counters."""
    x, weight = torch.empty(1, 64, device="meta"), torch.empty(65537 * 16, 64, device="meta")
    with record("sm_90") as launches:
        with pytest.raises(ValueError, match="needs 65537 arrival counters, there are 65536"):
            linear.linear(x, weight, x.new_empty(1, len(weight)), tiles=LinearTiles(16, 16, 32, 2))
        assert not launches


def test_tiles_that_do_not_fit():
    """Tiles that would cut across heads' borders, or report maxima of other tiles, are refused."""
    given = inputs("3 heads", torch.float32)
    scatter = (given.k_cache, given.v_cache, given.query.slot_mapping)
    with pytest.raises(ValueError, match="a width of 192 is no multiple of the 128 outputs of a tile"):
        linear.linear(given.x, given.qkv_weight, given.q, scatter=scatter, tiles=LinearTiles(16, 128, 64))
    maxima = given.x.new_empty(len(given.x), 3)
    with pytest.raises(ValueError, match="tile_maxima need tiles of 64 outputs, got 128"):
        out = given.x.new_empty(len(given.x), 130)
        linear.linear(given.x, given.wte, out, tile_maxima=maxima, tiles=LinearTiles(16, 128, 64))


def test_a_launch_goes_to_the_device_of_its_tensors(monkeypatch):
    """Triton knows only the current device, which need not be theirs."""
    assert launches.on_device(torch.device("cuda:1")).idx == 1
    entered = []

    @contextmanager
    def on_device(device):
        entered.append(device)
        yield
        entered.append("left")

    monkeypatch.setattr(launches, "on_device", on_device)
    monkeypatch.setattr(launches, "_device", lambda arguments: "the second GPU")
    kernel = {(1,): lambda **arguments: entered.append("launched")}
    with launches.early_launches(False):  # which would ask that GPU what it can
        launches.launch(kernel, (1,), {"x_ptr": torch.zeros(1)}, {})
    assert entered == ["the second GPU", "launched", "left"]
