"""The public surface: what is refused and how, where a generation ends, what it returns and leaves behind."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from decoding import SpeculationConfig, StagedDecoder
from decoding.stages import GPT2Stage
from decoding.text import load_tokenizer
from tests.test_lossless import VOCAB, tiny_model

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def tiny():
    """Ids only: no tokenizer, context 128, a draft that is sometimes right."""
    return StagedDecoder.from_pretrained(tiny_model(0, 2), tiny_model(1, 1), None, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def bundled():
    return StagedDecoder.from_pretrained(device="cpu")


BAD = {
    "empty prompt": ({"prompt": []}, "prompt is empty"),
    "long prompt": ({"prompt": [1] * 129}, "129 tokens.*128"),
    "id too large": ({"prompt": [1, VOCAB]}, rf"\[0, {VOCAB}\), got {VOCAB}"),
    "negative id": ({"prompt": [-1]}, "got -1"),
    "float prompt": ({"prompt": torch.zeros(3)}, "token ids"),
    "text without tokenizer": ({"prompt": "def"}, "without a tokenizer"),
    "no tokens": ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
    "fractional tokens": ({"max_new_tokens": 2.5}, "max_new_tokens must be an integer"),
    "temperature": ({"temperature": -1.0}, "temperature.*-1.0"),
    "nan temperature": ({"temperature": float("nan")}, "temperature.*nan"),
    "top_k": ({"top_k": -2}, "top_k must be at least 0, got -2"),
    "top_p zero": ({"top_p": 0.0}, r"top_p.*\(0, 1\].*0.0"),
    "top_p large": ({"top_p": 1.5}, "top_p.*1.5"),
    "min_p": ({"min_p": 2}, "min_p.*2"),
    "seed text": ({"seed": "x"}, "seed must be an integer"),
    "seed range": ({"seed": 2**64}, "seed must be in"),
    "method": ({"method": "magic"}, "method must be one of"),
    "missing stage": ({"method": "staged"}, "needs draft2"),
    "eos": ({"eos_token_id": VOCAB}, "eos_token_id"),
    "scalar prompt": ({"prompt": torch.tensor(5)}, r"token ids \[n\] or \[1, n\]"),
    "temperature that no float32 survives": ({"temperature": 1e-18}, "temperature.*0 or in .1e-15, 1e.15]"),
    "temperature beyond float32": ({"temperature": 1e39}, "temperature.*0 or in .1e-15, 1e.15]"),
    "method and shape": ({"method": "tree", "speculation": SpeculationConfig()}, "not both"),
    "stop without tokenizer": ({"stop_strings": ["x"]}, "tokenizer"),
    "stop of no text": ({"stop_strings": 5}, "stop_strings must be a string or a list"),
    "no prompt": ({"prompt": None}, "prompt must be text or token ids, .*NoneType"),
    "bytes": ({"prompt": b"abc"}, "prompt must be text or token ids, .*bytes"),
    "two sequences": ({"prompt": torch.ones(2, 3).int()}, r"one sequence, got \(2, 3\)"),
    "text for a flag": ({"do_sample": "False"}, "do_sample must be True or False, got 'False'"),
    "text for another": ({"ignore_eos": "no"}, "ignore_eos must be True or False, got 'no'"),
    "shape by name": ({"speculation": "tree"}, "speculation must be a SpeculationConfig"),
    "no streamer": ({"streamer": 5}, "streamer must have put and end"),
    "infinite temperature": ({"temperature": np.float32("inf")}, "temperature must be a number"),
    "temperature beyond floats": ({"temperature": 10**400}, "temperature must be a number"),
}


def test_prompts_of_any_kind_are_equal(tiny):
    prompts = ([1, 2], torch.tensor([1, 2]), torch.tensor([[1, 2]]), np.array([1, 2]), np.array([[1, 2]]))
    prompts += ([[1, 2]], (1, 2), np.array([2, 1])[::-1])
    assert len({tuple(tiny.generate(prompt, max_new_tokens=4).new_token_ids) for prompt in prompts}) == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"stages": ("draft", "draft"), "rounds": (1, 1)}, "stages must be names, each once"),
        ({"children": (65,)}, r"children must be in \[1, 64\], got 65"),
        ({"stages": "draft"}, "stages must be a tuple"),
        ({"rounds": 2}, "rounds must be a tuple"),
        ({"stages": ([],)}, "stages must be names"),
        ({"rounds": (1024,), "widths": (1024,), "children": (64,)}, "at most 65536 nodes, got room for 134"),
        ({"shared_noise": "no"}, "shared_noise must be True or False, got 'no'"),
    ],
)
def test_shapes_that_cannot_run_are_refused(fields, message):
    shape = {"stages": ("draft",), "rounds": (2,), "widths": (2,), "children": (2,), "budget": 4}
    with pytest.raises(ValueError, match=message):
        SpeculationConfig(**(shape | fields))
    lists = SpeculationConfig(**{name: list(value) if name != "budget" else value for name, value in shape.items()})
    assert hash(lists) == hash(SpeculationConfig(**shape)) and lists == SpeculationConfig(**shape)


def test_a_pass_has_no_more_rows_than_a_launch_can_make():
    shape = SpeculationConfig(("draft2", "a", "b"), (1, 1, 1), (64, 1024, 64), (4, 8, 4), budget=63, max_depth=32)
    assert shape.capacity > 2**14 and shape.room(1, 1024, 33) == 2**14


@pytest.mark.parametrize("arguments, message", BAD.values(), ids=BAD.keys())
def test_bad_arguments_are_refused_by_name_and_value(tiny, arguments, message):
    arguments = {"prompt": [1, 2], "max_new_tokens": 4, "do_sample": True} | arguments
    with pytest.raises(ValueError, match=message):
        tiny.generate(**arguments)
    assert len(tiny.generate([1, 2], max_new_tokens=4).new_token_ids) == 4


def test_what_greedy_decoding_has_no_use_for_is_told(tiny):
    """In a warning, as by Hugging Face; what is greedy by itself, and what is at its default, is not."""
    with pytest.warns(UserWarning, match="temperature, top_p: no effect without do_sample=True"):
        tiny.generate([1, 2], max_new_tokens=1, temperature=0.7, top_p=0.9)
    with pytest.warns(UserWarning, match="top_k: no effect"):
        tiny.generate([1, 2], max_new_tokens=1, temperature=0, top_k=7, do_sample=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tiny.generate([1, 2], max_new_tokens=1, temperature=0, top_k=50)
        tiny.generate([1, 2], max_new_tokens=1, temperature=0.7, do_sample=True)
        tiny.generate([1, 2], max_new_tokens=1, temperature=np.float32(0.7), do_sample=np.True_)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"oracle": "bundled", "device": "cuda"}, "no GPU"),
        ({"oracle": "bundled", "device": "tpu"}, "device must be"),
        ({"oracle": "bundled", "dtype": "int8"}, "dtype must be"),
        ({"oracle": "bundled", "backend": "jax"}, "backend must be"),
        ({"oracle": "./nowhere"}, "not a directory"),
        ({"oracle": 3, "draft": None, "draft2": None}, "oracle must be a hub id"),
        ({"oracle": torch.nn.Linear(2, 2), "draft": None, "draft2": None}, "oracle must be a hub id.*Linear"),
        ({"oracle": "bundled", "draft2": 3}, "draft2 must be the directory"),
        ({"oracle": "bundled", "plan": {}}, "plan must be a file"),
    ],
    ids=lambda value: next(reversed(value.values())) if isinstance(value, dict) else None,
)
def test_what_cannot_be_loaded_is_refused(arguments, message, monkeypatch):
    """As on a machine without a GPU, whether there is one or not."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=message):
        StagedDecoder.from_pretrained(**arguments)


