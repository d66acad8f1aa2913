"""What the commands do that make stages; their flags are in ``make_flags``."""

import argparse
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from tokenizers import Tokenizer
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from decoding import katz, text
from decoding.command_line import printable
from model import corpus, samples, training, weights
from model.files import reading, written
from model.heap import keep_freed_memory
from model.runtime import bfloat16_is_fast
from model.training_config import TrainingConfig

TOKENS, OWN_TEXT, SOURCES, CARD = "tokens.npz", "own_text.npy", "sources.json", "training.json"
MOST_TOKENS = 65536  # ids of text are kept in 16 bits
MOST_REPEATS = 4  # of the oracle's text: up to there a text is worth about as much as new one (Muennighoff et al. 2023)


def read_corpus(data: list[str] | None, suffix: str, exclude: Path | None = None) -> corpus.Corpus:
    """What lies in the directories ``data``; 'installed' is the installed Python source."""
    excluded = corpus.telling_lines(exclude) if exclude else frozenset()
    sources = []
    for name in data or ["installed"]:
        sources += corpus.installed_sources() if name == "installed" else corpus.directory_sources(Path(name))
    return corpus.collect(sources, suffix, excluded=excluded)


def prepare(flags: argparse.Namespace, tokenizer_dir: Path | None) -> tuple[np.ndarray, np.ndarray]:
    """Token ids to train on and held out, uint16; written to ``flags.out`` and read from there when a run resumes.

    Raises ValueError where another tokenizer's lie there, or those of text that was chosen otherwise.
    """
    stored, excluded = flags.out / TOKENS, flags.exclude.name if flags.exclude else None
    asked = {"vocab_size": None if tokenizer_dir else _vocab_size(flags), "suffix": flags.suffix, "exclude": excluded}
    if stored.exists():
        with reading(flags.out / SOURCES):
            noted = asked | json.loads((flags.out / SOURCES).read_text())  # folders of before have fewer notes
        kept = _tokenizer(flags.out)
        if tokenizer_dir is not None:
            is_other = _rules(_tokenizer(tokenizer_dir)) != _rules(kept)
        else:
            is_other = noted["vocab_size"] != asked["vocab_size"] or kept.get_vocab_size() > asked["vocab_size"]
        if is_other:
            raise ValueError(f"{flags.out} holds text in the tokens of another tokenizer")
        for name in ("suffix", "exclude"):
            if noted[name] != asked[name]:
                raise ValueError(f"{name} was {noted[name]} when the text in {flags.out} was read, not {asked[name]}")
        print(f"text as stored in {flags.out}, whatever --data says")
        with reading(stored), np.load(stored) as arrays:
            return arrays["train"], arrays["heldout"]
    texts = read_corpus(flags.data, flags.suffix, flags.exclude)
    if tokenizer_dir is None:
        tokenizer = corpus.train_tokenizer(texts.train, _vocab_size(flags))
    else:
        tokenizer = _tokenizer(tokenizer_dir)
    end = corpus.END_OF_TEXT
    train, heldout = corpus.encode(tokenizer, texts.train), corpus.encode(tokenizer, texts.heldout)
    sources = {"sources": texts.card(), "excluded_files": texts.left_out["excluded"]} | asked
    with written(flags.out) as folder:
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, bos_token=end).save_pretrained(folder)
        (folder / SOURCES).write_text(json.dumps(sources, indent=1) + "\n")
        np.savez(folder / TOKENS, train=train, heldout=heldout)
    return train, heldout


def _vocab_size(flags: argparse.Namespace) -> int:
    return TrainingConfig.vocab_size if flags.vocab_size is None else flags.vocab_size


def _rules(tokenizer: Tokenizer) -> dict:
    """What makes tokens of text: vocabulary and merges."""
    return json.loads(tokenizer.to_str())["model"]


def _tokenizer(directory: Path) -> Tokenizer:
    tokenizer = text.load_tokenizer(directory)
    if tokenizer is None:
        raise ValueError(f"no tokenizer.json, nor vocab.json with merges.txt, in {directory}")
    if tokenizer.token_to_id(corpus.END_OF_TEXT) is None:
        raise ValueError(f"the tokenizer in {directory} has no {corpus.END_OF_TEXT} to stand between texts")
    return tokenizer


def _num_tokens(directory: Path) -> int:
    """The vocabulary of the model in ``directory``, which may be padded; of its tokenizer where there is no model."""
    num_tokens = least = 1 + max(_tokenizer(directory).get_vocab().values())
    config = directory / "config.json"
    if config.is_file():
        with reading(config):
            num_tokens = int(json.loads(config.read_text(encoding="utf-8"))["vocab_size"])
    if not least <= num_tokens <= MOST_TOKENS:
        raise ValueError(
            f"{num_tokens} tokens in {directory} must hold the tokenizer's {least} ids and be at most {MOST_TOKENS}"
        )
    return num_tokens


