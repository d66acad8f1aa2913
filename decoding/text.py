"""Text to token ids and back, with the tokenizer files of a checkpoint; and where stop strings cut."""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers


def load_tokenizer(directory: Path) -> Tokenizer | None:
    """The tokenizer whose files lie in ``directory``; None where there are none. Nothing is guessed or downloaded."""
    if (file := directory / "tokenizer.json").is_file():
        try:
            tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:
            raise ValueError(f"{file} cannot be read as a tokenizer: {error}") from error
        tokenizer.no_truncation()  # a file may keep both from training; transformers too sets them anew at every call
        tokenizer.no_padding()
        return tokenizer
    vocab, merges = directory / "vocab.json", directory / "merges.txt"
    if not (vocab.is_file() and merges.is_file()):
        return None
    tokenizer = Tokenizer(models.BPE.from_file(str(vocab), str(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return tokenizer


def require_same_tokens(name: str, one: Tokenizer, other_name: str, other: Tokenizer) -> None:
    """Raises ValueError naming the first token id at which two stages' tokenizers differ."""
    if (first := one.get_vocab()) == (second := other.get_vocab()):
        return
    by_id, other_by_id = ({i: token for token, i in vocab.items()} for vocab in (first, second))
    token_id = min(i for i in by_id.keys() | other_by_id.keys() if by_id.get(i) != other_by_id.get(i))
    raise ValueError(
        f"the tokenizers of {name} and {other_name} differ, first at id {token_id}: "
        f"{by_id.get(token_id)!r} and {other_by_id.get(token_id)!r}"
    )


def find_stop(tokenizer: Tokenizer, token_ids: list[int], stop_strings: tuple[str, ...]) -> tuple[int, str] | None:
    """The first stop string in the tokens' text: (number of tokens whose text ends before it, text before it)."""
    text = tokenizer.decode(token_ids, skip_special_tokens=True)
    starts = [start for stop in stop_strings if (start := text.find(stop)) >= 0]
    if not starts:
        return None
    before = text[: min(starts)]
    keep = len(token_ids)
    while keep and not before.startswith(tokenizer.decode(token_ids[:keep], skip_special_tokens=True)):
        keep -= 1
    return keep, before
