"""Muon: the steps of torch's own, matrices of one shape together; what it makes of a gradient is orthogonal."""

import pytest
import torch

from model.muon import Muon, orthogonal


def test_the_steps_are_those_of_torch():
    """Five steps on wide, tall and square matrices in bfloat16, weight decay included."""
    torch.manual_seed(0)
    shapes = [(16, 48), (48, 16), (16, 48), (32, 32)]
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [torch.nn.Parameter(parameter.detach().clone()) for parameter in ours]
    options = {"lr": 0.02, "weight_decay": 0.1}
    optimizers = Muon(ours, **options), torch.optim.Muon(theirs, adjust_lr_fn="match_rms_adamw", **options)
    for _ in range(5):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn(one.shape)
            other.grad = one.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for one, other in zip(ours, theirs, strict=True):
        assert (one - other).abs().max() < 5e-3, "more than bfloat16 explains"


@pytest.mark.parametrize("shape", [(3, 8, 24), (2, 24, 8)], ids=["wide", "tall"])
def test_singular_values_come_near_one_and_directions_stay(shape):
    torch.manual_seed(0)
    matrices = torch.randn(shape)
    result = orthogonal(matrices)
    assert torch.linalg.svdvals(result).min() > 0.6 and torch.linalg.svdvals(result).max() < 1.3
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    middle = left.mT @ result @ right.mT  # diagonal where the singular vectors are the same
    assert (middle - torch.diag_embed(middle.diagonal(dim1=1, dim2=2))).abs().max() < 1e-4


def test_other_parameters_than_matrices_are_refused():
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        Muon([torch.nn.Parameter(torch.zeros(3))], lr=0.1)
