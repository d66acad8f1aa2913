"""The promise: for one seed, every method, tree, budget and chain depth gives the tokens of plain decoding."""

from types import ModuleType

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from decoding import SpeculationConfig, StagedDecoder
from decoding.compare import DEMO_PROMPTS, HFGenerate
from decoding.config import METHODS, Limits, SamplingConfig, chain
from decoding.decoder import BUNDLED
from decoding.katz import KatzTrigram, save
from decoding.loop import Generation
from kernels import reference
from profiling import equality

VOCAB = 97
PROMPTS = (
    *DEMO_PROMPTS,
    "def add(a, b):\n    return",
    "for i in range(10):\n    print(",
    "import numpy as np\n\nx = np.",
    "try:\n    value = int(text)\nexcept ",
    "@property\ndef shape(self):\n    ",
)
SAMPLINGS = {
    "greedy": {},
    "top-k 50": {"do_sample": True, "top_k": 50},
    "top-p 0.9": {"do_sample": True, "top_k": 0, "top_p": 0.9},
    "min-p 0.05": {"do_sample": True, "top_k": 0, "min_p": 0.05},
    "all filters, T 1.3": {"do_sample": True, "top_k": 20, "top_p": 0.95, "min_p": 0.01, "temperature": 1.3},
}


def tiny_model(seed: int, layers: int, scale: float = 4.0) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCAB, n_positions=128, n_embd=64, n_layer=layers, n_head=1, bos_token_id=0, eos_token_id=None
    )
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter *= scale
    return model


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """A draft2 table estimated from the oracle's own samples."""
    oracle = StagedDecoder.from_pretrained(tiny_model(0, 2), draft=None, draft2=None, device="cpu", dtype="float32")
    runs = [oracle.generate([1 + i], max_new_tokens=100, do_sample=True, top_k=0, seed=i) for i in range(6)]
    ids = torch.cat([run.sequences[0] for run in runs]).numpy()
    directory = tmp_path_factory.mktemp("table")
    save(KatzTrigram(ids, VOCAB).bake(512), directory)
    return directory


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def four_stages(request, table):
    """A chain of four: table, a poor draft, a good draft (the oracle plus noise), the oracle."""
    oracle = tiny_model(0, 2)
    drafts = [tiny_model(1, 1), equality.noisy_copy(oracle, 0.2)]
    return StagedDecoder.from_pretrained(oracle, drafts, table, device="cpu", dtype=request.param)


def configurations() -> dict[str, SpeculationConfig]:
    """Trees and chains on one to four stages, small and large budgets."""
    tree = SpeculationConfig(("draft_2",), (3,), (5,), (4,), 12, 6)
    return {
        "baseline": SpeculationConfig(),
        "chain of 1": chain(1, "draft_2"),
        "chain of 7": chain(7, "draft_2"),
        "poor chain": chain(4, "draft_1"),
        "tree": tree,
        "tree, budget 1": SpeculationConfig(("draft_2",), (2,), (3,), (3,), 1, 6),
        "tree, budget 60": SpeculationConfig(("draft_2",), (4,), (12,), (8,), 60, 9),
        "paper's rule": SpeculationConfig(("draft_2",), (3,), (5,), (4,), 12, 6, tau=1.0, shared_noise=False),
        "lookup": SpeculationConfig(("draft2",), (4,), (4,), (3,), 15, 6),
        "three stages": SpeculationConfig(("draft2", "draft_2"), (3, 2), (4, 8), (3, 4), 20, 8),
        "four stages": SpeculationConfig(("draft2", "draft_1", "draft_2"), (2, 2, 2), (3, 6, 9), (3, 3, 4), 30, 10),
        "three stages, width 1": SpeculationConfig(("draft2", "draft_2"), (3, 2), (1, 4), (1, 1), 6, 6),
    }


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS.keys())
def test_every_shape_of_speculation_gives_the_same_tokens(four_stages, sampling):
    """Twelve shapes on one to four stages, greedy and sampled: one text. And speculation does accept something."""
    for seed, prompt in ((3, [5, 17, 40]), (2**63 + 11, list(range(1, 41)))):
        outs = {
            name: four_stages.generate(prompt, max_new_tokens=48, speculation=config, seed=seed, **sampling)
            for name, config in configurations().items()
        }
        texts = {name: out.new_token_ids for name, out in outs.items()}
        assert all(text == texts["baseline"] for text in texts.values()), texts
        assert outs["tree"].stats["mean_acceptance_length"] > 1.3
        assert outs["four stages"].stats["mean_acceptance_length"] > 1.3


