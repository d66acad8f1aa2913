"""Machine code of the kernels for five GPUs, compiled without one: it passes its gates, and the gates can fail.

Compiling needs kernels that are not interpreted, so it happens in a process without TRITON_INTERPRET.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels import gpu
from kernels.gpu.config import LinearTiles
from kernels.gpu.launch import record
from kernels.gpu.linear import linear
from kernels.layout import MOMENT_PART
from model.quantization import quantize_matrix
from profiling import aot, grown
from profiling.aot import Job, Row, gate_failures
from profiling.aot_snapshot import differences
from profiling.cost import LAUNCH, MACHINES, modelled_seconds, occupancy
from profiling.machine_code import Report, Source
from profiling.shapes import SHAPES, operations, random_tree

ROOT = Path(__file__).parent.parent
GOOD = Report(
    registers=168,
    spills=0,
    stack=0,
    shared=122880,
    tensor_memory=0,
    matrix={"HGMMA": 8},
    wide=72,
    narrow=2,
    streamed_wide=32,
    streamed_narrow=0,
    fused=192,
    instructions=1864,
    seconds=1.0,
)


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment | variables, capture_output=True, text=True
    )


def row(report: Report = GOOD, arch: str = "sm_90", dtype: str = "bfloat16", block_rows: int = 64, **options) -> Row:
    """A linear layer's binary, as good as they come unless told otherwise."""
    signature = {"weight_ptr": "*bf16", "BLOCK_ROWS": "constexpr"}
    options = {"num_warps": 4, "num_stages": 4} | options
    source = Source("kernels.gpu.linear", "_linear_kernel", signature, {(1,): block_rows}, {}, options)
    return Row(Job(arch, dtype, "large", 64, "lm_head", source), report)


def test_every_kernel_compiles_and_passes_its_gates():
    """GPT-2 Large: four architectures in bfloat16, sm_90 in float32 and with heads of 128; and nothing drifted."""
    done = run("-m", "profiling.aot", "--reduced", "--check", "--json")
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert {row["arch"] for row in rows} == set(MACHINES) - {"sm_89"}
    assert {row["dtype"] for row in rows} >= {"bfloat16", "float16", "float32"}
    ops = ("route", "layer_norm_qkv", "tree_attention", "mlp_proj", "lm_head", "prefill attention", "draw top-k")
    for op in (*ops, "verify_and_commit", "mlp_proj, int8", "lm_head, maxima, int8", "prefill attn_proj, int8"):
        assert any(row["op"] == op for row in rows), op


def test_interpreted_kernels_are_refused():
    done = run("-m", "profiling.aot", "--reduced", TRITON_INTERPRET="1")
    assert done.returncode == 2
    assert "TRITON_INTERPRET" in done.stderr and len(done.stderr.splitlines()) == 1


