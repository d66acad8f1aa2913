"""Where stop strings cut, the same for every method, and what a streamer hears."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer, TextStreamer

from decoding import StagedDecoder
from decoding.config import METHODS
from decoding.text import StopStrings
from tests.helpers import Hearing

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def bundled():
    return StagedDecoder.from_pretrained(device="cpu")


@pytest.mark.parametrize("method", METHODS)
def test_stop_strings_cut_text_tokens_and_statistics(bundled, method):
    """The text ends before the first stop string, the tokens before the one in which it begins."""
    prompt = "import os\nimport sys\n\n\ndef main():\n"
    whole = bundled.generate(prompt, max_new_tokens=48, method="baseline")
    for stop in {whole.text[20:23], whole.text[9:10], whole.text[30:36]}:
        out = bundled.generate(prompt, max_new_tokens=48, method=method, stop_strings=["never there", stop])
        assert out.finish_reason == "stop"
        assert out.text == whole.text[: whole.text.index(stop)]
        assert whole.new_token_ids[: len(out.new_token_ids)] == out.new_token_ids
        assert out.text.startswith(bundled.tokenizer.decode(out.new_token_ids))
        assert len(out.token_stages) == len(out.new_token_ids)


@pytest.mark.parametrize("method", METHODS)
def test_stop_strings_that_overlap(bundled, method):
    """What completes first cuts, however many tokens arrive together; of two completed by one token the earlier one.
    A streamer hears just the tokens that are returned."""
    prompt = "import os\nimport sys\n\n\ndef main():\n"
    whole = bundled.generate(prompt, max_new_tokens=40, method="baseline", seed=3, do_sample=True)
    for first in range(2, 20, 3):
        stops = [whole.text[first : first + 12], whole.text[first + 3 : first + 6], whole.text[first + 2 : first + 9]]
        texts = (bundled.tokenizer.decode(whole.new_token_ids[:n]) for n in range(1, 41))
        text = next(text for text in texts if any(stop in text for stop in stops))
        before = text[: min(text.index(stop) for stop in stops if stop in text)]
        heard = Hearing()
        given = {"seed": 3, "do_sample": True, "method": method, "streamer": heard, "stop_strings": stops}
        out = bundled.generate(prompt, max_new_tokens=40, **given)
        assert out.text == before and out.finish_reason == "stop"
        assert heard.tokens == out.new_token_ids == whole.new_token_ids[: len(out.new_token_ids)]


def test_a_streamer_hears_all_of_a_text_that_might_have_stopped(bundled):
    """Its end begins a stop string that never comes: held back, and told when the text is over."""
    whole = bundled.generate("import os", max_new_tokens=12)
    heard = Hearing()
    stops = [whole.text[-3:] + "\0", whole.text[4:9] + "\0"]
    out = bundled.generate("import os", max_new_tokens=12, stop_strings=stops, streamer=heard)
    assert out.finish_reason == "length" and heard.ended and heard.tokens == out.new_token_ids == whole.new_token_ids


def test_stop_strings_by_hand():
    """Tokens are letters and the halves of "é": a cut, a string begun, half a character that may complete one."""
    alphabet = {"a": 0, "b": 1, "c": 2, "Ã": 3, "©": 4, "<end>": 5}
    tokenizer = Tokenizer(models.BPE(alphabet, []))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    stops = StopStrings(tokenizer, ("bcb", "aé"))
    assert stops.find([0, 1]) is None and stops.num_settled([0, 1]) == 1, "b may be the first of bcb"
    assert stops.find([0, 1, 2]) is None and stops.num_settled([0, 1, 2]) == 1
    assert stops.find([0, 1, 2, 0]) is None and stops.num_settled([0, 1, 2, 0]) == 3, "a may be the first of aé"
    assert stops.find([0, 1, 2, 0, 3]) is None and stops.num_settled([0, 1, 2, 0, 3]) == 3, "and so may its half"
    assert stops.find([0, 1, 2, 0, 3, 4]) == (3, "abc")
    assert StopStrings(tokenizer, ("cab", "a")).find([2, 0, 1]) == (1, "c"), "a was complete before"
    assert StopStrings(tokenizer, ("ab", "cab")).find([2, 0, 1]) == (0, ""), "both by the last token"
    half = StopStrings(tokenizer, ("\ufffd",))
    assert half.find([0, 3, 4]) == (1, "a"), "tokens one by one show half a character, so more of them must, too"
    with pytest.raises(ValueError, match="'<end>' is a special token: name it in eos_token_id"):
        StopStrings(tokenizer, ("a", "<end>"))


def test_streamer_gets_prompt_tokens_and_end(bundled, capsys):
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "model" / "bundled" / "oracle")
    out = bundled.generate("def add(a, b):\n", max_new_tokens=20, streamer=TextStreamer(tokenizer))
    assert capsys.readouterr().out.rstrip("\n") == ("def add(a, b):\n" + out.text).rstrip("\n")
