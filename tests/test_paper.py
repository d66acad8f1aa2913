"""The paper's figures: right from rows, never beside a red check, no prompt twice or lost, every file written."""

import csv
import dataclasses
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from decoding import StagedDecoder
from decoding.compare import HFGenerate
from decoding.config import default_speculation
from decoding.decoder import BUNDLED
from decoding.execution import MAX_PLANS, Captured
from kernels.reference import matrices
from model import bundle
from profiling import ablations, dram, paper, paper_session, paper_tables, prompts
from profiling.demo import unpadded_row
from profiling.paper_runs import FIXED, STOPPED, Case, OwnGap, TokensDiffer, digest, run_case
from profiling.paper_session import Config
from profiling.peers import NEVER, Own
from profiling.prompts import GREEDY, SETTINGS, TOP_K
from profiling.shards import Shard
from tests.helpers import hf_model, random_tokens, tiny_gpt2
from tests.recorded_graph import RecordedGraph

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
GAP = SimpleNamespace(model=SimpleNamespace(device=CPU), top_two_gap=lambda text: 0.25 * len(text))


class Says:
    """A method that always gives the same tokens and notes when it was asked."""

    greedy_only = False

    def __init__(self, name: str, tokens: list[int], kind: str = "method", log: list | None = None):
        self.name, self.tokens, self.kind, self.log = name, tokens, kind, [] if log is None else log

    def generate(self, ids, num_tokens, sampling, stop):
        self.log.append(self.name)
        return self.tokens[:num_tokens]

    def columns(self):
        return {}


def row(prompt: int, method: str, tokens: int, seconds: float, **columns) -> dict:
    """A row as ``run_case`` makes it."""
    kind = "peer" if method.startswith("hf") or method == "ctranslate2" else "method"
    case = Case("paper", prompt, columns.pop("setting", GREEDY), columns.pop("seed", 0), FIXED)
    same = {} if kind == "peer" else {"equal": True}
    shown = {"method": method, "kind": kind, "tokens": tokens, "seconds": seconds, "repeated_8_grams": 0.5}
    return {**case._asdict(), **shown, **same, **columns}


def counted(prompt: int, method: str, tokens: int, seconds: float, passes: int, oracle: int, **columns) -> dict:
    columns = {"oracle_passes": passes, "oracle_bytes": oracle, "accepted": 0, "tried": 0} | columns
    return row(prompt, method, tokens, seconds, **columns)


def hand_made() -> list[dict]:
    """Three prompts; staged is 2, 4 and 8 times as fast on them and moves (300 + 40 + 20) / 1200 of the bytes."""
    rows = []
    for prompt, times in enumerate((2, 4, 8)):
        rows.append(counted(prompt, "baseline", 10, 1.0, 10, 400))
        drafts = {"draft_passes": 4, "draft_bytes": 40 / 3, "draft2_passes": 8, "draft2_bytes": 20 / 3}
        rows.append(counted(prompt, "staged", 10, 1.0 / times, 4, 100, **drafts | {"accepted": 6, "tried": 8}))
    return rows


def test_ratios_are_of_totals_and_the_spread_is_that_of_prompts():
    """A mean of ratios would say 4.67x and a spread over runs would be another one."""
    baseline, staged = paper_tables.summarise(hand_made())
    assert (baseline["speedup"], baseline["relative_bytes"], baseline["tokens_per_oracle_pass"]) == (1, 1, 1)
    assert staged["speedup"] == pytest.approx(3 / (1 / 2 + 1 / 4 + 1 / 8))
    assert staged["speedup_median"] == pytest.approx(4)
    assert (staged["speedup_p10"], staged["speedup_p90"]) == pytest.approx((2.4, 7.2))
    assert staged["tokens_per_oracle_pass"] == pytest.approx(30 / 12)
    assert staged["draft_passes_per_oracle_pass"] == pytest.approx(1)
    assert staged["acceptance"] == pytest.approx(0.75) and staged["repeated_8_grams"] == 0.5
    assert staged["relative_bytes_by_stage"] == pytest.approx(
        {"oracle": 300 / 1200, "draft": 40 / 1200, "draft2": 20 / 1200}
    )
    assert staged["relative_bytes"] == pytest.approx(360 / 1200)
    assert (staged["prompts"], staged["runs"], staged["equal"], staged["compared"]) == (3, 3, 3, 3)


