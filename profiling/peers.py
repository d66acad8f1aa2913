"""The systems that a user would pick today for the same models, behind one small interface.

    loaded = peers.load(peers.defaults(device), oracle_dir, draft_dir, dtype, device)
    new_ids = loaded[0].generate(prompt_ids, 64, {"do_sample": True, "seed": 7}, peers.NEVER, streamer)

| name | what it is |
| --- | --- |
| hf-generate | transformers' ``generate`` as it comes: eager, dynamic cache |
| hf-static-compile | the same with ``cache_implementation="static"``, which compiles decoding by ``torch.compile`` |
| hf-assisted | ``assistant_model`` = our draft |
| hf-prompt-lookup | ``prompt_lookup_num_tokens=10``, n-grams of up to 2 |
| ctranslate2 | CTranslate2 in the same dtype and with as many threads as torch (extra ``peers`` of this package) |

Each is configured as people would, that is by its defaults. Assisted generation drafts up to 20 tokens a round
(``num_assistant_tokens``, schedule "constant"), and stops drafting where the draft gives its own token less than 0.4
(``assistant_confidence_threshold``; adapted during a generation where scikit-learn is installed, fixed elsewhere).

All count new token ids and stop as ``StagedDecoder.generate`` does: an eos token is returned, a stop string is not, and
a context of n positions can be fed n tokens. Sampled text comes from the peer's own generator, so it never equals ours
for a seed: then only speed and acceptance can be compared. CTranslate2 cannot be given a seed per call. Each ``put`` of
a streamer after the prompt's is one pass of the oracle. On a GPU only hf-generate was run yet.
"""

import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import CompileConfig, GPT2LMHeadModel, StoppingCriteria, StoppingCriteriaList

from decoding.compare import HFGenerate, first_difference
from decoding.config import SamplingConfig
from decoding.text import StopStrings, load_tokenizer
from profiling.peer import NEVER, Own, Peer, Stop, System, Unavailable

__all__ = ["NAMES", "NEVER", "Own", "Peer", "Stop", "System", "Unavailable", "defaults", "first_difference", "load"]

LOOKUP_TOKENS = 10  # what transformers' own candidate generator takes where nothing is said


class HFPeer(Peer):
    """transformers' ``generate``; ``options`` are the arguments that make the variant."""

    def __init__(self, name: str, hf: HFGenerate, tokenizer: Any, options: dict[str, Any]):
        super().__init__(name, hf.model.config.n_positions, tokenizer)
        self.hf, self.options = hf, options

    def _generate(self, prompt_ids, length, config, seed, stop, streamer):
        options = self.options | _as_hf(config)
        if looked_up := options.get("prompt_lookup_num_tokens"):  # drafts past the end of the context and fails there
            room = self.context + 1 - len(prompt_ids) - length
            options["prompt_lookup_num_tokens"] = min(looked_up, room) or None
        if stop.strings:
            criterion = _StopStrings(self.tokenizer, stop.strings, len(prompt_ids))
            options["stopping_criteria"] = StoppingCriteriaList([criterion])
        torch.manual_seed(seed)
        eos = list(stop.eos_token_ids) or None
        return self.hf.generate(prompt_ids, length, eos_token_id=eos, streamer=streamer, **options)


class CompiledHFPeer(HFPeer):
    """The variant that compiles. Its code is for one cache length; a longer text brings a longer cache and new code."""

    def warm_up(self, prompt_ids, max_new_tokens, sampling=None) -> None:
        """Compile for this length alone, and forget others.

        Else transformers would keep the longest cache for all texts, and torch would make the second length's code one
        for any length, which is slower.
        """
        torch.compiler.reset()
        for kept in ("_compiled_call", "_previous_max_cache_length"):
            vars(self.hf.model).pop(kept, None)
        for _ in range(2):  # on a GPU the second one records its graphs
            self.generate(prompt_ids, max_new_tokens, sampling)


