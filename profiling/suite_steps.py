"""The steps of ``profiling.suite`` in order of value, as commands; what each needs, makes, and how long it may take."""

import argparse
import importlib.util
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# In fewer minutes there is no time for models of GPT-2 Large's size beside the rest, nor to compile FlexAttention, and
# the paper's report takes less of everything.
BRIEF, BRIEF_PAPER = 25.0, "--tokens 64 --seeds 1 --peer-seeds 0 --ablation-prompts 0"
# Every kernel, and whole generations.
KERNELS = ("tests/test_gpu_kernels.py", "tests/test_gpu_tiles.py", "tests/test_gpu_loop.py")
# A CPU has seen captured iterations only with a stand-in for the graph: here all tests of these count.
CAPTURED = ("tests/test_gpu_capture.py", "tests/test_gpu_no_host_reads.py")
USUAL_PEERS = ("hf-generate", "hf-assisted", "hf-prompt-lookup")
JOBS = 8  # tests at a time: most of their first run is compiling


@dataclass(frozen=True)
class Step:
    """One command, run as a process of its own."""

    name: str
    arguments: tuple[str, ...]  # of the Python interpreter
    share: float  # of a call's budget that it may take; 1 = whatever is left
    needs: tuple[Path, ...] = ()  # without these it cannot run
    makes: tuple[Path, ...] = ()  # without these it has not finished, whatever was noted
    goes_on: bool = False  # stopped by its time limit, it takes up its work when it is called again


@dataclass(frozen=True)
class Trio:
    """Models of a chain, as the flags of every command name them."""

    name: str
    oracle: str
    draft: str
    draft2: str
    needs: tuple[Path, ...] = ()

    @property
    def flags(self) -> tuple[str, ...]:
        return ("--oracle", self.oracle, "--draft", self.draft, "--draft2", self.draft2)


BUNDLED = Trio("bundled", "bundled", "auto", "auto")


def grown(folder: Path) -> Trio:
    """The bundled chain at the cost of models of the paper's size, see ``profiling.grown``."""
    oracle, draft = folder / "oracle", folder / "draft"
    needs = (oracle / "model.safetensors", draft / "model.safetensors")
    return Trio("grown", str(oracle), str(draft), str(ROOT / "model" / "bundled" / "draft2"), needs)


def plan(flags: argparse.Namespace) -> list[Step]:
    """All steps, most wanted first. ``flags`` are those of ``profiling.suite``."""
    seconds, out = flags.budget_minutes * 60, flags.out
    chain = []
    if flags.oracle:
        chain = _figures(flags, Trio("given", flags.oracle, flags.draft, flags.draft2))
    elif flags.mini or flags.models_first or flags.budget_minutes >= BRIEF:
        chain = _trained(flags)
    if flags.mini:
        steps = [_tests(flags, "tests", 0.4, "tests/test_rows_of_a_pass.py"), *_microbenchmarks(flags, seconds), *chain]
        return [replace(step, share=1.0) for step in steps]  # all of them are to finish, however slow the machine
    steps = [_tests(flags, "tests-kernels", 0.22, *KERNELS, "-m", "gpu", *parallel())]
    steps.append(_tests(flags, "tests-captured", 0.1, *CAPTURED, *parallel()))
    own = BUNDLED if flags.oracle else grown(out / "grown")  # measured beside the models that are given or trained
    if own is not BUNDLED:
        steps.append(Step("grow", ("-m", "profiling.grown", "--out", str(out / "grown")), 0.05, makes=own.needs))
        steps.append(_latency(flags, own, 0.15, USUAL_PEERS))
    steps += _microbenchmarks(flags, seconds)
    if own is not BUNDLED:
        steps.append(_timeline(flags, own, 0.07))
    steps = chain + steps if flags.models_first else steps + chain
    if own is BUNDLED:
        steps.append(_latency(flags, own, 1.0, USUAL_PEERS))
    steps.append(_paper(flags, own, 1.0))
    if own is not BUNDLED:  # also where nothing could be grown
        steps.append(_latency(flags, BUNDLED, 1.0, USUAL_PEERS))
    others = [f"--ignore={path}" for path in (*KERNELS, *CAPTURED)]
    steps.append(_tests(flags, "tests-others", 1.0, "tests", "-m", "gpu", *others, *parallel()))
    return steps


def parallel() -> tuple[str, ...]:
    """pytest's flags for several tests at a time, where it can."""
    return ("-n", str(JOBS)) if importlib.util.find_spec("xdist") else ()


def _trained(flags: argparse.Namespace) -> list[Step]:
    models = flags.out / "models"
    made = (models / "oracle" / "model.safetensors", models / "draft" / "model.safetensors", models / "draft2")
    trio = Trio("trained", *(str(models / name) for name in ("oracle", "draft", "draft2")), made)
    return _training(flags) + _figures(flags, trio)


def _figures(flags: argparse.Namespace, trio: Trio) -> list[Step]:
    peers = () if flags.mini else USUAL_PEERS
    figures = [_timeline(flags, trio, 0.2), _latency(flags, trio, 0.4, peers)]
    if flags.models_first:
        return [_paper(flags, trio, 0.5), *figures]
    return [*figures, _paper(flags, trio, 1.0)]


