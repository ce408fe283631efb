"""Jobs of a trivial kind: which blocks are done, by which machine, and when a job is finished."""

import errno
import json
import multiprocessing
import socket
from pathlib import Path

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
        self.outputs = ["numbers.txt", "more"]

    def identity(self):
        return {"factor": self.factor}

    def fill(self):
        self.done = self.shards.missing("doubled")
        with Workers(self.processes, Doubler, self.shards) as workers:
            self.run(workers, "double", "doubled", "numbers")

    def merge(self):
        with (self.work / "numbers.txt").open("w") as file:
            file.writelines(path.read_text() for path in self.shards.paths("doubled"))
        (self.work / "more").mkdir(exist_ok=True)
        (self.work / "more" / f"{self.factor}.txt").touch()
        self.publish("more")
        return {"outputs": {"numbers.txt": self.publish("numbers.txt")}}


DOUBLED = "".join(f"{2 * i}\n" for i in range(14))


def test_a_finished_job_is_not_begun_again(tmp_path):
    job = DoubleJob(tmp_path / "out")
    manifest = job.finish()
    assert (tmp_path / "out" / "numbers.txt").read_text() == DOUBLED
    assert job.done == list(range(7)) and manifest["published"] == ["more", "numbers.txt"]
    assert not job.work.exists()
    again = DoubleJob(tmp_path / "out")
    assert again.finish() == manifest and again.done == []
    with pytest.raises(ValueError, match="factor is 2 there, 3 now"):
        DoubleJob(tmp_path / "out", factor=3).finish()


def test_a_full_disk_is_told_with_the_folder_and_the_job_resumes(tmp_path, monkeypatch):
    job = DoubleJob(tmp_path / "out")
    with monkeypatch.context() as patch:

        def full(self):
            raise OSError(errno.ENOSPC, "No space left on device")

        patch.setattr(DoubleJob, "merge", full)
        with pytest.raises(OSError, match=rf"the disk is full.*run again: '{tmp_path}/out'"):
            job.finish()
    again = DoubleJob(tmp_path / "out")
    again.finish()
    assert again.done == [] and (tmp_path / "out" / "numbers.txt").read_text() == DOUBLED


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


def machine(rank, out, ports, queue):
    # A port each: the machine that is ready first must not meet the other's earlier connection.
    processes, once_more = (
        Processes(num_machines=2, machine_rank=rank, dist_url=f"tcp://127.0.0.1:{port}")
        for port in ports
    )
    job = DoubleJob(out, processes=processes)
    Doubler.double = _listed(Doubler.double, done := [])
    manifest = job.finish()
    again = DoubleJob(out, processes=once_more)
    assert again.finish() == manifest and again.done == []
    queue.put((rank, done, manifest))


def _listed(double, done):
    def call(self, blocks):
        done.extend(block.number for block in blocks)
        double(self, blocks)

    return call


