"""What a user may ask of a generation, checked before any work: sampling, lengths, the shape of speculation."""

import math
import numbers
from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np

from kernels.layout import DEPTH_LIMIT, MAX_CHILDREN, ROW_BLOCK, Sampling, TreeShape
from kernels.reference import TREE_SHAPE, new_seed

MAX_WIDTH = 1024  # nodes that one launch selects, and rounds
MAX_NODES = 2**16  # that a tree has room for, those kept from the iteration before included
MAX_ROOM = 2**14  # rows for nodes in a pass, which paths of 64 places in one block of Triton's allow
LEAST_TEMPERATURE = 1e-15  # and tau: logits over the product of two less leave float32
MOST_TEMPERATURE = 1e15  # and tau: the product of two more is infinite in float32
METHODS = ("baseline", "speculative", "tree", "staged")


@dataclass(frozen=True)
class SamplingConfig:
    """How a token is drawn. Names and meanings are Hugging Face's; greedy unless ``do_sample``."""

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = 50  # 0 or None = off
    top_p: float = 1.0  # 1 = off
    min_p: float = 0.0  # 0 = off

    def __post_init__(self):
        require_bool("do_sample", self.do_sample)
        _require_number(
            "temperature",
            self.temperature,
            lambda value: value == 0 or LEAST_TEMPERATURE <= value <= MOST_TEMPERATURE,
            f"that is 0 or in [{LEAST_TEMPERATURE:g}, {MOST_TEMPERATURE:g}]",
        )
        if self.top_k is not None:
            _require_integer("top_k", self.top_k, lambda value: value >= 0, "at least 0")
        _require_number("top_p", self.top_p, lambda value: 0 < value <= 1, "in (0, 1]")
        _require_number("min_p", self.min_p, lambda value: 0 <= value <= 1, "in [0, 1]")

    @property
    def unused(self) -> list[str]:
        """The fields that were set and have no effect, since decoding is greedy without ``do_sample`` and at
        temperature 0."""
        if not self.is_greedy:
            return []
        changed = [field.name for field in fields(self) if getattr(self, field.name) != field.default]
        saying_so = {"do_sample", "temperature"} if self.temperature == 0 else {"do_sample"}
        return [name for name in changed if name not in saying_so]

    @property
    def is_greedy(self) -> bool:
        return not self.do_sample or self.temperature == 0

    def with_seed(self, seed: int) -> Sampling:
        """The draw rule of the kernels. Temperature 0 is greedy, and greedy has no filter and no noise."""
        words = new_seed(seed)
        if self.is_greedy:
            return Sampling(noise=False, seed=words, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0)
        return Sampling(True, words, float(self.temperature), self.top_k or 0, float(self.top_p), float(self.min_p))


