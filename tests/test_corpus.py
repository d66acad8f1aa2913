"""What becomes training text: which files are read, which are held out or left out, and the tokenizer."""

import gzip
import json
import os

import numpy as np
import pytest

from model import corpus


def source(name: str) -> str:
    """A file of twenty functions in which every line holds ``name``."""
    return "".join(f"def {name}_{i}(argument):\n    return {name}_table[{i}]\n\n\n" for i in range(20))


BODY = source("function")


def write(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)
    return folder


def test_duplicates_near_repetitions_and_tests_are_left_out(tmp_path):
    """Of a file, its copy, a file that mostly repeats it and a file of tests, only the first is read."""
    root = write(tmp_path / "a", one=BODY, copy=BODY, near=BODY + "\nprint('a line of its own')\n")
    write(root / "tests", test_one=source("another"))
    write(tmp_path / "b", other=source("name_11"), large="x = 1  # comment\n" * 20000)
    texts = corpus.collect([corpus.Source("a", root, "MIT"), corpus.Source("b", tmp_path / "b")])
    assert texts.train == [BODY] and texts.heldout == [source("name_11")]
    assert texts.card() == [
        {"source": "a", "licence": "MIT", "files": 1, "bytes": len(BODY)},
        {"source": "b", "licence": "unknown", "files": 1, "bytes": len(source("name_11"))},
    ]


def test_held_out_files_depend_on_content_alone(tmp_path):
    """About one file in 50 is held out, the same ones wherever they lie."""
    files = {f"file_{i}": source(f"name_{i}") for i in range(300)}
    folders = write(tmp_path / "one", **files), write(tmp_path / "two", **{f"moved_{k}": v for k, v in files.items()})
    one, other = (corpus.collect(corpus.directory_sources(folder)) for folder in folders)
    assert sorted(one.heldout) == sorted(other.heldout) and 1 <= len(one.heldout) <= 20
    assert not set(one.train) & set(one.heldout)


def test_files_that_hold_a_line_of_an_evaluation_set_are_left_out(tmp_path):
    """A long line of a prompt betrays a file wherever it stands; short lines, which anyone writes, do not, but for the
    longest one of a prompt that has no other."""
    telling = "def has_close_elements(numbers: List[float], threshold: float) -> bool:"
    short = "Return length of given string"
    rows = [{"prompt": f"import os\n\n\n{telling}\n    return None\n"}, {"prompt": f"def f(x):\n    {short}\n"}]
    problems = tmp_path / "problems.jsonl.gz"
    problems.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    excluded = corpus.telling_lines(problems)
    assert excluded == {telling, short}
    files = {
        "clean": BODY + "import os\n",
        "leak": f"class A:\n    {telling}\n        pass\n",
        "spaced": f"{telling.replace(' ', '  ')}\n    pass\n",
        "commented": f"#\n#   {telling}\n",
        "old": f"import os\r{short}\rpass\r",
        "other": source("name_11"),
    }
    folder = write(tmp_path / "text", **files, held=source("name_50"))
    (folder / "old.py").write_bytes(files["old"].encode())
    sources = corpus.directory_sources(folder)
    everything, rest = corpus.collect(sources), corpus.collect(sources, excluded=excluded)
    assert not everything.left_out and rest.left_out == {"excluded": 4}
    left_out = set(everything.train + everything.heldout) - set(rest.train + rest.heldout)
    assert left_out == {files[name] for name in ("leak", "spaced", "commented", "old")}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\n\n",
        b'{"prompt": ""}\n',
        b'{"prompt": null}\n',
        b'{"prompt": ["a"]}\n',
        b"[1]\n",
        b'{"text": "a"}',
        b"\xff",
    ],
)
@pytest.mark.parametrize("name", ["problems.jsonl", "problems.jsonl.gz"])
def test_a_file_that_would_exclude_nothing_is_refused(tmp_path, content, name):
    problems = tmp_path / name
    problems.write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    with pytest.raises(ValueError, match=f"(cannot read|no prompts in) .*{name}( as JSON lines with prompts: |, so)"):
        corpus.telling_lines(problems)


def test_a_damaged_file_of_prompts_is_named(tmp_path):
    packed = gzip.compress(b'{"prompt": "def f(x):"}\n' * 100)
    for damaged in (packed[:-12], packed[:20] + b"\0" * 4 + packed[24:], b"plain"):
        (tmp_path / "problems.gz").write_bytes(damaged)
        with pytest.raises(ValueError, match="cannot read .*problems.gz as JSON lines with prompts"):
            corpus.telling_lines(tmp_path / "problems.gz")


def test_only_files_are_read(tmp_path):
    """Not what only ends like one: a folder, a pipe that nobody writes to, links to nothing and to themselves."""
    folder = write(tmp_path, one=BODY)
    write(folder / "package.py", two=BODY)
    os.mkfifo(folder / "pipe.py")
    (folder / ".#lock.py").symlink_to("gone")
    (folder / "loop.py").symlink_to("loop.py")
    assert corpus.text_files(folder, ".py") == [folder / "one.py", folder / "package.py" / "two.py"]


def test_too_little_text_is_refused(tmp_path):
    with pytest.raises(ValueError, match="0 files to train on, 0 held out$"):
        corpus.collect([corpus.Source("empty", tmp_path)])
    files = {"large": "x = 1  # comment\n" * 20000, "copy": BODY, "copy_2": BODY, "short": "pass\n"}
    (write(tmp_path / "files", **files) / "latin.py").write_bytes("é = 'a longer line'\n".encode("latin-1"))
    why = "1 files to train on, 0 held out, 1 not UTF-8, 1 repeated, 1 too large, 1 too short$"
    with pytest.raises(ValueError, match=why):
        corpus.collect(corpus.directory_sources(tmp_path / "files"))
    with pytest.raises(ValueError, match="no directory of training text at"):
        corpus.directory_sources(tmp_path / "absent")


def test_an_absent_package_is_refused():
    with pytest.raises(ValueError, match="'no_such_package' is not installed"):
        corpus.installed_sources(("no_such_package",))


def test_packages_that_pip_put_into_a_directory_carry_their_licences(tmp_path):
    """Two packages with metadata and a script outside: each is a source with the licence it declares."""
    for name, licence in (
        ("one", "License-Expression: MIT"),
        ("two", "Classifier: License :: OSI Approved :: BSD License"),
    ):
        write(tmp_path / name, code=source(name))
        info = tmp_path / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.4\nName: {name}\nVersion: 1.0\n{licence}\n")
        (info / "RECORD").write_text(f"{name}/code.py,,\n../../bin/tool.py,,\n")
    sources = corpus.directory_sources(tmp_path)
    assert [(source.name, source.root, source.licence) for source in sources] == [
        ("one 1.0", tmp_path / "one", "MIT"),
        ("two 1.0", tmp_path / "two", "BSD License"),
    ]


def test_tokenizer_round_trip_and_document_borders():
    tokenizer = corpus.train_tokenizer([BODY], 400)
    text = "def é(x):\n\treturn '😀'\n"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    ids = corpus.encode(tokenizer, [BODY, text])
    assert ids.dtype == np.uint16 and (ids == 0).sum() == 2 and ids[0] == 0
