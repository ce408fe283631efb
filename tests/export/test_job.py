"""Jobs of a trivial kind: which blocks are done, by which machine, and when a job is finished."""

import multiprocessing
import socket

import pytest

from vlnms_d2.export import job as job_module
from vlnms_d2.export.job import Job
from vlnms_d2.export.workers import Processes, Workers


class Doubler:
    """Leaves a file per block with the doubled numbers."""

    def __init__(self, shards):
        self.shards = shards

    def double(self, blocks):
        for number, images in blocks:
            self.shards.path(number, "doubled").write_text("".join(f"{2 * i}\n" for i in images))


class DoubleJob(Job):
    def __init__(self, out, factor=2, processes=None, num_images=14):
        super().__init__(out, list(range(num_images)), 2, processes or Processes())
        self.factor = factor
        self.done = []

    def identity(self):
        return {"factor": self.factor}

    def fill(self):
        self.done = self.shards.missing("doubled")
        with Workers(self.processes, Doubler, self.shards) as workers:
            self.run(workers, "double", "doubled", "numbers")

    def merge(self):
        with (self.work / "numbers.txt").open("w") as file:
            file.writelines(path.read_text() for path in self.shards.paths("doubled"))
        return {"outputs": {"numbers.txt": self.publish("numbers.txt")}}


DOUBLED = "".join(f"{2 * i}\n" for i in range(14))


def test_a_finished_job_is_not_begun_again(tmp_path):
    job = DoubleJob(tmp_path / "out")
    manifest = job.finish()
    assert (tmp_path / "out" / "numbers.txt").read_text() == DOUBLED
    assert job.done == list(range(7)) and manifest["published"] == ["numbers.txt"]
    assert not job.work.exists()
    again = DoubleJob(tmp_path / "out")
    assert again.finish() == manifest and again.done == []
    with pytest.raises(ValueError, match="factor is 2 there, 3 now"):
        DoubleJob(tmp_path / "out", factor=3).finish()


def test_only_missing_blocks_are_done(tmp_path, monkeypatch):
    job = DoubleJob(tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(DoubleJob, "merge", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            job.finish()
    for number in (0, 2, 3, 5, 6):
        job.shards.path(number, "doubled").unlink()
    again = DoubleJob(tmp_path / "out")
    again.finish()
    assert again.done == [0, 2, 3, 5, 6]
    assert (tmp_path / "out" / "numbers.txt").read_text() == DOUBLED


@pytest.mark.parametrize(
    ("device", "read_ahead", "sizes"),
    [("cpu", 6, [1] * 7), ("cuda", 1, [1] * 7), ("cuda", 6, [3, 3, 1]), ("cuda", 99, [7])],
)
def test_gpus_get_several_blocks_to_read_ahead(tmp_path, monkeypatch, device, read_ahead, sizes):
    monkeypatch.setattr(job_module, "_READ_AHEAD", read_ahead)
    monkeypatch.setattr(Processes, "device", device)
    job, tasks = DoubleJob(tmp_path), []
    job.shards.folder.mkdir(parents=True)

    class Listener:
        def run(self, method, given, done):
            for task in given:
                tasks.append([block.number for block in task])
                done(task)

    job.run(Listener(), "double", "doubled", "numbers")
    assert list(map(len, tasks)) == sizes and [n for task in tasks for n in task] == list(range(7))
    assert list(job._block(3).images) == [6, 7]


def machine(rank, out, port, queue):
    url = f"tcp://127.0.0.1:{port}"
    processes = Processes(num_machines=2, machine_rank=rank, dist_url=url)
    job = DoubleJob(out, processes=processes)
    Doubler.double = _listed(Doubler.double, done := [])
    manifest = job.finish()
    again = DoubleJob(out, processes=processes)
    assert again.finish() == manifest and again.done == []
    queue.put((rank, done, manifest))


def _listed(double, done):
    def call(self, blocks):
        done.extend(block.number for block in blocks)
        double(self, blocks)

    return call


def test_two_machines_share_the_blocks(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    queue = context.Queue()
    machines = [
        context.Process(target=machine, args=(rank, tmp_path / "out", port, queue))
        for rank in range(2)
    ]
    for each in machines:
        each.start()
    for each in machines:
        each.join()
    assert [each.exitcode for each in machines] == [0, 0]
    (_, first, manifest), (_, second, other) = sorted(queue.get() for _ in machines)
    assert (first, second) == ([0, 2, 4, 6], [1, 3, 5]) and manifest == other
    assert (tmp_path / "out" / "numbers.txt").read_text() == DOUBLED
