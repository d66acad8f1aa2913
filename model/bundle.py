"""Pack trained stages as the trio that comes with the package: bfloat16 weights in shards of at most 15 MB, cards.

python -m model.bundle --oracle DIR --draft DIR --draft2 DIR [--out model/bundled]
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from transformers import GPT2LMHeadModel

COPIED = ("tokenizer.json", "tokenizer_config.json", "training.json")


def pack(source: Path, target: Path) -> int:
    """Write ``source``'s model and tokenizer to ``target`` in bfloat16; returns the bytes written."""
    shutil.rmtree(target, ignore_errors=True)
    model = GPT2LMHeadModel.from_pretrained(source, dtype=torch.bfloat16)
    model.save_pretrained(target, max_shard_size="15MB")
    for name in COPIED:
        shutil.copy(source / name, target / name)
    return sum(file.stat().st_size for file in target.iterdir())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("oracle", "draft", "draft2"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "bundled")
    flags = parser.parse_args()
    sizes = {name: pack(getattr(flags, name), flags.out / name) for name in ("oracle", "draft")}
    shutil.rmtree(flags.out / "draft2", ignore_errors=True)
    shutil.copytree(flags.draft2, flags.out / "draft2", copy_function=shutil.copyfile)
    sizes["draft2"] = sum(file.stat().st_size for file in (flags.out / "draft2").iterdir())
    print(json.dumps(sizes))


if __name__ == "__main__":
    main()