class _StopStrings(StoppingCriteria):
    """Our rule for stop strings, asked after every step, as our decoder does after every iteration."""

    def __init__(self, tokenizer: Any, strings: tuple[str, ...], num_prompt: int):
        self.stops, self.num_prompt = StopStrings(tokenizer, strings), num_prompt

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        found = self.stops.find(input_ids[0, self.num_prompt :].tolist())
        return torch.tensor([found is not None], device=input_ids.device)


def _as_hf(config: SamplingConfig) -> dict[str, Any]:
    if not config.do_sample or config.temperature == 0:
        return {"do_sample": False}
    return {
        "do_sample": True,
        "temperature": float(config.temperature),
        "top_k": config.top_k or 0,
        "top_p": float(config.top_p),
        "min_p": config.min_p or None,
    }


class CTranslate2Peer(Peer):
    """CTranslate2 on the converted checkpoint. Its vocabulary names each token by its id, so no tokenizer is needed."""

    def __init__(self, name: str, model: GPT2LMHeadModel, tokenizer: Any, dtype: torch.dtype, device: torch.device):
        super().__init__(name, model.config.n_positions, tokenizer)
        try:
            import ctranslate2
        except ImportError as error:
            raise Unavailable(f"not installed (pip install ctranslate2): {error}") from error
        compute_type = str(dtype).removeprefix("torch.")
        try:
            if compute_type not in (types := ctranslate2.get_supported_compute_types(device.type)):
                raise Unavailable(f"no {compute_type} on this {device.type}, only {', '.join(sorted(types))}")
            with tempfile.TemporaryDirectory() as folder:
                _convert(model, folder)
                ctranslate2.set_random_seed(0)  # read once, by each worker's generator: a call has no seed of its own
                self.generator = ctranslate2.Generator(
                    folder,
                    device=device.type,
                    device_index=device.index or 0,
                    compute_type=compute_type,
                    intra_threads=torch.get_num_threads(),
                )
            self.generate([0], 1)
        except (RuntimeError, ValueError) as error:  # no such GPU, a CUDA library of another version, a model it lacks
            raise Unavailable(f"cannot run this model on {device.type}: {' '.join(str(error).split())}") from error

    def _generate(self, prompt_ids, length, config, seed, stop, streamer):
        new: list[int] = []
        stops = StopStrings(self.tokenizer, stop.strings) if stop.strings else None

        def step(result) -> bool:
            new.append(result.token_id)
            if streamer is not None:
                streamer.put(torch.tensor([result.token_id]))
            return stops is not None and stops.find(new) is not None

        if streamer is not None:
            streamer.put(torch.tensor([prompt_ids]))
        (result,) = self.generator.generate_batch(
            [[str(token) for token in prompt_ids]],
            max_length=length,
            include_prompt_in_result=False,  # the prompt in one pass
            end_token=list(stop.eos_token_ids),  # an empty list: none
            return_end_token=True,
            callback=step if streamer is not None or stop.strings else None,
            **_as_ctranslate2(config),
        )
        if streamer is not None:
            streamer.end()
        return result.sequences_ids[0]


def _convert(model: GPT2LMHeadModel, folder: str) -> None:
    from ctranslate2.converters.transformers import GPT2Loader

    spec = GPT2Loader().get_model_spec(model)
    spec.register_vocabulary([str(token) for token in range(model.config.vocab_size)])
    # never consulted: prompts are whole, and every generation names its end tokens
    spec.config.bos_token = spec.config.eos_token = spec.config.unk_token = "0"
    spec.config.layer_norm_epsilon = model.config.layer_norm_epsilon
    spec.validate()
    spec.optimize(quantization="float32")
    spec.save(folder)


def _as_ctranslate2(config: SamplingConfig) -> dict[str, Any]:
    if not config.do_sample or config.temperature == 0:
        return {"sampling_topk": 1}
    if config.min_p:
        raise ValueError(f"CTranslate2 has no min_p, got {config.min_p}")
    return {
        "sampling_topk": config.top_k or 0,
        "sampling_topp": float(config.top_p),
        "sampling_temperature": float(config.temperature),
    }


