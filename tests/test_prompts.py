"""Prompts of files: MBPP's problems are chosen evenly, however many are wanted."""

import json

import pytest

from profiling import prompts


@pytest.mark.parametrize("count, chosen", [(2, [0, 5]), (4, [0, 2, 5, 7]), (7, [0, 1, 2, 4, 5, 7, 8]), (99, range(10))])
def test_problems_are_evenly_spaced(tmp_path, count, chosen):
    file = tmp_path / prompts.MBPP
    file.parent.mkdir()
    rows = [{"text": f"Task {i}", "code": "x" * 90} for i in range(10)]
    file.write_text("\n".join(map(json.dumps, rows)))
    expected = [f'"""Task {i}"""\n' + "x" * 30 for i in chosen]
    assert prompts.mbpp(tmp_path, count) == expected
