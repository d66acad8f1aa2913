"""A run in parts: every prompt belongs to one process, what was measured is neither lost nor measured again."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from profiling.paper_runs import FIXED, Case
from profiling.prompts import GREEDY
from profiling.shards import Journal, Shard, merged

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("num_processes", [1, 2, 3, 5])
def test_every_prompt_belongs_to_one_process(num_processes):
    shards = [Shard(rank, num_processes) for rank in range(num_processes)]
    parts = [shard.part(range(7)) for shard in shards]
    assert sorted(prompt for part in parts for prompt in part) == list(range(7))


def test_a_killed_run_goes_on(tmp_path):
    """Whole lines are kept, a torn one is measured again; another number of processes finds the same cases."""
    about, cases = {"tokens": 8}, [Case("paper", prompt, GREEDY, 0, FIXED) for prompt in range(4)]
    first = Journal(tmp_path, Shard(0, 2), about, resume=False)
    second = Journal(tmp_path, Shard(1, 2), about, resume=False)
    first.add(cases[0], [{"prompt": 0}])
    second.add(cases[1], [{"prompt": 1}])
    with first.path.open("a") as file:
        file.write('{"case": ["paper", 2,')
    again = Journal(tmp_path, Shard(), about, resume=True)
    assert [case for case in cases if case not in again] == cases[2:]
    for case in cases[2:]:
        again.add(case, [{"prompt": case.prompt}])
    whole = Journal(tmp_path, Shard(), about, resume=True)
    assert merged([whole.cases, second.cases]) == [{"prompt": prompt} for prompt in range(4)]
    with pytest.raises(ValueError, match="tokens = 8, this run has 9"):
        Journal(tmp_path, Shard(), {"tokens": 9}, resume=True)
    anew = Journal(tmp_path, Shard(), {"tokens": 9}, resume=False)
    assert not anew.cases and not second.path.exists()


PROCESS = """
import sys
from pathlib import Path
from profiling.shards import Journal, Shard, merged

shard = Shard.from_environment()
shard.start()
journal = Journal(Path(sys.argv[1]), shard, {}, resume=False)
for prompt in shard.part(range(5)):
    journal.add(("paper", prompt), [{"prompt": prompt, "rank": shard.rank}])
gathered = shard.gather(journal.cases)
assert (gathered is None) == (shard.rank != 0)
if gathered is not None:
    print(merged(gathered))
shard.stop()
"""


def test_torchrun_shares_the_prompts(tmp_path):
    """Two processes over gloo: a journal each, and the first has every prompt once."""
    (tmp_path / "process.py").write_text(PROCESS)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [*launcher, str(tmp_path / "process.py"), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    assert str([{"prompt": prompt, "rank": prompt % 2} for prompt in range(5)]) in done.stdout
    assert [len(file.read_text().splitlines()) for file in sorted(tmp_path.glob("rows-*.jsonl"))] == [1 + 3, 1 + 2]
