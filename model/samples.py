"""Text that a model writes itself, in bulk: what a smaller stage is distilled from, what a draft² table is counted on.

A table counted on the draft's own text at a high temperature is the paper's (Spector & Ré 2023, section 3.3).
"""

from collections.abc import Iterator

import numpy as np
import torch
from transformers import GenerationConfig, GPT2LMHeadModel


@torch.no_grad()
def sample_text(
    model: GPT2LMHeadModel,
    prompt_ids: np.ndarray,
    num_tokens: int,
    temperature: float = 1.0,
    batch: int | None = None,  # rows at a time; None: 64, on a GPU 512
    prompt_length: int = 32,
    length: int = 256,
    seed: int = 0,
) -> Iterator[np.ndarray]:
    """Continue random pieces of ``prompt_ids`` uint16 [tokens] until ``num_tokens`` new tokens are drawn.

    Yields uint16 [rows, ``prompt_length`` + ``length``] with the prompts in front, both cut to what the context holds.
    Draws from the full law at ``temperature``; an end-of-text token does not end a row. The model's own
    ``generation_config``, which might cut the law, is reset.
    """
    model.generation_config = GenerationConfig()
    prompt_length = min(prompt_length, model.config.n_positions // 2)
    length = min(length, model.config.n_positions - prompt_length)
    batch = batch or (512 if model.device.type == "cuda" else 64)
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    for _ in range(0, num_tokens, batch * length):
        starts = rng.integers(0, len(prompt_ids) - prompt_length, size=batch)
        prompts = np.stack([prompt_ids[start : start + prompt_length] for start in starts]).astype(np.int64)
        inputs = torch.from_numpy(prompts).to(model.device)
        rows = model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            do_sample=True,
            temperature=temperature,
            top_k=0,
            min_new_tokens=length,
            max_new_tokens=length,
            pad_token_id=0,
            eos_token_id=None,
        )
        yield rows.cpu().numpy().astype(np.uint16)