class _Makers:
    """What the peers are made from; models are loaded once, when the first of them asks."""

    def __init__(self, oracle_dir, draft_dir, dtype: torch.dtype, device: torch.device):
        self.oracle_dir, self.draft_dir, self.dtype, self.device = oracle_dir, draft_dir, dtype, device
        self.tokenizer = load_tokenizer(Path(oracle_dir))

    @cached_property
    def hf(self) -> HFGenerate:
        return HFGenerate(str(self.oracle_dir), self.dtype, self.device)

    def _hf_peer(self, name: str, kind: type[HFPeer] = HFPeer, **options: Any) -> HFPeer:
        return kind(name, self.hf, self.tokenizer, options)

    def generate(self, name: str) -> Peer:
        return self._hf_peer(name)

    def static_compile(self, name: str) -> Peer:
        if self.device.type != "cpu":
            return self._hf_peer(name, CompiledHFPeer, cache_implementation="static")  # compiles by itself
        if shutil.which("g++") is None and shutil.which("clang++") is None:
            raise Unavailable("torch.compile needs a C++ compiler on a CPU, and there is none")
        compiled = CompileConfig()
        compiled._compile_all_devices = True  # transformers compiles on a CPU only if told so
        return self._hf_peer(name, CompiledHFPeer, cache_implementation="static", compile_config=compiled)

    def assisted(self, name: str) -> Peer:
        if self.draft_dir is None:
            raise Unavailable("there is no draft")
        draft = GPT2LMHeadModel.from_pretrained(str(self.draft_dir), dtype=self.dtype).to(self.device).eval()
        for field in ("vocab_size", "n_positions"):
            ours, oracle = getattr(draft.config, field), getattr(self.hf.model.config, field)
            if ours != oracle:
                raise Unavailable(f"{field} of the draft is {ours}, of the oracle {oracle}")
        draft.generation_config.eos_token_id = None  # or it would stop drafting there even where eos is ignored
        return self._hf_peer(name, assistant_model=draft)

    def prompt_lookup(self, name: str) -> Peer:
        return self._hf_peer(name, prompt_lookup_num_tokens=LOOKUP_TOKENS)

    def ctranslate2(self, name: str) -> Peer:
        model = GPT2LMHeadModel.from_pretrained(str(self.oracle_dir), dtype=torch.float32)
        return CTranslate2Peer(name, model, self.tokenizer, self.dtype, self.device)


_MAKERS: dict[str, Callable[[_Makers, str], Peer]] = {
    "hf-generate": _Makers.generate,
    "hf-static-compile": _Makers.static_compile,
    "hf-assisted": _Makers.assisted,
    "hf-prompt-lookup": _Makers.prompt_lookup,
    "ctranslate2": _Makers.ctranslate2,
}
NAMES = tuple(_MAKERS)


def defaults(device: torch.device) -> tuple[str, ...]:
    """All names; on a CPU without "hf-static-compile", which compiles for a minute there: ask for it by name."""
    return tuple(name for name in NAMES if device.type != "cpu" or name != "hf-static-compile")


def _say(name: str, reason: str) -> None:
    print(f"peer {name} left out: {reason}", file=sys.stderr)


def load(
    names: Sequence[str],
    oracle_dir: str | Path,
    draft_dir: str | Path | None,
    dtype: torch.dtype,
    device: torch.device,
    on_skip: Callable[[str, str], None] = _say,
) -> list[Peer]:
    """The peers ``names`` with the checkpoints of these directories, in the order of ``names``.

    What is not installed or not possible here is left out, and ``on_skip(name, reason)`` is told why; the default
    prints it to standard error, ``skipped.__setitem__`` keeps it in a dict. Raises ValueError for an unknown name.
    """
    for name in names:
        if name not in _MAKERS:
            raise ValueError(f"peers are {', '.join(NAMES)}, got {name!r}")
    makers, loaded = _Makers(oracle_dir, draft_dir, dtype, device), []
    for name in names:
        try:
            loaded.append(_MAKERS[name](makers, name))
        except Unavailable as reason:
            on_skip(name, str(reason))
    return loaded