def test_a_prompt_is_one_problem_however_many_seeds_it_has():
    """Two seeds of one prompt, 2x and 6x as fast: one problem, and its ratio is that of its sums."""
    rows = [row(0, "baseline", 10, 1.0, seed=seed) for seed in (0, 1)]
    rows += [row(0, "tree", 10, 1 / 2, seed=0), row(0, "tree", 10, 1 / 6, seed=1)]
    ratios = paper_tables.prompt_ratios(rows[2:], rows[:2])
    assert ratios == pytest.approx({0: 2 / (1 / 2 + 1 / 6)})
    assert paper_tables.summarise(rows)[1]["speedup_p90"] == pytest.approx(3)


def test_a_prompt_without_tokens_has_no_ratio():
    rows = [row(0, "baseline", 0, 0.1), row(1, "baseline", 10, 1.0), row(0, "tree", 0, 0.3), row(1, "tree", 10, 0.5)]
    assert paper_tables.prompt_ratios(rows[2:], rows[:2]) == pytest.approx({1: 2.0})


def test_bars_are_met_missed_or_not_measured_and_a_miss_says_why():
    rows = hand_made()
    for prompt in range(3):
        rows += [row(prompt, "hf-generate", 10, 0.5), row(prompt, "hf-assisted", 10, 0.6)]
        rows += [row(prompt, "hf-prompt-lookup", 10, 0.25), row(prompt, "ctranslate2", 10, 0.3)]
    found = {bar.claim: bar for bar in paper_tables.bars(paper_tables.summarise(rows), "cpu")}
    traffic = found["staged, greedy: memory traffic relative to the baseline"]
    assert traffic.measured == pytest.approx(0.30) and not traffic.is_met
    assert "2.50 tokens an oracle pass leave 0.25 to the oracle; draft adds 0.03, draft2 adds 0.02" in traffic.reason
    assert "1.0 draft passes an iteration, each 0.13 of an oracle pass" in traffic.reason
    speed = {claim.split("against ")[1]: bar for claim, bar in found.items() if "against" in claim}
    assert speed["HF generate"].measured == pytest.approx(1.5 / 0.875) and not speed["HF generate"].is_met
    better = speed["the better of HF assisted and prompt lookup"]
    assert better.measured == pytest.approx(0.75 / 0.875) and "of hf-prompt-lookup" in better.reason
    assert speed["CTranslate2"].measured == pytest.approx(0.9 / 0.875) and speed["CTranslate2"].is_met
    assert found["staged, top-k 50, T = 1: memory traffic relative to the baseline"].measured is None
    on_gpu = {bar.claim: bar for bar in paper_tables.bars(paper_tables.summarise(rows), "cuda")}
    assert on_gpu["staged, greedy: tokens per second against our baseline"].is_met  # 3.43x, the paper's is 3.17x


def test_a_tampered_token_ends_the_case():
    """No row of a case comes back when one of our methods is wrong, even in the last token alone."""
    case, right = Case("paper", 5, GREEDY, 0, FIXED), [7, 8, 9]
    methods = [Says("baseline", right), Says("tree", right), Says("staged", [7, 8, 6])]
    with pytest.raises(
        TokensDiffer, match=r"prompt=5.*staged gives \[6\] for new token 2, the baseline \[9\].*1.0e\+00"
    ):
        run_case(case, [1, 2], methods, 3, {}, NEVER, GAP)
    with pytest.raises(TokensDiffer, match=r"staged gives \[\] for new token 2"):
        run_case(case, [1, 2], [*methods[:2], Says("staged", [7, 8])], 3, {}, NEVER, GAP)


