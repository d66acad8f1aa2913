"""The bundled models' text at the cost of models of the paper's size: no training, no network.

    python -m profiling.grown --out DIR     # DIR/oracle: 36 layers, 1280 wide; DIR/draft: 2 layers, 1152 wide (42 M)
    python -m profiling.latency --oracle DIR/oracle --draft DIR/draft --draft2 model/bundled/draft2

Both begin as the function of a bundled model (``model.growth``), so they write its text and agree as often as the small
ones do, whatever their shape, while a pass streams the bytes of GPT-2 Large (but for the vocabulary, which stays the
bundled one) and of the paper's draft. That is wide and shallow here, since each layer waits for five launches; trained,
a draft of as few layers might agree less. Latency and traffic measured on them are real; the text is a small model's.
Weights whose values do not matter yet are random, not zero, except those that add to the residual stream.
"""

import argparse
import shutil
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.utils import logging

from decoding import make
from decoding.decoder import BUNDLED
from model.growth import grow
from profiling.flags import count, in_one_line

SIZES = {"oracle": (36, 1280), "draft": (2, 1152)}
HEAD_DIM = 64
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


def write(source: Path, target: Path, layers: int, width: int) -> int:
    """Write ``source``, grown to ``layers`` layers and ``width`` channels, to ``target``; its number of parameters.

    In bfloat16, with the tokenizer of ``source``. Raises ValueError where ``source`` is the larger model.
    """
    small = GPT2LMHeadModel.from_pretrained(source, dtype=torch.float32)
    sizes = {"n_layer": layers, "n_embd": width, "n_head": width // HEAD_DIM}
    config = GPT2Config.from_dict(small.config.to_dict() | sizes)
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        large = GPT2LMHeadModel(config)
    grow(large, small)
    unfinished = target.with_name(f"unfinished_{target.name}")  # a kill in the middle leaves no half of a model
    shutil.rmtree(unfinished, ignore_errors=True)
    large.to(torch.bfloat16).save_pretrained(unfinished)
    for name in TOKENIZER:
        shutil.copy(source / name, unfinished)
    shutil.rmtree(target, ignore_errors=True)
    unfinished.rename(target)
    return large.num_parameters()


def parser() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the models are written")
    for name, size in SIZES.items():
        flags.add_argument(f"--{name}-size", type=count, nargs=2, metavar=("LAYERS", "WIDTH"), default=size)
    return flags


@in_one_line("grown")
def main(arguments: list[str] | None = None) -> None:
    flags = parser().parse_args(arguments)
    flags.out.mkdir(parents=True, exist_ok=True)
    for name in SIZES:
        if any((flags.out / name / file).exists() for file in (make.SOURCES, make.CARD)):
            raise ValueError(f"{flags.out / name} holds a model that was trained, or is, and would be lost")
    logging.disable_progress_bar()
    for name in SIZES:
        layers, width = getattr(flags, f"{name}_size")
        parameters = write(BUNDLED / name, flags.out / name, layers, width)
        print(f"{flags.out / name}: {layers} layers, {width} wide, {parameters / 1e6:.1f} M parameters")
    models = f"--oracle {flags.out / 'oracle'} --draft {flags.out / 'draft'} --draft2 {BUNDLED / 'draft2'}"
    print(f"python -m profiling.latency {models}")


if __name__ == "__main__":
    main()