def test_methods_agree_on_two_threads():
    """The number of threads may move bits, but those of all methods alike."""
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        for dtype in ("float32", "bfloat16"):
            decoder = StagedDecoder.from_pretrained(device="cpu", dtype=dtype)
            texts = {
                tuple(decoder.generate("class Stack:\n", 24, method=method, do_sample=True, seed=5).new_token_ids)
                for method in METHODS
            }
            assert len(texts) == 1
    finally:
        torch.set_num_threads(threads)


def test_different_seeds_differ(four_stages):
    texts = {
        tuple(four_stages.generate([5], max_new_tokens=12, do_sample=True, seed=seed).new_token_ids)
        for seed in range(8)
    }
    assert len(texts) == 8


def test_seed_is_returned_and_repeats_the_text(four_stages):
    first = four_stages.generate([5], max_new_tokens=12, do_sample=True)
    again = four_stages.generate(
        [5], max_new_tokens=12, do_sample=True, seed=first.seed, speculation=SpeculationConfig()
    )
    assert first.new_token_ids == again.new_token_ids


def test_caches_stay_sound_after_every_iteration(table):
    """Each slot is a position's or a node's, exactly once; the oracle's cache is one short of the text, a lower stage's
    is a prefix of it; and what a cache holds is what a fresh prefill of the same text computes, bit for bit."""
    oracle = tiny_model(0, 2)
    drafts = [tiny_model(1, 1), equality.noisy_copy(oracle, 0.2)]
    decoder = StagedDecoder.from_pretrained(oracle, drafts, table, device="cpu", dtype="float32")
    config = configurations()["four stages"]
    sampling = SamplingConfig(do_sample=True).with_seed(1)
    generation = Generation(decoder.lower, decoder.oracle, [5, 17], sampling, Limits(60), config)
    chain = generation.state.chain
    stages = [*decoder.lower[1:], decoder.oracle]
    while generation.finish_reason is None:
        generation.step()
        assert chain.cached_len[-1] == len(generation.text) - 1
        for i, stage in enumerate(stages):
            slots = [*chain.page_tables[i, : stage.context].tolist(), *chain.node_slots[i].tolist()]
            assert sorted(slots) == list(range(1, stage.context + config.capacity + 1)), "a slot is lost or twice there"
            assert not stage.cache.k[:, 0].any() and not stage.cache.v[:, 0].any(), "the null page was written"
            _assert_cache_holds(stage, generation.text[: chain.cached_len[i]], chain.page_tables[i])
    assert (chain.cached_len > 40).all(), "a lower stage fell behind the text"
    generation.close()
    for stage in stages:
        stage.cache.check()


