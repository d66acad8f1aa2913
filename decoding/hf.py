"""One more argument for users of transformers: ``model.generate(ids, custom_generate=staged_generate(draft))``."""

import math
from collections.abc import Callable
from typing import Any

import torch
from transformers.generation import (
    EosTokenCriteria,
    MaxLengthCriteria,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from decoding.decoder import StagedDecoder

# What transformers makes of a generation config: the fields of each, where they are named alike.
_WARPERS = {
    TemperatureLogitsWarper: "temperature",
    TopKLogitsWarper: "top_k",
    TopPLogitsWarper: "top_p",
    MinPLogitsWarper: "min_p",
}
_CRITERIA = {MaxLengthCriteria: "max_length", EosTokenCriteria: "eos_token_id"}
_UNREAD = (
    "streamer",
    "assistant_model",
    "token_type_ids",
    "inputs_embeds",
    "head_mask",
    "encoder_hidden_states",
    "encoder_attention_mask",
)


def staged_generate(
    draft: Any = None, draft2: Any = None, method: str | None = None, seed: int | None = None, streamer: Any = None
) -> Callable[..., torch.Tensor]:
    """A ``custom_generate`` for ``GPT2LMHeadModel.generate``: the model is the oracle, run by this project's forward.

    ``draft``, ``draft2``, ``method``, ``seed`` and ``streamer`` are those of ``StagedDecoder``; without a seed one is
    drawn from torch's generator, so ``torch.manual_seed`` repeats a run. The stages are loaded at the first call and
    kept: a later change of the model's weights has no effect. Returns ids [1, prompt + new] as ``generate`` does.

    Raises ValueError for whatever would have to be ignored: batches, beams, penalties, other processors and stopping
    criteria. transformers (5.24) keeps ``streamer`` and ``assistant_model`` of its own call from a ``custom_generate``
    that is a function: a streamer goes here, and the assistant is ``draft``.
    """
    decoders: dict[int, tuple[Any, StagedDecoder]] = {}

    def generate(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
        _refuse_what_is_not_computed(input_ids, logits_processor, stopping_criteria, generation_config, kwargs)
        if id(model) not in decoders:
            made = StagedDecoder.from_pretrained(
                model, draft=draft, draft2=draft2, device=model.device, dtype=model.dtype
            )
            decoders[id(model)] = (model, made)
        decoder, eos = decoders[id(model)][1], _values(generation_config.eos_token_id)
        eos = sorted(token for token in eos if 0 <= token < decoder.oracle.vocab_size)  # others are never drawn
        out = decoder.generate(
            input_ids,
            max_new_tokens=generation_config.max_length - input_ids.shape[1],
            do_sample=generation_config.do_sample,
            temperature=_or(generation_config.temperature, 1.0),
            top_k=generation_config.top_k,
            top_p=_or(generation_config.top_p, 1.0),
            min_p=_or(generation_config.min_p, 0.0),
            seed=int(torch.randint(2**62, ())) if seed is None else seed,
            eos_token_id=eos,
            ignore_eos=not eos,
            streamer=streamer,
            method=method,
        )
        return out.sequences.to(input_ids.device)

    return generate


def _values(value: Any) -> set:
    """One number or several, however they are kept."""
    return set(torch.as_tensor(value).flatten().tolist()) if value is not None else set()


def _or(value: Any, default: float) -> float:
    return default if value is None else value


def _refuse_what_is_not_computed(input_ids, logits_processor, stopping_criteria, generation_config, kwargs) -> None:
    for name in ("num_beams", "num_return_sequences"):
        if (getattr(generation_config, name, 1) or 1) != 1:
            raise ValueError(f"staged_generate needs {name}=1, got {getattr(generation_config, name)}")
    for name in ("penalty_alpha", "dola_layers"):
        if getattr(generation_config, name, None) is not None:
            raise ValueError(f"staged_generate searches greedily or samples: {name} must be None")
    if input_ids.shape[0] != 1:
        raise ValueError(f"staged_generate takes a batch of 1, got {input_ids.shape[0]}")
    for name in ("return_dict_in_generate", "output_scores", "output_logits"):
        if getattr(generation_config, name, False):
            raise ValueError(f"staged_generate returns token ids only: {name} must be false")
    for known, given in ((_WARPERS, logits_processor), (_CRITERIA, stopping_criteria)):
        for rule in given or ():
            if type(rule) not in known:
                raise ValueError(f"staged_generate does not apply {type(rule).__name__}")
            name = known[type(rule)]
            own, wanted = getattr(rule, name), getattr(generation_config, name)
            if _values(own) != _values(wanted):
                raise ValueError(f"staged_generate takes {name} of generate, {wanted}, not a rule with {own}")
            if getattr(rule, "min_tokens_to_keep", 1) != 1 or getattr(rule, "filter_value", -math.inf) != -math.inf:
                raise ValueError(
                    f"staged_generate applies {name} as generate itself does, not another {type(rule).__name__}"
                )
        kinds = [type(rule).__name__ for rule in given or ()]
        if len({*kinds}) < len(kinds):
            raise ValueError(f"staged_generate applies each rule once, got {kinds}")
    mask = kwargs.get("attention_mask")
    if mask is not None and not bool(mask.all()):
        raise ValueError("staged_generate takes no padding: attention_mask must be all ones")
    positions = kwargs.get("position_ids")
    if positions is not None and positions.flatten().tolist() != list(range(input_ids.shape[1])):
        raise ValueError("staged_generate counts positions from 0: position_ids must do so too")
    for name in _UNREAD:
        if kwargs.get(name) is not None:
            raise ValueError(f"staged_generate does not read {name}")
    cache = kwargs.get("cache", kwargs.get("past_key_values"))
    if cache is not None and cache.get_seq_length():
        raise ValueError("staged_generate keeps a cache of its own: past_key_values must be empty")
