"""Tasks on several processes: what happens when one of them fails or is killed."""

import os
import signal

import pytest

from vlnms_d2.engine.parallel import run_tasks


class Worker:
    """Leaves a file per task."""

    def __init__(self, folder):
        self.folder = folder

    def work(self, task):
        if task == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if task == "fail":
            raise ValueError("no such task")
        (self.folder / str(task)).write_text(str(os.getpid()))


@pytest.mark.parametrize("processes", [1, 2])
def test_all_tasks_are_done(tmp_path, processes):
    done = []
    run_tasks(Worker, tmp_path, "work", iter(range(20)), processes, done.append)
    assert sorted(done) == list(range(20)) and len(list(tmp_path.iterdir())) == 20
    at_work = {path.read_text() for path in tmp_path.iterdir()}
    assert (str(os.getpid()) in at_work) == (processes == 1)


@pytest.mark.parametrize("processes", [1, 2])
def test_an_error_comes_through(tmp_path, processes):
    with pytest.raises(ValueError, match="no such task"):
        run_tasks(Worker, tmp_path, "work", [0, "fail", *range(1, 9)], processes, lambda task: None)


def test_a_killed_process_is_told_and_not_waited_for(tmp_path):
    with pytest.raises(RuntimeError, match=r"ended before its work was done.*goes on where"):
        run_tasks(Worker, tmp_path, "work", [0, "die", *range(1, 9)], 2, lambda task: None)
