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
import json
import shutil
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.utils import logging

from decoding.decoder import BUNDLED
from model.files import written
from model.growth import check_growth, grow
from profiling.flags import count, in_one_line

SIZES = {"oracle": (36, 1280), "draft": (2, 1152)}
HEAD_DIM = 64
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
NOTE = "grown.json"  # by which a folder is known as written here


def config_of(source: Path, target: Path, layers: int, width: int) -> GPT2Config:
    """Of ``source``, grown to ``layers`` layers and ``width`` channels.

    Raises ValueError where ``source`` is the larger model, and where ``target`` holds what was not written here.
    """
    if target.exists() and any(target.iterdir()) and not (target / NOTE).is_file():
        raise ValueError(f"{target} holds what was not grown here and would be lost")
    if width < HEAD_DIM or width % HEAD_DIM:
        raise ValueError(f"the width must be a multiple of {HEAD_DIM}, got {width}")
    small = GPT2Config.from_pretrained(source)
    sizes = {"n_layer": layers, "n_embd": width, "n_head": width // HEAD_DIM}
    config = GPT2Config.from_dict(small.to_dict() | sizes)
    check_growth(config, small)
    return config


def write(source: Path, target: Path, config: GPT2Config) -> int:
    """Write ``source``, grown to ``config``, to ``target`` in bfloat16, with its tokenizer; how many parameters."""
    small = GPT2LMHeadModel.from_pretrained(source, dtype=torch.float32)
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        large = GPT2LMHeadModel(config)
    grow(large, small)
    target.mkdir(exist_ok=True)
    (target / NOTE).write_text(json.dumps({"layers": config.n_layer, "width": config.n_embd}) + "\n")
    with written(target) as folder:
        large.to(torch.bfloat16).save_pretrained(folder)
        for name in TOKENIZER:
            shutil.copy(source / name, folder)
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
    configs = {
        name: config_of(BUNDLED / name, flags.out / name, *getattr(flags, f"{name}_size")) for name in SIZES
    }  # of both before the first is written
    logging.disable_progress_bar()
    for name, config in configs.items():
        parameters = write(BUNDLED / name, flags.out / name, config)
        size = f"{config.n_layer} layers, {config.n_embd} wide, {parameters / 1e6:.1f} M parameters"
        print(f"{flags.out / name}: {size}")
    models = f"--oracle {flags.out / 'oracle'} --draft {flags.out / 'draft'} --draft2 {BUNDLED / 'draft2'}"
    print(f"python -m profiling.latency {models}")


if __name__ == "__main__":
    main()
