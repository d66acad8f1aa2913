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


def test_a_smaller_model_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        grown.main(["--out", str(tmp_path), "--oracle-size", "2", "384"])
    assert ended.value.code == 2 and "n_layer" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["oracle", "draft"])
@pytest.mark.parametrize("file", ["sources.json", "training.json"])  # of a training that has begun, and ended
def test_a_trained_model_is_not_lost(tmp_path, capsys, name, file):
    trained = tmp_path / name / file
    trained.parent.mkdir()
    trained.write_text("{}")
    with pytest.raises(SystemExit, match="2"):
        grown.main(["--out", str(tmp_path), "--oracle-size", "9", "448", "--draft-size", "3", "192"])
    assert "would be lost" in capsys.readouterr().err and trained.exists()
    assert [folder.name for folder in tmp_path.iterdir()] == [name], "nothing else was written"
