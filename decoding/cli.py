"""The command line: ``staged generate``, ``staged compare``, and what makes stages."""

import argparse
import json
import os
import re
import sys
import warnings
from contextlib import suppress
from pathlib import Path

from rich.console import Console

from decoding import make_flags
from decoding.compare import DEMO_PROMPTS, HFGenerate, compare
from decoding.config import METHODS, SamplingConfig
from decoding.decoder import BUNDLED, StagedDecoder
from decoding.display import coloured, legend, print_comparison, stage_styles
from decoding.planner import search
from kernels.reference.compiled import is_cold
from model import quantization, weights
from model.signals import interrupts

SAMPLING = ("do_sample", "temperature", "top_k", "top_p", "min_p", "seed")


def main(arguments: list[str] | None = None) -> None:
    """Run the command line. Exit code 2 and one line on standard error for what the user can mend."""
    flags = parser().parse_args(arguments)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: print(f"staged: {message}", file=sys.stderr)
            with interrupts():
                flags.run(flags)
        sys.stdout.flush()
    except BrokenPipeError:  # a reader like head has seen enough; rich ends in the same way, with the same code
        with suppress(OSError, ValueError):  # where standard output is no file there is nothing left to flush
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (ValueError, FloatingPointError, OSError) as error:
        print(f"staged {flags.command}: {' '.join(_with_flags(str(error), flags).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def _with_flags(message: str, flags: argparse.Namespace) -> str:
    """``message`` with the field that it begins with, "top_p must be ...", named as the flag that set it."""
    begins = re.match(r"\w+(?=[ :=])", message)
    field = begins[0] if begins else ""
    flag = "stop" if field == "stop_strings" else field
    is_flag = flag in vars(flags) and flag not in ("prompt", "prompts", "command", "run")
    return f"--{flag.replace('_', '-')}{message[len(field) :]}" if is_flag else message


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="staged", description="Staged speculative decoding for GPT-2, bit for bit lossless."
    )
    commands = top.add_subparsers(dest="command", required=True)

    generate = make_flags.add_command(commands, "generate", "continue a prompt")
    generate.add_argument("prompt", help="the text to continue; '-' reads standard input")
    generate.add_argument("--method", choices=METHODS, help="default: the fullest that the stages allow")
    generate.add_argument("--stop", action="append", metavar="TEXT", help="stop before this text; may be repeated")
    generate.add_argument("--ignore-eos", action="store_true", help="do not stop at the end-of-text token")
    generate.add_argument("--color", action="store_true", help="colour each token by the stage that proposed it")
    generate.add_argument("--json", action="store_true", help="print one JSON object with all output fields")
    generate.set_defaults(run=run_generate)

    comparison = make_flags.add_command(
        commands, "compare", "every method on the same prompts, tokens checked identical"
    )
    comparison.add_argument("prompts", nargs="*", metavar="PROMPT", help="default: three prompts of Python code")
    comparison.add_argument("--hf", action="store_true", help="also run Hugging Face's generate (greedy only)")
    comparison.add_argument("--color", action="store_true", help="show the completions, coloured by stage")
    comparison.add_argument("--json", action="store_true", help="print the rows as JSON")
    comparison.set_defaults(run=run_compare)

    planning = make_flags.add_command(commands, "plan", "find the shape of speculation that is fastest on this machine")
    planning.add_argument("prompts", nargs="*", metavar="PROMPT", help="default: three prompts of Python code")
    planning.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON for --plan of other commands")
    planning.add_argument("--turns", type=int, default=3, help="that each comparison of two shapes takes (default: 3)")
    planning.add_argument(
        "--minutes", type=float, default=3.0, help="for the search, which ends what it has begun (default: 3)"
    )
    planning.set_defaults(run=run_plan)

    for command in (generate, comparison, planning):
        _add_common(command)
    make_flags.add_commands(commands)
    return top


def _add_common(command: argparse.ArgumentParser) -> None:
    command.add_argument("--max-new-tokens", type=int, default=128, help="default: 128")
    command.add_argument("--do-sample", action="store_true", help="draw tokens; greedy without it")
    command.add_argument("--temperature", type=float, default=1.0, help="default: 1")
    command.add_argument("--top-k", type=int, default=50, help="0: off (default: 50)")
    command.add_argument("--top-p", type=float, default=1.0, help="1: off, the default")
    command.add_argument("--min-p", type=float, default=0.0, help="0: off, the default")
    command.add_argument("--seed", type=int, help="of sampled text; default: a fresh one for generate, 0 for compare")
    add_model_flags(command)


def add_model_flags(command: argparse.ArgumentParser) -> None:
    """The flags that ``load_decoder`` reads: which models, and where they run."""
    command.add_argument("--oracle", default="bundled", help="hub id or directory of a GPT-2 checkpoint")
    command.add_argument("--draft", default="auto", help="hub id or directory; 'none' for no draft")
    command.add_argument("--draft2", default="auto", help="directory of a table; 'none' for no draft2")
    command.add_argument("--plan", type=Path, metavar="FILE", help="shapes that 'staged plan' found on this machine")
    command.add_argument(
        "--draft-quantization", choices=quantization.SCHEMES, help="keep the draft's weights in 8 bits; the text stays"
    )
    command.add_argument("--device", default="auto")
    command.add_argument("--dtype", default="auto", help="float32, bfloat16 or float16")
    command.add_argument("--backend", default="auto")
    command.add_argument(
        "--graphs",
        action=argparse.BooleanOptionalAction,
        default="auto",
        help="capture iterations and prompts in CUDA graphs; default: where that is possible",
    )