def test_good_code_passes():
    assert gate_failures(row()) == []


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (row(GOOD._replace(spills=1, stack=8)), "1 spills"),
        (row(GOOD._replace(registers=256)), "256 registers, at most 255"),
        (row(GOOD._replace(shared=228 * 1024)), "at most 232448"),
        (row(GOOD._replace(registers=128), num_warps=32), "no program fits"),
        (row(GOOD._replace(matrix={"HMMA": 8})), "expected HGMMA"),
        (row(GOOD._replace(matrix={"HGMMA": 4, "HMMA": 4})), "expected HGMMA"),
        (row(block_rows=16), "expected HMMA"),
        (row(dtype="float32"), "expected none"),
        (row(GOOD._replace(matrix={}, fused=0), dtype="float32"), "neither matrix instructions nor"),
        (row(GOOD._replace(matrix={"v_mfma_xf32": 8}, shared=0), arch="gfx942"), "expected v_mfma"),
        (row(GOOD._replace(streamed_narrow=2)), "2 narrower ones"),
        (row(GOOD._replace(streamed_wide=0)), "0 weight loads of 16 bytes"),
        (row()._replace(report=None, error="PTXASError: too much"), "does not compile: PTXASError"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_gate_can_fail(bad, message):
    failures = gate_failures(bad)
    assert any(message in line for line in failures), failures


def test_a_binary_that_depends_on_the_number_of_rows_is_found():
    """Tiles chosen by N would break bit-exactness: here warps follow N, in one operation."""
    code = """
from profiling import aot
plain = aot.launches
def launches(shape, num_rows, *more):
    return [
        (op, l._replace(options=l.options | {"num_warps": 8}) if op.name == "mlp_proj" and num_rows == 2 else l)
        for op, l in plain(shape, num_rows, *more)
    ]
aot.launches = launches
print("\\n".join(aot.collect(["sm_90"], ["large"], ["bfloat16"], [64])[1]))
"""
    done = run("-c", code)
    assert done.stdout.splitlines() == [
        "sm_90 bfloat16 large head_dim 64 mlp_proj: 2 binaries of _linear_kernel for N in (1, 2, 16, 17, 64, 128)"
    ], done.stderr


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"registers": 177}, "registers 168 -> 177"),
        ({"spills": 2}, "spills 0 -> 2"),
        ({"shared": 4096}, "shared 122880 -> 4096"),
        ({"matrix": {"HMMA": 8}}, "matrix {'HGMMA': 8} -> {'HMMA': 8}"),
        ({"key": "another"}, "not in the snapshot"),
        ({"error": "out of luck"}, "compiled -> out of luck"),
    ],
)
def test_a_change_from_the_snapshot_is_reported(change, line):
    before = row().as_json()
    assert any(line in found for found in differences([before | change], [before], complete=False))


def test_a_parameter_at_its_default_is_not_part_of_the_key():
    """A kernel may gain an optional parameter and every binary that does without it keeps its place in the snapshot."""
    before = row().job.source
    options = {"signature": before.signature | {"scales_ptr": "constexpr"}, "constants": {(1,): 64, (2,): None}}
    assert before._replace(**options, unset=frozenset({"scales_ptr"})).key == before.key
    assert before._replace(**options).key != before.key


def test_what_may_change_is_not_reported():
    before = row().as_json()
    after = before | {"registers": 176, "instructions": 1, "seconds": 9.0, "matrix": {"HGMMA": 80}}
    assert differences([after], [before], complete=True) == []


def test_a_row_that_vanished_is_reported_when_everything_was_compiled():
    before = row().as_json()
    assert "no longer launched" in differences([], [before], complete=True)[0]
    assert differences([], [before], complete=False) == []


@pytest.mark.parametrize(
    ("change", "num_warps", "arch", "programs"),
    [
        ({}, 4, "sm_90", 1),  # 228 KiB hold one of 121 KiB
        ({"shared": 0}, 4, "sm_90", 3),  # 512 // 168 = 3 warps a scheduler, 12 in all
        ({"shared": 0, "registers": 16}, 1, "sm_80", 32),  # the limit on programs
        ({"shared": 0, "registers": 33}, 4, "sm_89", 12),  # 512 // 40 = 12 warps a scheduler, 48 in all
        ({"shared": 0, "registers": 64, "tensor_memory": 128}, 4, "sm_100", 4),  # 512 columns
        ({"shared": 16384, "registers": 128}, 4, "gfx942", 4),  # 64 KiB; 512 // 128 = 4 waves a scheduler
        ({"shared": 65537}, 4, "gfx942", 0),
    ],
)
def test_occupancy_by_hand(change, num_warps, arch, programs):
    assert occupancy(GOOD._replace(**change), num_warps, arch) == programs


def modelled(num_outputs: int, depth: int, tiles: LinearTiles, norm: bool = False, quantized: bool = False):
    x, weight, out, gain = (
        torch.empty(*size, dtype=torch.bfloat16, device="meta")
        for size in ((1, depth), (num_outputs, depth), (1, num_outputs), (depth,))
    )
    weight = quantize_matrix(weight) if quantized else weight
    with record("sm_90") as recorded:
        linear(x, weight, out, norm=(gain, gain, 1e-5) if norm else None, tiles=tiles)
    return modelled_seconds(recorded[-1], GOOD, "sm_90")  # a layer norm without moments takes them first


