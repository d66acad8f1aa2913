"""Pack trained stages as the trio that comes with the package: bfloat16 weights in shards of at most 15 MB, cards.

python -m model.bundle --oracle DIR --draft DIR --draft2 DIR [--out model/bundled]

What lies in --out is replaced once all three are packed.
"""

import argparse
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

COPIED = ("tokenizer.json", "tokenizer_config.json", "training.json")
PROMPTS = ("def read_lines(path):", "class Stack:", 'def mean(values):\n    """', "for name in names:")


def pack(source: Path, target: Path) -> int:
    """Write ``source``'s model, tokenizer and model card to ``target`` in bfloat16; returns the bytes written."""
    model = GPT2LMHeadModel.from_pretrained(source, dtype=torch.bfloat16)
    model.save_pretrained(target, max_shard_size="15MB")
    for name in COPIED:
        shutil.copy(source / name, target / name)
    training = json.loads((source / "training.json").read_text(encoding="utf-8"))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(source)
    (target / "README.md").write_text(card(target.name, training, samples(model, tokenizer)), encoding="utf-8")
    return sum(file.stat().st_size for file in target.iterdir())


@torch.no_grad()
def samples(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, num_tokens: int = 48) -> dict[str, str]:
    """What the model makes of PROMPTS: greedy, and drawn with top-k 50 from a fixed seed."""
    torch.manual_seed(0)
    texts = {}
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        for title, drawn in (("greedy", {"do_sample": False}), ("top-k 50", {"do_sample": True, "top_k": 50})):
            room = min(num_tokens, model.config.n_positions - ids.shape[1])
            mask = torch.ones_like(ids)
            out = model.generate(ids, attention_mask=mask, max_new_tokens=room, pad_token_id=0, **drawn)
            texts[f"{prompt.splitlines()[0]}, {title}"] = tokenizer.decode(out[0], skip_special_tokens=True)
    return texts


def card(name: str, training: dict, texts: dict[str, str]) -> str:
    """A model card from what ``staged train-oracle`` or ``train-draft`` recorded, and samples."""
    config, last = training["config"], training["log"][-1]
    sizes = f"{config['layers']} layers, width {config['width']}, vocabulary {config['vocab_size']}"
    seen, text = (f"{count / 1e6:.1f} M tokens" for count in (last["tokens"], training["text_tokens"]))
    origin = training.get("started_from")
    before = ""
    if origin:
        grown = f"begun from a model of {origin['parameters'] / 1e6:.1f} M parameters"
        before = f", {grown}" + (f" that had seen {origin['tokens'] / 1e6:.1f} M" if origin["tokens"] else "")
    lines = [
        "---",
        "license: apache-2.0",
        "library_name: transformers",
        "---",
        f"# The bundled {name}",
        "",
        f"A GPT-2 of {training['parameters'] / 1e6:.1f} M parameters: {sizes}, context {config['context']}. It has "
        f"seen {seen} of a text of {text} in {last['seconds'] / 60:.0f} minutes{before}; held-out loss "
        f"{last['heldout_loss']:.2f} nats a token. `{training['command']}`",
        "",
        *(part for command in _earlier(training) for part in (f"Before: `{command}`", "")),
        "| source | licence | files | MB |",
        "| --- | --- | ---: | ---: |",
    ]
    for row in sorted(training["sources"], key=lambda row: -row["bytes"]):
        lines.append(f"| {row['source']} | {row['licence']} | {row['files']} | {row['bytes'] / 1e6:.1f} |")
    for title, text in texts.items():
        lines += ["", f"## `{title}`", "", "```python", text.replace("```", "` ` `"), "```"]
    return "\n".join(lines) + "\n"


def _earlier(training: dict) -> Iterator[str]:
    """The commands that made the models it was begun from, the latest first."""
    origin = training.get("started_from")
    while origin and origin.get("command"):
        yield origin["command"]
        origin = origin.get("started_from")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("oracle", "draft", "draft2"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "bundled")
    flags = parser.parse_args(arguments)
    for name, file in (("oracle", "training.json"), ("draft", "training.json"), ("draft2", "table.json")):
        if not (getattr(flags, name) / file).is_file():
            parser.error(f"--{name}: no {file} in {getattr(flags, name)}")
    vocabularies = [PreTrainedTokenizerFast.from_pretrained(path).get_vocab() for path in (flags.oracle, flags.draft)]
    table = json.loads((flags.draft2 / "table.json").read_text(encoding="utf-8"))
    if vocabularies[0] != vocabularies[1] or table["vocab_size"] != len(vocabularies[0]):
        parser.error("the stages do not share one vocabulary")
    flags.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=flags.out.parent) as folder:
        packed = Path(folder)
        sizes = {name: pack(getattr(flags, name), packed / name) for name in ("oracle", "draft")}
        shutil.copytree(flags.draft2, packed / "draft2", copy_function=shutil.copyfile)
        sizes["draft2"] = sum(file.stat().st_size for file in (packed / "draft2").iterdir())
        for name in sizes:
            shutil.rmtree(flags.out / name, ignore_errors=True)
            (packed / name).replace(flags.out / name)
    print(json.dumps(sizes))


if __name__ == "__main__":
    main()
