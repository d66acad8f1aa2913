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
    try:
        tokenizer = Tokenizer(models.BPE.from_file(str(vocab), str(merges)))
    except Exception as error:
        raise ValueError(f"{vocab} and {merges.name} cannot be read as a tokenizer: {error}") from error
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


class StopStrings:
    """Where stop strings cut one text that grows by any number of tokens at a time.

    The cut is that of tokens that come one by one: after the first token whose text completes a stop string, at the
    earliest of those that are complete then. So it depends on the tokens alone.
    """

    def __init__(self, tokenizer: Tokenizer, strings: tuple[str, ...]):
        """Raises ValueError for a special token, which is left out of texts."""
        special = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
        for string in strings:
            if string in special:
                raise ValueError(f"stop_strings must be text, {string!r} is a special token: name it in eos_token_id")
        self._tokenizer, self._strings, self._checked = tokenizer, strings, 0

    def find(self, token_ids: list[int]) -> tuple[int, str] | None:
        """The first stop string in all tokens of the text so far: (number of tokens whose text ends before it, text
        before it)."""
        if not self._may_stop(self._decode(token_ids)):
            self._checked = len(token_ids)
        for end in range(self._checked + 1, len(token_ids) + 1):
            text = self._decode(token_ids[:end])
            starts = [start for stop in self._strings if (start := text.find(stop)) >= 0]
            if starts:
                before = text[: min(starts)]
                return self._num_within(token_ids[:end], before), before
        self._checked = len(token_ids)
        return None

    def _may_stop(self, text: str) -> bool:
        """Whether the first tokens of ``text`` may hold a stop string: half a character is in theirs alone."""
        return any(stop in text or "\ufffd" in stop for stop in self._strings)

    def num_settled(self, token_ids: list[int]) -> int:
        """How many of these tokens, which hold no stop string, no stop string can take away any more."""
        text = self._decode(token_ids).rstrip("\ufffd")  # half a character, maybe
        begun = (n for stop in self._strings for n in range(1, len(stop)) if text.endswith(stop[:n]))
        return self._num_within(token_ids, text[: len(text) - max(begun, default=0)])

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=True)

    def _num_within(self, token_ids: list[int], text: str) -> int:
        """How many of the tokens lie within ``text``, with which theirs begins."""
        count = len(token_ids)
        while count and not text.startswith(self._decode(token_ids[:count])):
            count -= 1
        return count