def test_a_peer_that_differs_is_reported_not_dropped():
    case = Case("paper", 0, GREEDY, 0, FIXED)
    methods = [Says("baseline", [7, 8, 9]), Says("hf", [7, 1, 9], "peer"), Says("other", [7, 8, 9], "peer")]
    ours, theirs, same = run_case(case, [1, 2], methods, 3, {}, NEVER, GAP)
    assert (theirs["equal"], theirs["first_difference"], theirs["gap"]) == (False, 1, 0.25 * 3)
    assert ours["equal"] and same["equal"] and ours["digest"] == same["digest"] == digest([7, 8, 9]) != theirs["digest"]
    summary = paper_tables.summarise([ours, theirs, same])
    assert summary[1]["differences"] == [{"prompt": 0, "seed": 0, "first_difference": 1, "gap": 0.75}]


def test_methods_take_turns_to_begin():
    log: list[str] = []
    methods = [Says(name, [1], log=log) for name in ("baseline", "tree", "staged")]
    for prompt in range(3):
        rows = run_case(Case("paper", prompt, GREEDY, 0, FIXED), [1], methods, 1, {}, NEVER, GAP)
        assert [r["method"] for r in rows] == ["baseline", "tree", "staged"]
    assert log[::3] == ["baseline", "tree", "staged"]


def test_the_gap_is_that_of_the_oracle():
    model, text = tiny_gpt2(), random_tokens(21)
    theirs = HFGenerate.top_two_gap(SimpleNamespace(model=hf_model()), text)
    assert OwnGap(model).top_two_gap(text) == pytest.approx(theirs, abs=1e-3)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """A random oracle and draft of one layer with the bundled tokenizer, so that the bundled table fits them."""
    folder = tmp_path_factory.mktemp("models")
    for name, fields in (("oracle", {"n_head": 2}), ("draft", {})):
        hf_model(vocab_size=8192, n_positions=256, **fields).save_pretrained(folder / name)
        shutil.copy(BUNDLED / "oracle" / "tokenizer.json", folder / name)
    return {name: folder / name for name in ("oracle", "draft")}


@pytest.fixture
def config(models, tmp_path) -> Config:
    sources = {"oracle": str(models["oracle"]), "draft": (str(models["draft"]),), "draft2": (str(BUNDLED / "draft2"),)}
    small = Config(tmp_path / "out", **sources, dtype="float32", peers=("hf-generate",)).quick()
    return dataclasses.replace(small, tokens=6, ablation_tokens=4)


every_variant = ablations.variants


def few_variants(decoders: dict[str, StagedDecoder]) -> list[Own]:
    return [variant for variant in every_variant(decoders) if variant.kind not in ("chain", "draft2")][:4]


def test_a_whole_run_writes_every_figure_and_resumes(config, monkeypatch):
    """Interrupted within the second prompt, gone on: every case once, nothing measured twice, all files there."""
    monkeypatch.setattr(ablations, "variants", few_variants)
    done: list[Case] = []

    def interrupted(case, *arguments):
        if len(done) == 5:
            raise KeyboardInterrupt
        done.append(case)
        return run_case(case, *arguments)

    monkeypatch.setattr(paper, "run_case", interrupted)
    with pytest.raises(KeyboardInterrupt):
        paper.run(config)
    monkeypatch.setattr(paper, "run_case", lambda case, *arguments: done.append(case) or run_case(case, *arguments))
    report = paper.run(dataclasses.replace(config, resume=True))
    session = paper_session.load(config, Shard())
    expected = [
        case for suite in ("paper", "ablations") for group in paper_session.cases(session, suite) for case in group
    ]
    assert done == expected and len(done) == 2 * 2 * 2 + 2  # prompts, settings, extents; then the ablations' prompt
    out = report.parent
    for figure in ("figure1", "figure2", "figure3"):
        assert (out / f"{figure}.png").read_bytes()[:4] == b"\x89PNG" and "<svg" in (out / f"{figure}.svg").read_text()
    document = json.loads((out / "paper.json").read_text())
    rows = list(csv.DictReader((out / "paper.csv").open()))
    assert len(rows) == len(document["rows"]) == 8 * 5 + 2 * 4
    assert all(r["equal"] for r in document["rows"] if r["kind"] != "peer")
    assert {point["model"] for point in document["points"]} == {"oracle", "draft"}
    assert min(point["seconds"] for point in document["points"]) > 0 and document["ceilings"]["copy"] > 0
    text = report.read_text()
    for part in ("no result", "Table 1", STOPPED, "greedy, staged", "0.23", "3.17x (475)", "hf-generate", "Ablations"):
        assert part in text, part
    terminal, page = (out / "figure3.txt").read_text(), (out / "figure3.html").read_text()
    assert "\x1b[" in terminal and "def read_lines" in terminal and "read_lines" in page and "color:" in page


