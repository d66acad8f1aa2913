"""The loader takes every form of a GPT-2 checkpoint and refuses, by name, every one it would compute wrongly."""

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.config import GPT2Config
from model.weights import GPT2Weights, from_state_dict, load
from tests.helpers import hf_model, load32

SHAPE = {"n_layer": 2, "n_head": 1}
UNTIED = SHAPE | {"tie_word_embeddings": False}
# Our names and the checkpoint's.
TOP = {"wte": "wte.weight", "wpe": "wpe.weight", "ln_f_weight": "ln_f.weight", "ln_f_bias": "ln_f.bias"}
LAYER = {
    "ln_1_weight": "ln_1.weight",
    "ln_1_bias": "ln_1.bias",
    "c_attn_weight": "attn.c_attn.weight",
    "c_attn_bias": "attn.c_attn.bias",
    "attn_c_proj_weight": "attn.c_proj.weight",
    "attn_c_proj_bias": "attn.c_proj.bias",
    "ln_2_weight": "ln_2.weight",
    "ln_2_bias": "ln_2.bias",
    "c_fc_weight": "mlp.c_fc.weight",
    "c_fc_bias": "mlp.c_fc.bias",
    "mlp_c_proj_weight": "mlp.c_proj.weight",
    "mlp_c_proj_bias": "mlp.c_proj.bias",
}
C_FC = "transformer.h.1.mlp.c_fc.weight"


def edit_tensors(directory: Path, change: Callable[[dict], None]) -> Path:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def assert_same_weights(actual: GPT2Weights, expected: GPT2Weights) -> None:
    pairs = list(zip(actual.tensors(), expected.tensors(), strict=True))
    assert all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize("fields", [SHAPE, UNTIED], ids=["tied", "untied"])
def test_directory_and_memory_agree(checkpoint, fields):
    """A saved directory and the model in memory give the same config and weights."""
    config, weights = load32(checkpoint(**fields))
    other_config, other_weights = load32(hf_model(**fields))
    assert config == other_config
    assert_same_weights(weights, other_weights)


def test_every_parameter_arrives():
    """Matrices are transposed, everything else is taken as it is, and each lands under its own name."""
    model = hf_model(**SHAPE)
    state, (_, weights) = model.state_dict(), load32(model)
    for i, layer in enumerate(weights.layers):
        assert vars(layer).keys() == LAYER.keys()
        for name, source in LAYER.items():
            tensor = state[f"transformer.h.{i}.{source}"]
            assert torch.equal(getattr(layer, name), tensor.t() if tensor.dim() == 2 else tensor), name
            assert getattr(layer, name).is_contiguous(), name
    for name, source in TOP.items():
        assert torch.equal(getattr(weights, name), state[f"transformer.{source}"]), name
    assert sum(tensor.numel() for tensor in weights.tensors()) == sum(
        parameter.numel() for parameter in model.parameters()
    )


def test_tied_head_is_the_embedding(checkpoint):
    """A tied head is not stored twice, and an untied one is its own tensor."""
    _, tied = load32(checkpoint(**SHAPE))
    _, untied = load32(checkpoint(**UNTIED))
    assert tied.lm_head is tied.wte
    assert not torch.equal(untied.lm_head, untied.wte)


def test_dtype_is_converted(checkpoint):
    """Weights come in the dtype that was asked for, rounded once from the checkpoint's."""
    _, exact = load32(checkpoint(**SHAPE))
    _, half = load(checkpoint(**SHAPE), torch.bfloat16, "cpu")
    assert {tensor.dtype for tensor in half.tensors()} == {torch.bfloat16}
    assert torch.equal(half.wte, exact.wte.bfloat16())


def test_sharded_checkpoint(checkpoint, tmp_path):
    """Several files and an index are one checkpoint."""
    hf_model(**SHAPE).save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert_same_weights(load32(tmp_path)[1], load32(checkpoint(**SHAPE))[1])


