"""Promise 6: an evaluation that is killed and started again ends with the same files, and computes nothing twice."""

import errno
import os
import resource
from collections import Counter
from pathlib import Path

import pytest

from robustlab.core.errors import DataFileError, RobustlabWarning
from robustlab.evaluate import cache
from tests.contracts.toys import source
from tests.helpers_resume import again, evaluate, model, passes, saved, shards, unfinished

DEAD = 2**22 + 1  # the number of no process: Linux gives smaller ones
SMALL = {"attacks": (), "severities": (3,), "val": source(count=16, seed=3)}
SHARDS = 3 * 3 + 2
STAGES = ("before", "half", "written", "moved", "made", "placing", "placed")


class Kill(BaseException):
    """Stands for the end of the process: nothing in robustlab may catch it."""


class Disk:
    """Sees everything that the cache does to the disk; at one point it kills, or fails as a disk fails.

    Args:
        patch: pytest's monkeypatch.
        stage: Where the point lies: before a file is written, when half of it is there, when all of it is there, when
            it was moved to its place; when a folder was made; before and after a model's entry is moved to its place.
        number: How many of these pass before.
        fault: What happens there.
    """

    def __init__(self, patch, stage="", number=-1, fault=Kill):
        self.seen, self.finished = Counter(), Counter()
        self.stage, self.number, self.fault = stage, number, fault
        write, move, make, rename = Path.write_bytes, Path.replace, Path.mkdir, Path.rename

        def write_bytes(path, data):
            if cache.FOLDER not in path.parts:
                return write(path, data)
            self.point("before")
            write(path, data[: len(data) // 2])
            self.point("half")
            write(path, data)
            return self.point("written")

        def replace(path, target):
            move(path, target)
            if path.name.endswith(".part"):
                self.finished[str(target)] += 1
                self.point("moved")

        def mkdir(path, *args, **options):
            make(path, *args, **options)
            if cache.FOLDER in path.parts:
                self.point("made")

        def rename_entry(path, target):
            self.point("placing")
            rename(path, target)
            self.point("placed")

        for name, function in [("write_bytes", write_bytes), ("replace", replace), ("mkdir", mkdir)]:
            patch.setattr(Path, name, function)
        patch.setattr(Path, "rename", rename_entry)

    def point(self, stage):
        self.seen[stage] += 1
        if stage == self.stage and self.seen[stage] > self.number:
            raise self.fault

    def shards(self):
        return Counter({name: n for name, n in self.finished.items() if Path(name).stem.isdecimal()})


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The files of a report that nothing disturbed, and how many points of each stage there are."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        disk = Disk(patch)
        report = evaluate(model(), folder, **SMALL)
    assert sum(disk.shards().values()) == len(disk.shards()) == SHARDS
    return saved(report, folder), disk.seen


@pytest.mark.parametrize("stage", STAGES)
def test_6_a_run_that_is_killed_at_any_write_goes_on_where_it_stood(stage, undisturbed, tmp_path):
    wanted, points = undisturbed
    assert points[stage] >= (1 if stage.startswith("plac") else SHARDS)
    host = cache.writer().rpartition(".")[0]
    for number in range(points[stage]):
        folder, here = tmp_path / str(number), f"{stage}, number {number}"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cache, "writer", lambda: f"{host}.{DEAD}")
            first = Disk(patch, stage, number)
            with pytest.raises(Kill):
                evaluate(model(), folder, **SMALL)
        before = shards(folder)
        assert before.keys() == {str(Path(name).relative_to(folder / "cache")) for name in first.shards()}, here
        with pytest.MonkeyPatch.context() as patch:
            second = Disk(patch)
            report = evaluate(model(), folder, **SMALL)
        both = first.shards() + second.shards()
        assert len(both) == SHARDS, here
        assert set(both.values()) == {1}, f"{here}: computed twice"
        after = shards(folder)
        assert {name: after[name] for name in before} == before, here
        assert saved(report, folder) == wanted, here
        assert unfinished(folder) == [], here


def test_6_a_finished_run_needs_one_probe(undisturbed, tmp_path):
    again(tmp_path, **SMALL)
    written, sizes, report = again(tmp_path, **SMALL)
    assert (written, sizes) == ({}, [8])
    assert saved(report, tmp_path) == undisturbed[0]


# ---- the disk


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
@pytest.mark.parametrize("stage", ["before", "half", "moved"])
def test_6_a_disk_that_fails_amid_a_run_costs_the_cache_and_not_the_report(code, stage, undisturbed, tmp_path):
    begun = 3 + 4  # format, probe and notes come before the shards
    options = {**SMALL, "val": None}
    wanted = saved(evaluate(model(), None, **options), tmp_path / "wanted")
    with pytest.MonkeyPatch.context() as patch:
        disk = Disk(patch, stage, begun, OSError(code, os.strerror(code)))
        with pytest.warns(RobustlabWarning, match="can no longer be kept") as said:
            report = evaluate(model(), tmp_path, **options)
    assert len(said) == 1
    assert os.strerror(code) in str(said[0].message)
    assert saved(report, tmp_path / "report") == wanted
    kept = shards(tmp_path)
    assert kept.keys() == {str(Path(name).relative_to(tmp_path / "cache")) for name in disk.shards()}
    assert len(kept) == (4 + 2 if stage == "moved" else 4), "every chunk tries again: space may be free by then"
    assert unfinished(tmp_path) == []
    written, _, report = again(tmp_path, **options)
    assert sum(written.values()) == 9 - len(kept)
    assert {name: facts for name, facts in shards(tmp_path).items() if name in kept} == kept
    assert saved(report, tmp_path / "report") == wanted


def test_6_a_limit_of_the_system_amid_a_run_does_the_same(tmp_path, monkeypatch):
    """The real error of a real write, of a file beyond the largest size that the system allows."""
    options = {**SMALL, "val": None}
    wanted = saved(evaluate(model(), None, **options), tmp_path / "wanted")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    write, count = cache.Shelf.write, Counter()

    def limited(shelf, key, start, answers):
        count["writes"] += 1
        if count["writes"] <= 4:
            return write(shelf, key, start, answers)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
        try:
            return write(shelf, key, start, answers)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    monkeypatch.setattr(cache.Shelf, "write", limited)
    with pytest.warns(RobustlabWarning, match="File too large"):
        report = evaluate(model(), tmp_path, **options)
    monkeypatch.undo()
    assert saved(report, tmp_path / "report") == wanted
    assert len(shards(tmp_path)) == 4
    assert unfinished(tmp_path) == []
    assert sum(again(tmp_path, **options)[0].values()) == 5


def refused(folder):
    """Return the error of an evaluation, which comes before any forward pass beyond the first look and the doctor's."""
    net = model()
    with passes(net) as sizes, pytest.raises(DataFileError) as caught:
        evaluate(net, folder, **SMALL)
    error = caught.value
    assert error.who.startswith("cache=")
    assert str(folder) in str(error)
    assert all(part.strip() for part in (error.who, error.expected, error.got, error.fix))
    assert isinstance(error, OSError)
    return sizes


@pytest.mark.parametrize("below", ["", "deeper/still"])
def test_6_a_file_in_the_place_of_the_folder_is_refused(below, tmp_path):
    (tmp_path / "file").write_text("mine")
    assert refused(tmp_path / "file" / below) == [8]
    assert (tmp_path / "file").read_text() == "mine"
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "cache").write_text("mine")
    assert refused(tmp_path / "run") == [8]


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC])
@pytest.mark.parametrize(("stage", "number"), [("made", 0), ("before", 0), ("half", 0)])
def test_6_a_folder_that_cannot_be_written_is_refused_at_once(code, stage, number, tmp_path, monkeypatch):
    Disk(monkeypatch, stage, number, OSError(code, os.strerror(code)))
    assert refused(tmp_path) == [8]


