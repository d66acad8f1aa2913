"""``custom_generate`` of transformers: its ids, and a refusal of all that would have to be ignored."""

import pytest
import torch
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import EosTokenCriteria, MaxLengthCriteria, TemperatureLogitsWarper, TopKLogitsWarper

from decoding import staged_generate
from tests.helpers import Hearing
from tests.test_lossless import tiny_model


@pytest.mark.parametrize("arguments", [{"do_sample": False}, {"do_sample": True, "top_k": 5}], ids=["greedy", "top-k"])
def test_custom_generate_of_transformers(arguments):
    """One more argument to ``generate``: greedy gives the same ids, sampling repeats under ``torch.manual_seed``."""
    model, ids = tiny_model(0, 2), torch.tensor([[5, 6, 7]])
    mask, function = torch.ones_like(ids), staged_generate(draft=tiny_model(1, 1))

    def run(**more):
        torch.manual_seed(0)
        return model.generate(ids, attention_mask=mask, max_new_tokens=20, pad_token_id=0, **arguments, **more)

    got = run(custom_generate=function)
    assert torch.equal(got, run(custom_generate=function)) and got.shape == (1, 23)
    if not arguments["do_sample"]:
        assert torch.equal(got, run())
    with pytest.raises(ValueError, match="RepetitionPenalty"):
        run(custom_generate=function, repetition_penalty=1.5)


@pytest.mark.parametrize("as_given", [lambda *ids: torch.tensor(ids), lambda *ids: [*ids, 50256, -1]])
def test_custom_generate_takes_ends_of_text_as_transformers_does(as_given):
    """Tensors and lists, with ids that no text can hold."""
    model, ids = tiny_model(0, 2), torch.tensor([[5, 6, 7]])
    arguments = {"attention_mask": torch.ones_like(ids), "pad_token_id": 0, "max_new_tokens": 12}
    ends = as_given(*model.generate(ids, **arguments, eos_token_id=None)[0, [7, 9]].tolist())
    wanted = model.generate(ids, **arguments, eos_token_id=ends)
    assert torch.equal(model.generate(ids, custom_generate=staged_generate(), **arguments, eos_token_id=ends), wanted)
    assert wanted.shape[1] < 15


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"token_type_ids": torch.tensor([[1, 1, 1]])}, "does not read token_type_ids"),
        ({"position_ids": torch.tensor([[3, 4, 5]])}, "counts positions from 0"),
        ({"inputs_embeds": torch.zeros(1, 3, 64)}, "does not read inputs_embeds"),
    ],
)
def test_custom_generate_refuses_inputs_that_it_would_ignore(inputs, message):
    model, ids = tiny_model(0, 2), torch.tensor([[5, 6, 7]])
    arguments = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 4, "pad_token_id": 0}
    with pytest.raises(ValueError, match=message):
        model.generate(ids, custom_generate=staged_generate(), **arguments, **inputs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"logits_processor": [TopKLogitsWarper(1)], "do_sample": True, "top_k": 0}, "takes top_k of generate, 0"),
        ({"stopping_criteria": [MaxLengthCriteria(5)]}, "takes max_length of generate, 7"),
        ({"stopping_criteria": [EosTokenCriteria(9)]}, "takes eos_token_id of generate"),
        ({"logits_processor": [TemperatureLogitsWarper(0.5)], "do_sample": True, "temperature": 0.5}, "each rule once"),
        ({"logits_processor": [TopKLogitsWarper(50, -1.0)], "do_sample": True}, "each rule once|not another TopK"),
        ({"num_beams": 2}, "needs num_beams=1, got 2"),
        ({"do_sample": True, "num_return_sequences": 2}, "needs num_return_sequences=1, got 2"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_custom_generate_refuses_rules_that_it_would_ignore(arguments, message):
    """Rules that transformers makes of the arguments are known; a caller's own of the same kind says something else."""
    model, ids = tiny_model(0, 2), torch.tensor([[5, 6, 7]])
    lists = {"logits_processor": LogitsProcessorList, "stopping_criteria": StoppingCriteriaList}
    arguments = {name: lists[name](value) if name in lists else value for name, value in arguments.items()}
    given = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 4, "pad_token_id": 0} | arguments
    with pytest.raises(ValueError, match=message):
        model.generate(ids, custom_generate=staged_generate(), **given)


@pytest.mark.parametrize(
    "field", [{"penalty_alpha": 0.6}, {"dola_layers": "high"}], ids=lambda field: next(iter(field))
)
def test_custom_generate_refuses_other_searches(field):
    """Where transformers lets them through to the function."""
    config = GenerationConfig(max_length=7, **field)
    with pytest.raises(ValueError, match=f"{next(iter(field))} must be None"):
        staged_generate()(tiny_model(0, 2), torch.tensor([[5, 6, 7]]), [], [], config)


def test_custom_generate_streams():
    """To a streamer of its own: transformers keeps the one of its call to itself."""
    model, ids, heard = tiny_model(0, 2), torch.tensor([[5, 6, 7]]), Hearing()
    given = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 9, "pad_token_id": 0}
    out = model.generate(ids, custom_generate=staged_generate(streamer=heard), **given)
    assert heard.tokens == out[0, 3:].tolist() and len(heard.tokens) == 9 and heard.ended
