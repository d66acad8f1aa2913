"""What a system must offer to be compared with ours: one sequence, token ids in and out, one rule of where it ends."""

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

from decoding.config import SamplingConfig, SpeculationConfig
from decoding.decoder import StagedDecoder
from decoding.text import StopStrings


class Stop(NamedTuple):
    """Where a generation ends before its length; nothing given: fixed length, eos ignored."""

    eos_token_ids: tuple[int, ...] = ()
    strings: tuple[str, ...] = ()


NEVER = Stop()


class Unavailable(Exception):
    """This peer is not installed here, or cannot run these models; the message is the reason."""


class Peer(ABC):
    """One system with the oracle loaded. ``generate`` is all that a benchmark calls."""

    name: str
    kind = "peer"  # of ours "method", or what an ablation varies
    greedy_only = True  # tokens can be compared with ours in greedy decoding alone, see ``profiling.peers``

    def __init__(self, name: str, context: int, tokenizer: Any):
        self.name, self.context, self.tokenizer = name, context, tokenizer

    def generate(
        self,
        prompt_ids: list[int],
        max_new_tokens: int,
        sampling: dict[str, Any] | None = None,
        stop: Stop = NEVER,
        streamer: Any = None,
    ) -> list[int]:
        """New token ids. ``sampling`` takes the names of ``StagedDecoder.generate``, seed included (0 where missing).

        ``streamer`` follows Hugging Face's protocol; it may see tokens beyond a stop string that are not returned.
        Raises ValueError for sampling arguments that are out of range or that this system has not.
        """
        given = dict(sampling or {})
        seed = given.pop("seed", None) or 0
        config = SamplingConfig(**given)
        if stop.strings and self.tokenizer is None:
            raise ValueError("stop strings need a tokenizer, and the oracle's directory has none")
        length = min(max_new_tokens, self.context + 1 - len(prompt_ids))
        new = self._generate(prompt_ids, length, config, seed, stop, streamer)
        found = StopStrings(self.tokenizer, stop.strings).find(new) if stop.strings else None
        return new if found is None else new[: found[0]]

    def warm_up(self, prompt_ids: list[int], max_new_tokens: int, sampling: dict[str, Any] | None = None) -> None:
        """Make ready for generations up to this length: call it with the longest one before any is timed."""
        self.generate(prompt_ids, max_new_tokens, sampling)

    def columns(self) -> dict[str, Any]:
        """What the latest generation counted, as columns of its row; only ours count."""
        return {}

    @abstractmethod
    def _generate(self, prompt_ids, length, config: SamplingConfig, seed: int, stop: Stop, streamer) -> list[int]:
        """At most ``length`` new token ids; what follows a stop string is cut off by the caller."""


class Own:
    """One shape of speculation of our decoder, with the interface of a peer."""

    greedy_only = False  # a seed gives the same tokens with every shape

    def __init__(
        self, decoder: StagedDecoder, name: str, config: SpeculationConfig | None = None, kind: str = "method"
    ):
        """``config`` None: the shape of the method ``name``. Raises ValueError where its stages are missing."""
        self.decoder, self.name, self.kind = decoder, name, kind
        self.config = decoder.plan(name) if config is None else config

    def generate(self, prompt_ids, max_new_tokens, sampling=None, stop=NEVER, streamer=None) -> list[int]:
        """As ``Peer.generate``."""
        self.out = self.decoder.generate(
            prompt_ids,
            max_new_tokens,
            speculation=self.config,
            eos_token_id=list(stop.eos_token_ids) or None,
            ignore_eos=not stop.eos_token_ids,
            stop_strings=list(stop.strings) or None,
            streamer=streamer,
            **{"seed": 0} | (sampling or {}),
        )
        return self.out.new_token_ids

    def warm_up(self, prompt_ids, max_new_tokens, sampling=None) -> None:
        """As ``Peer.warm_up``."""
        self.generate(prompt_ids, max_new_tokens, sampling)

    def columns(self) -> dict[str, Any]:
        """As ``Peer.columns``."""
        stats = self.out.stats
        stages = [s for s in (*self.decoder.lower, self.decoder.oracle) if s.name in (*self.config.stages, "oracle")]
        return {
            "finish": self.out.finish_reason,
            "iteration": stats["iteration"],
            "accepted": stats["accepted"],
            "tried": stats["tried"],
            "prefill_seconds": round(stats["prefill_seconds"], 6),
            **{f"{stage.name}_passes": stage.passes for stage in stages},
            **{f"{stage.name}_bytes": stage.bytes_moved for stage in stages},
        }


System = Own | Peer  # what is measured