def test_a_wrong_method_ends_the_run_without_a_report(config, monkeypatch, capsys):
    """The command says which prompt, exits 1, and writes no figure."""
    true = Own.generate

    def tampered(self, *arguments):
        new = true(self, *arguments)
        return [*new[:-1], new[-1] ^ 1] if self.name == "tree" and new else new

    monkeypatch.setattr(Own, "generate", tampered)
    arguments = ["paper", "--quick", "--oracle", config.oracle, "--draft", config.draft[0], "--out", str(config.out)]
    monkeypatch.setattr(sys, "argv", [*arguments, "--peers", "--ablation-prompts", "0"])
    assert paper.main() == 1
    assert "nothing is reported" in capsys.readouterr().err and not (config.out / "report.md").exists()


def test_nothing_is_captured_while_a_clock_runs(config, monkeypatch):
    """More shapes than are kept by default, some with larger caches than others: all captures lie in the warm-up."""
    decoders = ablations.load(config.oracle, list(config.draft), list(config.draft2), dtype="float32")
    decoder, captured = next(iter(decoders.values())), []
    decoder.execution = Captured(lambda: captured.append(1) or RecordedGraph())
    session = SimpleNamespace(config=config, decoders=decoders, decoder=decoder, prompt_ids=[[5, 6, 7], [8, 9]])
    methods = [method for method in ablations.variants(decoders) if method.kind in ("method", "tree", "staged")]
    paper.warm_up(session, methods, 2)
    before = len(captured)
    for prompt, ids in enumerate(session.prompt_ids):
        for setting, sampling in SETTINGS.items():
            case = Case("ablations", prompt, setting, 1, FIXED)
            rows = run_case(case, ids, methods, 2, sampling, NEVER, OwnGap(decoder.oracle.model))
            assert {r["iteration"] for r in rows} == {"captured"}
    assert len(captured) == before >= 2 * len(methods) > MAX_PLANS


def test_budgets_keep_the_default_shape(config):
    """A budget of a whole block has the default's shape; others are scaled; every one gives the baseline's tokens."""
    decoders = ablations.load(config.oracle, list(config.draft), list(config.draft2), dtype="float32")
    decoder = next(iter(decoders.values()))
    for method in ("tree", "staged"):
        default = default_speculation(method, [stage.name for stage in decoder.lower])
        assert ablations.scaled(default, 15) == default
        half = ablations.scaled(default, 7)
        assert (half.budget, half.rounds, half.children) == (7, default.rounds, default.children)
        assert half.widths == tuple(max(1, round(width * 7 / 15)) for width in default.widths)
    methods = ablations.variants(decoders)
    assert {method.kind for method in methods} == {"method", "chain", "tree", "staged", "draft2"}
    case, gap = Case("ablations", 0, TOP_K, 3, FIXED), OwnGap(decoder.oracle.model)
    rows = run_case(case, [5, 6, 7], methods, 5, {"do_sample": True}, NEVER, gap)
    assert len(rows) == len(methods) and all(r["equal"] for r in rows)


