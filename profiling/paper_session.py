"""What a run of ``profiling.paper`` works with: its flags, its models and prompts, and what it has to measure."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

import torch

from decoding import StagedDecoder
from decoding.compare import available_methods
from decoding.decoder import BUNDLED
from model import weights
from profiling import ablations, passes, peers, prompts
from profiling.paper_runs import FIXED, STOPPED, Case
from profiling.prompts import SETTINGS
from profiling.shards import Shard


@dataclass(frozen=True)
class Config:
    """What a run measures; a flag is named after its field."""

    out: Path
    oracle: str = "bundled"
    draft: tuple[str, ...] = ()  # the first is the paper's draft, others join the ablations; "none": no such stage
    draft2: tuple[str, ...] = ()  # likewise
    device: str = "auto"
    dtype: str = "auto"
    backend: str = "auto"
    prompts: Path | None = None
    hub: bool = False
    limit: int | None = None  # only the first prompts
    tokens: int = 128
    seeds: int = 2
    peer_seeds: int = 1  # peers draw with generators of their own, so a second seed is only a second sample of speed
    peers: tuple[str, ...] | None = None  # None: those that make sense on this device
    ablation_prompts: int = 8
    ablation_tokens: int = 64
    figure_rows: tuple[int, ...] = passes.ROWS
    samples: int = 20
    resume: bool = False
    rehearsal: bool = False  # in miniature: its figures are no results

    def quick(self) -> "Config":
        """The same in miniature."""
        small = {"limit": 2, "tokens": 12, "seeds": 1, "ablation_prompts": 1, "ablation_tokens": 8}
        return dataclasses.replace(self, **small, figure_rows=(1, 4), samples=2, rehearsal=True)


@dataclass
class Session:
    """The models and prompts of a run, loaded."""

    config: Config
    decoders: dict[str, StagedDecoder]  # the first is the trio of the paper's figures
    prompt_ids: list[list[int]]
    first_prompt: str
    source: str
    peers: list[peers.Peer]
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def decoder(self) -> StagedDecoder:
        return next(iter(self.decoders.values()))

    @property
    def device(self) -> torch.device:
        return self.decoder.oracle.model.device


def load(config: Config, shard: Shard) -> Session:
    """Models, peers and prompts. Raises ValueError for what cannot be had."""
    drafts, tables = sources(config)
    choice = {"device": shard.device(config.device), "dtype": config.dtype, "backend": config.backend}
    decoders = ablations.load(config.oracle, drafts, tables, **choice)
    decoder = next(iter(decoders.values()))
    texts, source = prompt_texts(config)
    if decoder.tokenizer is None:
        raise ValueError("the oracle has no tokenizer, and prompts are text")
    room = max(1, decoder.oracle.model.config.n_positions - config.tokens)
    ids = [decoder.tokenizer.encode(text).ids[-room:] for text in texts]  # the end of a prompt that is too long
    skipped: dict[str, str] = {}
    model = decoder.oracle.model
    names = peers.defaults(model.device) if config.peers is None else config.peers
    folders = [BUNDLED / "oracle" if config.oracle == "bundled" else weights.locate(config.oracle)]
    folders.append(weights.locate(drafts[0]) if drafts[0] else None)
    loaded = peers.load(names, *folders, model.dtype, model.device, skipped.__setitem__) if names else []
    return Session(config, decoders, ids, texts[0], source, loaded, skipped)


def sources(config: Config) -> tuple[list[str | None], list[str | None]]:
    """Drafts and tables, None for no such stage: as ``--draft`` and ``--draft2`` name them, "auto" and "none" too.

    Raises ValueError for "auto" with another oracle than the bundled one.
    """
    chosen = []
    for given, name in ((config.draft, "draft"), (config.draft2, "draft2")):
        default = str(BUNDLED / name) if config.oracle == "bundled" else None
        if "auto" in given and default is None:
            raise ValueError(f"--{name} auto goes with the bundled oracle alone")
        chosen.append([{"auto": default, "none": None}.get(source, source) for source in given or ("auto",)])
    return chosen[0], chosen[1]


def prompt_texts(config: Config) -> tuple[list[str], str]:
    """The prompts and what they are."""
    if config.hub:
        texts, source = prompts.humaneval_from_hub(), "HumanEval"
    elif config.prompts is not None:
        texts, source = prompts.humaneval(config.prompts), "HumanEval"
    else:
        texts, source = list(prompts.OWN), "our own set"
    return texts[: config.limit], source


def suites(session: Session) -> dict[str, list[peers.System]]:
    """The methods of the paper with the peers, and the variants of the ablations; the baseline first in both."""
    decoder = session.decoder
    found = {"paper": [*(peers.Own(decoder, name) for name in available_methods(decoder)), *session.peers]}
    if session.config.ablation_prompts:
        found["ablations"] = ablations.variants(session.decoders)
    return found


def cases(session: Session, suite: str) -> list[list[Case]]:
    """What is to be measured, by prompt."""
    config = session.config
    if suite == "paper":
        extents, chosen, num_seeds = (FIXED, STOPPED), range(len(session.prompt_ids)), config.seeds
    else:
        extents, num_seeds = (FIXED,), 1
        chosen = range(0, len(session.prompt_ids), max(1, len(session.prompt_ids) // config.ablation_prompts))
        chosen = chosen[: config.ablation_prompts]
    draws = [(setting, seed) for setting in SETTINGS for seed in range(num_seeds if SETTINGS[setting] else 1)]
    return [
        [Case(suite, prompt, setting, seed, extent) for setting, seed in draws for extent in extents]
        for prompt in chosen
    ]
