"""What a training run is told."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TrainingConfig:
    """Flags of the command line carry the same names. Lengths in tokens; shares are of the budget, at its end."""

    layers: int = 7
    width: int = 384
    vocab_size: int = 8192
    context: int = 1024
    minutes: float = 30.0  # of training; what a process is stopped for (SIGSTOP, Ctrl-Z) does not count
    steps: int = 0  # exactly as many instead, if not 0
    tokens_per_step: int = 4096
    tokens_per_pass: int = 0  # gradients of smaller passes are added up, if not 0: bounds the memory it takes
    short_window: int = 256
    full_window_share: float = 0.15
    learning_rate: float = 3e-3
    warmup_steps: int = 40
    decay_share: float = 0.45
    teacher_share: float = 0.4  # before that a student learns from the text alone, many times as fast
    seed: int = 0
