"""The public entry point: load a chain of stages, generate text that is exactly the oracle's own."""

import secrets
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from decoding import katz, text
from decoding.config import (
    METHODS,
    Limits,
    SamplingConfig,
    SpeculationConfig,
    check_seed,
    default_speculation,
    is_integer,
    require_bool,
)
from decoding.execution import choose
from decoding.loop import Generation
from decoding.plan import Plan
from decoding.stages import GPT2Stage, KatzStage, Stage
from kernels.layout import SuccessorTable, aligned
from model import quantization, runtime, weights
from model.capture import on_default_stream
from model.gpt2 import GPT2
from model.signals import interrupts

BUNDLED = Path(__file__).resolve().parent.parent / "model" / "bundled"


@dataclass(frozen=True)
class GenerateOutput:
    """What ``StagedDecoder.generate`` returns."""

    sequences: torch.Tensor  # int64 [1, prompt + new], as in Hugging Face
    new_token_ids: list[int]  # an eos token is part of it, a stop string is not
    text: str | None  # the completion only; None without a tokenizer
    token_stages: list[str]  # per new token, the cheapest stage that had proposed it; "oracle" for its own
    finish_reason: str  # "eos", "stop" or "length"
    seed: int
    stats: dict[str, Any]  # see Statistics.summary


