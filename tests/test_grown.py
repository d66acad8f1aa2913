"""Models at the paper's cost that write what the bundled ones write."""

import pytest
from transformers import AutoConfig

from decoding import StagedDecoder
from decoding.decoder import BUNDLED
from profiling import grown


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The bundled oracle and draft, a little larger."""
    out = tmp_path_factory.mktemp("grown")
    grown.main(["--out", str(out), "--oracle-size", "9", "448", "--draft-size", "2", "192"])
    return out


def test_sizes(folder):
    for name, layers, width in (("oracle", 9, 448), ("draft", 2, 192)):
        config = AutoConfig.from_pretrained(folder / name)
        assert (config.n_layer, config.n_embd, config.n_head) == (layers, width, width // 64)


def test_the_text_is_that_of_the_bundled_models(folder):
    """Also how often the draft agrees, on which every speed depends."""
    table = BUNDLED / "draft2"
    own = StagedDecoder.from_pretrained(str(folder / "oracle"), str(folder / "draft"), table, dtype="float32")
    bundled = StagedDecoder.from_pretrained(dtype="float32")
    for prompt in ("def read_lines(path):\n", "class Stack:\n"):
        ours, theirs = (one.generate(prompt, 24, method="staged") for one in (own, bundled))
        assert ours.new_token_ids == theirs.new_token_ids
        assert ours.stats["mean_acceptance_length"] == pytest.approx(theirs.stats["mean_acceptance_length"], rel=0.2)


@pytest.mark.parametrize(
    ("layers", "width", "why"), [("1", "192", "n_layer 2"), ("2", "64", "n_embd 128"), ("2", "200", "multiple of 64")]
)
def test_sizes_of_both_are_tried_before_one_is_written(tmp_path, capsys, layers, width, why):
    with pytest.raises(SystemExit, match="2"):
        grown.main(["--out", str(tmp_path), "--oracle-size", "9", "448", "--draft-size", layers, width])
    assert why in capsys.readouterr().err and not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["oracle", "draft"])
def test_what_was_not_grown_is_not_lost(tmp_path, capsys, name):
    """A model that was trained, or anything else."""
    theirs = tmp_path / name / "weights.bin"
    theirs.parent.mkdir()
    theirs.write_text("{}")
    with pytest.raises(SystemExit, match="2"):
        grown.main(["--out", str(tmp_path), "--oracle-size", "9", "448", "--draft-size", "3", "192"])
    assert "would be lost" in capsys.readouterr().err and theirs.exists()
    assert [folder.name for folder in tmp_path.iterdir()] == [name], "nothing else was written"


def test_what_was_grown_is_replaced(folder):
    draft = folder / "draft"
    grown.write(BUNDLED / "draft", draft, grown.config_of(BUNDLED / "draft", draft, 2, 192))
    assert not (draft / ".unfinished").exists()
