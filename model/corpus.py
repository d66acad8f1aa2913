"""Training text from directories of source files: distinct files, their licences, a held-out part.

Exact duplicates are dropped, files whose lines mostly occur in files already taken are dropped too (near-repetition
inflates acceptance figures), and a fixed share, chosen by a hash of the content, is held out. Nothing is downloaded and
nothing is stored but token ids. ``pip install --no-deps --target DIR PACKAGE...`` makes a directory of text whose
licences are known.
"""

import gzip
import hashlib
import importlib.metadata
import importlib.util
import json
import random
import sysconfig
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from model.files import reading

END_OF_TEXT = "<|endoftext|>"
DEFAULT_PACKAGES = ("torch", "transformers", "numpy")
SKIPPED_PARTS = {"idlelib", "test", "tests", "testing", "lib2to3", "__pycache__"}


@dataclass(frozen=True)
class Source:
    """A folder to read, and under which licence its files are."""

    name: str
    root: Path
    licence: str = "unknown"


@dataclass
class Corpus:
    """Distinct files, split by content hash, in an order shuffled with a fixed seed."""

    train: list[str] = field(default_factory=list)
    heldout: list[str] = field(default_factory=list)
    taken: dict[str, list] = field(default_factory=dict)  # name -> [licence, files, bytes]
    left_out: Counter[str] = field(default_factory=Counter)  # why -> files

    def card(self) -> list[dict]:
        """One JSON row per source: name, licence, files, bytes."""
        return [
            {"source": name, "licence": licence, "files": files, "bytes": size}
            for name, (licence, files, size) in self.taken.items()
        ]


def licence_of(distribution: importlib.metadata.Distribution) -> str:
    """The licence that an installed package declares: SPDX expression, classifier or free text."""
    metadata = distribution.metadata
    classified = [line.split(" :: ")[-1] for line in metadata.get_all("Classifier", []) if line.startswith("License")]
    declared = metadata.get("License-Expression") or " / ".join(classified) or metadata.get("License")
    return declared.split("\n")[0] if declared else "unknown"


def installed_sources(packages: tuple[str, ...] = DEFAULT_PACKAGES) -> list[Source]:
    """The standard library and the source folders of ``packages``. Raises ValueError for one that is not installed."""
    sources = [Source("python standard library", Path(sysconfig.get_paths()["stdlib"]), "PSF-2.0")]
    for name in packages:
        spec = importlib.util.find_spec(name)
        if spec is None or not spec.submodule_search_locations:
            raise ValueError(f"package {name!r} is not installed, so its source cannot be trained on")
        distribution = importlib.metadata.distribution(name)
        sources.append(Source(name, Path(spec.submodule_search_locations[0]), licence_of(distribution)))
    return sources


def directory_sources(directory: Path) -> list[Source]:
    """What lies in ``directory``: packages that pip put there, each with its licence, or else the folder itself.

    Raises ValueError if it is no directory.
    """
    if not directory.is_dir():
        raise ValueError(f"no directory of training text at {directory}")
    sources = {}
    for distribution in importlib.metadata.distributions(path=[str(directory)]):
        name = f"{distribution.name} {distribution.version}"
        tops = {file.parts[0] for file in distribution.files or () if file.suffix == ".py"}
        for top in tops - SKIPPED_PARTS - {"..", "bin"}:
            sources[top] = Source(name, directory / top, licence_of(distribution))
    return [sources[top] for top in sorted(sources)] or [Source(directory.name, directory)]


def text_files(root: Path, suffix: str) -> list[Path]:
    """``root`` itself or all files below it that end in ``suffix``, in a stable order, without tests."""
    if root.is_file():
        return [root]
    skipped = SKIPPED_PARTS | {"site-packages"}
    inside = (path for path in root.rglob(f"*{suffix}") if not skipped & set(path.relative_to(root).parts[:-1]))
    return sorted(path for path in inside if path.is_file())  # no folder, pipe or link to nothing


def telling_lines(problems: Path) -> frozenset[str]:
    """Lines by which problems of an evaluation set are known, as ``_plain`` makes them.

    Those of at least 40 characters in each prompt of ``problems``, or its longest one where there are none. The file
    holds JSON lines with a "prompt" each (HumanEval's format), gzipped if it ends in ".gz". Not known by them are
    solutions without their prompt, or with one that was rewritten or wrapped anew or lost its only long line, as to a
    new name of the function.
    Raises ValueError for another file and for one without prompts.
    """
    found = set()
    with reading(problems, " as JSON lines with prompts"):
        raw = problems.read_bytes()
        text = (gzip.decompress(raw) if problems.suffix == ".gz" else raw).decode("utf-8")
        for row in text.split("\n"):
            lines = [_plain(line) for line in json.loads(row)["prompt"].splitlines()] if row.strip() else []
            found.update([line for line in lines if len(line) >= 40] or [max(lines, key=len, default="")])
    found.discard("")
    if not found:
        raise ValueError(f"no prompts in {problems}, so it would exclude nothing")
    return frozenset(found)


def _plain(line: str) -> str:
    """``line`` as it is compared: neither indented nor commented out, with single spaces."""
    return " ".join(line.lstrip("# \t").split())


def collect(
    sources: Iterable[Source],
    suffix: str = ".py",
    max_file_bytes: int = 200_000,
    max_repeated: float = 0.4,
    excluded: frozenset[str] = frozenset(),
) -> Corpus:
    """Read the files of every source.

    A file is left out when it is larger than ``max_file_bytes`` (tables, generated code), not UTF-8, or when more
    than ``max_repeated`` of its lines of at least 12 characters occurred in earlier files, or it has none, or when one
    of its lines is among ``excluded``, which keeps an evaluation set out. One in 50 is held out.
    Raises ValueError if nothing is left.
    """
    corpus, seen_files, seen_lines = Corpus(), set(), set()
    for source in sources:
        for path in text_files(source.root, suffix):
            raw = path.read_bytes()
            digest = hashlib.sha256(raw).digest()
            try:
                text = raw.decode("utf-8").replace("\r\n", "\n")
            except UnicodeDecodeError:
                text = None
            lines = [hash(line) for line in map(str.strip, (text or "").split("\n")) if len(line) >= 12]
            if len(raw) > max_file_bytes:
                why = "too large"
            elif text is None:
                why = "not UTF-8"
            elif digest in seen_files or sum(line in seen_lines for line in lines) > max_repeated * len(lines):
                why = "repeated"
            elif excluded and not excluded.isdisjoint(map(_plain, text.splitlines())):
                why = "excluded"
            else:
                why = None if lines else "too short"
            seen_files.add(digest)
            if why is not None:
                corpus.left_out[why] += 1
                continue
            seen_lines.update(lines)
            (corpus.heldout if digest[0] % 50 == 0 else corpus.train).append(text)
            counts = corpus.taken.setdefault(source.name, [source.licence, 0, 0])
            counts[1] += 1
            counts[2] += len(raw)
    if not corpus.train or not corpus.heldout:
        left_out = "".join(f", {number} {why}" for why, number in sorted(corpus.left_out.items()))
        raise ValueError(
            f"too little text: {len(corpus.train)} files to train on, {len(corpus.heldout)} held out{left_out}"
        )
    random.Random(0).shuffle(corpus.train)
    return corpus


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE as GPT-2's, trained on ``texts``; id 0 is the end-of-text token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """One flat uint16 array of token ids, an end-of-text id before every document."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    parts = []
    for encoding in tokenizer.encode_batch(texts):
        parts.append(np.array([end, *encoding.ids], dtype=np.uint16))
    return np.concatenate(parts)
