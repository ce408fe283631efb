"""The same work on several processes: what is asked of `launch`, and what its errors become."""

import os

import pytest
import torch
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException

from vlnms_d2.engine import processes
from vlnms_d2.engine.processes import Processes, begun, from_main, own_missing
from vlnms_d2.engine.shards import Shards


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"processes": 0}, "processes 0"),
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


def test_one_process_works_here_with_one_thread():
    seen = []
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        Processes().run(lambda x: seen.append((x, os.getpid(), torch.get_num_threads())), 7)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert seen == [(7, os.getpid(), 1)]


def test_errors_of_other_processes_are_told(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,2")

    def raise_error(error):
        def launch(*args):
            assert args[1:5] == (2, 3, 1, "tcp://a:1")
            assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
            raise error

        monkeypatch.setattr(processes, "launch", launch)
        given = Processes(processes=2, num_machines=3, machine_rank=1, dist_url="tcp://a:1")
        given.run(print)

    with pytest.raises(RuntimeError, match=r"^ValueError: the file x is damaged$"):
        trace = "-- Process 1 terminated\nTraceback ...\nValueError: the file x is damaged\n"
        raise_error(ProcessRaisedException(trace, 1, 99))
    with pytest.raises(RuntimeError, match=r"SIGKILL\. Run the same command again"):
        raise_error(ProcessExitedException("process 1 terminated with signal SIGKILL", 1, 99, 1))
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "1,2"


def test_ranks_share_the_blocks_that_are_missing(tmp_path, monkeypatch):
    shards = Shards(tmp_path, 7)
    for number in (1, 4):
        shards.path(number, "done").touch()
    assert own_missing(shards, "done") == [0, 2, 3, 5, 6]
    shares = []
    for rank in range(3):
        monkeypatch.setattr(processes.InferenceSampler, "__init__", _as_rank(rank))
        shares.append(own_missing(shards, "done"))
    assert shares == [[0, 2], [3, 5], [6]]
    monkeypatch.setattr(Shards, "missing", lambda *args: [])
    assert own_missing(shards, "done") == []


def _as_rank(rank):
    def init(self, size):
        self._local_indices = self._get_local_indices(size, 3, rank)

    return init


def test_a_finished_run_is_not_begun_again(tmp_path):
    assert from_main("mine") == "mine"
    with begun(tmp_path / "out", lambda: {"a": 1}, False) as output:
        output.finish({})
    with begun(tmp_path / "out", lambda: {"a": 1}, False) as output:
        assert output is None
    with (
        pytest.raises(ValueError, match="a is 1 there, 2 now"),
        begun(tmp_path / "out", lambda: {"a": 2}, False),
    ):
        pass