def test_other_drafts_and_tables_share_the_oracle(models):
    oracle, draft, table = str(models["oracle"]), str(models["draft"]), str(BUNDLED / "draft2")
    decoders = ablations.load(oracle, [draft, oracle], [table, table], dtype="float32")
    assert len({id(decoder.oracle) for decoder in decoders.values()}) == 1
    names = [method.name for method in ablations.variants(decoders) if method.kind == "stages"]
    assert any("draft" in name and "oracle" in name for name in names)


def test_memory_counters_give_bytes_or_a_reason(monkeypatch):
    """A quarter of 1 TB/s for two seconds is 0.5 TB; on a CPU there is a reason."""
    assert dram.bytes_per_token(CPU, {})[1].startswith("a CPU's memory counters")
    counter = dram.Counter.__new__(dram.Counter)
    counter.peak, counter.device, counter.handle = 1e12, torch.device("cuda"), None
    asked = SimpleNamespace(metrics=[SimpleNamespace(nvmlReturn=0, value=25.0)])
    counter.nvml = SimpleNamespace(
        nvmlGpmSampleAlloc=object,
        nvmlGpmSampleGet=lambda handle, sample: sample,
        nvmlGpmSampleFree=lambda sample: None,
        nvmlGpmMetricsGet=lambda metrics: metrics,
        c_nvmlGpmMetricsGet_t=lambda: asked,
        NVML_GPM_METRICS_GET_VERSION=1,
        NVML_GPM_METRIC_DRAM_BW_UTIL=10,
        NVML_SUCCESS=0,
        NVMLError=OSError,
    )
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    clock = iter((10.0, 12.0, 20.0, 20.5))
    monkeypatch.setattr(dram.time, "perf_counter", lambda: next(clock))
    assert counter.bytes_of(lambda: None) == pytest.approx(0.5e12) and asked.metrics[0].metricId == 10
    with pytest.raises(RuntimeError, match="0.50 s are too short"):
        counter.bytes_of(lambda: None)


def test_own_prompts_are_twelve_and_fit():
    decoder = StagedDecoder.from_pretrained(draft=None, draft2=None, dtype="float32")
    assert len(set(prompts.OWN)) == 12 and all(10 < len(decoder.encode(text)) < 100 for text in prompts.OWN)
    assert not any(text.endswith("\n") for text in (*prompts.OWN, *bundle.PROMPTS)), "see DEMO_PROMPTS"


def test_where_stages_come_from(tmp_path):
    """Left out they are the bundled ones of the bundled oracle, none of another; "auto" of another is refused."""
    bundled = [[str(BUNDLED / name)] for name in ("draft", "draft2")]
    assert list(paper_session.sources(Config(out=tmp_path))) == bundled
    assert paper_session.sources(Config(out=tmp_path, draft=("none", "auto")))[0] == [None, *bundled[0]]
    assert paper_session.sources(Config(out=tmp_path, oracle="gpt2-large")) == ([None], [None])
    with pytest.raises(ValueError, match="--draft2 auto goes with the bundled oracle alone"):
        paper_session.sources(Config(out=tmp_path, oracle="gpt2-large", draft2=("auto",)))


def test_the_baseline_without_padding_is_the_baseline(monkeypatch):
    """Its texts are compared prompt by prompt, its speed with runs that take turns, and its rows are what they say."""
    decoder, rows = StagedDecoder.from_pretrained(draft=None, draft2=None, dtype="bfloat16"), []
    pointwise = matrices.Packed.product
    monkeypatch.setattr(
        matrices.Packed, "product", lambda self, x, *how: rows.append(len(x)) or pointwise(self, x, *how)
    )
    monkeypatch.setattr(matrices, "agreeing_rows", lambda *how: (8, 16, 32))
    row = unpadded_row(decoder, "bfloat16", tokens=6, repeats=1)
    assert row["method"] == "baseline, rows not padded" and row["identical"] == "3 of 3"
    assert row["tokens_per_second"] > 0 and row["speedup"] > 0 and row["tokens_per_oracle_pass"] == 1
    assert {1, 8} <= set(rows), "one row without padding, eight with it"