def test_shards_without_an_index(tmp_path):
    """Without the index it is not known which files belong together; nor is any other file the model."""
    hf_model(**SHAPE).save_pretrained(tmp_path, max_shard_size="100KB")
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(ValueError, match=r"holds no model\.safetensors, nor model\.safetensors\.index"):
        load32(tmp_path)


def test_one_file_goes_before_shards(copied, checkpoint):
    """As in transformers, where a model was saved once in one file and once in several."""
    directory = copied(**SHAPE)
    hf_model(**SHAPE | {"n_layer": 1}).save_pretrained(directory / "shards", max_shard_size="100KB")
    for path in (directory / "shards").glob("model*"):
        path.rename(directory / path.name)
    assert_same_weights(load32(directory)[1], load32(checkpoint(**SHAPE))[1])


def test_rules_of_a_generation_config_are_told(copied):
    """What would change greedy text and is not applied is named in a warning, in a folder and in memory."""
    directory, model = copied(**SHAPE), copy.deepcopy(hf_model(**SHAPE))
    rules = {"repetition_penalty": 1.5, "num_beams": 1, "eos_token_id": 3}
    (directory / "generation_config.json").write_text(json.dumps(rules))
    model.generation_config.no_repeat_ngram_size = 2
    for source, name in ((directory, "repetition_penalty"), (model, "no_repeat_ngram_size")):
        with pytest.warns(UserWarning, match=f"not applied here: {{'{name}'"):
            load32(source)


def test_missing_shard(tmp_path):
    """A file that the index names and that is not there is named."""
    hf_model(**SHAPE).save_pretrained(tmp_path, max_shard_size="100KB")
    shard = min(tmp_path.glob("*.safetensors"))
    shard.unlink()
    with pytest.raises(ValueError, match=shard.name):
        load32(tmp_path)


@pytest.mark.parametrize("prefix", ["transformer.", ""], ids=["with-prefix", "without-prefix"])
def test_old_checkpoints(copied, checkpoint, prefix):
    """Old files carry causal masks as buffers and may lack the "transformer." prefix: both load."""

    def age(tensors: dict) -> None:
        for name in list(tensors):
            tensors[prefix + name.removeprefix("transformer.")] = tensors.pop(name)
        for i in range(2):
            tensors[f"{prefix}h.{i}.attn.bias"] = torch.ones(1, 1, 8, 8).tril().bool()
            tensors[f"{prefix}h.{i}.attn.masked_bias"] = torch.tensor(-1e4)

    _, weights = load32(edit_tensors(copied(**SHAPE), age))
    assert_same_weights(weights, load32(checkpoint(**SHAPE))[1])


def test_tied_head_stored_twice(copied):
    """A tied checkpoint may store the head as well, as long as it is the embedding."""
    directory = copied(**SHAPE)
    edit_tensors(directory, lambda t: t.update({"lm_head.weight": t["transformer.wte.weight"].clone()}))
    _, weights = load32(directory)
    assert weights.lm_head is weights.wte


def test_tied_head_that_differs(copied):
    """A head that the config calls tied and that is not would be silently lost."""
    directory = copied(**SHAPE)
    edit_tensors(directory, lambda t: t.update({"lm_head.weight": t["transformer.wte.weight"] + 1}))
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from wte\.weight .*tie_word_embeddings"):
        load32(directory)


@pytest.mark.parametrize(
    "name", ["transformer.wte.weight", "transformer.h.0.ln_1.bias", "transformer.ln_f.weight", C_FC]
)
def test_missing_weight(copied, name):
    """Each kind of missing weight is named."""
    with pytest.raises(ValueError, match=f"missing.*'{name.removeprefix('transformer.')}'"):
        load32(edit_tensors(copied(**SHAPE), lambda tensors: tensors.pop(name)))


