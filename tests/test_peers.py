"""The peers are asked for the same as our decoder: same tokens, counter and stop rule, and none is dropped silently."""

import sys

import pytest
import torch
from tokenizers import Tokenizer, models

from decoding import StagedDecoder
from decoding.compare import HFGenerate
from profiling import peers
from tests.helpers import hf_model, random_tokens

CPU = torch.device("cpu")
PROMPT = random_tokens(6)
FAVOURITE = 19
NAMES = tuple(name for name in peers.NAMES if name != "hf-static-compile")
SAMPLED = {"do_sample": True, "temperature": 1.5, "top_k": 20, "seed": 5}


class Recorder:
    def __init__(self):
        self.puts: list[list[int]] = []
        self.ended = 0

    def put(self, token_ids: torch.Tensor) -> None:
        assert not self.ended
        self.puts.append(token_ids.flatten().tolist())

    def end(self) -> None:
        self.ended += 1


@pytest.fixture(scope="module")
def directories(checkpoint, tmp_path_factory):
    """Oracle and draft, random, with a tokenizer that writes token i as the word ``ti``.

    The oracle's favourite token changes places with 0, the checkpoint's eos, so that fixed lengths must ignore it.
    """
    oracle, model = tmp_path_factory.mktemp("oracle"), hf_model(n_layer=2, n_positions=64)
    with torch.no_grad():
        model.transformer.wte.weight[[0, FAVOURITE]] = model.transformer.wte.weight[[FAVOURITE, 0]]
    model.save_pretrained(oracle)
    tokenizer = Tokenizer(models.WordLevel({f"t{i}": i for i in range(97)}, unk_token="t0"))
    tokenizer.save(str(oracle / "tokenizer.json"))
    return oracle, checkpoint(n_positions=64)