def _refuse_loss(flags: argparse.Namespace) -> None:
    """Raises ValueError where a run would write over a model or a tokenizer that no such run has made."""
    for name in ("oracle", "start", "tokenizer"):
        given = getattr(flags, name, None)
        if given is not None and given.resolve() == flags.out.resolve():
            raise ValueError(f"--out: {flags.out} is the folder of --{name}, which would be lost")
    theirs = [name for name in ("config.json", "tokenizer.json") if (flags.out / name).exists()]
    if theirs and not (flags.out / SOURCES).exists():
        raise ValueError(f"--out: {flags.out} holds a {theirs[0]} that was not made here and would be lost")


def train_oracle(flags: argparse.Namespace) -> None:
    if flags.tokenizer is not None and flags.vocab_size is not None:
        raise ValueError("vocab-size is that of the tokenizer: give one of --tokenizer and --vocab-size")
    _train(flags, flags.tokenizer, None)


def train_draft(flags: argparse.Namespace) -> None:
    _train(flags, flags.oracle, _model(flags.oracle))


def _model(directory: Path) -> GPT2LMHeadModel:
    if not (directory / "config.json").is_file():
        raise ValueError(f"no trained model in {directory}")
    try:
        weights.load(directory, torch.float32, "cpu")  # transformers makes up what is missing
        return GPT2LMHeadModel.from_pretrained(directory)
    except Exception as error:  # of transformers, safetensors or the hub's checks of a config
        raise ValueError(f"{directory} holds no GPT-2 that can be loaded: {error}") from error


def _begin(flags: argparse.Namespace) -> None:
    """Make the folder to write before any work."""
    try:
        flags.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out: {flags.out}: {error.strerror}") from error


def own_text(directory: Path, prompt_ids: np.ndarray, num_tokens: int, temperature: float) -> np.ndarray:
    """About ``num_tokens`` tokens written by the model in ``directory``, a few tokens of text before each row."""
    model = _model(directory)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model.to(device, torch.bfloat16 if bfloat16_is_fast(torch.device(device)) else torch.float32).eval()
    parts = list(track(samples.sample_text(model, prompt_ids, num_tokens, temperature), f"{directory.name} writes"))
    return np.concatenate([part.flatten() for part in parts])


def blend(ids: np.ndarray, own: np.ndarray, own_share: float) -> np.ndarray:
    """``ids`` and behind them ``own``, as often as makes it ``own_share`` of the whole, once to MOST_REPEATS times."""
    times = round(own_share / (1 - own_share) * len(ids) / len(own))
    return np.concatenate([ids, *[own] * min(max(1, times), MOST_REPEATS)])


def _train(flags: argparse.Namespace, tokenizer_dir: Path | None, teacher: GPT2LMHeadModel | None) -> None:
    names = [field.name for field in fields(TrainingConfig) if hasattr(flags, field.name)]
    given = {name: getattr(flags, name) for name in names if name != "vocab_size"}
    TrainingConfig(**given)  # refuses what no run can be, before text is read
    if tokenizer_dir is None and not 257 <= _vocab_size(flags) <= MOST_TOKENS:
        raise ValueError(
            f"vocab-size must be from 257, all bytes and the end, to {MOST_TOKENS}, got {flags.vocab_size}"
        )
    if tokenizer_dir is not None:
        _num_tokens(tokenizer_dir)  # refuses what is too large, before text is read
    if teacher is not None and teacher.config.n_positions < flags.context:
        raise ValueError(f"context must be at most the oracle's, {teacher.config.n_positions}, got {flags.context}")
    if teacher is not None and not 0 < flags.own_share < 1:
        raise ValueError(f"own-share must be above 0 and below 1, got {flags.own_share}")
    if teacher is not None and flags.own_text < 0:
        raise ValueError(f"own-text must be at least 0, got {flags.own_text}")
    if not flags.checkpoint_minutes >= 0:
        raise ValueError(f"checkpoint-minutes must be at least 0, got {flags.checkpoint_minutes}")
    _refuse_loss(flags)
    start = _model(flags.start) if flags.start else None
    _begin(flags)
    ids, heldout = prepare(flags, tokenizer_dir)
    if teacher is not None and flags.own_text:
        stored = flags.out / OWN_TEXT
        if not stored.exists():
            own = own_text(flags.oracle, ids, flags.own_text, 1.0)
            with written(flags.out) as folder:
                np.save(folder / OWN_TEXT, own)
        num_text = len(ids)
        with reading(stored):
            ids = blend(ids, np.load(stored), flags.own_share)
        share = 1 - num_text / len(ids)
        if share < 0.9 * flags.own_share:
            print(f"the oracle's own text is {share:.1%} of what is learnt from: a larger --own-text makes it more")
    tokenizer = _tokenizer(flags.out)
    config = TrainingConfig(**given, vocab_size=_num_tokens(tokenizer_dir or flags.out))
    origin = _ancestry(flags.start, start) if flags.start else None
    if not torch.cuda.is_available():
        keep_freed_memory()
    trainer = training.Trainer(config, ids, teacher, compiled=not flags.no_compile, start=start)
    end = tokenizer.token_to_id(corpus.END_OF_TEXT)
    for one in (trainer.model.config, trainer.model.generation_config):
        one.bos_token_id = one.eos_token_id = end
    console = Console(highlight=False, soft_wrap=True)
    num_parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    console.print(f"{num_parameters / 1e6:.1f} M parameters, {len(ids):,} tokens of text", end=", ")
    console.print(f"{len(heldout):,} held out, on {trainer.device}")
    if trainer.resume(flags.out):
        console.print(f"goes on after step {trainer.step}, {trainer.progress:.0%} of the budget")
    try:
        for row in report(console, training.train(trainer, heldout, flags.out, flags.checkpoint_minutes)):
            if "heldout_loss" in row:
                _write_model(flags, trainer, num_parameters, origin)
    except (KeyboardInterrupt, SystemExit):
        if trainer.progress < 1.0:
            console.print(f"stopped and saved after step {trainer.step}: the same command goes on from there")
        raise