@pytest.mark.parametrize("order", [("draft2", "draft_1", "draft_2"), ("draft_2", "draft_1", "draft2")])
def test_a_pass_has_room_for_every_ancestor(order, table, monkeypatch):
    """Four stages, the table below or above the drafts: no node is left out for want of room, which the topmost draft
    has only as far as a block reaches: here it does. The oracle needs none for
    ancestors, the others do, the topmost for those that the table answered in its place; the oracle's root, always
    scored, has its row at the head. Committed tokens have room in the first pass of an iteration."""
    oracle, spare, used, seen = tiny_model(0, 2), {}, {}, {}

    def stage_rows(tree, nodes, progress, chain, cache, reach, num_head, num_rows):
        num_seen, length = int(chain.cached_len[cache]), int(progress.length)
        first_pass, seen[cache] = seen.get(cache) != length, length
        assert num_head == (0 if not first_pass else 1 if cache == 2 else config.max_depth + 1)
        rows = reference.stage_rows(tree, nodes, progress, chain, cache, reach, num_head, num_rows)
        if reach[0] >= 0:
            assert torch.equal(rows.nodes, nodes), "a node found no room"
            num_ancestors = len(rows.tokens) - (length - num_seen) - int((nodes > 0).sum())
            spare[cache] = max(spare.get(cache, -1), num_rows - len(nodes))
            used[cache] = max(used.get(cache, 0), num_ancestors)
        return rows

    ops = ModuleType("ops")
    ops.__dict__.update(vars(reference), stage_rows=stage_rows)
    drafts = [tiny_model(1, 1), equality.noisy_copy(oracle, 0.2)]
    decoder = StagedDecoder.from_pretrained(oracle, drafts, table, device="cpu", dtype="float32")
    for stage in [*decoder.lower[1:], decoder.oracle]:
        monkeypatch.setattr(stage.model, "ops", ops)
    config = SpeculationConfig(order, (2, 2, 2), (3, 6, 9), (3, 3, 4), 30, 10)
    for seed in range(3):
        seen.clear()
        decoder.generate([5, 17, seed], 100, do_sample=True, top_k=0, seed=seed, speculation=config)
    assert all(0 < used[cache] <= spare[cache] for cache in (0, 1)), f"{used} of {spare}"
    assert (used[2], spare[2]) == (0, -1)


def _assert_cache_holds(stage, text, slots):
    fresh = stage.model.new_cache(len(text))
    stage.model.prefill(text, fresh)
    got, want = slots[: len(text)], fresh.slots(0, len(text))
    assert torch.equal(stage.cache.k[:, got], fresh.k[:, want])
    assert torch.equal(stage.cache.v[:, got], fresh.v[:, want])


@pytest.fixture(scope="module")
def greedy_rows():
    """Eight prompts x 24 tokens of the bundled oracle, all configurations of ``profiling.equality``."""
    hf = HFGenerate(str(BUNDLED / "oracle"), torch.float32, torch.device("cpu"))
    chosen = equality.decoders("bundled", BUNDLED / "draft", BUNDLED / "draft2", hf.model)
    prompt_ids = {i: chosen["baseline"][0].encode(prompt) for i, prompt in enumerate(PROMPTS)}
    return {row["configuration"]: row for row in equality.run(chosen, hf, prompt_ids, 24)}


def test_greedy_equals_hugging_face(greedy_rows):
    """Bundled trio, float32: all methods, one to four stages, good, noisy and useless drafts; only ties may differ."""
    assert {*METHODS, "four stages"} <= greedy_rows.keys()
    for name, row in greedy_rows.items():
        assert not row["different"], f"{name}: {row['different']}"
        assert row["equal"] + len(row["tied"]) == len(PROMPTS)


@pytest.mark.parametrize("shape", ["chain", "tree"])
def test_acceptance_follows_the_quality_of_the_draft(greedy_rows, shape):
    """The oracle as its own draft is always accepted, with noise less often, drowned in noise hardly ever."""

    def rate(draft):
        row = greedy_rows[f"{shape}, draft = {draft}"]
        return row["accepted"] / row["tried"]

    assert rate("oracle") >= 0.98
    assert 0.2 <= rate("oracle + noise") <= 0.95
    assert rate("drowned in noise") < 0.2


def test_humaneval_prompts(prompts_dir):
    """A few real HumanEval prompts, sampled, every method: where prompt sets are given."""
    from profiling.prompts import humaneval

    decoder = StagedDecoder.from_pretrained(device="cpu")
    for prompt in humaneval(prompts_dir)[::40]:
        texts = [
            decoder.generate(prompt, max_new_tokens=24, method=m, do_sample=True, seed=1).new_token_ids for m in METHODS
        ]
        assert all(text == texts[0] for text in texts)
