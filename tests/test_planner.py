"""The search for the fastest shape: on times that are made up, and as the command runs it."""

import json
import math
import time

import pytest
import torch

from decoding import StagedDecoder, cli
from decoding.config import SpeculationConfig, chain, default_speculation
from decoding.plan import Plan
from decoding.planner import improve, neighbours, ratio
from kernels import gpu, reference
from kernels.reference import linear
from tests.helpers import hf_model

STAGED = default_speculation("staged", ["draft2", "draft"])
NEVER = math.inf


def test_default_trees_fill_the_rows_that_a_pass_takes_cheaply(monkeypatch):
    """With the root they are as many; every chain of stages has its shape, and a decoder asks its backend."""
    assert (STAGED.budget, STAGED.widths, STAGED.rounds) == (15, (4, 15), (4, 1))
    few = default_speculation("staged", ["draft2", "draft"], rows=8)
    assert (few.budget, few.widths, few.rounds) == (7, (4, 7), (4, 1))
    assert [default_speculation("tree", ["draft"], rows=rows).budget for rows in (8, 16)] == [7, 15]
    decoder = StagedDecoder.from_pretrained(dtype="float32", device="cpu")
    assert decoder.plan("staged").budget + 1 == reference.cheap_rows(torch.device("cpu"), torch.float32) == 8
    monkeypatch.setattr(reference, "cheap_rows", lambda device, dtype: 16)
    assert decoder.plan("staged") == STAGED
    assert reference.cheap_rows(torch.device("cuda"), torch.float32) == 16
    monkeypatch.setattr(reference, "TREE_SHAPE", gpu.TREE_SHAPE)
    assert decoder.plan("staged") == default_speculation("staged", ["draft2", "draft"], 16, gpu.TREE_SHAPE)
    assert decoder.plan("staged").widths == (6, 15) and decoder.plan("staged").min_prob == 0


def test_rows_are_cheap_where_matrices_are_native(monkeypatch):
    for native, tiles, rows in ((True, True, 16), (True, False, 12), (False, True, 8), (False, False, 8)):
        monkeypatch.setattr(linear, "matrices_are_native", lambda dtype, native=native: native)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda tiles=tiles: tiles)
        assert linear.cheap_rows(torch.device("cpu"), torch.bfloat16) == rows
        assert linear.cheap_rows(torch.device("cpu"), torch.float32) == 8


def test_a_neighbour_differs_in_one_number_by_one_step():
    found = list(neighbours(STAGED))
    assert len(found) == len(set(found)) and STAGED not in found
    for shape in found:
        ours, theirs = vars(STAGED), vars(shape)
        changed = [name for name in ours if ours[name] != theirs[name]]
        assert len(changed) == 1
    assert {shape.budget for shape in found} == {11, 15, 23}
    assert {shape.rounds for shape in found} >= {(3, 1), (6, 1), (4, 2)}
    assert {shape.min_prob for shape in found} >= {STAGED.min_prob} and len({shape.min_prob for shape in found}) > 1
    alone = neighbours(default_speculation("tree", ["draft"]))
    assert {shape.min_prob for shape in alone} == {0.0}, "the lowest stage takes no notice of it"


def test_a_shape_is_read_in_a_line():
    assert str(STAGED) == ("draft2 4 x 4 nodes x 4 children, draft 1 x 15 nodes x 6 children, 15 nodes at most 12 deep")
    assert str(SpeculationConfig()) == "no speculation"


def test_a_chain_stays_a_chain():
    assert list(neighbours(chain(4))) == [chain(3), chain(6)]
    assert list(neighbours(chain(1))) == [chain(2)]