def report(console: Console, rows: Iterator[dict]) -> Iterator[dict]:
    """Pass rows on; print one now and then: progress, time left, losses, rate."""
    losses, printed = [], 0
    for row in rows:
        if "loss" in row:
            losses.append(row["loss"])
        if row["seconds"] - printed >= 10 or "heldout_loss" in row:
            left = row["seconds"] * (1 / max(row["progress"], 1e-4) - 1)
            said = [f"loss {sum(losses) / len(losses):.3f}"] if losses else []
            said += [f"held out {row['heldout_loss']:.3f}"] if "heldout_loss" in row else []
            console.print(
                f"{row['progress']:6.1%}  {left / 60:5.1f} min left  step {row['step']}  "
                f"{', '.join(said)}  {row['tokens_per_second']} tokens/s"
            )
            losses, printed = [], row["seconds"]
        yield row


def _write_model(
    flags: argparse.Namespace, trainer: training.Trainer, num_parameters: int, origin: dict | None
) -> None:
    card = {
        "command": printable("staged", sys.argv[1:]),
        "started_from": origin,
        "config": asdict(trainer.config),
        "parameters": num_parameters,
        "text_tokens": len(trainer.ids),
        "teacher": flags.oracle.name if trainer.teacher is not None else None,
        **json.loads((flags.out / SOURCES).read_text()),
        "log": trainer.log,
    }
    with written(flags.out) as folder:
        trainer.model.save_pretrained(folder)
        (folder / CARD).write_text(json.dumps(card, indent=1) + "\n")


def _ancestry(directory: Path, start: GPT2LMHeadModel) -> dict:
    """What the model to begin from was: parameters, the tokens that it and those before it had seen, its making."""
    found = {"parameters": start.num_parameters(), "tokens": None}
    if (directory / CARD).is_file():
        card = json.loads((directory / CARD).read_text())
        earlier = (card.get("started_from") or {}).get("tokens") or 0
        found["tokens"] = earlier + card["log"][-1]["tokens"]
        found |= {name: card.get(name) for name in ("command", "started_from")}
    return found


def build_draft2(flags: argparse.Namespace) -> None:
    if flags.model is None and (flags.samples is not None or flags.temperature is not None):
        raise ValueError("samples and temperature are of the text that a --model writes")
    if flags.contexts < 0:
        raise ValueError(f"contexts must be at least 0, got {flags.contexts}")
    num_samples = 1_000_000 if flags.samples is None else flags.samples
    temperature = 1.5 if flags.temperature is None else flags.temperature
    if num_samples < 1 or not 0 < temperature < math.inf:
        raise ValueError(f"samples and temperature must be above 0 and finite, got {num_samples} and {temperature}")
    tokenizer, num_tokens = _tokenizer(flags.tokenizer), _num_tokens(flags.tokenizer)
    if flags.model is not None:
        vocab_size = _model(flags.model).config.vocab_size  # all of it is loaded, so that it is known to be whole
        if vocab_size != num_tokens:
            raise ValueError(f"the model in {flags.model} has {vocab_size} tokens, the tokenizer {num_tokens}")
    _begin(flags)
    ids = corpus.encode(tokenizer, read_corpus(flags.data, flags.suffix, flags.exclude).train)
    origin = "text"
    if flags.model is not None:
        ids = own_text(flags.model, ids, num_samples, temperature)
        origin = f"text that {flags.model.name} wrote at temperature {temperature}"
    table = katz.KatzTrigram(ids, num_tokens).bake(flags.contexts)
    katz.save(table, flags.out, {"estimated_from": origin, "tokens": len(ids)})
    print(f"{table.tokens.shape[0]} rows from {len(ids):,} tokens of {origin} in {flags.out}")
