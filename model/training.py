"""Train a GPT-2 on text within a budget, optionally distilled from a larger one; a killed run goes on where it was.

The module trains transformers' ``GPT2LMHeadModel`` (a well-kept library is better than our own backward pass) and
writes what ``save_pretrained`` writes. Hidden matrices are updated by Muon, everything else by AdamW. Most of the
budget uses short windows at random positions, so that every position embedding is trained while attention is cheap; the
last part uses windows of the full context. The learning rate warms up, stays, and decays in the last part, so that a
run can be given more time later: it then goes on from where the decay began.

Commands: ``staged train-oracle``, ``staged train-draft``.
"""

import math
import signal
import time
from collections.abc import Iterator
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from model.files import reading, written
from model.growth import grow
from model.loss import heldout_loss, loss_of
from model.muon import Muon
from model.runtime import bfloat16_is_fast
from model.signals import End, handled
from model.training_config import TrainingConfig

LATEST, STABLE = "checkpoint.pt", "checkpoint_before_decay.pt"


def build(config: TrainingConfig) -> GPT2LMHeadModel:
    """A GPT-2 with head dim 64, tied head, no dropout, initialised from ``config.seed``."""
    torch.manual_seed(config.seed)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=config.vocab_size,
            n_positions=config.context,
            bos_token_id=None,
            eos_token_id=None,
            n_embd=config.width,
            n_layer=config.layers,
            n_head=config.width // 64,
            attn_pdrop=0.0,
            embd_pdrop=0.0,
            resid_pdrop=0.0,
            activation_function="gelu_pytorch_tanh",
        )
    )