def test_cost_by_hand():
    """One row through [132 * 64, 1024]: 132 programs, one each for the 132 multiprocessors of an H200."""
    cost = modelled(132 * 64, 1024, LinearTiles(64, 64, 128, 1, 4, 4))
    weights, x, out = 17_301_504, 2048, 16_896
    assert (cost.programs, cost.resident, cost.rounds) == (132, 1, 1)
    assert cost.traffic.dram_bytes == weights + x + out
    assert cost.traffic.l2_bytes == weights + 132 * x + out
    assert cost.traffic.flops == 2 * 64 * 132 * 64 * 1024  # 63 of 64 rows are dead, and computed
    assert cost.in_flight == 132 * 3 * 64 * 128 * 2 > cost.needed  # three stages wait, one is consumed
    # 17.32 MB at 4.3 TB/s; one trip to DRAM for the first weights, one to L2 for the epilogue
    assert cost.seconds == pytest.approx(LAUNCH + 0.7e-6 + 0.2e-6 + 17_320_448 / 4.3e12)


def test_cost_of_too_few_bytes_in_flight():
    """Twelve programs with one stage of 2 KiB in flight each have 24 KiB of the 3 MB that hide the latency."""
    cost = modelled(12 * 64, 1024, LinearTiles(64, 64, 16, 1, 4, 2))
    dram_bytes = 2 * (12 * 64 * 1024 + 1024 + 12 * 64)
    assert cost.dram == pytest.approx(dram_bytes / 4.3e12 * (4.3e12 * 0.7e-6) / (12 * 2048))


def test_cost_of_one_program_too_many():
    """A 133rd program waits for a second round: the serial part is paid twice, half the loads are in flight."""
    tiles = LinearTiles(64, 64, 128, 1, 4, 4)
    one, two = modelled(132 * 64, 1024, tiles), modelled(133 * 64, 1024, tiles)
    assert (one.rounds, two.rounds) == (1, 2)
    assert two.serial == pytest.approx(2 * one.serial)
    assert two.in_flight == pytest.approx(one.in_flight * 133 / 132 / 2)


def test_cost_of_a_layer_norm():
    """Moments are there already: one trip to L2 before the product, and eight bytes a row and part for each program."""
    tiles = LinearTiles(64, 64, 128, 1, 4, 4)
    normed, plain = modelled(132 * 64, 1024, tiles, norm=True), modelled(132 * 64, 1024, tiles)
    assert normed.serial - plain.serial == pytest.approx(0.2e-6)
    assert normed.traffic.l2_bytes - plain.traffic.l2_bytes == 132 * 8 * 1024 // MOMENT_PART


def test_cost_of_8_bits():
    """Half the bytes of the matrix and four a row; half the bytes in flight, so time falls by less."""
    tiles = LinearTiles(64, 64, 128, 1, 4, 4)
    plain, small = (modelled(132 * 64, 1024, tiles, quantized=quantized) for quantized in (False, True))
    assert plain.traffic.dram_bytes - small.traffic.dram_bytes == 132 * 64 * (1024 - 4)
    assert 2 * small.in_flight == plain.in_flight
    with record("sm_90"):
        wide, narrow = (
            operations(SHAPES["small"], 1, torch.bfloat16, "meta", gpu, quantized=q)[-2] for q in (False, True)
        )
    assert wide.weight_bytes - narrow.weight_bytes == 768 * (3072 - 4)


def test_weight_bytes_of_a_pass_are_the_checkpoint():
    """GPT-2 Large in bfloat16: 774 M parameters read once a pass, less the embeddings that one row does not read."""
    with record("sm_90"):
        found = operations(SHAPES["large"], 1, torch.bfloat16, "meta", gpu)
    read = sum(op.repeats * op.weight_bytes for op in found) / 2
    parameters = 36 * (12 * 1280**2 + 13 * 1280) + 50257 * 1280 + 2 * 1280  # layers, tied head, last norm
    assert read == parameters + 2 * 1280  # a row of each embedding


