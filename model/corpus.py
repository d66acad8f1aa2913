"""Training text: the Python source that an installed environment already holds.

Files are taken from the standard library and from named packages, exact duplicates are dropped, files whose lines
mostly occur in files already taken are dropped too (near-repetition inflates acceptance figures), and a fixed share,
chosen by a hash of the content, is held out. Nothing is downloaded and nothing is stored but token ids.
"""

import hashlib
import importlib.util
import random
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"
# Licences of the default sources: standard library PSF-2.0; torch and numpy BSD-3-Clause; transformers Apache-2.0.
DEFAULT_PACKAGES = ("torch", "transformers", "numpy")
SKIPPED_PARTS = {"site-packages", "idlelib", "test", "tests", "lib2to3", "__pycache__"}


@dataclass
class Corpus:
    """Distinct source files, split by content hash; order is shuffled with a fixed seed."""

    train: list[str] = field(default_factory=list)
    heldout: list[str] = field(default_factory=list)

    @property
    def num_bytes(self) -> int:
        return sum(len(text) for text in self.train) + sum(len(text) for text in self.heldout)


def default_roots(packages: tuple[str, ...] = DEFAULT_PACKAGES) -> list[Path]:
    """The standard library and the source folders of ``packages``. Raises ValueError for one that is not installed."""
    roots = [Path(sysconfig.get_paths()["stdlib"])]
    for name in packages:
        spec = importlib.util.find_spec(name)
        if spec is None or not spec.submodule_search_locations:
            raise ValueError(f"package {name!r} is not installed, so its source cannot be trained on")
        roots.append(Path(spec.submodule_search_locations[0]))
    return roots


def python_files(root: Path) -> list[Path]:
    """All ``.py`` files below ``root`` in a stable order, without tests and nested environments."""
    inside = (path for path in root.rglob("*.py"))
    return sorted(path for path in inside if not SKIPPED_PARTS & set(path.relative_to(root).parts[:-1]))


def collect(roots: list[Path], max_file_bytes: int = 200_000, max_repeated: float = 0.4) -> Corpus:
    """Read every root's Python files.

    A file is left out when it is larger than ``max_file_bytes`` (tables, generated code), not UTF-8, or when more
    than ``max_repeated`` of its lines of at least 12 characters occurred in earlier files. One in 50 is held out.
    """
    corpus, seen_files, seen_lines = Corpus(), set(), set()
    for root in roots:
        for path in python_files(root):
            raw = path.read_bytes()
            digest = hashlib.sha256(raw).digest()
            if len(raw) > max_file_bytes or digest in seen_files:
                continue
            seen_files.add(digest)
            try:
                text = raw.decode("utf-8").replace("\r\n", "\n")
            except UnicodeDecodeError:
                continue
            lines = [hash(line) for line in map(str.strip, text.split("\n")) if len(line) >= 12]
            if not lines or sum(line in seen_lines for line in lines) > max_repeated * len(lines):
                continue
            seen_lines.update(lines)
            (corpus.heldout if digest[0] % 50 == 0 else corpus.train).append(text)
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
