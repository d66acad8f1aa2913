"""Packing replaces the trio that lies in the folder, and only once all three stages are packed; model cards."""

import json

import pytest

from decoding import make
from decoding.command_line import printable
from decoding.decoder import BUNDLED
from model import bundle

NAMES = ("oracle", "draft", "draft2")


def test_a_mistake_costs_nothing_and_a_trio_may_be_packed_onto_itself(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bundle, "samples", lambda *_: {})  # they take a while

    def pack(**folders) -> None:
        flags = [flag for name in NAMES for flag in (f"--{name}", str(folders[name]))]
        bundle.main([*flags, "--out", str(tmp_path / "trio")])

    def files() -> dict[str, bytes]:
        return {str(file): file.read_bytes() for file in (tmp_path / "trio").rglob("*") if file.is_file()}

    shipped = {name: BUNDLED / name for name in NAMES}
    pack(**shipped)
    packed = files()
    assert len(packed) > 12
    for name in NAMES:
        with pytest.raises(SystemExit):
            pack(**shipped | {name: tmp_path / "nowhere"})
        assert f"--{name}: no " in capsys.readouterr().err and files() == packed
    other = tmp_path / "other"
    other.mkdir()
    card = json.loads((BUNDLED / "draft2" / "table.json").read_text())
    (other / "table.json").write_text(json.dumps(card | {"vocab_size": 300}))
    with pytest.raises(SystemExit):
        pack(**shipped | {"draft2": other})
    assert "do not share one vocabulary" in capsys.readouterr().err and files() == packed
    (other / "table.json").unlink()
    other.rmdir()
    pack(**{name: tmp_path / "trio" / name for name in NAMES})
    assert files() == packed
    assert [folder.name for folder in tmp_path.iterdir()] == ["trio"], "nothing is left behind"


def test_a_card_adds_up_what_the_models_before_had_seen():
    """The bundled oracle: 9.5 M tokens before, 19.2 M since. And no folder of the machine is named."""
    cards = json.loads((BUNDLED / "oracle" / "training.json").read_text())
    seen = cards["started_from"]["tokens"] + cards["log"][-1]["tokens"]
    oracle = make._model(BUNDLED / "oracle")
    made = {name: cards[name] for name in ("command", "started_from")}
    assert make._ancestry(BUNDLED / "oracle", oracle) == {"parameters": cards["parameters"], "tokens": seen, **made}
    written = bundle.card("oracle", cards, {})
    assert f"that had seen {cards['started_from']['tokens'] / 1e6:.1f} M" in written
    commands, origin = [], cards
    while origin and "command" in origin:
        commands.append(origin["command"])
        origin = origin["started_from"]
    card = (BUNDLED / "oracle" / "README.md").read_text()
    assert len(commands) > 1 and all(f"`{command}`" in text for command in commands for text in (card, written))
    assert not any(word.startswith(("/", "~")) for command in commands for word in command.split())
    command = printable("staged", ["--data", "/a/text", "--exclude", "../b/c", "--start", "model/d"])
    assert command == "staged --data .../text --exclude .../c --start model/d"
