"""A larger GPT-2 that begins as the function of a smaller, trained one, so that nothing learnt so far is lost.

Deeper: a layer is followed by copies of itself whose output projections are zero. Wider: in the manner of Net2Net (Chen
et al. 2016, arXiv 1511.05641), but for what a layer norm sees. Its mean and variance go over all channels, so new
channels may not be zero: each holds the mean of the old ones, to which everything that is added to the residual stream
adds its own mean. Then the mean stays, the normalised value of a new channel is zero, and the variance falls by the
ratio of the widths, which the gains make up for.
"""

import math
import re

import torch
from transformers import GPT2Config, GPT2LMHeadModel


@torch.no_grad()
def grow(model: GPT2LMHeadModel, source: GPT2LMHeadModel) -> None:
    """Give ``model`` the function of ``source``, which has as many layers or fewer and is as wide or narrower.

    Weights that read new channels, heads and hidden units keep their initial values, so that all of them learn at once.
    A wider model agrees with ``source`` up to rounding and the epsilon of its layer norms. Raises ValueError as
    ``check_growth``.
    """
    ours, theirs = model.config, source.config
    check_growth(ours, theirs)
    weights = source.state_dict()
    for name, value in model.state_dict().items():
        if name == "lm_head.weight":
            continue  # the embedding itself
        origin, repeated = _origin(name, theirs.n_layer, ours.n_layer)
        given = torch.zeros_like(weights[origin]) if repeated and "c_proj" in name else weights[origin]
        _widen(name, value, given.to(value), ours.n_embd, theirs.n_embd)


def check_growth(ours: GPT2Config, theirs: GPT2Config) -> None:
    """Raises ValueError where context or vocabulary differ or ``theirs``, to start from, is the larger model."""
    for name in ("n_positions", "vocab_size", "n_layer", "n_embd"):
        given, wanted = getattr(theirs, name), getattr(ours, name)
        may_grow = name in ("n_layer", "n_embd")
        if given > wanted or given != wanted and not may_grow:
            raise ValueError(f"the model to start from has {name} {given}, this one {'only ' * may_grow}{wanted}")


def _origin(name: str, given: int, layers: int) -> tuple[str, bool]:
    """Which weight of the source is meant, and whether its layer repeats the one before."""
    found = re.match(r"(transformer\.h\.)(\d+)(.*)", name)
    if found is None:
        return name, False
    index = int(found[2])
    origin = index * given // layers
    return f"{found[1]}{origin}{found[3]}", index > 0 and origin == (index - 1) * given // layers


def _widen(name: str, value: torch.Tensor, given: torch.Tensor, width: int, old_width: int) -> None:
    """Write ``given``, a weight of a model of width ``old_width``, into ``value``, the same weight at ``width``."""
    if "ln_" in name:
        value[:old_width] = given * (math.sqrt(old_width / width) if "weight" in name else 1.0)
    elif "c_attn" in name or "c_fc" in name:  # reads the residual stream: query, key and value, or hidden units
        parts = 3 if "c_attn" in name else 1
        rows = value[: given.shape[0]] if given.ndim == 2 else value
        rows.unflatten(-1, (parts, -1))[..., : given.shape[-1] // parts] = given.unflatten(-1, (parts, -1))
    else:  # added to the residual stream
        if "c_proj.weight" in name:
            value[given.shape[0] :] = 0.0
        rows = value[: given.shape[0]] if given.ndim == 2 else value
        rows[..., :old_width] = given
        rows[..., old_width:] = given.mean(-1, keepdim=True)
