"""The benchmarks' own promises: what is counted, what is timed, what a red check does, and a whole run on the CPU."""

import importlib
import json
import os
import subprocess
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from kernels import gpu, reference
from kernels.gpu import config
from kernels.gpu.config import LinearTiles, linear_tiles
from profiling import roofline, timing
from profiling.calls import check, make_calls, relative_error, run, take_rows
from profiling.comparators import as_rows, comparators
from profiling.cost import MACHINES
from profiling.kernel_tables import WAITING, kernel_tables
from profiling.shapes import SHAPES, Shape
from profiling.tiles import MAX_WASTE, candidates, shared_bytes
from profiling.tune import WEIGHTS, Task, save, using
from tests import interpreter

ROOT = Path(__file__).parent.parent
TINY = Shape("tiny", 1, 128, 2, vocab=200, positions=128)
CPU = torch.device("cpu")


def profiling(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """``python -m profiling...`` as on a machine without a GPU and outside the interpreter."""
    kept = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=ROOT,
        env={**kept, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_quantiles_are_those_of_the_samples():
    measured = timing.quantiles([5.0, 1.0, 2.0, 3.0, 4.0, 6.0], "perf_counter")
    assert measured[:3] == pytest.approx((3.5, 2.0, 5.0)) and measured.method == "perf_counter"


def test_a_walk_calls_every_copy_and_divides_by_them():
    counts = [0, 0, 0]

    def call(i: int) -> None:
        counts[i] += 1

    measured = timing.measure([lambda i=i: call(i) for i in range(3)], CPU, samples=4)
    assert counts == [5, 5, 5]  # one walk to warm up
    assert 0 < measured.low <= measured.median <= measured.high < 1


@pytest.fixture
def fake_cuda(monkeypatch):
    """Enough of ``torch.cuda`` to run the timer's GPU path: captured calls run once, a replay takes 6 ms."""
    log = SimpleNamespace(captured=0, replays=0, capturing=False)

    class Graph:
        def replay(self):
            log.replays += 1

        reset = staticmethod(lambda: None)

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        record = synchronize = staticmethod(lambda: None)
        elapsed_time = staticmethod(lambda end: 6.0)

    @contextmanager
    def graph(_):
        log.capturing = True
        yield
        log.capturing = False

    stream = SimpleNamespace(wait_stream=lambda other: None)
    properties = SimpleNamespace(L2_cache_size=50 << 20)
    for name, value in {
        "Stream": lambda device: stream,
        "current_stream": lambda device: stream,
        "stream": lambda s: nullcontext(),
        "synchronize": lambda device: None,
        "CUDAGraph": Graph,
        "graph": graph,
        "Event": Event,
        "get_device_properties": lambda device: properties,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return log


def test_on_a_gpu_launches_are_captured_and_seconds_are_of_one(fake_cuda):
    def call():
        fake_cuda.captured += fake_cuda.capturing

    measured = timing.measure([call, call, call], torch.device("cuda"), samples=5, launches=60)
    assert fake_cuda.captured == 60 and fake_cuda.replays == 3 + 5
    assert measured.method == "graph"
    assert measured.median == pytest.approx(1e-4)  # 6 ms for 60 launches


def test_copies_exceed_three_times_the_cache(fake_cuda):
    device = torch.device("cuda")
    assert timing.copies_for(40 << 20, device) == 4
    assert timing.is_cold(40 << 20, 4, device) and not timing.is_cold(40 << 20, 3, device)
    assert timing.copies_for(1 << 30, device) == 2
    assert timing.copies_for(1, device) == timing.MAX_COPIES and not timing.is_cold(1, timing.MAX_COPIES, device)


def test_bytes_and_flops_of_one_operation_by_hand():
    """GPT-2 Large's attention projection over three rows: weight, bias, input, residual, output, two bytes each."""
    operations, calls = make_calls(SHAPES["large"], 3, torch.bfloat16, "meta", 512)
    projection = operations["attn_proj"]
    assert projection.weight_bytes == 2 * (1280 * 1280 + 1280)
    assert projection.bytes == 2 * (1280 * 1280 + 1280 + 3 * 1280 + 3 * 1280 + 3 * 1280)
    assert projection.flops == 2 * 3 * 1280 * 1280
    assert projection.repeats == 36
    assert calls["attn_proj"].function == "linear_residual"
    attention = operations["tree_attention"]  # q, out, K and V of 511 committed tokens and three nodes
    assert attention.bytes == 2 * 1280 * (3 + 3 + 2 * (511 + 3))


def test_the_twins_pass_their_own_check_and_a_wrong_operation_does_not():
    _, calls = make_calls(TINY, 20, torch.float32, CPU, 64)
    for name, call in calls.items():
        result = check(call, reference, torch.float32, [0, 7, 19])
        assert result["ok"], f"{name}: {result}"

    def off_by_little(x, *args, **kwargs):
        return reference.lm_head(x, *args, **kwargs) * 1.001

    def depends_on_its_neighbours(x, *args, rows, **kwargs):
        return reference.lm_head(x, *args, rows=rows, **kwargs) + 1e-9 * len(rows)

    wrong = check(calls["lm_head"], SimpleNamespace(lm_head=off_by_little), torch.float32, [0])
    assert not wrong["ok"] and wrong["error"] > 1e-4 and wrong["different_rows"] == []
    wrong = check(calls["lm_head"], SimpleNamespace(lm_head=depends_on_its_neighbours), torch.float32, [0])
    assert not wrong["ok"] and wrong["error"] < 1e-4 and wrong["different_rows"] == [0]


@pytest.mark.skipif(not interpreter.INTERPRETING, reason="needs Triton's interpreter")
def test_the_kernels_pass_the_check_of_their_benchmark():
    _, calls = make_calls(TINY, 20, torch.float32, CPU, 64)
    for name, call in calls.items():
        result = check(call, gpu, torch.float32, [0, 7, 19])
        assert result["ok"], f"{name}: {result}"


def test_a_part_of_the_rows_is_a_pass_of_its_own():
    _, calls = make_calls(TINY, 20, torch.float32, CPU, 64)
    for name in ("layer_norm_qkv", "tree_attention", "embed"):
        whole = run(calls[name], reference)
        backwards = torch.arange(19, -1, -1)
        assert torch.equal(run(take_rows(calls[name], slice(0, 5)), reference), whole[:5]), name
        assert torch.equal(run(take_rows(calls[name], backwards), reference)[backwards], whole), name


def test_comparators_compute_what_we_compute():
    """SDPA's boolean mask is the tree's; op by op is the fused operation."""
    _, calls = make_calls(TINY, 20, torch.float32, CPU, 64)
    compared = 0
    for call in calls.values():
        for other in comparators(call):
            if other.same_result:
                (timed,) = other.make([call.arguments])
                theirs, ours = as_rows(timed()), run(call, reference).flatten(1)
                assert relative_error(theirs, ours[:, : theirs.shape[1]]) < 1e-5, other.name
                compared += 1
    assert compared == 6


@pytest.mark.parametrize("arch", MACHINES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_candidates_fit(arch, dtype):
    """Every split has work, tiles fit the shared memory, the output head and the joint projection."""
    for shape in SHAPES.values():
        for name in WEIGHTS:
            outputs, depth = Task(shape, name, dtype, arch).weight()
            found = candidates(arch, outputs, depth, dtype, name, 40)
            assert len(found) == len(set(found)) <= 40
            assert found or arch == "gfx942" or dtype == torch.float32
            for tiles in found:
                steps = -(-depth // tiles.depth)
                assert -(-steps // tiles.splits) * (tiles.splits - 1) < steps, "a split without work"
                assert steps * tiles.depth <= MAX_WASTE * depth
                assert shared_bytes(tiles, dtype) <= MACHINES[arch].program_shared
                assert name != "lm_head" or tiles.outputs == 64
                assert name != "layer_norm_qkv" or shape.width % tiles.outputs == 0
                assert not tiles.swapped or (arch, dtype) == ("sm_90", torch.bfloat16) and tiles.outputs >= 64


def test_the_table_keeps_what_is_saved(monkeypatch, tmp_path):
    """A saved row is what the kernel takes; a trial leaves none; a modelled row does not replace a measured one."""
    monkeypatch.setattr(config, "TABLE", tmp_path / "tuned.json")
    config._table.cache_clear()
    try:
        task = Task(TINY, "mlp_fc_gelu", torch.bfloat16, "sm_90")
        default, ours, other = task.current(), LinearTiles(16, 32, 64, 2, 4, 2), LinearTiles(32, 32, 64)
        with using(task, other):
            assert task.current() == other
        assert task.current() == default and not config.TABLE.exists()
        assert save(task, ours, source="measured", microseconds_1=1.5)
        assert linear_tiles("sm_90", 512, 128, torch.bfloat16) == ours
        with using(task, other):
            assert task.current() == other
        assert task.current() == ours
        assert not save(task, other, source="model")
        row = json.loads(config.TABLE.read_text())["sm_90"]["512x128 bfloat16"]
        assert LinearTiles(**row["tiles"]) == ours and row["microseconds_1"] == 1.5
    finally:
        monkeypatch.undo()
        config._table.cache_clear()


def document(**row) -> dict:
    described = {"kind": "operation", "shape": "tiny", "operation": "lm_head", "rows": 1, "implementation": "ours"}
    times = {"microseconds": 2.0, "microseconds_q20": 1.9, "microseconds_q80": 2.2, "cold": True}
    counts = {"bytes": 4000, "flops": 8000, "gb_per_s": 2.0, "percent_of_copy": 20.0}
    about = dict.fromkeys(("device", "dtype", "text_length", "torch", "triton", "commit", "date", "command"), "x")
    ceilings = {"copy": 1e10, "read": 1.2e10, "matrix": 1e12, "matrix_dtype": "bfloat16"}
    return {
        "about": {**about, "rehearsal": False},
        "ceilings": ceilings,
        "rows": [{**described, **times, **counts}, {**described, "implementation": "F.linear alone", **row}],
    }


def test_pictures_are_written_and_an_empty_run_is_refused(tmp_path):
    files = roofline.draw(document(failure="CUDA error"), tmp_path / "run")
    assert [file.name for file in files] == ["run.png", "run.svg"]
    assert all(file.stat().st_size > 10_000 for file in files)
    timed = {"microseconds": 3.0, "bytes": 4000, "flops": 8000}
    assert len(roofline.points(document(**timed))) == 2
    assert len(roofline.points(document(**timed, implementation=WAITING))) == 1, "not drawn as if it were torch's"
    with pytest.raises(ValueError, match="nothing to draw"):
        roofline.draw({**document(), "rows": []}, tmp_path / "empty")


def test_a_failure_has_no_speed_but_a_reason():
    text = kernel_tables(document(failure="RuntimeError: no kernel image"))
    assert "| lm_head | 1 | ours | 2.00 (1.90 - 2.20) | 2 | 20.0 |  |" in text
    assert "- operation tiny lm_head 1 F.linear alone: RuntimeError: no kernel image" in text


def test_a_whole_run_on_the_cpu(tmp_path):
    """``--rehearse``: every operation checked and timed, every artefact written, everything labelled as no result."""
    done = profiling(
        "profiling.kernels", "--rehearse", "--dtype", "float32", "--no-flex", "--rows", "1", "5", "--out", str(tmp_path)
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert {file.suffix for file in tmp_path.iterdir()} == {".json", ".csv", ".md", ".png", ".svg"}
    assert all(file.name.startswith("kernels-rehearsal-") for file in tmp_path.iterdir())
    run_of = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert run_of["about"]["device"] == "cpu" and run_of["about"]["rehearsal"] is True
    timed = [row for row in run_of["rows"] if "microseconds" in row]
    assert len(timed) == 2 * (8 + 5 * 2 + 1) + 2  # ours, torch twice per linear layer, SDPA; passes
    assert all(row["microseconds_q20"] <= row["microseconds"] <= row["microseconds_q80"] for row in timed)
    assert not any("failure" in row for row in run_of["rows"])


def test_one_operation_alone(tmp_path):
    """What a changed kernel is measured with: no other operation, and no pass."""
    few = ("--operations", "tree_attention", "--rows", "5", "--no-flex", "--out", str(tmp_path))
    done = profiling("profiling.kernels", "--rehearse", "--dtype", "float32", *few)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(next(tmp_path.glob("*.json")).read_text())["rows"]
    assert {row["operation"] for row in rows if row["kind"] != "ceilings"} == {"tree_attention"}
    assert [row["implementation"] for row in rows if row["kind"] == "operation"] == ["ours", "SDPA"]


def test_tuning_on_the_cpu(tmp_path):
    done = profiling("profiling.tune", "--rehearse", "--weights", "attn_proj", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    row = json.loads((tmp_path / "tuned.json").read_text())["sm_90"]["768x768 bfloat16"]
    assert row["source"] == "rehearsal" and row["candidates"] == 4
    run_of = json.loads(next(tmp_path.glob("tune-rehearsal-*.json")).read_text())
    tuned = [row["same_bits"] for row in run_of["rows"] if row["kind"] == "tuned"]
    assert tuned == [True] * 4  # the twins know no tiles
    assert sum(row["kind"] == "brief" and row["microseconds"] > 0 for row in run_of["rows"]) == 3


def test_ranking_by_the_model(tmp_path):
    pytest.importorskip("triton.backends.nvidia", reason="needs a Triton that can compile for NVIDIA")
    done = profiling(
        *("profiling.tune", "--model", "--shapes", "gpt2", "--weights", "attn_proj", "--limit", "3", "--jobs", "1"),
        *("--table", str(tmp_path / "tuned.json"), "--out", str(tmp_path / "out")),
        TRITON_CACHE_DIR=str(tmp_path / "cache"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    row = json.loads((tmp_path / "tuned.json").read_text())["sm_90"]["768x768 bfloat16"]
    assert row["source"] == "model" and 0 < row["microseconds_1"] <= row["microseconds_16"] and row["score"] <= 1


@pytest.mark.parametrize("command, other", [("kernels", "--model"), ("tune", "--model"), ("sampler", "profiling.aot")])
def test_without_a_gpu_one_line_says_what_to_do(command, other, monkeypatch, capsys):
    module = importlib.import_module(f"profiling.{command}")
    monkeypatch.setattr(sys, "argv", [command])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert module.main() == 2
    (line,) = capsys.readouterr().out.splitlines()
    assert "--rehearse" in line and other in line