def test_auto_stages_exist_for_the_bundled_oracle_only():
    with pytest.raises(ValueError, match="is the bundled oracle's, .*pass draft=... or draft=None"):
        StagedDecoder.from_pretrained(tiny_model(0, 1), draft2=None)


def test_vocabularies_must_agree():
    with pytest.raises(ValueError, match=rf"vocab_size of draft2 is \d+, of oracle {VOCAB}"):
        StagedDecoder.from_pretrained(tiny_model(0, 1), None, ROOT / "model" / "bundled" / "draft2")


def test_tokenizers_must_agree(tmp_path):
    """A draft with the same vocabulary size but two tokens swapped is refused, naming the first."""
    for file in (ROOT / "model" / "bundled" / "draft").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    fields = json.loads((tmp_path / "tokenizer.json").read_text())
    vocab = fields["model"]["vocab"]
    swapped = {token: {40: 41, 41: 40}.get(i, i) for token, i in vocab.items()}
    fields["model"]["vocab"] = swapped
    (tmp_path / "tokenizer.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="differ, first at id 40"):
        StagedDecoder.from_pretrained("bundled", tmp_path, None)


@pytest.mark.parametrize("method", ["baseline", "speculative", "tree"])
@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_max_new_tokens_is_exact(tiny, method, count):
    out = tiny.generate([5, 6], max_new_tokens=count, method=method)
    assert len(out.new_token_ids) == count and out.finish_reason == "length"
    assert out.sequences.tolist() == [[5, 6, *out.new_token_ids]]
    assert len(out.token_stages) == count


@pytest.mark.parametrize("method", ["baseline", "speculative", "tree"])
def test_every_token_as_eos(tiny, method):
    """Whichever token of the text is declared eos, the text ends with its first occurrence, and counts stop there."""
    text = tiny.generate([5, 6], max_new_tokens=40, method="baseline", do_sample=True, seed=4).new_token_ids
    for eos in set(text):
        out = tiny.generate([5, 6], max_new_tokens=40, method=method, do_sample=True, seed=4, eos_token_id=eos)
        assert out.new_token_ids == text[: text.index(eos) + 1]
        expected = "eos" if text.index(eos) < len(text) else "length"
        assert out.finish_reason == expected
        assert len(out.token_stages) == len(out.new_token_ids)
    ignored = tiny.generate([5, 6], 40, True, seed=4, eos_token_id=text[0], ignore_eos=True, method=method)
    assert ignored.new_token_ids == text


@pytest.mark.parametrize("method", ["baseline", "speculative", "tree"])
@pytest.mark.parametrize("prompt_length", [100, 126, 127, 128])
def test_context_end(tiny, method, prompt_length):
    """128 positions can be fed, so one token more than fits can be drawn; the text is the baseline's to the end."""
    prompt = [(7 * i) % VOCAB for i in range(prompt_length)]
    out = tiny.generate(prompt, max_new_tokens=60, method=method)
    assert len(out.new_token_ids) == 129 - prompt_length and out.finish_reason == "length"
    assert out.new_token_ids == tiny.generate(prompt, max_new_tokens=60, method="baseline").new_token_ids


def test_a_draft_with_a_shorter_context_falls_silent(tiny):
    """Beyond the draft's context the oracle goes on alone."""
    from transformers import GPT2LMHeadModel

    config = tiny_model(1, 1).config
    config.n_positions = 20
    torch.manual_seed(1)
    decoder = StagedDecoder.from_pretrained(tiny_model(0, 2), GPT2LMHeadModel(config), None, "cpu", "float32")
    for method in ("speculative", "tree"):
        out = decoder.generate([5, 6], max_new_tokens=60, method=method)
        assert out.new_token_ids == tiny.generate([5, 6], max_new_tokens=60, method="baseline").new_token_ids


def test_text_that_utf8_cannot_hold(bundled):
    """What Python makes of bytes that are no UTF-8."""
    with pytest.raises(ValueError, match="prompt must be text that UTF-8 can hold"):
        bundled.generate("abc\udcff", max_new_tokens=1)


@pytest.mark.parametrize("temperature, tau", [(1e-15, 1e-15), (1e-15, 0.85), (1e-3, 1e-15)])
def test_the_smallest_temperature_and_tau(bundled, temperature, tau):
    """Neither gives infinities, and tau never decides what the text is."""
    shape = SpeculationConfig(("draft2", "draft"), (2, 2), (4, 4), (4, 4), 7, 8, tau=tau)
    given = {"max_new_tokens": 12, "do_sample": True, "temperature": temperature, "seed": 1}
    plain = bundled.generate("x", method="baseline", **given)
    assert bundled.generate("x", speculation=shape, **given).new_token_ids == plain.new_token_ids


def test_statistics_add_up(bundled):
    """Counts describe committed tokens: every token has a stage, accepted + the oracle's own = all."""
    out = bundled.generate("class Stack:\n    def __init__(self):\n", max_new_tokens=50)
    stages = out.stats["stages"]
    accepted = sum(stages[name]["accepted"] for name in ("draft2", "draft"))
    assert len(out.token_stages) == 50 == accepted + out.token_stages.count("oracle")
    assert stages["oracle"]["passes"] >= out.token_stages.count("oracle")
    assert out.stats["mean_acceptance_length"] == pytest.approx(50 / stages["oracle"]["passes"])
    for name in ("draft2", "draft"):
        assert stages[name]["accepted"] == out.token_stages.count(name) <= stages[name]["tried"]
        assert all(0 <= rate <= 1 for rate in stages[name]["acceptance_rate_per_position"])
    seconds = out.stats["seconds"]
    assert sum(seconds[part] for part in ("draft2", "draft", "oracle", "host")) == pytest.approx(seconds["total"])


class Interrupting:
    """A streamer that stops the generation from within."""

    def put(self, value):
        if value.dim() == 1:
            raise KeyboardInterrupt

    def end(self):
        raise AssertionError("end must not follow an interruption")


def test_interruption_frees_pages_and_leaves_the_decoder_usable(tiny):
    want = tiny.generate([5, 6], max_new_tokens=20).new_token_ids
    with pytest.raises(KeyboardInterrupt):
        tiny.generate([5, 6], max_new_tokens=20, streamer=Interrupting())
    for stage in (*tiny.lower, tiny.oracle):
        assert stage.cache.num_free_pages == stage.cache.num_pages
    assert tiny.generate([5, 6], max_new_tokens=20).new_token_ids == want


class Meddling(Interrupting):
    """A streamer that generates with the decoder it listens to."""

    def __init__(self, decoder):
        self.decoder = decoder

    def put(self, value):
        self.decoder.generate([7, 8], max_new_tokens=4)


def test_a_stage_serves_one_generation_at_a_time(tiny):
    """A second one on the same stages, which keep its state, is refused; afterwards all goes on."""
    want = tiny.generate([5, 6], max_new_tokens=20).new_token_ids
    for decoder in (tiny, StagedDecoder([], tiny.oracle)):
        with pytest.raises(RuntimeError, match="in use by another generation"):
            tiny.generate([5, 6], max_new_tokens=20, streamer=Meddling(decoder))
    assert tiny.generate([5, 6], max_new_tokens=20).new_token_ids == want


def test_nan_logits_are_reported(tiny):
    """A stage that breaks is named, with the place."""
    decoder = StagedDecoder.from_pretrained(tiny_model(0, 1), None, None, device="cpu", dtype="float32")
    decoder.oracle.model.weights.ln_f_weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="'oracle' produced NaN logits at text length 2"):
        decoder.generate([1, 2], max_new_tokens=4)