@pytest.fixture(scope="module")
def decoder(directories):
    return StagedDecoder.from_pretrained(*directories, draft2=None, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def loaded(directories) -> dict[str, peers.Peer]:
    return {peer.name: peer for peer in peers.load(NAMES, *directories, torch.float32, CPU)}


@pytest.fixture(params=NAMES)
def peer(request, loaded) -> peers.Peer:
    if request.param not in loaded:
        pytest.importorskip("ctranslate2", reason="needs ctranslate2, which the extra 'peers' installs")
    return loaded[request.param]


def ours(decoder, max_new_tokens: int, prompt=PROMPT, stop=peers.NEVER, method="tree") -> list[int]:
    return peers.Own(decoder, method).generate(prompt, max_new_tokens, {}, stop)


def test_greedy_tokens_are_ours(peer, decoder):
    text = peer.generate(PROMPT, 16)
    assert text == ours(decoder, 16) == ours(decoder, 16, method="baseline") and 0 in text[:-1]


def test_eos_is_ignored_or_returned(peer, decoder):
    """An eos that would occur changes nothing where it is not asked for, and is the last token where it is."""
    text = ours(decoder, 16)
    for eos in {text[0], text[10]}:
        stop = peers.Stop(eos_token_ids=(eos, 96))
        cut = peer.generate(PROMPT, 16, {}, stop)
        assert cut == ours(decoder, 16, stop=stop) == text[: text.index(eos) + 1]
    assert peer.generate(PROMPT, 16) == text


def test_stop_strings_cut_as_ours_do(peer, decoder):
    """The stop string is gone; a streamer may have seen it. One that never occurs changes nothing."""
    text = ours(decoder, 16)
    stop = peers.Stop(strings=(f"t{text[9]} t{text[10]}", "never"))
    cut = peer.generate(PROMPT, 16, {}, stop, Recorder())
    assert cut == ours(decoder, 16, stop=stop) and len(cut) < 11
    assert peer.generate(PROMPT, 16, {}, peers.Stop(strings=("never",))) == text


@pytest.mark.parametrize("num_prompt", [58, 64])
def test_the_context_ends_where_ours_does(peer, decoder, num_prompt):
    prompt = random_tokens(num_prompt, seed=1)
    new = peer.generate(prompt, 20)
    assert len(new) == 64 + 1 - num_prompt and new == ours(decoder, 20, prompt)


def test_a_streamer_sees_prompt_and_tokens(peer):
    recorder = Recorder()
    new = peer.generate(PROMPT, 20, {}, peers.NEVER, recorder)
    assert recorder.puts[0] == PROMPT and recorder.ended == 1
    assert [token for put in recorder.puts[1:] for token in put] == new
    if peer.name in ("hf-generate", "ctranslate2"):
        assert all(len(put) == 1 for put in recorder.puts[1:])


def test_an_assistant_that_is_the_oracle_is_accepted(directories):
    """Several tokens arrive per pass of the oracle: the assistant is used, and a pass is a ``put``."""
    (assisted,) = peers.load(["hf-assisted"], directories[0], directories[0], torch.float32, CPU)
    assisted.options["assistant_model"].generation_config.assistant_confidence_threshold = 0.0
    recorder = Recorder()
    assisted.generate(PROMPT, 42, {}, peers.NEVER, recorder)
    assert [len(put) for put in recorder.puts[1:]] == [21, 21]  # 20 drafted, the default, and the oracle's own


def test_prompt_lookup_copies_from_the_text(loaded):
    """This random model falls into a loop, so that what follows can be looked up: fewer passes than tokens."""
    recorder = Recorder()
    new = loaded["hf-prompt-lookup"].generate(PROMPT, 32, {}, peers.NEVER, recorder)
    assert len(recorder.puts) - 1 < len(new) == 32


def test_sampling_arguments_arrive(peer):
    """One candidate is greedy, at temperature 0 too; many at a high temperature are not, and a seed repeats itself."""
    greedy = peer.generate(PROMPT, 16)
    assert peer.generate(PROMPT, 16, {"do_sample": True, "top_k": 1}) == greedy
    assert peer.generate(PROMPT, 16, {"do_sample": True, "temperature": 0.0}) == greedy
    drawn = peer.generate(PROMPT, 16, SAMPLED)
    assert len(drawn) == 16 and drawn != greedy and peer.greedy_only
    if peer.name != "ctranslate2":
        assert peer.generate(PROMPT, 16, SAMPLED) == drawn != peer.generate(PROMPT, 16, SAMPLED | {"seed": 6})


def test_candidates_stay_within_top_k(peer, loaded):
    """The first token of 16 draws is always among the two best, and is not always the same."""
    hf = loaded["hf-generate"].hf
    with torch.no_grad():
        best = hf.model(torch.tensor([PROMPT])).logits[0, -1].topk(2).indices.tolist()
    sampling = {"do_sample": True, "top_k": 2, "temperature": 9.0}
    drawn = {peer.generate(PROMPT, 1, sampling | {"seed": s})[0] for s in range(16)}
    assert drawn == set(best)


def test_what_a_peer_lacks_is_an_error(loaded):
    if "ctranslate2" in loaded:
        with pytest.raises(ValueError, match="min_p"):
            loaded["ctranslate2"].generate(PROMPT, 4, {"do_sample": True, "min_p": 0.1})
    with pytest.raises(ValueError, match="top_p"):
        loaded["hf-generate"].generate(PROMPT, 4, {"top_p": 2.0})


def test_what_cannot_run_is_named(directories, checkpoint, monkeypatch, capsys):
    """Not installed, a dtype the CPU lacks, no draft, a draft of another vocabulary: a reason each."""
    skipped = {}
    monkeypatch.setitem(sys.modules, "ctranslate2", None)
    names = ["ctranslate2", "hf-assisted", "hf-generate"]
    loaded = peers.load(names, directories[0], None, torch.float32, CPU, skipped.__setitem__)
    assert [peer.name for peer in loaded] == ["hf-generate"]
    assert "not installed" in skipped["ctranslate2"] and "no draft" in skipped["hf-assisted"]
    assert peers.load(["hf-assisted"], directories[0], checkpoint(vocab_size=98), torch.float32, CPU) == []
    assert "hf-assisted left out: vocab_size of the draft is 98, of the oracle 97" in capsys.readouterr().err
    with pytest.raises(ValueError, match="peers are hf-generate, .*, got 'vllm'"):
        peers.load(["vllm"], *directories, torch.float32, CPU)


def test_ctranslate2_says_which_dtypes_there_are(directories, monkeypatch):
    """As on a CPU without bfloat16, whichever this one is."""
    ctranslate2 = pytest.importorskip("ctranslate2", reason="needs ctranslate2, which the extra 'peers' installs")
    monkeypatch.setattr(ctranslate2, "get_supported_compute_types", lambda device: {"float32", "int8"})
    skipped = {}
    assert peers.load(["ctranslate2"], *directories, torch.bfloat16, CPU, skipped.__setitem__) == []
    assert "no bfloat16 on this cpu, only" in skipped["ctranslate2"] and "float32" in skipped["ctranslate2"]


def test_compiling_is_asked_for_by_name_on_a_cpu(directories, decoder):
    """The static cache with a compiled forward gives the same tokens; here by a backend that compiles nothing."""
    name = "hf-static-compile"
    assert name not in peers.defaults(CPU) and name in peers.defaults(torch.device("cuda"))
    (static,) = peers.load([name], *directories, torch.float32, CPU)
    calls = []
    config = static.options["compile_config"]
    config.backend, config.mode = lambda graph, inputs: calls.append(1) or graph.forward, None
    for length in (12, 8):  # once per length asked for: neither for every call, nor one code for all
        calls.clear()
        static.warm_up(PROMPT, length)
        assert len(calls) == 1
        assert static.generate(PROMPT, length) == ours(decoder, length)
        assert len(calls) == 1


@pytest.mark.gpu
def test_peers_on_a_gpu(directories):
    """All peers, compiled decoding included, in float32: the tokens of eager ``generate``."""
    device = torch.device("cuda")
    loaded = peers.load(peers.defaults(device), *directories, torch.float32, device)
    want = loaded[0].generate(PROMPT, 16)
    for peer in loaded:
        got = peer.generate(PROMPT, 16)
        place = peers.first_difference(got, want, loaded[0].hf, PROMPT)
        assert place is None or place["gap"] < 1e-3, f"{peer.name}: {place}"


def test_first_difference_says_where_and_how_close(directories):
    hf = HFGenerate(str(directories[0]), torch.float32, CPU)
    text = hf.generate(PROMPT, 8)
    assert peers.first_difference(text, list(text), hf, PROMPT) is None
    other = text[:5] + [(text[5] + 1) % 97] + text[6:]
    with torch.no_grad():
        logits = hf.model(torch.tensor([PROMPT + text[:5]])).logits[0, -1].sort(descending=True).values
    place = peers.first_difference(other, text, hf, PROMPT)
    assert place == {"token": 5, "gap": pytest.approx(float(logits[0] - logits[1]), abs=1e-5)}
    assert peers.first_difference(text[:3], text, hf, PROMPT)["token"] == 3
