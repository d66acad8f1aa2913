"""The config of a checkpoint: what is read from it, and what is refused by name, since it would be computed wrongly."""

import json
import re
from pathlib import Path

import pytest

from model.config import GPT2Config
from tests.helpers import hf_model, load32

SHAPE = {"n_layer": 2, "n_head": 1}


def edit_config(directory: Path, **fields) -> Path:
    """Set fields of config.json; ``...`` removes one."""
    path = directory / "config.json"
    config = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not ...}))
    return directory


UNFIT_CONFIGS = {
    "other-model": ({"model_type": "llama"}, "model_type must be 'gpt2', got 'llama'"),
    "no-model-type": ({"model_type": ...}, "model_type must be 'gpt2', got None"),
    "activation": ({"activation_function": "relu"}, "activation_function must be one of .*got 'relu'"),
    "cross-attention": ({"add_cross_attention": True}, "add_cross_attention must be false"),
    "uneven-heads": ({"n_head": 7}, "n_embd must be a multiple of n_head, got 64 and 7"),
    "other-width": ({"n_embd": 128, "n_head": 2}, "has shape .*the config asks for"),
    "layer-too-many": ({"n_layer": 3}, r"missing.*'h\.2\."),
    "layer-too-few": ({"n_layer": 1}, r"unexpected.*'h\.1\."),
    "vocabulary": ({"vocab_size": 98}, r"wte\.weight has shape \(97, 64\), the config asks for \(98, 64\)"),
}


@pytest.mark.parametrize(("fields", "message"), UNFIT_CONFIGS.values(), ids=UNFIT_CONFIGS)
def test_config_that_does_not_fit(copied, fields, message):
    """What the forward pass does not compute, and what disagrees with the weights, is refused."""
    with pytest.raises(ValueError, match=message):
        load32(edit_config(copied(**SHAPE), **fields))


def test_missing_config(copied):
    """A directory without config.json is no checkpoint; the file is named."""
    directory = copied(**SHAPE)
    (directory / "config.json").unlink()
    with pytest.raises(ValueError, match=r"config\.json is missing"):
        load32(directory)


def test_config_that_is_not_json(copied):
    directory = copied(**SHAPE)
    (directory / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        load32(directory)


def test_defaults_of_an_old_config(copied):
    """Fields that old configs do not have take GPT-2's values, which are Hugging Face's defaults."""
    absent = ["n_inner", "activation_function", "tie_word_embeddings", "scale_attn_weights", "add_cross_attention"]
    config, _ = load32(edit_config(copied(**SHAPE), **dict.fromkeys(absent, ...)))
    assert (config.n_inner, config.activation, config.tie_word_embeddings) == (256, "gelu_tanh", True)
    assert config.attention_scale(1) == 64**-0.5


@pytest.mark.parametrize(("eos", "expected"), [(5, (5,)), ([5, 6], (5, 6)), (None, (0,))], ids=["one", "two", "none"])
def test_generation_config_names_the_end(copied, eos, expected):
    """The end-of-text ids of generation_config.json win over config.json's, as in Hugging Face."""
    directory = copied(**SHAPE)
    (directory / "generation_config.json").write_text(json.dumps({} if eos is None else {"eos_token_id": eos}))
    assert load32(directory)[0].eos_token_ids == expected


def test_generation_config_of_a_model_in_memory_names_the_end():
    model = hf_model()
    model.generation_config.eos_token_id = [5, 7]
    assert load32(model)[0].eos_token_ids == (5, 7)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_head": 0}, "n_head must be an integer of at least 1, got 0"),
        ({"n_head": -1}, "n_head must be an integer of at least 1, got -1"),
        ({"n_embd": "64"}, "n_embd must be an integer of at least 1, got '64'"),
        ({"n_layer": None}, "n_layer must be an integer of at least 1, got None"),
        ({"layer_norm_epsilon": "1e-5"}, "layer_norm_epsilon must be a finite number above 0"),
        ({"layer_norm_epsilon": 0.0}, "layer_norm_epsilon must be a finite number above 0"),
        ({"eos_token_id": "x"}, "eos_token_id must be a token id"),
    ],
    ids=str,
)
def test_config_values_of_the_wrong_kind(fields, message):
    """A config is checked before it is used: no TypeError from inside the loader, nothing taken silently."""
    with pytest.raises(ValueError, match=re.escape(message)):
        GPT2Config.from_hf({"model_type": "gpt2", **fields})


def test_files_that_are_json_but_not_objects(copied):
    directory = copied()
    (directory / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="must hold a JSON object"):
        load32(directory)
