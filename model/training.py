"""Train a small GPT-2 on Python source within a time budget, optionally distilled from a larger one.

    python -m model.training --out DIR --layers 6 --width 256 --minutes 45                  # tokenizer and oracle
    python -m model.training --out DIR --layers 2 --width 128 --minutes 20 --teacher ORACLE  # draft

The module trains transformers' ``GPT2LMHeadModel`` (a well-kept library is better than our own backward pass) and
writes what ``save_pretrained`` writes. Hidden matrices are updated by Muon, everything else by AdamW. The first part of
the budget uses short windows at random positions, so that every position embedding is trained while attention is cheap;
the last part uses windows of the full context.
"""

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from model import corpus


@dataclass(frozen=True)
class TrainingConfig:
    """Flags of the command line carry the same names. Lengths in tokens, ``minutes`` of wall time."""

    layers: int = 6
    width: int = 256
    vocab_size: int = 8192
    context: int = 1024
    minutes: float = 30.0
    tokens_per_step: int = 4096
    short_window: int = 256
    full_window_share: float = 0.25
    learning_rate: float = 3e-3
    warmup_share: float = 0.03
    decay_share: float = 0.45
    teacher_share: float = 0.4  # of the budget, at its end; before that a student learns from the text alone
    seed: int = 0


def build(config: TrainingConfig) -> GPT2LMHeadModel:
    """A GPT-2 with head dim 64, tied head, no dropout, initialised from ``config.seed``."""
    torch.manual_seed(config.seed)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=config.vocab_size,
            n_positions=config.context,
            n_embd=config.width,
            n_layer=config.layers,
            n_head=config.width // 64,
            attn_pdrop=0.0,
            embd_pdrop=0.0,
            resid_pdrop=0.0,
            activation_function="gelu_pytorch_tanh",
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def optimizers(model: GPT2LMHeadModel, learning_rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for embeddings, biases and norms."""
    hidden = [p for name, p in model.named_parameters() if p.ndim == 2 and ".h." in name]
    rest = [p for name, p in model.named_parameters() if p.ndim != 2 or ".h." not in name]
    return [
        torch.optim.Muon(hidden, lr=learning_rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def rate_at(progress: float, config: TrainingConfig) -> float:
    """Factor of the learning rate at ``progress`` in [0, 1]: linear warm-up, constant, linear decay to a fiftieth."""
    if progress < config.warmup_share:
        return max(progress / config.warmup_share, 0.01)
    return min(1.0, max((1.0 - progress) / config.decay_share, 0.02))


def windows(ids: np.ndarray, length: int, count: int, rng: np.random.Generator) -> torch.Tensor:
    """``count`` random windows of ``ids``: int64 [count, length]."""
    starts = rng.integers(0, len(ids) - length, size=count)
    return torch.from_numpy(np.stack([ids[s : s + length] for s in starts]).astype(np.int64))


def loss_of(
    model: GPT2LMHeadModel, tokens: torch.Tensor, offset: torch.Tensor, teacher: GPT2LMHeadModel | None
) -> torch.Tensor:
    """Mean next-token loss in nats; with a teacher, the mean cross-entropy against the teacher's law."""
    positions = offset + torch.arange(tokens.shape[1], device=tokens.device)[None]
    with torch.autocast(tokens.device.type, dtype=torch.bfloat16):
        logits = model(tokens, position_ids=positions, use_cache=False).logits[:, :-1]
        if teacher is None:
            return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
        with torch.no_grad():
            law = teacher(tokens, position_ids=positions, use_cache=False).logits[:, :-1].float().softmax(-1)
    return F.cross_entropy(logits.flatten(0, 1).float(), law.flatten(0, 1))


@torch.no_grad()
def heldout_loss(model: GPT2LMHeadModel, ids: np.ndarray, context: int, num_windows: int = 24) -> float:
    """Nats per token over evenly spaced windows of the held-out text, predictions at all positions of the context."""
    starts = np.linspace(0, len(ids) - context - 1, num_windows).astype(int)
    losses = []
    for start in starts:
        tokens = torch.from_numpy(ids[start : start + context].astype(np.int64))[None]
        losses.append(loss_of(model, tokens.to(model.device), torch.tensor(0), None).item())
    return sum(losses) / len(losses)


def train(
    config: TrainingConfig,
    ids: np.ndarray,
    heldout: np.ndarray,
    teacher: GPT2LMHeadModel | None = None,
    compiled: bool = True,
) -> Iterator[tuple[GPT2LMHeadModel, dict]]:
    """Train until the budget is spent; yields (model, progress row) about twice a minute and at the end.

    The row's ``loss`` is the training loss since the last one; ``heldout_loss`` is always the next-token loss. With a
    teacher, the last ``teacher_share`` of the budget minimises the cross-entropy against its law: the first part
    sees several times as many tokens in the same time. ``compiled`` needs a C++ compiler and is 1.3 times as fast on
    a CPU.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build(config).to(device).train()
    steps = optimizers(model, config.learning_rate)
    step_loss = torch.compile(loss_of, dynamic=False) if compiled else loss_of
    if teacher is not None:
        teacher = teacher.to(device).eval()
    rng = np.random.default_rng(config.seed)
    start = last = time.monotonic()
    tokens_seen, recent = 0, []
    while (progress := (time.monotonic() - start) / (60 * config.minutes)) < 1.0:
        full = progress > 1.0 - config.full_window_share
        length = config.context if full else config.short_window
        batch = windows(ids, length, config.tokens_per_step // length, rng).to(device)
        offset = 0 if full else int(rng.integers(0, config.context - length + 1))
        guide = teacher if progress > 1.0 - config.teacher_share else None
        loss = step_loss(model, batch, torch.tensor(offset), guide)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in steps:
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * rate_at(progress, config)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        tokens_seen += batch.numel()
        recent.append(loss.item())
        if time.monotonic() - last > 30:
            last = time.monotonic()
            yield model, _row(start, tokens_seen, sum(recent) / len(recent))
            recent = []
    final = _row(start, tokens_seen, sum(recent) / max(1, len(recent)))
    yield model, final | {"heldout_loss": heldout_loss(model.eval(), heldout, config.context)}


def _row(start: float, tokens_seen: int, loss: float) -> dict:
    seconds = time.monotonic() - start
    return {"seconds": round(seconds), "tokens": tokens_seen, "loss": round(loss, 4)}


def load_tokens(out: Path, tokenizer_dir: Path | None, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokenizer (trained here, or the teacher's) written to ``out``; returns (training ids, held-out ids)."""
    texts = corpus.collect(corpus.default_roots())
    if tokenizer_dir is None:
        tokenizer = corpus.train_tokenizer(texts.train, vocab_size)
    else:
        tokenizer = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    end = corpus.END_OF_TEXT
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, bos_token=end).save_pretrained(out)
    return corpus.encode(tokenizer, texts.train), corpus.encode(tokenizer, texts.heldout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--teacher", type=Path, help="directory of the model to distil from; its tokenizer is used")
    parser.add_argument("--no-compile", action="store_true", help="do not compile: slower, needs no C++ compiler")
    for name, default in asdict(TrainingConfig()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    flags = vars(parser.parse_args())
    out, teacher_dir, compiled = flags.pop("out"), flags.pop("teacher"), not flags.pop("no_compile")
    config = TrainingConfig(**flags)
    ids, heldout = load_tokens(out, teacher_dir, config.vocab_size)
    print(f"{len(ids) / 1e6:.1f} M training tokens, {len(heldout) / 1e6:.2f} M held out", flush=True)
    teacher = GPT2LMHeadModel.from_pretrained(teacher_dir) if teacher_dir else None
    log = []
    for model, row in train(config, ids, heldout, teacher, compiled):
        log.append(row)
        print(json.dumps(row), flush=True)
        if len(log) % 10 == 0 or "heldout_loss" in row:
            model.save_pretrained(out)
    card = {"config": asdict(config), "teacher": teacher_dir.name if teacher_dir else None, "log": log}
    (out / "training.json").write_text(json.dumps(card, indent=1) + "\n")


if __name__ == "__main__":
    main()