def load_decoder(flags: argparse.Namespace) -> StagedDecoder:
    """The decoder that the flags name. Raises ValueError as ``from_pretrained``."""
    lower = {
        name: None if value == "none" else value for name, value in (("draft", flags.draft), ("draft2", flags.draft2))
    }
    names = ("device", "dtype", "backend", "graphs", "plan", "draft_quantization")
    decoder = StagedDecoder.from_pretrained(flags.oracle, **lower, **{name: getattr(flags, name) for name in names})
    if decoder.oracle.model.device.type == "cpu" and is_cold():
        print("the loops of the torch backend are compiled now, once: a minute or so", file=sys.stderr)
    return decoder


def _refuse_unused(flags: argparse.Namespace) -> None:
    """Say what has no effect instead of ignoring it: sampling flags of greedy decoding, colours of JSON."""
    rule = SamplingConfig(**{name: getattr(flags, name) for name in SAMPLING if name != "seed"})
    unused = [*rule.unused, *(["seed"] if rule.is_greedy and flags.seed is not None else [])]
    if unused:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in unused)
        raise ValueError(f"{names}: no effect without --do-sample and a temperature above 0")
    if getattr(flags, "json", False) and flags.color:
        raise ValueError("--color: no effect on --json")


def run_generate(flags: argparse.Namespace) -> None:
    _refuse_unused(flags)
    decoder = load_decoder(flags)
    prompt = sys.stdin.read() if flags.prompt == "-" else flags.prompt
    how = {name: getattr(flags, name) for name in SAMPLING}
    if flags.color:  # the speed that is shown is not that of the first tokens of a process
        decoder.generate(prompt, max_new_tokens=min(8, flags.max_new_tokens), method=flags.method, **how)
    out = decoder.generate(
        prompt,
        max_new_tokens=flags.max_new_tokens,
        method=flags.method,
        stop_strings=flags.stop,
        ignore_eos=flags.ignore_eos,
        **how,
    )
    if flags.json:
        print(json.dumps(vars(out) | {"sequences": out.sequences.tolist()}))
        return
    if not flags.color:
        print(prompt + out.text)
        return
    console = Console(highlight=False, soft_wrap=True, force_terminal=True)
    styles = stage_styles([stage.name for stage in decoder.lower])
    console.print(coloured(decoder.tokenizer, prompt, out.new_token_ids, out.token_stages, styles))
    console.print(legend(styles))
    speed, length = out.stats["tokens_per_second"], out.stats["mean_acceptance_length"]
    seed = f", seed {out.seed}" if flags.do_sample else ""
    console.print(
        f"{len(out.new_token_ids)} tokens, {speed:.1f} tokens/s, {length:.2f} tokens per oracle pass, "
        f"finished by {out.finish_reason}{seed}"
    )


def run_plan(flags: argparse.Namespace) -> None:
    _refuse_unused(flags)
    for name, least in (("turns", 1), ("max_new_tokens", 1), ("minutes", 0)):
        if not getattr(flags, name) >= least:  # nan is not
            raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(flags, name)}")
    decoder = load_decoder(flags)
    ids = [decoder.encode(prompt) for prompt in flags.prompts or DEMO_PROMPTS]
    try:
        flags.out.open("a").close()  # before the search, not after it
    except OSError as error:
        raise ValueError(f"--out: {flags.out}: {error.strerror}") from error
    sampling = {name: getattr(flags, name) for name in SAMPLING if name != "seed"} | {"seed": flags.seed or 0}
    found = search(decoder, ids, sampling, flags.max_new_tokens, flags.turns, flags.minutes, print)
    found.save(flags.out)
    print(f"fastest: {found.fastest}; shapes of all methods in {flags.out}")


def run_compare(flags: argparse.Namespace) -> None:
    _refuse_unused(flags)
    if flags.hf and flags.do_sample:
        raise ValueError("--hf: transformers draws with other noise, so only greedy text can be compared")
    decoder = load_decoder(flags)
    prompts = flags.prompts or list(DEMO_PROMPTS)
    sampling = {name: getattr(flags, name) for name in SAMPLING if name != "seed"} | {"seed": flags.seed or 0}
    hf = None
    if flags.hf:
        source = BUNDLED / "oracle" if flags.oracle == "bundled" else weights.locate(Path(flags.oracle))
        hf = HFGenerate(str(source), decoder.oracle.model.dtype, decoder.oracle.model.device)
    rows, outputs = compare(decoder, prompts, flags.max_new_tokens, sampling, hf)
    if flags.json:
        print(json.dumps(rows))
    else:
        _print_comparison(flags, decoder, prompts, sampling, rows, outputs)
    if any(row["method"] != "HF generate" and row["identical"] != f"{len(prompts)} of {len(prompts)}" for row in rows):
        raise SystemExit("methods differ: this is a bug")


def _print_comparison(flags, decoder, prompts, sampling, rows, outputs) -> None:
    console = Console(highlight=False, soft_wrap=True, force_terminal=flags.color or None)
    if flags.color:
        styles = stage_styles([stage.name for stage in decoder.lower])
        for prompt, out in zip(prompts, outputs, strict=True):
            console.print(coloured(decoder.tokenizer, prompt, out.new_token_ids, out.token_stages, styles))
            console.rule()
        console.print(legend(styles))
        console.print()
    drawn = f"sampled, seed {sampling['seed']}" if sampling["do_sample"] else "greedy"
    conditions = f"{len(prompts)} prompts x {flags.max_new_tokens} tokens, {drawn}, batch 1, {decoder.runtime}"
    print_comparison(console, rows, f"{conditions}; passes are the oracle's")
