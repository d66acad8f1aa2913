"""Load GPT-2 weights: a directory that ``save_pretrained`` wrote, a hub id, or a model in memory. Strict by design."""

import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from kernels.layout import aligned
from model.config import GPT2Config, eos_token_ids

# Of a generation config: what would change greedy text, and the value that does not.
_RULES = {
    "num_beams": 1,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_new_tokens": 0,
    "penalty_alpha": 0.0,
    "guidance_scale": 1.0,
}
_RULES |= dict.fromkeys(("bad_words_ids", "sequence_bias", "suppress_tokens", "begin_suppress_tokens"))
_RULES |= dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id", "exponential_decay_length_penalty"))
# Buffers that old checkpoints carry: causal masks, not weights.
_MASKS = (".attn.bias", ".attn.masked_bias")
_FILES = ["config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json"]
_TOKENIZER_FILES = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt"]


@dataclass(frozen=True)
class Layer:
    """One transformer block; matrices are [out, in], the transpose of the checkpoint's.

    A model's own are as its backend reads them: ``Quantized``, or packed by ``ops.packed``, with shape and bytes.
    """

    ln_1_weight: torch.Tensor  # [C]
    ln_1_bias: torch.Tensor  # [C]
    c_attn_weight: torch.Tensor  # [3 C, C]
    c_attn_bias: torch.Tensor  # [3 C]
    attn_c_proj_weight: torch.Tensor  # [C, C]
    attn_c_proj_bias: torch.Tensor  # [C]
    ln_2_weight: torch.Tensor  # [C]
    ln_2_bias: torch.Tensor  # [C]
    c_fc_weight: torch.Tensor  # [I, C]
    c_fc_bias: torch.Tensor  # [I]
    mlp_c_proj_weight: torch.Tensor  # [C, I]
    mlp_c_proj_bias: torch.Tensor  # [C]


@dataclass(frozen=True)
class GPT2Weights:
    """All tensors of a GPT-2 on one device in one dtype."""

    wte: torch.Tensor  # [V, C]
    wpe: torch.Tensor  # [n_positions, C]
    layers: tuple[Layer, ...]
    ln_f_weight: torch.Tensor  # [C]
    ln_f_bias: torch.Tensor  # [C]
    lm_head: torch.Tensor  # [V, C], wte itself where the head is tied

    def map_matrices(self, function: Callable[[Any], Any]) -> "GPT2Weights":
        """These weights with ``function`` applied to every matrix of a linear layer; the embeddings stay."""

        def mapped(layer: Layer) -> Layer:
            matrices = {name: function(tensor) for name, tensor in vars(layer).items() if tensor.ndim == 2}
            return replace(layer, **matrices)

        return replace(self, layers=tuple(map(mapped, self.layers)), lm_head=function(self.lm_head))

    def tensors(self) -> Iterator[torch.Tensor]:
        yield from (self.wte, self.wpe, self.ln_f_weight, self.ln_f_bias)
        if self.lm_head is not self.wte:
            yield self.lm_head
        for layer in self.layers:
            yield from vars(layer).values()

    @property
    def bytes_per_pass(self) -> int:
        """Bytes of weights that one pass streams: all but the embedding rows it does not look up."""
        looked_up = (self.wpe,) if self.lm_head is self.wte else (self.wpe, self.wte)
        return sum(tensor.nbytes for tensor in self.tensors() if all(tensor is not table for table in looked_up))


def locate(source: str | Path) -> Path:
    """The local directory of a checkpoint: ``source`` itself, or the snapshot of a hub id (downloaded if need be)."""
    path = Path(source)
    if path.is_dir():
        return path
    if path.exists() or str(source).startswith((".", "/", "~")):
        raise ValueError(f"{source} is not a directory with a GPT-2 checkpoint")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(source), allow_patterns=_FILES + _TOKENIZER_FILES))
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{source!r} is neither a local directory nor a reachable hub id: {reason}") from error


def load(source: Any, dtype: torch.dtype, device: torch.device | str) -> tuple[GPT2Config, GPT2Weights]:
    """Config and weights of ``source``: a directory, or a ``GPT2LMHeadModel`` in memory (anything with ``state_dict``).

    Raises ValueError for a config the forward pass does not compute and for missing, unexpected, misshapen or
    non-finite weights, naming the tensor.
    """
    if hasattr(source, "state_dict"):
        config = GPT2Config.from_hf(source.config.to_dict())
        rules = getattr(source, "generation_config", None)
        state, generation = source.state_dict(), {} if rules is None else rules.to_dict()
        return _with_generation(config, generation), from_state_dict(config, state, dtype, device)
    source = Path(source)
    config = GPT2Config.from_hf(_read_json(source / "config.json"))
    rules = source / "generation_config.json"
    config = _with_generation(config, _read_json(rules) if rules.is_file() else {})
    return config, from_state_dict(config, _read_tensors(source), dtype, device)


def _with_generation(config: GPT2Config, generation: dict[str, Any]) -> GPT2Config:
    """The generation config's end-of-text tokens come before the model's, as in transformers. Warns of its rules."""
    unused = {name: generation[name] for name, off in _RULES.items() if generation.get(name, off) not in (off, None)}
    if unused:
        warnings.warn(f"the generation config asks for what is not applied here: {unused}", stacklevel=3)
    eos = generation.get("eos_token_id")
    return config if eos is None else replace(config, eos_token_ids=eos_token_ids(eos, config.vocab_size))