def test_a_decoder_may_be_loaded_in_inference_mode():
    with torch.inference_mode():
        decoder = StagedDecoder.from_pretrained()
    assert len(decoder.generate("x", max_new_tokens=4).new_token_ids) == 4


def test_what_a_tokenizer_file_keeps_of_training_is_not_applied(tmp_path):
    """Truncation and padding in tokenizer.json would change prompts."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "model" / "bundled" / "oracle")
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=4)
    tokenizer.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded, prompts = load_tokenizer(tmp_path), ("x", "def add(first, second):")
    assert [loaded.encode(prompt).ids for prompt in prompts] == [bundled_ids(prompt) for prompt in prompts]


def bundled_ids(text: str) -> list[int]:
    return load_tokenizer(ROOT / "model" / "bundled" / "oracle").encode(text).ids


def test_inference_mode_of_the_caller_does_not_matter():
    """A decoder first used inside torch.inference_mode works outside of it, and its output is an ordinary tensor."""
    decoder = StagedDecoder.from_pretrained(tiny_model(0, 1), tiny_model(1, 1), None, "cpu", "float32")
    with torch.inference_mode():
        inside = decoder.generate([1, 2], max_new_tokens=6)
    outside = decoder.generate([1, 2], max_new_tokens=6)
    assert inside.new_token_ids == outside.new_token_ids
    outside.sequences[0, 0] = 3


@pytest.mark.parametrize("is_interrupt", [True, False])
def test_an_interrupt_within_compiled_loops_is_an_interrupt(is_interrupt, tiny, monkeypatch):
    """numba's dispatcher makes a SystemError of Ctrl-C; any other of those stays one, and the decoder stays usable."""

    def fail(*_):
        try:
            raise KeyboardInterrupt if is_interrupt else ValueError
        except BaseException as error:
            raise SystemError from error

    with monkeypatch.context() as patched:
        patched.setattr(GPT2Stage, "score", fail)
        with pytest.raises(KeyboardInterrupt if is_interrupt else SystemError):
            tiny.generate([1, 2, 3], 4)
    assert len(tiny.generate([1, 2, 3], 4).new_token_ids) == 4
