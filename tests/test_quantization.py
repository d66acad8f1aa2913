"""Weights of lower stages in 8 bits: worked by hand, the same on both backends, counted in bytes, never the oracle's,
and without a trace in the text.
"""

import dataclasses
import json

import pytest
import torch

from decoding import StagedDecoder, cli
from decoding.config import METHODS
from decoding.stages import GPT2Stage
from kernels import gpu, reference
from kernels.gpu.launch import architecture, record
from kernels.layout import Quantized
from model.gpt2 import GPT2
from model.quantization import quantize, quantize_matrix
from model.weights import load
from tests.gpu_helpers import ARGUMENTS, DTYPES, assert_near, in_float64, inputs, run
from tests.helpers import hf_model, tiny_gpt2
from tests.interpreter import DEVICE
from tests.test_lossless import tiny_model

WEIGHTS = {
    "layer_norm_linear": "fc_weight",
    "layer_norm_qkv": "qkv_weight",
    "linear_residual": "proj_weight",
    "lm_head": "wte",
}
GREEDY, SAMPLED = {"seed": 1}, {"do_sample": True, "top_k": 20, "seed": 2**63 + 11}


def test_quantized_by_hand():
    """The largest magnitude of a row becomes 127; ties go to the even integer; a row of zeros stays one."""
    weight = torch.tensor([[1.27, -0.635, 0.01, 0.004], [0.0, 0.0, 0.0, 0.0], [-254.0, 3.0, 5.0, 254.0]])
    matrix = quantize_matrix(weight)
    assert matrix.values.tolist() == [[127, -64, 1, 0], [0, 0, 0, 0], [-127, 2, 2, 127]]
    assert matrix.values.dtype == torch.int8 and matrix.scales.dtype == torch.float32
    torch.testing.assert_close(matrix.scales[[0, 2]], torch.tensor([0.01, 2.0]))
    assert (matrix.scales > 0).all(), "a row of zeros is not divided by zero"
    assert matrix.nbytes == 3 * 4 + 3 * 4


