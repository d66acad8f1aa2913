"""What a training run is told."""

import math
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

    def __post_init__(self) -> None:
        """Raises ValueError for what no run can be."""
        least = {"layers": 1, "vocab_size": 2, "context": 2, "short_window": 2, "steps": 0, "tokens_per_pass": 0}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise ValueError(f"{name} must be at least {value}, got {getattr(self, name)}")
        if self.width < 64 or self.width % 64:
            raise ValueError(f"width must be a multiple of 64, the size of a head, got {self.width}")
        if self.short_window > self.context:
            raise ValueError(f"short_window must be at most context, {self.context}, got {self.short_window}")
        if self.tokens_per_step < self.context:
            raise ValueError(f"tokens_per_step must be at least context, {self.context}, got {self.tokens_per_step}")
        if not self.steps and not 0 < self.minutes < math.inf:
            raise ValueError(f"minutes must be above 0 and finite, or steps given, got {self.minutes}")
        if not 0 < self.learning_rate < math.inf or self.warmup_steps < 1:
            raise ValueError(f"both above 0: got learning_rate {self.learning_rate}, warmup_steps {self.warmup_steps}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be in [0, 2**63), got {self.seed}")
        if not self.decay_share > 0:
            raise ValueError(f"decay_share must be above 0, got {self.decay_share}")
        for name in ("full_window_share", "decay_share", "teacher_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be from 0 to 1, got {getattr(self, name)}")
