"""Packing replaces the trio that lies in the folder, and only once all three stages are packed."""

import pytest

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
    pack(**{name: tmp_path / "trio" / name for name in NAMES})
    assert files() == packed
    assert [folder.name for folder in tmp_path.iterdir()] == ["trio"], "nothing is left behind"
