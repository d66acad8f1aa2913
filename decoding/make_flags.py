"""The commands that make stages: ``staged train-oracle``, ``staged train-draft``, ``staged build-draft2``."""

import argparse
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import torch

from model.training_config import TrainingConfig

DRAFT_DEFAULTS = {"layers": 2, "width": 128, "minutes": 20.0}
HELP = {
    "layers": "blocks of the model",
    "width": "of the model, a multiple of 64",
    "context": "most positions that it can read",
    "minutes": "budget of the whole run, by the clock",
    "steps": "budget in steps instead of --minutes, if not 0",
    "tokens_per_step": "of one update of the weights, at least --context",
    "tokens_per_pass": "of one pass, whose gradients are added up, if not 0: bounds the memory it takes",
    "short_window": "tokens of the pieces of text at first",
    "full_window_share": "of the budget, at its end, with pieces of --context tokens",
    "learning_rate": "of the matrices (Muon) and the rest (AdamW), after warm-up and before decay",
    "warmup_steps": "in which it rises from nothing",
    "decay_share": "of the budget, at its end, in which it falls to nothing",
    "teacher_share": "of the budget, at its end, that learns from the oracle's law; before, from the text alone",
    "seed": "of weights and the order of text",
}
ON_A_GPU = {"tokens_per_step": 32768, "tokens_per_pass": 16384}  # defaults there


def add_command(commands: argparse._SubParsersAction, name: str, what: str) -> argparse.ArgumentParser:
    return commands.add_parser(name, help=what, description=f"{what[0].upper()}{what[1:]}.")


def add_commands(commands: argparse._SubParsersAction) -> None:
    """The three commands, each with a flag for every field of ``TrainingConfig`` that serves it."""
    oracle = add_command(commands, "train-oracle", "train a GPT-2 on directories of text")
    oracle.add_argument(
        "--tokenizer", type=Path, metavar="DIR", help="with a tokenizer's files; otherwise one is trained"
    )
    oracle.add_argument("--vocab-size", type=int, metavar="N", help="of the tokenizer that is trained (default: 8192)")
    _add_training(oracle, {}, ("vocab_size", "teacher_share"))
    oracle.set_defaults(run=_in_make("train_oracle"))

    draft = add_command(commands, "train-draft", "train a small GPT-2, distilled from an oracle")
    draft.add_argument("--oracle", type=Path, required=True, metavar="DIR", help="the oracle; its tokenizer is used")
    draft.add_argument(
        "--own-text",
        type=int,
        default=0,
        metavar="N",
        help="tokens that the oracle writes itself, to learn from as well",
    )
    draft.add_argument(
        "--own-share",
        type=float,
        default=0.5,
        metavar="S",
        help="of what is learnt from, how much the oracle has written, repeated at most 4 times (default: 0.5)",
    )
    _add_training(draft, DRAFT_DEFAULTS, ("vocab_size",))
    draft.set_defaults(run=_in_make("train_draft"))

    draft2 = add_command(commands, "build-draft2", "estimate a Katz trigram table")
    draft2.add_argument("--tokenizer", type=Path, required=True, metavar="DIR", help="with the oracle's tokenizer.json")
    draft2.add_argument("--contexts", type=int, metavar="N", default=65536, help="pairs of tokens with their own row")
    draft2.add_argument("--model", type=Path, metavar="DIR", help="count text that this model writes, not the data")
    draft2.add_argument("--samples", type=int, metavar="N", help="tokens that it writes (default: 1000000)")
    draft2.add_argument("--temperature", type=float, metavar="T", help="at which it writes (default: 1.5)")
    _add_text(draft2)
    draft2.set_defaults(run=_in_make("build_draft2"))


def _add_text(command: argparse.ArgumentParser) -> None:
    command.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory to write")
    command.add_argument(
        "--data",
        action="append",
        metavar="DIR",
        help="directory of text, or 'installed': Python source beside the interpreter (default); may be repeated",
    )
    command.add_argument(
        "--exclude",
        type=Path,
        metavar="FILE",
        help="JSON lines with prompts (HumanEval.jsonl.gz): files that hold a line of theirs are left out",
    )
    command.add_argument("--suffix", metavar="TEXT", default=".py", help="of the files that are read (default: .py)")


def _add_training(command: argparse.ArgumentParser, defaults: dict, skipped: tuple[str, ...]) -> None:
    _add_text(command)
    command.add_argument(
        "--checkpoint-minutes",
        type=float,
        metavar="N",
        default=3.0,
        help="between checkpoints (default: 3)",
    )
    command.add_argument("--start", type=Path, metavar="DIR", help="begin from this model, which may be a smaller one")
    command.add_argument("--no-compile", action="store_true", help="do not compile: slower, needs no C++ compiler")
    for field in fields(TrainingConfig):
        if field.name not in skipped:
            default = defaults.get(field.name, field.default)
            flag, kind = f"--{field.name.replace('_', '-')}", type(default)
            on_a_gpu = f", on a GPU {ON_A_GPU[field.name]}" if field.name in ON_A_GPU else ""
            said = f"{HELP[field.name]} (default: {default}{on_a_gpu})"
            if torch.cuda.is_available():
                default = ON_A_GPU.get(field.name, default)
            command.add_argument(flag, type=kind, default=default, metavar="N", help=said)


def _in_make(name: str) -> Callable[[argparse.Namespace], None]:
    """The function of ``decoding.make``, imported when it is called: training's imports take seconds."""

    def run(flags: argparse.Namespace) -> None:
        from decoding import make

        getattr(make, name)(flags)

    return run