@pytest.mark.parametrize(("stage", "number"), [("before", 1), ("half", 2), ("placing", 0), ("moved", 2)])
def test_6_a_disk_that_fills_before_the_first_shard_is_refused(stage, number, tmp_path, monkeypatch):
    Disk(monkeypatch, stage, number, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    assert sum(refused(tmp_path)) <= 8 * 8 + 32
    assert shards(tmp_path) == {}
    monkeypatch.undo()
    assert unfinished(tmp_path) == []


# ---- two writers


@pytest.mark.parametrize("stage", ["before", "half", "written", "moved", "placing", "placed"])
def test_6_two_writers_at_once_end_with_the_same_report(stage, undisturbed, tmp_path, monkeypatch):
    """A second process does all its work while the first one is in the middle of a write."""
    for number in (0, 1, 2, 3, 7) if not stage.startswith("plac") else (0,):
        folder, others = tmp_path / str(number), []
        with pytest.MonkeyPatch.context() as patch:
            disk = Disk(patch, stage, number)
            name = cache.writer()

            def other(disk=disk, patch=patch, folder=folder, others=others, name=name):
                disk.stage = ""
                patch.setattr(cache, "writer", lambda: f"{name.rpartition('.')[0]}.1")
                others.append(evaluate(model(), folder, **SMALL))
                patch.setattr(cache, "writer", lambda: name)

            point = disk.point

            def both(stage, point=point, other=other):
                try:
                    point(stage)
                except Kill:
                    other()

            disk.point = both
            report = evaluate(model(), folder, **SMALL)
        assert len(others) == 1
        for found in (report, *others):
            assert saved(found, folder) == undisturbed[0], f"{stage}, number {number}"
        assert again(folder, **SMALL)[:2] == ({}, [8])
        assert unfinished(folder) == []