class StagedDecoder:
    """A chain of stages ending in the oracle. Build one with ``from_pretrained``."""

    def __init__(
        self,
        lower: list[Stage],
        oracle: GPT2Stage,
        tokenizer=None,
        chosen: str = "",
        graphs: str | bool = "auto",
        plan: Plan | None = None,
    ):
        for stage in lower:
            if stage.vocab_size != oracle.vocab_size:
                raise ValueError(
                    f"vocab_size of {stage.name} is {stage.vocab_size}, of {oracle.name} {oracle.vocab_size}: "
                    "stages must share one vocabulary"
                )
        if quantization.is_quantized(oracle.model.weights):
            raise ValueError("the oracle must keep its dtype: with int8 weights its text is not its checkpoint's")
        self.lower, self.oracle, self.tokenizer = lower, oracle, tokenizer
        self.runtime, self.execution = chosen, choose(lower, oracle, graphs)
        self._plan = plan
        if plan and plan.conditions.get("runtime", chosen) != chosen:
            warnings.warn(f"the plan was measured on {plan.conditions['runtime']}, this is {chosen}", stacklevel=3)
        for shape in plan.shapes.values() if plan else ():
            for name in shape.stages:
                self._stage(name)

    @classmethod
    def from_pretrained(
        cls,
        oracle: Any = "bundled",
        draft: Any = "auto",
        draft2: Any = "auto",
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        backend: str = "auto",
        graphs: str | bool = "auto",
        plan: str | Path | Plan | None = None,
        draft_quantization: str | None = None,
    ) -> "StagedDecoder":
        """Load the chain draft2, draft, oracle.

        ``oracle`` and ``draft`` are a hub id, a directory, or a ``GPT2LMHeadModel`` in memory; ``draft`` may be a list
        of them, cheapest first, for deeper chains. ``draft2`` is the directory of a table. "bundled" is the small trio
        that comes with the package, "auto" its lower stages, None leaves a stage out. ``dtype`` "auto" is the one that
        the device computes fast, bfloat16 where it has instructions for it and else float32, whatever the checkpoint's:
        name the checkpoint's dtype to compare tokens with ``model.generate``. ``graphs``: whether iterations and passes
        over prompts are captured in CUDA graphs and replayed; "auto" does so wherever it can be, with the triton
        backend on a GPU. The first generation of each shape, with each temperature and each set of filters, captures an
        iteration, of which eight are kept; prompts are padded to a few sizes.
        ``plan``: the shapes that ``staged plan`` found fastest on this machine, for ``method``; None: the defaults.
        ``draft_quantization="int8"`` keeps the drafts' matrices in 8 bits (``model.quantization``), never the oracle's:
        the text stays the same, a draft's pass reads about half of bfloat16's bytes and guesses a little worse.
        Raises ValueError with what to pass where a default does not exist, and for anything that cannot be loaded, does
        not fit together, or is not possible here.
        """
        quantization.check_scheme("draft_quantization", draft_quantization)
        if dtype in quantization.SCHEMES:
            raise ValueError(
                f"dtype must be a float, the oracle's is its promise: draft_quantization={dtype!r} is for drafts"
            )
        if draft_quantization is not None and not draft:
            raise ValueError(f"draft_quantization={draft_quantization!r} needs a draft, and there is none")
        plan = Plan.load(plan) if isinstance(plan, str | Path) else plan
        if plan is not None and not isinstance(plan, Plan):
            raise ValueError(f"plan must be a file that 'staged plan' wrote or a Plan, got {plan!r}")
        chosen = runtime.resolve(device, dtype, backend)
        oracle_stage, tokenizer = _load_stage("oracle", oracle, chosen)
        drafts = [
            _default(source, "draft", oracle) for source in (draft if isinstance(draft, list | tuple) else [draft])
        ]
        drafts = [source for source in drafts if source is not None]
        lower: list[Stage] = []
        table = _default(draft2, "draft2", oracle)
        if table is not None:
            if not isinstance(table, str | Path):
                raise ValueError(f"draft2 must be the directory of a table, got {table!r}")
            rows = katz.load(table)
            home = chosen.ops.state_device(chosen.device)
            rows = SuccessorTable(*(aligned(part.to(home)) for part in rows[:-1]), rows.vocab_size)
            lower.append(KatzStage("draft2", rows, chosen.ops))
        for i, source in enumerate(drafts):
            name = "draft" if len(drafts) == 1 else f"draft_{i + 1}"
            stage, own = _load_stage(name, source, chosen, draft_quantization)
            if tokenizer is not None and own is not None:
                text.require_same_tokens("oracle", tokenizer, name, own)
            lower.append(stage)
        described = f"{chosen}, draft in {draft_quantization}" if draft_quantization else str(chosen)
        return cls(lower, oracle_stage, tokenizer, described, graphs, plan)

    def generate(
        self,
        prompt: str | list[int] | torch.Tensor,
        max_new_tokens: int = 128,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int | None = 50,
        top_p: float = 1.0,
        min_p: float = 0.0,
        seed: int | None = None,
        eos_token_id: int | list[int] | None = None,
        ignore_eos: bool = False,
        stop_strings: str | list[str] | None = None,
        streamer: Any = None,
        method: str | None = None,
        speculation: SpeculationConfig | None = None,
    ) -> GenerateOutput:
        """Continue ``prompt`` (text, token ids, or a tensor [n] or [1, n]) by up to ``max_new_tokens`` tokens.

        The tokens depend on the oracle, the prompt, the sampling arguments and ``seed`` alone: every ``method``
        ("baseline", "speculative", "tree", "staged"; None for the fullest available) and every ``speculation`` gives
        the same ones. ``seed=None`` draws a fresh seed, returned as ``out.seed``. ``eos_token_id=None`` is the
        checkpoint's own. ``streamer`` follows Hugging Face's protocol (``put``, ``end``).

        Raises ValueError before any work for an argument outside its range, FloatingPointError for NaN logits,
        RuntimeError where a stage is in use: one generation at a time, streamers and other threads included.
        """
        prompt_ids = self.encode(prompt)
        require_bool("ignore_eos", ignore_eos)
        if speculation is not None and not isinstance(speculation, SpeculationConfig):
            raise ValueError(f"speculation must be a SpeculationConfig, got {speculation!r}")
        if streamer is not None and not (hasattr(streamer, "put") and hasattr(streamer, "end")):
            raise ValueError(f"streamer must have put and end, as transformers' have, got {streamer!r}")
        sampling = SamplingConfig(do_sample, temperature, top_k, top_p, min_p)
        if sampling.unused:
            unused = ", ".join(sampling.unused)
            warnings.warn(f"{unused}: no effect without do_sample=True and a temperature above 0", stacklevel=2)
        seed = secrets.randbits(63) if seed is None else check_seed(seed)
        limits = Limits(max_new_tokens, self._eos(eos_token_id, ignore_eos), _as_tuple(stop_strings))
        if limits.stop_strings and self.tokenizer is None:
            raise ValueError("stop_strings need a tokenizer, and the oracle was loaded without one")
        stops = text.StopStrings(self.tokenizer, limits.stop_strings) if limits.stop_strings else None
        if method is not None and speculation is not None:
            raise ValueError("give method, which names a shape, or speculation, which is one, not both")
        config = self.plan(method) if speculation is None else speculation
        lower = [self._stage(name) for name in config.stages]
        rule = sampling.with_seed(seed)
        with interrupts(), _exclusively([*lower, self.oracle]), on_default_stream(self.oracle.device):
            generation = Generation(lower, self.oracle, prompt_ids, rule, limits, config, self.execution)
            try:
                return self._drain(generation, prompt_ids, seed, stops, streamer)
            finally:
                generation.close()

    def _drain(self, generation, prompt_ids, seed, stops, streamer) -> GenerateOutput:
        new, completion, num_streamed = [], None, 0
        if streamer is not None:
            streamer.put(torch.tensor([prompt_ids]))
        for emitted in generation.run():
            new += emitted
            if stops and (stop := stops.find(new)):
                keep, completion = stop
                generation.stats.truncate(len(new) - keep)
                generation.finish_reason, new = "stop", new[:keep]
            if streamer is not None:
                is_open = stops and generation.finish_reason is None  # a stop string may take the last tokens away
                ready = stops.num_settled(new) if is_open else len(new)
                if ready > num_streamed:
                    streamer.put(torch.tensor(new[num_streamed:ready]))
                    num_streamed = ready
        if streamer is not None:
            streamer.end()
        if completion is None and self.tokenizer is not None:
            completion = self.tokenizer.decode(new, skip_special_tokens=True)
        return GenerateOutput(
            sequences=torch.tensor([prompt_ids + new]),
            new_token_ids=new,
            text=completion,
            token_stages=generation.stats.token_stages,
            finish_reason=generation.finish_reason,
            seed=seed,
            stats=generation.stats.summary([*generation.lower, generation.oracle]),
        )

    def encode(self, prompt: str | list[int] | torch.Tensor) -> list[int]:
        """Token ids of ``prompt``. Raises ValueError for an empty or too long prompt and for ids out of range."""
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ValueError("the oracle was loaded without a tokenizer: pass token ids, not text")
            try:
                prompt.encode()
            except UnicodeEncodeError as error:  # a lone surrogate, as Python makes of bytes that are no UTF-8
                raise ValueError(f"prompt must be text that UTF-8 can hold: {error}") from error
            ids = self.tokenizer.encode(prompt).ids
        elif isinstance(prompt, torch.Tensor | np.ndarray):
            if prompt.ndim not in (1, 2) or (prompt.ndim == 2 and prompt.shape[0] != 1):
                raise ValueError(f"prompt must be token ids [n] or [1, n], one sequence, got {tuple(prompt.shape)}")
            ids = prompt.reshape(-1).tolist()
        elif isinstance(prompt, Sequence) and not isinstance(prompt, bytes | bytearray):
            ids = list(prompt[0] if len(prompt) == 1 and isinstance(prompt[0], list) else prompt)
        else:
            raise ValueError(f"prompt must be text or token ids, a list or tensor, got {type(prompt).__name__}")
        if not ids:
            raise ValueError("prompt is empty: at least 1 token is needed")
        context, vocab_size = self.oracle.model.config.n_positions, self.oracle.vocab_size
        if len(ids) > context:
            raise ValueError(f"prompt has {len(ids)} tokens, the oracle's context is {context}")
        for token in ids:
            if not is_integer(token) or not 0 <= token < vocab_size:
                raise ValueError(f"prompt token ids must be integers in [0, {vocab_size}), got {token!r}")
        return [int(token) for token in ids]

    def _eos(self, eos_token_id: int | list[int] | None, ignore_eos: bool) -> tuple[int, ...]:
        if ignore_eos:
            return ()
        if eos_token_id is None:
            return self.oracle.model.config.eos_token_ids
        ids = tuple(eos_token_id) if isinstance(eos_token_id, list | tuple) else (eos_token_id,)
        for token in ids:
            if not is_integer(token) or not 0 <= token < self.oracle.vocab_size:
                raise ValueError(f"eos_token_id must be in [0, {self.oracle.vocab_size}), got {token!r}")
        return ids

    def _stage(self, name: str) -> Stage:
        for stage in self.lower:
            if stage.name == name:
                return stage
        raise ValueError(
            f"this decoder has no stage {name!r}, only {[stage.name for stage in self.lower]} and the oracle"
        )

    def plan(self, method: str | None = None) -> SpeculationConfig:
        """The tree shape of ``method`` with this decoder's stages: that of its plan, or else the default one.

        None stands for the plan's fastest method, without a plan for the fullest available.
        Raises ValueError for an unknown method and for one whose stage is missing.
        """
        if method is not None and method not in METHODS:
            raise ValueError(f"method must be one of {METHODS} or None, got {method!r}")
        if self._plan is not None:
            method = method or self._plan.fastest
            if method in self._plan.shapes:
                return self._plan.shapes[method]
        model = self.oracle.model
        rows = model.ops.cheap_rows(model.device, model.dtype)
        names = [stage.name for stage in self.lower]
        return default_speculation(method, names, rows, model.ops.TREE_SHAPE)