@pytest.mark.parametrize("num_nodes", [1, 2, 64, 128])
def test_trees_are_deterministic_and_shallow(num_nodes):
    paths = random_tree(num_nodes)
    assert paths == random_tree(num_nodes) and len(paths) == num_nodes
    assert all(path[:-1] in paths and path[-1] == node and len(path) <= 13 for node, path in enumerate(paths) if node)


def test_amd_waves_wait_for_their_stores_before_they_arrive():
    """A release covers one wave: every wave waits for its own stores before the barrier in front of the counter."""
    code = """
import re
from profiling import aot, machine_code
for job in aot.collect(["gfx942"], ["large"], ["bfloat16"], [64])[0]:
    if job.op in ("mlp_proj", "tree_attention"):
        lines = machine_code.binary_of(job.source, "gfx942").asm["amdgcn"].splitlines()
        counted = next(i for i, line in enumerate(lines) if "global_atomic_add" in line)
        barrier = max(i for i in range(counted) if "s_barrier" in lines[i])
        found = [m[0] for line in lines[:barrier] if (m := re.search("buffer_store|global_store|vmcnt.0.", line))]
        print(job.op, found[-1], "wbl2" in " ".join(lines[barrier:counted]))
"""
    done = run("-c", code)
    assert set(done.stdout.splitlines()) == {"mlp_proj vmcnt(0) True", "tree_attention vmcnt(0) True"}, done.stderr


def test_verification_reads_before_the_barrier_what_it_writes_after_it():
    """Of one program's warps none may still read a place that another has written: a barrier stands between."""
    code = """
import re
from profiling import aot, machine_code
job = next(job for job in aot.iteration_jobs(["sm_90"]) if job.op == "verify_and_commit")
lines = machine_code.binary_of(job.source, "sm_90").asm["ttgir"].splitlines()
first = next(i for i, line in enumerate(lines) if "ttg.barrier" in line or "gpu.barrier" in line)
for name in ("length_ptr", "tokens_ptr", "parents_ptr", "sources_ptr"):
    reads = [i for i, line in enumerate(lines) if re.search(f"tt.(load|splat) %{name}", line)]
    print(name, bool(reads) and min(reads) < first)
stores = [i for i, line in enumerate(lines) if "tt.store %length_ptr" in line]
loads = [i for i, line in enumerate(lines) if "tt.load %length_ptr" in line]
print("one read and one write, a barrier between:", len(loads) == len(stores) == 1 and loads[0] < first < stores[0])
"""
    done = run("-c", code)
    assert "one read and one write, a barrier between: True" in done.stdout and "False" not in done.stdout, done.stdout


def test_the_model_has_every_pass_that_a_reader_is_promised(monkeypatch, tmp_path, capsys):
    """GPT-2 Large with one row, a block and four; the draft of ``profiling.grown`` with a block, in int8, too."""

    def table(arch, num_rows, shape, quantized):
        return f"{arch} {shape.name} {shape.layers} x {shape.width}, {num_rows} rows{', int8' * quantized}"

    monkeypatch.setattr(aot, "model_table", table)
    monkeypatch.setattr(aot, "interpreting", lambda: False)
    assert aot.main(["--model", "--arch", "sm_90", "--out", str(tmp_path / "model.md")]) == 0
    layers, width = grown.SIZES["draft"]
    draft = f"sm_90 grown-draft {layers} x {width}, 16 rows"
    large = [f"sm_90 gpt2-large 36 x 1280, {rows} rows" for rows in (1, 16, 64)]
    wanted = [*large, draft, f"{draft}, int8"]
    assert capsys.readouterr().out.split("\n\n") == [*wanted[:-1], wanted[-1] + "\n"]
    written = (tmp_path / "model.md").read_text()
    assert all(line in written for line in wanted) and "not measured" in written