def _tests(flags: argparse.Namespace, name: str, share: float, *chosen: str) -> Step:
    report = flags.out / name / "junit.xml"
    return Step(name, ("-m", "pytest", *chosen, "-v", "--color=no", f"--junitxml={report}"), share)


def _microbenchmarks(flags: argparse.Namespace, seconds: float) -> list[Step]:
    rehearsed = ("--rehearse", "--rows", "1") if flags.mini else ()

    def folder(name: str) -> tuple[str, ...]:
        return ("--out", str(flags.out / name))

    def budget(share: float) -> tuple[str, ...]:
        return ("--budget-seconds", f"{max(1, share * seconds):.0f}")

    kernels = ("-m", "profiling.kernels", *folder("kernels"), *budget(0.17), *rehearsed)
    sampler = ("-m", "profiling.sampler", *folder("sampler"), *rehearsed)
    slow = ("--no-flex",) if flags.budget_minutes < BRIEF else ()  # what takes minutes to compile
    steps = [Step("kernels", (*kernels, *slow), 0.2), Step("sampler", sampler, 0.07)]
    if flags.tune:
        table = () if flags.mini else ("--table", str(flags.out / "tune" / "tuned.json"))
        tune = ("-m", "profiling.tune", *folder("tune"), *budget(0.37), *rehearsed[:1], *table)
        steps.append(Step("tune", tune, 0.4))
    return steps


def _training(flags: argparse.Namespace) -> list[Step]:
    oracle, draft, draft2 = (flags.out / "models" / name for name in ("oracle", "draft", "draft2"))
    made = (oracle / "model.safetensors", draft / "model.safetensors")
    shares = (0.3, flags.oracle_minutes), (0.15, flags.draft_minutes)
    minutes = [share * flags.budget_minutes if given is None else given for share, given in shares]
    data = tuple(part for directory in flags.data or () for part in ("--data", directory))
    if flags.prompts:
        data += ("--exclude", str(flags.prompts / "humaneval" / "HumanEval.jsonl.gz"))
    common = (*data, "--tokens-per-step", str(flags.tokens_per_step), "--tokens-per-pass", str(flags.tokens_per_pass))
    if flags.mini:
        common += ("--steps", "2", "--no-compile", "--context", "64", "--short-window", "32")

    def train(what: str, out: Path, layers: int, width: int, budget: float, *more: str) -> tuple[str, ...]:
        size = ("--layers", str(layers), "--width", str(width), "--minutes", f"{budget:g}")
        return ("-m", "decoding", what, "--out", str(out), *size, *common, *more)

    vocabulary, teacher = ("--vocab-size", str(flags.vocab_size)), ("--oracle", str(oracle))
    table = ("-m", "decoding", "build-draft2", "--out", str(draft2), "--tokenizer", str(oracle), *data)
    table += ("--model", str(draft), "--samples", str(flags.samples))
    large = train("train-oracle", oracle, flags.layers, flags.width, minutes[0], *vocabulary)
    small = train("train-draft", draft, flags.draft_layers, flags.draft_width, minutes[1], *teacher)
    return [
        Step("train-oracle", large, 1.0, (), made[:1], goes_on=True),
        Step("train-draft", small, 1.0, made[:1], made[1:], goes_on=True),
        Step("build-draft2", table, 0.3, made, (draft2,)),
    ]


def _prompts(flags: argparse.Namespace) -> tuple[str, ...]:
    return ("--prompts", str(flags.prompts)) if flags.prompts else ()


def _timeline(flags: argparse.Namespace, trio: Trio, share: float) -> Step:
    name = f"timeline-{trio.name}"
    size = ("--tokens", "4", "--count", "1") if flags.mini else ("--tokens", "48")
    command = ("-m", "profiling.timeline", "--out", str(flags.out / name), *trio.flags, *size, *_prompts(flags))
    return Step(name, command, share, trio.needs)


def _latency(flags: argparse.Namespace, trio: Trio, share: float, peers: tuple[str, ...]) -> Step:
    name = f"latency-{trio.name}"
    lengths = ("--input-len", "8", "--output-len", "8") if flags.mini else ("--input-len", "32,512")
    counts = ("1", "0") if flags.mini else ("10", "3")
    peers = ("--peers", *peers) if peers else ()
    command = ("-m", "profiling.latency", "--output-json", str(flags.out / name / "latency.json"), *trio.flags)
    command += (*lengths, "--num-iters", counts[0], "--num-iters-warmup", counts[1], *peers, *_prompts(flags))
    return Step(name, command, share, trio.needs)


def _paper(flags: argparse.Namespace, trio: Trio, share: float) -> Step:
    name = f"paper-{trio.name}"
    size = ("--quick", "--peers") if flags.mini else ("--limit", str(flags.paper_prompts))
    if not flags.mini and flags.budget_minutes < BRIEF:
        size += (*BRIEF_PAPER.split(), "--peers", *USUAL_PEERS)
    command = ("-m", "profiling.paper", "--out", str(flags.out / name), "--resume", *trio.flags, *size)
    return Step(name, command + _prompts(flags), share, trio.needs, goes_on=True)