@contextmanager
def _exclusively(stages: list[Stage]) -> Iterator[None]:
    """Hold all ``stages``. Raises RuntimeError for one that another generation holds."""
    with ExitStack() as held:
        for stage in stages:
            if not stage.in_use.acquire(blocking=False):
                raise RuntimeError(f"stage {stage.name!r} is in use by another generation: load a decoder for each")
            held.callback(stage.in_use.release)
        yield


def _load_stage(name: str, source: Any, chosen: runtime.Runtime, scheme: str | None = None):
    """A GPT-2 stage and its tokenizer (None where there is none)."""
    tokenizer = None
    if not (hasattr(source, "state_dict") and hasattr(source, "config")):
        if not isinstance(source, str | Path):
            raise ValueError(f"{name} must be a hub id, a directory or a GPT2LMHeadModel, got {type(source).__name__}")
        source = BUNDLED / name if source == "bundled" else weights.locate(source)
        tokenizer = text.load_tokenizer(source)
    try:
        config, tensors = weights.load(source, chosen.dtype, chosen.device)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    if scheme is not None:
        tensors = quantization.quantize(tensors)
    return GPT2Stage(name, GPT2(config, tensors, chosen.ops)), tokenizer


def _default(value: Any, stage: str, oracle: Any) -> Any:
    if isinstance(value, str) and value == "bundled":
        return BUNDLED / stage
    if not (isinstance(value, str) and value == "auto"):
        return value
    if not (isinstance(oracle, str) and oracle == "bundled"):
        raise ValueError(f"{stage}='auto' is the bundled oracle's, {BUNDLED / stage}: pass {stage}=... or {stage}=None")
    return BUNDLED / stage


def _as_tuple(value: str | list[str] | None) -> tuple[str, ...]:
    return () if value is None else (value,) if isinstance(value, str) else value