def _read_json(path: Path) -> dict:
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(fields).__name__}")
    return fields


def _read_tensors(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint: as in transformers, one file goes before shards."""
    files, index = [directory / "model.safetensors"], directory / "model.safetensors.index.json"
    if not files[0].is_file():
        if not index.is_file():
            raise ValueError(f"{directory} holds no model.safetensors, nor {index.name} with shards")
        names = _read_json(index).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
            raise ValueError(f"{index} must map names of weights to files, got weight_map {names!r}")
        files = [directory / name for name in sorted({*names.values()})]
    tensors = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as reader:
                for name in list(reader.keys()):
                    tensors[name] = reader.get_tensor(name)
        except Exception as error:
            raise ValueError(f"{file} cannot be read as safetensors: {error}") from error
    return tensors


def from_state_dict(
    config: GPT2Config, state: Mapping[str, torch.Tensor], dtype: torch.dtype, device: torch.device | str
) -> GPT2Weights:
    """Check a state dict against ``config`` and bring it into our layout. Raises ValueError as ``load`` does."""
    given = len(state)
    masks = sum(name.endswith(_MASKS) for name in state)
    state = {name.removeprefix("transformer."): tensor for name, tensor in state.items() if not name.endswith(_MASKS)}
    if len(state) != given - masks:
        raise ValueError("some weights are there twice, with and without the prefix 'transformer.'")
    head = state.pop("lm_head.weight", None)
    shapes = expected_shapes(config)
    if missing := sorted(shapes.keys() - state.keys()):
        raise ValueError(f"{len(missing)} weights are missing, first {missing[0]!r}")
    if unexpected := sorted(state.keys() - shapes.keys()):
        raise ValueError(f"{len(unexpected)} weights are unexpected, first {unexpected[0]!r}")
    for name, shape in shapes.items():
        _check_tensor(name, state[name], shape, dtype)

    def put(tensor: torch.Tensor) -> torch.Tensor:
        moved = tensor.detach().to(device=device, dtype=dtype).contiguous()
        return aligned(moved.clone() if moved.data_ptr() == tensor.data_ptr() else moved)  # never the caller's own

    def layer(i: int) -> Layer:
        return Layer(
            ln_1_weight=put(state[f"h.{i}.ln_1.weight"]),
            ln_1_bias=put(state[f"h.{i}.ln_1.bias"]),
            c_attn_weight=put(state[f"h.{i}.attn.c_attn.weight"].t()),
            c_attn_bias=put(state[f"h.{i}.attn.c_attn.bias"]),
            attn_c_proj_weight=put(state[f"h.{i}.attn.c_proj.weight"].t()),
            attn_c_proj_bias=put(state[f"h.{i}.attn.c_proj.bias"]),
            ln_2_weight=put(state[f"h.{i}.ln_2.weight"]),
            ln_2_bias=put(state[f"h.{i}.ln_2.bias"]),
            c_fc_weight=put(state[f"h.{i}.mlp.c_fc.weight"].t()),
            c_fc_bias=put(state[f"h.{i}.mlp.c_fc.bias"]),
            mlp_c_proj_weight=put(state[f"h.{i}.mlp.c_proj.weight"].t()),
            mlp_c_proj_bias=put(state[f"h.{i}.mlp.c_proj.bias"]),
        )

    wte = put(state["wte.weight"])
    return GPT2Weights(
        wte=wte,
        wpe=put(state["wpe.weight"]),
        layers=tuple(layer(i) for i in range(config.n_layer)),
        ln_f_weight=put(state["ln_f.weight"]),
        ln_f_bias=put(state["ln_f.bias"]),
        lm_head=_head(config, head, state["wte.weight"], wte, put),
    )


def _head(config, head, wte_source, wte, put) -> torch.Tensor:
    if config.tie_word_embeddings:
        if head is not None and not torch.equal(head, wte_source):
            raise ValueError("lm_head.weight differs from wte.weight although the config says tie_word_embeddings")
        return wte
    if head is None:
        raise ValueError("1 weights are missing, first 'lm_head.weight'")
    _check_tensor("lm_head.weight", head, (config.vocab_size, config.n_embd), wte.dtype)
    return put(head)


def _check_tensor(name: str, tensor: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, the config asks for {shape}")
    if not tensor.is_floating_point():
        raise ValueError(f"{name} must hold floating-point numbers, got {tensor.dtype}")
    if not torch.isfinite(tensor.to(dtype)).all():
        raise ValueError(f"{name} holds NaN or infinite values, or values too large for {dtype}")


def expected_shapes(config: GPT2Config) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a checkpoint's tensors, the head excepted; its matrices are [in, out]."""
    width, inner = config.n_embd, config.n_inner
    shapes = {
        "wte.weight": (config.vocab_size, width),
        "wpe.weight": (config.n_positions, width),
        "ln_f.weight": (width,),
        "ln_f.bias": (width,),
    }
    for i in range(config.n_layer):
        shapes |= {f"h.{i}.{norm}.{kind}": (width,) for norm in ("ln_1", "ln_2") for kind in ("weight", "bias")}
        for matrix, (rows, columns) in {
            "attn.c_attn": (width, 3 * width),
            "attn.c_proj": (width, width),
            "mlp.c_fc": (width, inner),
            "mlp.c_proj": (inner, width),
        }.items():
            shapes[f"h.{i}.{matrix}.weight"] = (rows, columns)
            shapes[f"h.{i}.{matrix}.bias"] = (columns,)
    return shapes
