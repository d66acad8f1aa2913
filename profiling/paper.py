"""The paper's tables and figures on this machine, beside what people would use instead, in one run.

    python -m profiling.paper --prompts DIR --out OUT         # 164 HumanEval prompts, DIR/humaneval/HumanEval.jsonl.gz
    python -m profiling.paper --hub --out OUT                 # the same from the hub; neither: prompts of our own
    python -m profiling.paper --quick --out OUT               # everything in miniature, no result
    python -m profiling.paper --oracle gpt2-large --draft distilgpt2 --hub --out OUT
    torchrun --nproc-per-node 8 -m profiling.paper ...        # prompts shared by the GPUs of one or more machines

Baseline, chain, tree and staged decoding, greedy and top-k 50 / T = 1, to a fixed length and up to HumanEval's stop
strings, and every peer that is installed, prompt by prompt. The tokens of all methods are compared before a time is
kept; a difference ends the run with exit code 1. Then ablations (more --draft and --draft2 join them), the roofline
with ceilings measured here, one coloured completion. OUT gets ``report.md``, ``paper.json``, ``paper.csv`` and
``figure1``, ``2``, ``3`` as pictures. What was measured is kept in ``OUT/journal`` as it comes; ``--resume`` goes on.
"""

import argparse
import sys
import time
from pathlib import Path

from profiling import machine, prompts
from profiling.flags import at_least, count, in_one_line
from profiling.paper_output import write
from profiling.paper_runs import FIXED, STOP_STRINGS, STOPPED, OwnGap, TokensDiffer, run_case
from profiling.paper_session import Config, Session, cases, load, suites
from profiling.peers import NAMES, NEVER, Stop, System
from profiling.prompts import SETTINGS
from profiling.shards import Journal, Shard, merged

WARM_UP = 4  # new tokens of ours; peers generate the whole length, to which some of them compile


def run(config: Config) -> Path:
    """Measure what is missing and write the report: its path (of every process; the first one writes it).

    What the user can mend ends the process with one line. Raises TokensDiffer where a method's tokens are not the
    baseline's.
    """
    shard = Shard.from_environment()
    shard.start()
    try:
        with in_one_line("paper", config.out):
            session = load(config, shard)
            key = {name: value for name, value in vars(config).items() if name not in ("out", "resume")}
            about = machine.describe(session.decoder.oracle.model.device)
            key |= {name: about[name] for name in ("commit", "device", "torch")}
            journal = Journal(config.out / "journal", shard, key, config.resume)
        for suite, methods in suites(session).items():
            measure(session, suite, methods, journal, shard)
        gathered = shard.gather((journal.cases, about["device"]))
        if gathered is not None:
            journals, devices = zip(*gathered, strict=True)
            write(session, about | {"processes": devices}, merged(journals))
        return config.out / "report.md"
    finally:
        shard.stop()


def measure(session: Session, suite: str, methods: list[System], journal: Journal, shard: Shard) -> None:
    """Run this process's cases of a suite that the journal does not have."""
    waiting = [case for group in shard.part(cases(session, suite)) for case in group if case not in journal]
    if not waiting:
        return
    config, model = session.config, session.decoder.oracle.model
    num_tokens = config.tokens if suite == "paper" else config.ablation_tokens
    stops = {FIXED: NEVER, STOPPED: Stop(model.config.eos_token_ids, STOP_STRINGS)}
    warm_up(session, methods, num_tokens)
    begun = time.monotonic()
    for done, case in enumerate(waiting, 1):
        ids, setting = session.prompt_ids[case.prompt], SETTINGS[case.setting]
        peers_too = not setting or case.seed < config.peer_seeds
        asked = [method for method in methods if peers_too or method.kind != "peer"]
        rows = run_case(case, ids, asked, num_tokens, setting, stops[case.extent], OwnGap(model))
        journal.add(case, rows)
        if done == len(waiting) or case.prompt != waiting[done].prompt:
            left = (time.monotonic() - begun) / done * (len(waiting) - done)
            print(f"{suite}: {done} of {len(waiting)} cases, about {left / 60:.1f} minutes left", file=sys.stderr)


def warm_up(session: Session, methods: list[System], num_tokens: int) -> None:
    """Nothing is compiled or captured any more when clocks run."""
    longest = max(session.prompt_ids, key=len)
    for decoder in session.decoders.values():
        decoder.execution.keep(len(methods) * len(SETTINGS))
    ours = [method for method in methods if method.kind != "peer"]
    for method in [*methods, *ours]:  # ours again: a larger tree replaces caches that earlier captures know
        if method.kind == "peer":
            method.warm_up(longest, num_tokens)  # once: what compiles forgets the code that it had
        length = num_tokens if method.kind == "peer" else min(WARM_UP, num_tokens)
        for sampling in SETTINGS.values():
            method.generate(longest, length, {**sampling, "seed": 0})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--oracle", default="bundled", help="a directory or hub id")
    parser.add_argument(
        "--draft", action="append", default=[], help="or none, auto; may be repeated: others join the ablations"
    )
    parser.add_argument("--draft2", action="append", default=[], help="a table, none or auto; likewise")
    for name in ("device", "dtype", "backend"):
        parser.add_argument(f"--{name}", default="auto")
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--prompts",
        type=prompts.folder_with(prompts.HUMANEVAL),
        help="folder with humaneval/HumanEval.jsonl.gz; default: our own set",
    )
    source.add_argument("--hub", action="store_true", help="HumanEval from the hub")
    parser.add_argument("--limit", type=count, help="only the first prompts")
    parser.add_argument("--tokens", type=count, default=Config.tokens, help="new tokens of a generation, at most")
    parser.add_argument("--seeds", type=count, default=Config.seeds, help="when sampling")
    parser.add_argument(
        "--peer-seeds", type=at_least(0), default=Config.peer_seeds, help="of them, for peers; 0: peers are greedy only"
    )
    parser.add_argument("--peers", nargs="*", choices=NAMES, help="default: all that make sense here; none: no peers")
    parser.add_argument("--ablation-prompts", type=at_least(0), default=Config.ablation_prompts, help="0: no ablations")
    parser.add_argument("--ablation-tokens", type=count, default=Config.ablation_tokens)
    parser.add_argument("--samples", type=count, default=Config.samples, help="of a point of the roofline")
    parser.add_argument("--resume", action="store_true", help="go on from what OUT/journal has")
    parser.add_argument("--quick", action="store_true", help="everything in miniature")
    flags = vars(parser.parse_args())
    for name in ("draft", "draft2", "peers"):
        flags[name] = None if flags[name] is None else tuple(flags[name])
    is_quick = flags.pop("quick")
    config = Config(**flags)
    try:
        report = run(config.quick() if is_quick else config)
    except TokensDiffer as error:
        print(f"tokens differ, nothing is reported: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"what was measured is kept: the same command with --resume goes on in {config.out}", file=sys.stderr)
        return 130
    if Shard.from_environment().rank == 0:
        print(report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