def test_no_element_is_off_by_more_than_half_a_step():
    weight = torch.randn(50, 192) * torch.logspace(-38, 3, 50)[:, None]
    matrix = quantize_matrix(weight)
    error = (matrix.values.double() * matrix.scales.double()[:, None] - weight.double()).abs()
    assert (error <= 0.50001 * matrix.scales.double()[:, None]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_packed_product_is_the_specification(bias, dtype):
    """The integers packed for this processor give what they give as they are, and a row's bits are its own."""
    x, matrix = torch.randn(16, 192, dtype=dtype), quantize_matrix(torch.randn(48, 192))
    shift = torch.randn(48, dtype=dtype) if bias else None
    exact = x.double() @ (matrix.values.double() * matrix.scales.double()[:, None]).T
    packed = reference.packed(matrix)
    assert reference.packed(packed) is packed and packed.shape == (48, 192) and packed.nbytes == 48 * 192 + 4 * 48
    whole = reference.linear.linear(x, packed, shift, "gelu")
    for y in (whole, reference.linear.linear(x, matrix, shift, "gelu")):
        assert y.dtype == dtype
        assert_near(y, torch.nn.functional.gelu(exact + (shift.double() if bias else 0)), dtype)
    for rows in (1, 3, 8):
        assert torch.equal(reference.linear.linear(x[:rows], packed, shift, "gelu"), whole[:rows])


@DTYPES
@pytest.mark.parametrize(
    ("op", "of"), [*((op, of) for op in WEIGHTS for of in ("1 row", "3 heads")), ("linear_residual", "prefill")]
)
def test_operation_is_its_twin(op, of, dtype, hostile_scratch):
    """Every linear layer: bias, GELU, residual, scatter of K and V, maxima and moments behind a product in 8 bits."""
    given = inputs(of, dtype)
    weight = quantize_matrix(getattr(given, WEIGHTS[op]))
    twin = Quantized(weight.values.cpu(), weight.scales.cpu())
    wanted = run(reference, op, in_float64(given), weight=twin)
    for actual, expected in zip(run(gpu, op, given, weight=weight), wanted, strict=True):
        assert_near(actual, expected, dtype)


def bad(weight: torch.Tensor) -> dict[str, tuple]:
    matrix = quantize_matrix(weight)
    return {
        "integers without scales": (matrix.values, "weight must be of torch.float32, got torch.int8"),
        "floats with scales": (dataclasses.replace(matrix, values=weight), "weight must be of torch.int8"),
        "scales too few": (dataclasses.replace(matrix, scales=matrix.scales[:-1].clone()), "scales must have shape"),
        "scales of doubles": (dataclasses.replace(matrix, scales=matrix.scales.double()), "scales must be of"),
    }


@pytest.mark.parametrize("fault", bad(torch.zeros(1, 1)))
def test_bad_matrix_is_refused(fault):
    """ValueError naming what is wrong, and nothing is launched."""
    given = inputs("1 head", torch.float32)
    weight, message = bad(given.fc_weight)[fault]
    arguments = ARGUMENTS["layer_norm_linear"](gpu, given) | {"weight": weight}
    with record(architecture(torch.device(DEVICE))) as launches, pytest.raises(ValueError, match=message):
        gpu.layer_norm_linear(**arguments)
    assert not launches


def test_bytes_of_a_pass_by_hand():
    """Matrices and head a byte an element and four a row; biases, norms in the dtype; embeddings are looked up."""
    config, weights = load(hf_model(), torch.bfloat16, "cpu")
    rows, c, vocab = 3 * 64 + 64 + 256 + 64, 64, 97
    small = 2 * (rows + 3 * 2 * c)  # biases, three layer norms
    matrices = 12 * c * c + vocab * c
    assert weights.bytes_per_pass == small + 2 * matrices
    for ops in (reference, gpu):
        model = GPT2(config, quantize(weights), ops)
        assert model.weights.bytes_per_pass == small + matrices + 4 * (rows + vocab), ops.__name__
        assert model.weights.wte is weights.wte and model.weights.wpe is weights.wpe


@pytest.fixture(scope="module")
def pair():
    """An oracle with itself as a draft in 8 bits."""
    oracle = tiny_model(0, 2)
    return StagedDecoder.from_pretrained(oracle, oracle, None, device="cpu", dtype="float32", draft_quantization="int8")


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_the_text_is_the_oracles(pair, sampling):
    """Every method gives what the oracle says alone; and 8 bits of the oracle guess it nearly always."""
    alone = StagedDecoder.from_pretrained(tiny_model(0, 2), None, None, device="cpu", dtype="float32")
    wanted = alone.generate([5, 17, 40], 60, **sampling).new_token_ids
    for method in ("baseline", "speculative", "tree"):
        out = pair.generate([5, 17, 40], 60, method=method, **sampling)
        assert out.new_token_ids == wanted, method
        if method != "baseline":
            rate = out.stats["stages"]["draft"]["acceptance_rate"]
            assert rate >= 0.9, f"{method}: {rate}"


def test_the_draft_is_quantized_and_the_oracle_is_not(pair):
    draft, oracle = (stage.model.weights for stage in (*pair.lower, pair.oracle))
    assert isinstance(draft.lm_head, Quantized) and isinstance(draft.layers[1].mlp_c_proj_weight, Quantized)
    assert not isinstance(oracle.lm_head, Quantized) and draft.bytes_per_pass < 0.35 * oracle.bytes_per_pass
    assert pair.runtime == "torch backend on cpu, float32, draft in int8"


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_bundled_trio(sampling):
    """Draft² below a draft in 8 bits: one text for all methods."""
    trio = StagedDecoder.from_pretrained(device="cpu", dtype="float32", draft_quantization="int8")
    texts = [trio.generate("import os\n", 24, method=method, **sampling).new_token_ids for method in METHODS]
    assert all(text == texts[0] for text in texts)


def test_backends_agree_on_the_text():
    """A chain on the Triton backend, the draft in 8 bits: the tokens of the torch backend."""
    texts, shape = {}, None
    for backend in ("triton", "torch"):
        decoder = StagedDecoder.from_pretrained(
            tiny_model(0, 1), tiny_model(0, 1), None, DEVICE, "float32", backend, draft_quantization="int8"
        )
        shape = shape or decoder.plan("speculative")
        out = decoder.generate([5, 17], 3, speculation=shape, **SAMPLED)
        texts[backend] = out.new_token_ids, out.token_stages
    assert texts["triton"] == texts["torch"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"draft_quantization": "int4"}, r"draft_quantization must be None or one of \['int8'\], got 'int4'"),
        ({"draft_quantization": "int8", "draft": None}, "draft_quantization='int8' needs a draft"),
        ({"dtype": "int8"}, "dtype must be a float.*draft_quantization='int8'"),
    ],
    ids=["unknown scheme", "no draft", "oracle"],
)
def test_what_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        StagedDecoder.from_pretrained(device="cpu", **arguments)


def test_a_quantized_oracle_is_refused():
    model = tiny_gpt2()
    oracle = GPT2Stage("oracle", GPT2(model.config, quantize(load(hf_model(), torch.float32, "cpu")[1]), reference))
    with pytest.raises(ValueError, match="the oracle must keep its dtype"):
        StagedDecoder([], oracle)


def test_flag_of_the_command_line(capsys):
    """``--draft-quantization int8`` reaches the draft: the same text, fewer bytes a token."""
    outs = []
    for extra in ([], ["--draft-quantization", "int8"]):
        cli.main(["generate", "import os\n", "--max-new-tokens", "12", "--dtype", "float32", "--json", *extra])
        outs.append(json.loads(capsys.readouterr().out))
    assert outs[0]["new_token_ids"] == outs[1]["new_token_ids"]
    assert outs[1]["stats"]["bytes_per_token"] < outs[0]["stats"]["bytes_per_token"]