def optimizers(model: GPT2LMHeadModel, learning_rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for embeddings, biases and norms."""
    hidden = [p for name, p in model.named_parameters() if p.ndim == 2 and ".h." in name]
    rest = [p for name, p in model.named_parameters() if p.ndim != 2 or ".h." not in name]
    fused = model.device.type == "cuda"
    dtype = torch.bfloat16 if bfloat16_is_fast(model.device) else torch.float32
    return [
        Muon(hidden, lr=learning_rate, weight_decay=0.05, dtype=dtype),
        torch.optim.AdamW(rest, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=fused),
    ]


def windows(ids: np.ndarray, length: int, first: int, count: int, seed: int) -> torch.Tensor:
    """Windows ``first`` to ``first + count`` of an endless shuffle of ``ids`` cut to pieces: int64 [count, length].

    Every piece comes once before any comes twice; each time the cuts are elsewhere.
    """
    num_windows = (len(ids) - length) // length
    if num_windows < 1:
        raise ValueError(f"{len(ids)} tokens of text are too few for windows of {length}")
    rows = []
    for index in range(first, first + count):
        epoch, place = divmod(index, num_windows)
        order, shift = _shuffle(num_windows, length, seed, epoch)
        start = order[place] * length + shift
        rows.append(ids[start : start + length])
    return torch.from_numpy(np.stack(rows).astype(np.int64))


@lru_cache(maxsize=4)
def _shuffle(num_windows: int, length: int, seed: int, epoch: int) -> tuple[np.ndarray, int]:
    rng = np.random.default_rng([seed, length, epoch])
    return rng.permutation(num_windows), int(rng.integers(length))


def compile_blocks(model: GPT2LMHeadModel) -> None:
    """Compile one block for all of them, where the whole model would take minutes for each shape of a batch."""
    for block in model.transformer.h:
        block.compile(dynamic=False)


class Trainer:
    """A run of training: model, optimisers, and what a checkpoint must hold besides.

    Which text a step sees follows from the state alone, so a run that is killed and resumed repeats the same losses
    when its length is given in ``steps`` (with a budget in minutes, the schedule follows the clock).
    """

    def __init__(
        self,
        config: TrainingConfig,
        ids: np.ndarray,
        teacher: GPT2LMHeadModel | None = None,
        compiled: bool = True,
        start: GPT2LMHeadModel | None = None,
    ) -> None:
        """``ids``: uint16 [tokens]. ``compiled`` needs a C++ compiler on a CPU, and is 1.3 times as fast there.

        ``start``: a trained model to begin from, see ``grow``. Raises ValueError where it does not fit, and for too
        little text.
        """
        longest = config.context if config.full_window_share else config.short_window
        windows(ids, longest, 0, 1, config.seed)  # refuses a text that is too short for the last steps
        self.config, self.ids = config, ids
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = build(config)
        if start is not None:
            grow(self.model, start)
        self.model = self.model.to(self.device).train()
        self.teacher = teacher.to(self.device).eval() if teacher is not None else None
        self.optimizers = optimizers(self.model, config.learning_rate)
        self.half = bfloat16_is_fast(self.device)
        self.stance = "default" if compiled else "force_eager"  # of torch.compile
        for one in (self.model, self.teacher):
            if one is not None and compiled:
                compile_blocks(one)
        self.step, self.tokens, self.seconds = 0, 0, 0.0
        self.step_seconds, self.was_stopped = 0.0, False  # of the last step; since that step began
        self.is_updating = False  # weights and counts are between two states
        self.taken = {config.short_window: 0, config.context: 0}  # windows of each length
        self.log: list[dict] = []

    @property
    def progress(self) -> float:
        """Spent share of the budget, 1 at its end."""
        if self.config.steps:
            return min(1.0, self.step / self.config.steps)
        return min(1.0, self.seconds / (60 * self.config.minutes))

    @property
    def decaying(self) -> bool:
        return self.progress > 1.0 - self.config.decay_share

    def rate(self) -> float:
        """Factor of the learning rate: linear warm-up, constant, linear decay to a fiftieth."""
        warm = min(1.0, (self.step + 1) / self.config.warmup_steps)
        return warm * min(1.0, max((1.0 - self.progress) / self.config.decay_share, 0.02))

    def train_step(self) -> float:
        """One update of all weights; returns its loss. One in which the process was stopped counts as long as the one
        before. Raises FloatingPointError for a loss that is no number."""
        start, config, self.was_stopped = time.monotonic(), self.config, False
        rng = np.random.default_rng([config.seed, self.step])
        full = self.progress > 1.0 - config.full_window_share
        length = config.context if full else config.short_window
        count = config.tokens_per_step // length
        batch = windows(self.ids, length, self.taken[length], count, config.seed).to(self.device)
        offset = torch.tensor(int(rng.integers(0, config.context - length + 1)))
        guide = self.teacher if self.progress > 1.0 - config.teacher_share else None
        mean_loss = torch.zeros((), device=self.device)
        for part in batch.split(max(1, (config.tokens_per_pass or config.tokens_per_step) // length)):
            with torch.compiler.set_stance(self.stance):
                loss = loss_of(self.model, part, offset, guide, self.half) * (len(part) / count)
            loss.backward()
            mean_loss += loss.detach()
        self.is_updating = True
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * self.rate()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.taken[length] += count
        self.step += 1
        self.tokens += batch.numel()
        value = self._finite("loss", mean_loss.item())
        self.is_updating = False
        if not self.was_stopped or self.step_seconds == 0.0:
            self.step_seconds = time.monotonic() - start
        self.seconds += self.step_seconds
        return value

    def _finite(self, name: str, value: float) -> float:
        """``value``, so that nothing is saved where it is none. Raises FloatingPointError."""
        if not math.isfinite(value):
            raise FloatingPointError(f"the {name} at step {self.step} is {value}: is --learning-rate too high?")
        return value

    def note_stop(self, *_) -> None:
        """Handler of SIGCONT, which a stopped process receives when it may go on."""
        self.was_stopped = True

    @property
    def flops_per_token(self) -> int:
        """Floating-point operations of a forward and a backward pass, by arithmetic, windows of the short length.

        Six for every weight that a product reads, and attention's (Chowdhery et al. 2022, appendix B); a teacher's
        passes are not counted.
        """
        config = self.config
        matrices = 12 * config.layers * config.width**2 + config.vocab_size * config.width
        return 6 * matrices + 12 * config.layers * config.width * config.short_window

    def row(self, since: tuple[float, int] = (0.0, 0)) -> dict:
        """Where the run is, and its rate since it had taken so many seconds and tokens."""
        rate = (self.tokens - since[1]) / (self.seconds - since[0])
        return {
            "step": self.step,
            "progress": round(self.progress, 4),
            "seconds": round(self.seconds),
            "tokens": self.tokens,
            "tokens_per_second": round(rate),
            "teraflops": round(1e-12 * rate * self.flops_per_token, 3),
        }

    def measure(self, heldout: np.ndarray) -> dict:
        """The ``heldout_loss`` of a row."""
        loss = heldout_loss(self.model.eval(), heldout, self.config.context)
        self.model.train()
        return {"heldout_loss": round(self._finite("held-out loss", loss), 4)}

    def save(self, path: Path) -> None:
        """Write a checkpoint; a kill in the middle leaves the one before."""
        state = {
            "config": asdict(self.config),
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "decaying": self.decaying,
            "text_tokens": len(self.ids),
            **{name: getattr(self, name) for name in ("step", "tokens", "seconds", "taken", "log")},
        }
        with written(path.parent) as folder:
            torch.save(state, folder / path.name)

    def resume(self, out: Path) -> bool:
        """Go on from the checkpoint in ``out``; from before its decay if the budget has grown since. False: none.

        Raises ValueError if it was made under another configuration (the budget aside) or on another text.
        """
        if not (out / LATEST).exists():
            return False
        state = self._read(out / LATEST)
        budget = {name: state["config"][name] for name in ("minutes", "steps")}
        grown = budget != {name: getattr(self.config, name) for name in budget}
        if grown and state["decaying"] and (out / STABLE).exists():
            state = self._read(out / STABLE)
        for name, value in asdict(self.config).items():
            if name not in budget and state["config"][name] != value:
                raise ValueError(f"{out} holds a run with {name} {state['config'][name]}, not {value}")
        if (num_tokens := state.get("text_tokens", len(self.ids))) != len(self.ids):
            raise ValueError(f"{out} holds a run on {num_tokens} tokens of text, not {len(self.ids)}")
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        for name in ("step", "tokens", "seconds", "taken", "log"):
            setattr(self, name, state[name])
        return True

    def _read(self, path: Path) -> dict:
        with reading(path, " as a checkpoint"):
            return torch.load(path, map_location=self.device, weights_only=True)


def train(trainer: Trainer, heldout: np.ndarray, out: Path, checkpoint_minutes: float = 3.0) -> Iterator[dict]:
    """Train until the budget is spent; yields a row after every step, with ``heldout_loss`` where that was measured.

    The last row has one; where the budget was spent before, it is the only one and may lack the loss of a step.
    Checkpoints go to ``out``, one more just before the learning rate decays, and one after the step in which SIGINT or
    SIGTERM asks for the end. Rows: step, progress, seconds, tokens, loss (of this step), and since the last logged row
    tokens_per_second and teraflops per second.
    """
    if len(heldout) < 2:
        raise ValueError(f"{len(heldout)} tokens of held-out text are too few to measure a loss on")
    end = End()
    with handled({signal.SIGCONT: trainer.note_stop, signal.SIGINT: end, signal.SIGTERM: end}):
        yield from _steps(trainer, heldout, out, checkpoint_minutes, end)


def _steps(trainer: Trainer, heldout: np.ndarray, out: Path, checkpoint_minutes: float, end: End) -> Iterator[dict]:
    """The rows of ``train``; once the end is asked for, a checkpoint and the end."""
    if trainer.progress >= 1.0:  # spent before, by a run that was killed before it wrote its model or had more to spend
        last = trainer.log[-1] if trainer.log else {}
        if last.get("progress") != 1.0 or "heldout_loss" not in last:
            trainer.log.append(trainer.row() | trainer.measure(heldout))
        yield trainer.log[-1]
    since, saved = (trainer.seconds, trainer.tokens), time.monotonic()
    while trainer.progress < 1.0:
        stable = not trainer.decaying
        try:
            loss = trainer.train_step()
        except Exception:  # what kills a compiler at work, Ctrl-C in a terminal, asks for the end as well
            if end.number is None or trainer.is_updating:
                raise
            trainer.save(out / LATEST)
            end.carry_out()
        if stable and trainer.decaying:
            trainer.save(out / STABLE)
        row = trainer.row(since) | {"loss": round(loss, 4)}
        done = trainer.progress >= 1.0
        if done or time.monotonic() - saved > 60 * checkpoint_minutes:
            row |= trainer.measure(heldout)
        if "heldout_loss" in row or trainer.step % 20 == 0:
            trainer.log.append(row)
            since = (trainer.seconds, trainer.tokens)
        if "heldout_loss" in row:
            trainer.save(out / LATEST)
            saved = time.monotonic()
        if end.number is not None and not done:
            trainer.save(out / LATEST)
            end.carry_out()
        yield row
    if end.number is not None:
        end.carry_out()