def test_missing_head(copied):
    """An untied config needs a head."""
    with pytest.raises(ValueError, match=r"missing.*'lm_head\.weight'"):
        load32(edit_tensors(copied(**UNTIED), lambda tensors: tensors.pop("lm_head.weight")))


@pytest.mark.parametrize("name", ["h.2.ln_1.weight", "h.0.crossattention.q_attn.weight", "score.weight"])
def test_unexpected_weight(copied, name):
    """A weight that the forward pass would not use is named: one layer more, another kind of model."""
    with pytest.raises(ValueError, match=f"unexpected.*'{name}'"):
        load32(edit_tensors(copied(**SHAPE), lambda tensors: tensors.update({name: torch.ones(64)})))


@pytest.mark.parametrize("name", ["transformer.wpe.weight", C_FC, "lm_head.weight"])
def test_misshapen_weight(copied, name):
    """A weight of the wrong shape is named with both shapes."""

    def cut(tensors: dict) -> None:
        tensors[name] = tensors[name][:-1].clone()

    with pytest.raises(ValueError, match=rf"{name.removeprefix('transformer.')} has shape \(.*the config asks for \("):
        load32(edit_tensors(copied(**UNTIED), cut))


def test_transposed_weight(copied):
    """torch's [out, in] in place of the checkpoint's [in, out] is misshapen, not transposed silently."""

    def transpose(tensors: dict) -> None:
        tensors[C_FC] = tensors[C_FC].t().contiguous()

    with pytest.raises(ValueError, match=r"h\.1\.mlp\.c_fc\.weight has shape \(256, 64\).*asks for \(64, 256\)"):
        load32(edit_tensors(copied(**SHAPE), transpose))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["transformer.wte.weight", C_FC, "lm_head.weight"])
def test_weight_that_is_not_finite(copied, name, value):
    """One NaN or infinite value anywhere is found and its tensor named."""

    def spoil(tensors: dict) -> None:
        tensors[name].view(-1)[-1] = value

    with pytest.raises(ValueError, match=f"{name.removeprefix('transformer.')} holds NaN or infinite values"):
        load32(edit_tensors(copied(**UNTIED), spoil))


def test_missing_weights_file(copied):
    directory = copied(**SHAPE)
    (directory / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"holds no model\.safetensors"):
        load32(directory)


@pytest.mark.parametrize("keep", [0, 100, -1], ids=["empty", "cut-in-the-header", "cut-in-the-data"])
def test_corrupted_weights_file(copied, keep):
    """A file that was cut anywhere is named; it is never read in part."""
    directory = copied(**SHAPE)
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read as safetensors"):
        load32(directory)


def test_a_later_change_of_the_model_changes_nothing():
    """Weights are copies, those too that are already of the right dtype and layout."""
    model = copy.deepcopy(hf_model())
    weights = load32(model)[1]
    before = [tensor.clone() for tensor in weights.tensors()]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1.0
    assert all(torch.equal(now, then) for now, then in zip(weights.tensors(), before, strict=True))


def test_values_too_large_for_the_dtype():
    """1e6 is finite in the checkpoint and infinite as float16."""
    model = copy.deepcopy(hf_model())
    with torch.no_grad():
        model.transformer.ln_f.bias[3] = 1e6
    load(model, torch.float32, "cpu")
    with pytest.raises(ValueError, match="ln_f.bias.*float16"):
        load(model, torch.float16, "cpu")


def test_integer_weights_and_doubled_names():
    model = hf_model()
    config = GPT2Config.from_hf(model.config.to_dict())
    state = dict(model.state_dict())
    with pytest.raises(ValueError, match="there twice"):
        from_state_dict(config, state | {"wte.weight": state["transformer.wte.weight"]}, torch.float32, "cpu")
    with pytest.raises(ValueError, match="floating-point"):
        from_state_dict(
            config, state | {"transformer.ln_f.bias": torch.zeros(64, dtype=torch.int8)}, torch.float32, "cpu"
        )
