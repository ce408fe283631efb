"""Tasks on several processes: what is computed where, and what happens when a process fails."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vlnms_d2.export import workers
from vlnms_d2.export.workers import Processes, Workers


class Worker:
    """Leaves a file per task."""

    def __init__(self, folder):
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such folder")
        self.folder = folder

    def work(self, task):
        if task == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if task == "fail":
            raise ValueError("no such task")
        (self.folder / str(task)).write_text(f"{os.getpid()} {torch.get_num_threads()}")


def run_tasks(folder, tasks, processes, done=lambda task: None):
    with Workers(Processes(processes=processes), Worker, folder) as workers:
        workers.run("work", tasks, done)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"processes": 0}, "processes is 0"),
        ({"num_gpus": -1}, "num_gpus is -1"),
        ({"num_gpus": 2, "processes": 2}, "give one of the two"),
        ({"num_gpus": 9999}, "num_gpus is 9999, but torch sees"),
        ({"num_machines": 2, "machine_rank": 2, "dist_url": "tcp://a:1"}, "expected from 0 to 1"),
        ({"num_machines": 2}, "a dist_url that all of them reach"),
    ],
)
def test_numbers_that_cannot_be(given, message):
    with pytest.raises(ValueError, match=message):
        Processes(**given)


@pytest.mark.parametrize("processes", [1, 2])
def test_all_tasks_are_done(tmp_path, processes):
    done = []
    run_tasks(tmp_path, iter(range(20)), processes, done.append)
    assert sorted(done) == list(range(20)) and len(list(tmp_path.iterdir())) == 20
    at_work = {path.read_text().split()[0] for path in tmp_path.iterdir()}
    assert (str(os.getpid()) in at_work) == (processes == 1)


@pytest.mark.parametrize("processes", [1, 2])
def test_each_process_computes_with_one_thread(tmp_path, processes):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        run_tasks(tmp_path, range(4), processes)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert {path.read_text().split()[1] for path in tmp_path.iterdir()} == {"1"}


@pytest.mark.parametrize("processes", [1, 2])
def test_an_error_comes_through(tmp_path, processes):
    with pytest.raises(ValueError, match="no such task"):
        run_tasks(tmp_path, [0, "fail", *range(1, 9)], processes)
    with pytest.raises(FileNotFoundError, match="none: no such folder"):
        run_tasks(tmp_path / "none", range(9), processes)


def test_a_killed_process_is_told_and_not_waited_for(tmp_path):
    with pytest.raises(RuntimeError, match=r"ended before its work was done.*resumes where"):
        run_tasks(tmp_path, [0, "die", *range(1, 9)], 2)


# Each line in one piece, also where Python is told not to buffer: two processes write at once.
SLOW = """
import os, time
os.write(1, b"import\\n")
time.sleep({seconds})
class Slow:
    def __init__(self):
        os.write(1, b"make\\n")
    def work(self, task):
        os.write(1, b"work\\n")
        time.sleep(600)
"""
# The module alone: the package would take most of the test's time to import, in each process.
START = """
import sys
sys.path.append({folder!r})
from slow import Slow
from workers import Processes, Workers
if __name__ == "__main__":
    with Workers(Processes(processes=2), Slow) as workers:
        workers.run("work", range(9))
"""


@pytest.mark.parametrize("moment", ["import", "make", "work"])
def test_processes_end_with_a_parent_that_is_killed(tmp_path, moment):
    """Also while they start: the second import is that of the server that forks them."""
    (tmp_path / "slow.py").write_text(SLOW.format(seconds=2 if moment == "import" else 0))
    folder = str(Path(workers.__file__).parent)
    (tmp_path / "start.py").write_text(START.format(folder=folder))
    script = [sys.executable, str(tmp_path / "start.py")]
    with subprocess.Popen(script, stdout=subprocess.PIPE, text=True) as process:
        for _ in range(2 if moment == "import" else 1):
            while process.stdout.readline() != f"{moment}\n":
                assert process.poll() is None
        process.kill()
        process.stdout.read()  # to the end of the pipe: no process has it open any more


def test_only_a_few_tasks_are_taken_in_advance(tmp_path):
    taken, ahead = [], []
    tasks = (taken.append(number) or number for number in range(50))
    run_tasks(tmp_path, tasks, 2, lambda task: ahead.append(len(taken) - len(ahead)))
    assert len(ahead) == 50 and max(ahead) <= 6