@dataclass(frozen=True)
class SpeculationConfig:
    """The shape of one iteration's tree, cheapest stage first.

    Stage i repeats ``rounds[i]`` times: the stages below extend the tree, then stage i scores its ``widths[i]`` best
    unscored nodes in one pass and gives each its ``children[i]`` best children. The oracle then verifies the
    ``budget`` best nodes. ``tau`` divides perturbed scores before the softmax that makes them edge scores. A stage with
    others below leaves out nodes whose path has no more probability than ``min_prob``; for none, the torch backend does
    not run it.
    ``shared_noise=False`` lets the lower stages rank by their own probabilities alone, the paper's rule: for ablation.
    """

    stages: tuple[str, ...] = ()
    rounds: tuple[int, ...] = ()
    widths: tuple[int, ...] = ()
    children: tuple[int, ...] = ()
    budget: int = 0
    max_depth: int = DEPTH_LIMIT
    tau: float = 0.85
    min_prob: float = 0.0
    shared_noise: bool = True

    def __post_init__(self):
        for name in ("stages", "rounds", "widths", "children"):
            values = getattr(self, name)
            if not isinstance(values, tuple | list):
                raise ValueError(f"{name} must be a tuple, an entry per stage, got {values!r}")
            object.__setattr__(self, name, tuple(values))  # a list cannot be hashed
        if not all(isinstance(name, str) for name in self.stages) or len({*self.stages}) != len(self.stages):
            raise ValueError(f"stages must be names, each once, got {self.stages}")
        for name, most in (("rounds", MAX_WIDTH), ("widths", MAX_WIDTH), ("children", MAX_CHILDREN)):
            values = getattr(self, name)
            if len(values) != len(self.stages):
                raise ValueError(
                    f"{name} must have one entry per stage, got {len(values)} for {len(self.stages)} stages"
                )
            for value in values:
                _require_integer(name, value, lambda v, most=most: 1 <= v <= most, f"in [1, {most}]")
        _require_integer("budget", self.budget, lambda v: 0 <= v < MAX_WIDTH, f"in [0, {MAX_WIDTH - 1}]")
        _require_integer("max_depth", self.max_depth, lambda v: 1 <= v <= DEPTH_LIMIT, f"in [1, {DEPTH_LIMIT}]")
        least, most = LEAST_TEMPERATURE, MOST_TEMPERATURE
        _require_number("tau", self.tau, lambda v: least <= v <= most, f"in [{least:g}, {most:g}]")
        _require_number("min_prob", self.min_prob, lambda v: 0 <= v < 1, "in [0, 1)")
        require_bool("shared_noise", self.shared_noise)
        if self.capacity > MAX_NODES:
            raise ValueError(
                f"rounds, widths and children must make at most {MAX_NODES} nodes, got room for {self.capacity}"
            )

    def __str__(self) -> str:
        """One line, as ``staged plan`` prints it; ``repr`` has every field."""
        stages = zip(self.stages, self.rounds, self.widths, self.children, strict=True)
        parts = [f"{stage} {rounds} x {width} nodes x {children} children" for stage, rounds, width, children in stages]
        return ", ".join([*parts, f"{self.budget} nodes at most {self.max_depth} deep"]) if parts else "no speculation"

    @property
    def min_score(self) -> float:
        """``min_prob`` as a path score."""
        return math.log(self.min_prob) if self.min_prob else -math.inf

    @property
    def capacity(self) -> int:
        """Nodes that a tree may hold: what one iteration can add, and as much kept from the one before, what the lowest
        stage adds last excepted."""
        added, calls = 0, 1
        for rounds, width, children in reversed(list(zip(self.rounds, self.widths, self.children, strict=True))):
            calls *= rounds
            added += calls * width * children
        last = self.rounds[0] * self.widths[0] * self.children[0] if len(self.stages) > 1 else 0
        return -(-(2 * added + last + self.budget + 1) // 16) * 16  # rows of slots start at multiples of 16 bytes

    def room(self, index: int, num_nodes: int, num_head: int) -> int:
        """Rows for nodes in a pass of stage ``index`` that scores ``num_nodes`` of them below ``num_head`` committed
        tokens: the nodes themselves, and ancestors of theirs that the stage has not run.

        The unscored ancestors of a selected node are selected with it, so the others have been scored by this stage,
        whose cache has them then, or by one between it and the oracle, or from what the oracle drew before. A node to
        score is at most at depth ``max_depth`` - 1, so its path has at most ``max_depth`` - 2 nodes between the root
        and itself. The topmost stage has no other above it; what a table answers in its place finds room where a block
        of ROW_BLOCK rows has some left; nodes without room wait. One row less for the oracle, stage ``len(stages)``,
        which always scores the root, the last of the committed tokens: 16 nodes take 16 rows and fill one block.
        """
        if index == len(self.stages):
            return max(0, num_nodes - 1) if self.budget else num_nodes
        if index < len(self.stages) - 1:
            return min(MAX_ROOM, num_nodes + min(self.capacity, self.widths[index] * max(0, self.max_depth - 2)))
        return num_nodes + (-(num_head + num_nodes) % ROW_BLOCK if index else 0)


def chain(num_tokens: int, stage: str = "draft") -> SpeculationConfig:
    """Classical speculative decoding: the draft proposes ``num_tokens`` tokens one after the other, no branches."""
    return SpeculationConfig((stage,), (num_tokens,), (1,), (1,), num_tokens, num_tokens)


def default_speculation(
    method: str | None, available: list[str], rows: int = 16, shape: TreeShape = TREE_SHAPE
) -> SpeculationConfig:
    """The default shape of ``method`` on the stages there are, cheapest first; None means all of them.

    ``rows`` are those that a pass takes for little more than one: the nodes of a tree fill them together with the root.
    ``shape``: what a staged tree owes to its backend, ``TREE_SHAPE`` of that.

    Raises ValueError where the method needs a stage that is missing.
    """
    drafts = tuple(name for name in available if name != "draft2")
    if method is None:
        method = "staged" if "draft2" in available else "tree" if drafts else "baseline"
    elif method == "staged" and ("draft2" not in available or not drafts):
        raise ValueError(f"method 'staged' needs draft2 and a draft, this decoder has {available}")
    elif method in ("speculative", "tree") and not drafts:
        raise ValueError(f"method {method!r} needs a draft, this decoder has {available}")
    if method == "baseline":
        return SpeculationConfig()
    if method == "speculative":
        return chain(4, drafts[-1])
    if method == "tree":
        return SpeculationConfig(drafts[-1:], (4,), (4,), (4,), budget=rows - 1, max_depth=8)
    lookup = ("draft2",) if "draft2" in available else ()
    n, m = len(lookup), len(drafts)
    rounds = (shape.lookup_rounds,) * n + (2,) * (m - 1) + (shape.draft_rounds,) * min(m, 1)
    widths = (shape.lookup_width,) * n + (rows - 1,) * m
    children = (4,) * n + (shape.draft_children,) * m
    return SpeculationConfig(lookup + drafts, rounds, widths, children, rows - 1, 12, min_prob=shape.min_prob)


@dataclass(frozen=True)
class Limits:
    """Where a generation ends. ``max_new_tokens`` counts the eos token; ``eos_token_ids`` is empty under ignore_eos."""

    max_new_tokens: int = 128
    eos_token_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()

    def __post_init__(self):
        _require_integer("max_new_tokens", self.max_new_tokens, lambda value: value >= 1, "at least 1")
        if not isinstance(self.stop_strings, tuple | list):
            raise ValueError(f"stop_strings must be a string or a list of them, got {self.stop_strings!r}")
        for stop in self.stop_strings:
            if not isinstance(stop, str) or not stop:
                raise ValueError(f"stop_strings must be non-empty strings, got {stop!r}")


def check_seed(seed: int) -> int:
    """``seed`` itself if it is an integer of 64 bits."""
    _require_integer("seed", seed, lambda value: 0 <= value < 2**64, "in [0, 2**64)")
    return int(seed)


def is_integer(value: object) -> bool:
    """Any integer type but bool."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def require_bool(name: str, value: object) -> None:
    """Raises ValueError for what is true or false only by Python's rules, as the text "False" is."""
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"{name} must be True or False, got {value!r}")


def _require_integer(name: str, value: object, allowed: Callable[[int], bool], wanted: str) -> None:
    if not is_integer(value):
        raise ValueError(f"{name} must be an integer {wanted}, got {value!r}")
    if not allowed(value):
        raise ValueError(f"{name} must be {wanted}, got {value}")


def _require_number(name: str, value: object, allowed: Callable[[float], bool], wanted: str) -> None:
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    try:
        is_number = is_number and math.isfinite(value)
    except OverflowError:  # an integer beyond all floats
        is_number = False
    if not is_number or not allowed(value):
        raise ValueError(f"{name} must be a number {wanted}, got {value!r}")
