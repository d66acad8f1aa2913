"""What training minimises, and what it is measured by."""

import numpy as np
import torch
import torch.nn.functional as F
from transformers import GPT2LMHeadModel

from model.runtime import bfloat16_is_fast

SHORT_SQUARE = 256  # tokens; tried: 256, which gains a third of a step, and 1024, which loses a sixth


def loss_of(
    model: GPT2LMHeadModel,
    tokens: torch.Tensor,  # [rows, length]
    offset: torch.Tensor,  # of the first position
    teacher: GPT2LMHeadModel | None,
    half: bool,
) -> torch.Tensor:
    """Mean next-token loss in nats; with a teacher, the mean cross-entropy against the teacher's law.

    ``half``: products in bfloat16, as autocast does.
    """
    positions = offset + torch.arange(tokens.shape[1], device=tokens.device)[None]
    # on a CPU the backward pass of flash attention takes longer than short squares of scores do
    attention = "eager" if tokens.device.type == "cpu" and tokens.shape[1] <= SHORT_SQUARE else "sdpa"
    if model.config._attn_implementation != attention:
        model.set_attn_implementation(attention)

    def hidden(model: GPT2LMHeadModel) -> torch.Tensor:
        return model.transformer(tokens, position_ids=positions, use_cache=False).last_hidden_state[:, :-1]

    with torch.autocast(tokens.device.type, dtype=torch.bfloat16, enabled=half):
        if teacher is None:
            return _text_loss(hidden(model), model.lm_head.weight, tokens[:, 1:])
        with torch.no_grad():
            taught = hidden(teacher)
        return _law_loss(hidden(model), model.lm_head.weight, taught, teacher.lm_head.weight)


@torch.compile(dynamic=False)
def _text_loss(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Output head and cross-entropy against the tokens that follow."""
    return F.cross_entropy(F.linear(hidden, weight).flatten(0, 1).float(), targets.flatten())


@torch.compile(dynamic=False)
def _law_loss(hidden: torch.Tensor, weight: torch.Tensor, taught: torch.Tensor, teachers: torch.Tensor) -> torch.Tensor:
    """Output heads and cross-entropy against the teacher's law."""
    with torch.no_grad():
        law = F.linear(taught, teachers).float().softmax(-1)
    return F.cross_entropy(F.linear(hidden, weight).flatten(0, 1).float(), law.flatten(0, 1))


@torch.no_grad()
def heldout_loss(model: GPT2LMHeadModel, ids: np.ndarray, context: int, num_windows: int = 24) -> float:
    """Nats per token over evenly spaced windows of the held-out text, predictions at all positions of the context, or
    at those that a text of at least 2 tokens has."""
    starts = np.linspace(0, max(0, len(ids) - context), num_windows).astype(int)
    half, losses = bfloat16_is_fast(model.device), []
    with torch.compiler.set_stance("force_eager"):  # not worth compiling for
        for start in starts:
            tokens = torch.from_numpy(ids[start : start + context].astype(np.int64))[None]
            losses.append(loss_of(model, tokens.to(model.device), torch.tensor(0), None, half).item())
    return sum(losses) / len(losses)