def test_the_search_climbs_to_the_best_shape_and_no_further():
    """A staircase of passes of 16 rows, tokens that grow with the logarithm of the budget, a price for every round."""

    def seconds(shape: SpeculationConfig) -> float:
        passes = -(-(shape.budget + 1) // 16) + 0.2 * math.prod(shape.rounds) + 0.01 * sum(shape.widths)
        return passes / math.log2(2 + min(shape.budget, sum(shape.widths)))

    best = improve(STAGED, seconds, turns=3, deadline=NEVER)
    assert seconds(best) < 0.9 * seconds(STAGED) and best.budget == 15 and best.rounds == (1, 1)
    assert all(seconds(best) / seconds(other) <= 1.02 for other in neighbours(best))


def test_the_search_ends_at_its_deadline_and_ignores_noise():
    asked = []

    def seconds(shape):
        asked.append(shape)
        return 1.0 / 1.01**shape.budget  # each step is worth less than counts

    assert improve(chain(2), lambda shape: 1.0 if shape.budget != 3 else 0.99, 1, NEVER) == chain(2)
    assert improve(chain(2), seconds, 1, deadline=time.monotonic() - 1) == chain(2) and not asked


@pytest.mark.parametrize("outlier", [4, 5], ids=["for", "against"])
def test_both_shapes_of_a_comparison_begin_equally_often(outlier):
    """A machine that becomes slower with every measurement favours neither; an outlier does not count."""
    times = [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7, 1.8, 1.9]
    times[outlier] = 9.0
    order, clock = [], iter(times)

    def seconds(shape):
        order.append(shape.budget)
        return next(clock)

    assert ratio(chain(1), chain(2), seconds, 5) == pytest.approx(1.0, abs=0.1)
    assert order == [1, 2, 2, 1, 1, 2, 2, 1, 1, 2]


@pytest.fixture(scope="module")
def plan() -> Plan:
    shapes = {"baseline": SpeculationConfig(), "speculative": chain(2), "tree": chain(3)}
    return Plan(shapes, "speculative", {"runtime": "somewhere"}, {"baseline": 1.0, "speculative": 1.4, "tree": 1.2})


def test_a_plan_survives_its_file(plan, tmp_path):
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (None, "not a plan"),
        ({"conditions": []}, "not a plan.*conditions must be an object"),
        ({"fastest": ["baseline"]}, "not a plan"),
        ({"shapes": {"baseline": {"budget": -1}}}, "budget must be"),
        ({"shapes": {"magic": {}}}, "one of them the fastest, got .'magic'"),
        ({"fastest": "staged"}, "one of them the fastest"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_a_file_that_is_no_plan_is_refused(plan, tmp_path, change, message):
    path = tmp_path / "plan.json"
    plan.save(path)
    path.write_text("[]" if change is None else json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        Plan.load(path)


def test_a_decoder_follows_its_plan(plan, tmp_path):
    """The planned shape for a method, the fastest for none; a plan for stages that are not there is refused."""
    oracle, draft = hf_model(), hf_model(n_layer=1)
    plan.save(tmp_path / "plan.json")
    decoder = StagedDecoder.from_pretrained(oracle, draft, None, plan=tmp_path / "plan.json")
    assert decoder.plan() == decoder.plan("speculative") == chain(2) and decoder.plan("tree") == chain(3)
    stages = decoder.generate([1, 2, 3], max_new_tokens=6, ignore_eos=True).stats["stages"]
    assert stages["draft"]["passes"] == 2 * stages["oracle"]["passes"]
    with pytest.raises(ValueError, match="has no stage 'draft'"):
        StagedDecoder.from_pretrained(oracle, None, None, plan=plan)


def test_the_command_writes_a_plan_that_other_commands_take(tmp_path, capsys, monkeypatch):
    path = tmp_path / "plan.json"
    few = ["def f(", "--max-new-tokens", "4"]
    cli.main(["plan", *few, "--out", str(path), "--turns", "1", "--minutes", "0.02"])
    found = Plan.load(path)
    assert set(found.shapes) == {"baseline", "speculative", "tree", "staged"} and found.speedups["baseline"] == 1.0
    assert found.speedups[found.fastest] == max(found.speedups.values())
    texts = []
    for flags in ([], ["--plan", str(path)]):
        cli.main(["generate", *few, *flags])
        texts.append(capsys.readouterr().out.splitlines()[-1])
    assert texts[0] == texts[1]
    for flag, number, least in (("--turns", "0", 1), ("--minutes", "nan", 0), ("--minutes", "-1", 0)):
        with pytest.raises(SystemExit):
            cli.main(["plan", *few, "--out", str(path), flag, number])
        assert f"{flag} must be at least {least}, got {number}" in capsys.readouterr().err
    monkeypatch.setattr(cli, "search", None)  # a file is tried before the search, not after it
    for wrong, why in ((tmp_path, "Is a directory"), (tmp_path / "missing" / "plan.json", "No such file or directory")):
        with pytest.raises(SystemExit):
            cli.main(["plan", *few, "--out", str(wrong)])
        assert f"--out: {wrong}: {why}" in capsys.readouterr().err