def test_two_machines_share_the_blocks(tmp_path):
    with socket.socket() as one, socket.socket() as two:
        one.bind(("127.0.0.1", 0))
        two.bind(("127.0.0.1", 0))
        ports = one.getsockname()[1], two.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    queue = context.Queue()
    machines = [
        context.Process(target=machine, args=(rank, tmp_path / "out", ports, queue))
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


def contents(folder):
    """Every file with its bytes, and every empty folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
        if path.is_symlink() or path.is_file() or not any(path.iterdir())
    }


@pytest.mark.parametrize(
    "name",
    [
        "numbers.txt",
        "more/diary.txt",
        "manifest.json",
        ".work/mine.txt",
        "more",
        "link",
        "dangling",
    ],
)
@pytest.mark.parametrize("overwrite", [False, True])
def test_files_of_others_are_refused_by_name_and_stay(tmp_path, name, overwrite):
    out = tmp_path / "out"
    out.mkdir()
    if name in ("link", "dangling"):
        (tmp_path / "link").mkdir()
        (tmp_path / "link" / "photo.jpg").write_text("theirs")
        (out / "more").symlink_to(tmp_path / name)
        name = "more"
    else:
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("{}")
    before = contents(tmp_path)
    job = DoubleJob(out)
    with pytest.raises(ValueError, match=rf"out/{name.split('/')[0]}.*(another|other) folder"):
        job.finish(overwrite)
    assert contents(tmp_path) == before and job.done == []


def test_a_file_that_was_added_to_a_published_folder_stays(tmp_path):
    out = tmp_path / "out"
    DoubleJob(out).finish()
    (out / "more" / "diary.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"out/more/diary\.txt: this tool did not write it"):
        DoubleJob(out, factor=3).finish(overwrite=True)
    assert (out / "more" / "2.txt").exists() and (out / "more" / "diary.txt").exists()
    one_less = DoubleJob(out, factor=3)
    one_less.outputs = ["numbers.txt"]
    one_less.merge = lambda: (
        Path(one_less.work / "numbers.txt").touch()
        or {"outputs": {"numbers.txt": one_less.publish("numbers.txt")}}
    )
    one_less.finish(overwrite=True)
    assert {*contents(out)} == {"numbers.txt", "manifest.json", "more/diary.txt"}


def test_a_finished_job_of_an_earlier_version_can_be_replaced(tmp_path):
    out = tmp_path / "out"
    DoubleJob(out).finish()
    manifest = json.loads((out / "manifest.json").read_bytes())
    del manifest["files"]  # earlier versions did not list the files of folders
    (out / "manifest.json").write_text(json.dumps(manifest))
    (out / "diary.txt").write_text("mine")
    again = DoubleJob(out)
    assert again.finish() == manifest and again.done == []
    with pytest.raises(ValueError, match=r"factor is 2 there, 3 now.*or --overwrite"):
        DoubleJob(out, factor=3).finish()
    DoubleJob(out, factor=3).finish(overwrite=True)
    assert {*contents(out)} == {"numbers.txt", "manifest.json", "more/3.txt", "diary.txt"}


def test_a_file_that_appears_during_the_work_stays(tmp_path):
    job = DoubleJob(tmp_path / "out")
    fill = job.fill
    job.fill = lambda: fill() or (tmp_path / "out" / "numbers.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"numbers\.txt: this tool did not write it"):
        job.finish()
    assert (tmp_path / "out" / "numbers.txt").read_text() == "mine"


@pytest.mark.parametrize("how", ["itself", "below", "link", "dots"])
def test_an_input_that_would_be_replaced_is_refused(tmp_path, how):
    out = tmp_path / "out"
    DoubleJob(out).finish()
    before = contents(out)
    (tmp_path / "link").symlink_to(out)
    job = DoubleJob(out, factor=3)
    job.inputs = {
        "itself": [out / "numbers.txt"],
        "below": [out / "more" / "2.txt"],
        "link": [tmp_path / "link" / "more"],
        "dots": [out / ".." / "out" / "manifest.json"],
    }[how]
    with pytest.raises(ValueError, match="is an input and would be replaced"):
        job.finish(overwrite=True)
    assert contents(out) == before


def test_overwriting_clears_nothing_for_bad_input(tmp_path, monkeypatch):
    out = tmp_path / "out"

    def bad(self):
        raise ValueError("bad input")

    DoubleJob(out).finish()
    before = contents(out)
    with monkeypatch.context() as patch:
        patch.setattr(DoubleJob, "fill", bad)
        with pytest.raises(ValueError, match="bad input"):
            DoubleJob(out, factor=3).finish(overwrite=True)
    assert contents(out) == before

    # Nor is unfinished work lost.
    with monkeypatch.context() as patch:
        patch.setattr(DoubleJob, "merge", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            DoubleJob(tmp_path / "unfinished").finish()
        before = contents(tmp_path / "unfinished")
        patch.setattr(DoubleJob, "fill", bad)
        with pytest.raises(ValueError, match="bad input"):
            DoubleJob(tmp_path / "unfinished", factor=3).finish(overwrite=True)
    assert contents(tmp_path / "unfinished") == before
    job = DoubleJob(tmp_path / "unfinished")
    job.finish()
    assert job.done == []


def test_an_interrupted_overwrite_resumes_and_the_old_output_is_never_announced(
    tmp_path, monkeypatch
):
    out = tmp_path / "out"
    DoubleJob(out).finish()
    for owner, method in ((DoubleJob, "merge"), (job_module.OutputFolder, "finish")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, method, lambda *args: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                DoubleJob(out, factor=3).finish(overwrite=True)
    with pytest.raises(ValueError, match="factor is 3 there, 2 now"):
        DoubleJob(out).finish()
    again = DoubleJob(out, factor=3)
    manifest = again.finish()
    assert again.done == [] and manifest["identity"] == {"factor": 3}
    assert {*contents(out)} == {"numbers.txt", "manifest.json", "more/3.txt"}


@pytest.mark.parametrize("removed", ["numbers.txt", "more/2.txt"])
def test_a_finished_job_without_its_output_is_made_again(tmp_path, removed):
    DoubleJob(tmp_path / "out").finish()
    whole = contents(tmp_path / "out")
    (tmp_path / "out" / removed).unlink()
    again = DoubleJob(tmp_path / "out")
    again.finish()
    assert again.done == list(range(7)) and contents(tmp_path / "out") == whole
