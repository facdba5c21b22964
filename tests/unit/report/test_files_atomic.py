"""A report folder changes as one set: the old report or the new one, whatever dies and whenever one reads."""

import json
import os
import shutil
import threading
from dataclasses import replace

import pytest
import safetensors.torch
import torch

from robustlab.core.errors import DataFileError
from robustlab.metrics.store import PredictionStore
from robustlab.report import Picture, Report, folder, tensors
from robustlab.report.folder import tensors_part
from robustlab.report.rows import Row
from tests.helpers_report import assert_same_report, folder_without_times

ACTIONS = ("_write", "_move", "_remove", "_sync_folder")


class Killed(BaseException):
    """The process is gone: nothing after it runs."""


class Faults:
    """Lets every change of the disk through until the ``at``-th one, and nothing from there on.

    Each write is three: half of the content, all but the last byte, all. ``error`` comes once, as from a full disk;
    without it the process is dead and every later change fails too.
    """

    def __init__(self, monkeypatch, at=None, error=None):
        self.count, self.at, self.error = 0, at, error
        plain = {name: getattr(folder, name) for name in ACTIONS}

        def write(path, blocks):
            content = b"".join(bytes(block) for block in blocks)
            for end in (len(content) // 2, len(content) - 1):
                self.step()
                with path.open("wb") as file:
                    file.write(content[:end])
            self.step()
            plain["_write"](path, [content])

        def guarded(name):
            def run(*arguments):
                self.step()
                return plain[name](*arguments)

            return run

        monkeypatch.setattr(folder, "_write", write)
        for name in ACTIONS[1:]:
            monkeypatch.setattr(folder, name, guarded(name))

    def step(self):
        self.count += 1
        if self.at is None or self.count < self.at:
            return
        if self.error is None:
            raise Killed
        if self.count == self.at:
            raise self.error


def small_report(seed, *, pictures=True, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(12) % 2

    def store(scale):
        logits = torch.randn(12, 2, generator=generator) * scale + shift
        scores = {"energy": -logits.logsumexp(1)}
        return PredictionStore(torch.arange(12) * 7, logits, labels, "binary", scores=scores)

    row = Row("m", "d", "clean", 0, 1, "", "", "", "", "accuracy", seed / 10, 0, 1, 12, 12, "wilson", "", "higher")
    gallery = (Picture("clean", 0.0, bytes([seed]) * 9, "a"),) if pictures else ()
    manifest = {"seed": seed, "created": f"day {seed}", "wall_seconds": seed / 7}
    return Report((row,) * (3 + seed), manifest, {"clean": store(1.0), "noise@3": store(2.0)}, gallery)


def content(report):
    """Return all that a report holds, in comparable form."""
    stores = {
        key: (store.keys.tolist(), store.logits.tolist(), store.scores["energy"].tolist(), store.answers_only)
        for key, store in report.predictions.items()
    }
    return report.to_json(), stores, report.gallery


OLD, NEW, LATER = small_report(1), small_report(2, pictures=False), small_report(3)
NAMES = {"report.json", "rows.csv", "predictions.safetensors", "predictions.json"}


def steps_of_a_save(tmp_path, report):
    """Return how many boundaries a save over OLD has."""
    with pytest.MonkeyPatch.context() as patch:
        OLD.save(tmp_path / "count")
        faults = Faults(patch)
        report.save(tmp_path / "count")
    return faults.count


def the_whole(path, *reports):
    """Return which of the reports the folder holds, whole."""
    found = content(Report.load(path))
    (which,) = [report for report in reports if content(report) == found]
    return which


@pytest.mark.parametrize("new", [NEW, LATER], ids=["fewer files", "all files"])
def test_killed_at_any_boundary_leaves_the_old_or_the_new_report(tmp_path, new):
    total = steps_of_a_save(tmp_path, new)
    assert total > 12
    new.save(tmp_path / "fresh")
    seen = []
    for k in range(1, total + 1):
        place = tmp_path / f"at-{k}"
        OLD.save(place)
        with pytest.MonkeyPatch.context() as patch:
            Faults(patch, k)
            with pytest.raises(Killed):
                new.save(place)
        seen.append(the_whole(place, OLD, new))
        if k % 2:  # the next save may be of the same report, or of another one
            new.save(place)
            assert_same_report(place, tmp_path / "fresh")
        else:
            LATER.save(place)
            assert content(Report.load(place)) == content(LATER)
        assert {path.name for path in place.iterdir()} <= NAMES | {"gallery.json"}
        assert folder_without_times(place)["report.json"]
    # one boundary parts the old from the new
    assert seen == sorted(seen, key=lambda report: report is new)
    assert {id(report) for report in seen} == {id(OLD), id(new)}


def test_killed_while_saving_the_same_report_again(tmp_path):
    OLD.save(tmp_path / "fresh")
    for k in range(1, steps_of_a_save(tmp_path, OLD) + 1):
        OLD.save(tmp_path / "run")
        with pytest.MonkeyPatch.context() as patch:
            Faults(patch, k)
            with pytest.raises(Killed):
                OLD.save(tmp_path / "run")
        the_whole(tmp_path / "run", OLD)
        with pytest.MonkeyPatch.context() as patch:  # dies after it has tidied up, before it has written all
            Faults(patch, 9)
            with pytest.raises(Killed):
                NEW.save(tmp_path / "run")
        the_whole(tmp_path / "run", OLD)
        OLD.save(tmp_path / "run")
        assert_same_report(tmp_path / "run", tmp_path / "fresh")


def test_killed_twice_still_leaves_one_whole_report(tmp_path):
    """The second save dies too, also while it finishes what the first one had begun."""
    total = steps_of_a_save(tmp_path, NEW)
    for first in range(total // 2, total + 1):  # from within the writes to after the last move
        for second in range(1, 9):
            place = tmp_path / f"at-{first}-{second}"
            OLD.save(place)
            for report, k in ((NEW, first), (LATER, second)):
                with pytest.MonkeyPatch.context() as patch:
                    Faults(patch, k)
                    with pytest.raises(Killed):
                        report.save(place)
            the_whole(place, OLD, NEW)
            shutil.rmtree(place)


def test_a_full_disk_at_any_boundary_is_reported_and_leaves_no_rubbish(tmp_path):
    total = steps_of_a_save(tmp_path, NEW)
    for k in range(1, total + 1):
        place = tmp_path / f"at-{k}"
        OLD.save(place)
        before = {path.name: path.read_bytes() for path in place.iterdir()}
        with pytest.MonkeyPatch.context() as patch:
            faults = Faults(patch, k, OSError(28, "No space left on device"))
            with pytest.raises(DataFileError, match="No space left"):
                NEW.save(place)
        assert faults.count >= k
        if the_whole(place, OLD, NEW) is OLD:
            assert {path.name: path.read_bytes() for path in place.iterdir()} == before
        NEW.save(place)
        assert {path.name for path in place.iterdir()} == NAMES


def test_a_first_save_that_is_killed_leaves_no_report(tmp_path):
    for k in range(1, 9):
        with pytest.MonkeyPatch.context() as patch:
            Faults(patch, k)
            with pytest.raises(Killed):
                NEW.save(tmp_path / f"at-{k}")
        with pytest.raises(DataFileError, match=r"a folder that Report\.save wrote"):
            Report.load(tmp_path / f"at-{k}")


@pytest.mark.parametrize("after", ["_read", "map_tensors"])
def test_a_reader_whose_files_are_replaced_while_it_reads_them_gets_a_whole_report(tmp_path, monkeypatch, after):
    """Another writer saves, twice over, whenever the reader has opened a file."""
    OLD.save(tmp_path)
    plain, saves, busy = getattr(folder, after), [NEW, OLD, NEW, LATER], []

    def overtaken(*arguments):
        if saves and not busy:
            busy.append(True)
            for _ in range(2):
                saves.pop().save(tmp_path)
            busy.clear()
        return plain(*arguments)

    monkeypatch.setattr(folder, after, overtaken)
    the_whole(tmp_path, OLD, NEW, LATER)


def test_a_reader_whose_file_is_moved_between_two_looks_finds_it(tmp_path, monkeypatch):
    """Killed right after it made NEW valid; the next writer moves the files just as a reader looks for them."""
    OLD.save(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        Faults(patch, steps_of_a_save(tmp_path.with_name("steps"), NEW) - 4)
        with pytest.raises(Killed):
            NEW.save(tmp_path)
    assert len(list(tmp_path.glob(".*.new"))) == 3
    plain = folder._staged

    def moved_away(place, name, digest):
        monkeypatch.setattr(folder, "_staged", plain)
        folder._recover(place, "report.json")
        return plain(place, name, digest)

    monkeypatch.setattr(folder, "_staged", moved_away)
    assert content(Report.load(tmp_path)) == content(NEW)


def test_readers_beside_a_writer_meet_whole_reports_only(tmp_path):
    place, done, met, wrong = tmp_path / "run", threading.Event(), set(), []
    OLD.save(place)
    wanted = {json.dumps(content(report)[:2]): index for index, report in enumerate((OLD, NEW))}

    def read():
        while not done.is_set():
            try:
                met.add(wanted[json.dumps(content(Report.load(place))[:2])])
            except Exception as error:
                wrong.append(error)

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for index in range(40):
        (NEW, OLD)[index % 2].save(place)
    done.set()
    for reader in readers:
        reader.join()
    assert wrong == []
    assert met


def test_writers_at_once_leave_one_whole_report(tmp_path):
    place, reports = tmp_path / "run", [small_report(seed, pictures=bool(seed % 2)) for seed in range(1, 5)]
    wrong = []

    def write(report):
        try:
            for _ in range(6):
                report.save(place)
        except Exception as error:
            wrong.append(error)

    writers = [threading.Thread(target=write, args=(report,)) for report in reports]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert wrong == []
    last = the_whole(place, *reports)
    assert {path.name for path in place.iterdir()} == NAMES | ({"gallery.json"} if last.gallery else set())


@pytest.mark.parametrize("name", ["predictions.json", "predictions.safetensors", "gallery.json"])
def test_a_file_of_another_report_is_refused(tmp_path, name):
    OLD.save(tmp_path / "a")
    LATER.save(tmp_path / "b")
    shutil.copy(tmp_path / "b" / name, tmp_path / "a" / name)
    with pytest.raises(DataFileError, match=f"whole files.*{name} is not the one"):
        Report.load(tmp_path / "a")


def test_a_truncated_file_is_refused(tmp_path):
    OLD.save(tmp_path)
    path = tmp_path / "predictions.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(DataFileError, match="whole files"):
        Report.load(tmp_path)


def test_folders_without_digests_are_still_read(tmp_path):
    OLD.save(tmp_path)
    path = tmp_path / "report.json"
    path.write_text(OLD.to_json())
    assert "files" not in json.loads(path.read_text())
    assert content(Report.load(tmp_path)) == content(OLD)


def test_answers_only_survives_and_old_files_mean_false(tmp_path):
    store = OLD.predictions["clean"]
    report = Report(OLD.rows, {}, {"clean": replace(store, answers_only=True), "noise@3": store})
    report.save(tmp_path)
    again = Report.load(tmp_path)
    assert again.predictions["clean"].answers_only
    assert not again.predictions["noise@3"].answers_only
    assert [entry.get("answers_only") for entry in json.loads((tmp_path / "predictions.json").read_text())] == [
        True,
        None,
    ]


def test_bytes_do_not_depend_on_time_process_or_what_was_there(tmp_path, monkeypatch):
    OLD.save(tmp_path / "a")
    NEW.save(tmp_path / "a")
    monkeypatch.setattr(os, "getpid", lambda: 4711)
    NEW.save(tmp_path / "b")
    assert {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "b").iterdir()
    }
    later = Report(NEW.rows, {**NEW.manifest, "created": "tomorrow", "wall_seconds": 99.5}, NEW.predictions)
    later.save(tmp_path / "c")
    assert_same_report(tmp_path / "a", tmp_path / "c")
    Report(NEW.rows, {**NEW.manifest, "seed": 9}, NEW.predictions).save(tmp_path / "d")
    with pytest.raises(AssertionError):
        assert_same_report(tmp_path / "a", tmp_path / "d")


def test_tensors_are_written_as_safetensors_writes_them(tmp_path):
    kinds = (torch.float32, torch.float64, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
    plain = {f"{i:032x}": (torch.arange(7) % 3).to(kind) for i, kind in enumerate(kinds)}
    plain |= {
        "f" * 32: torch.arange(6, dtype=torch.float16).reshape(2, 3),
        "e" * 32: torch.arange(5, dtype=torch.bfloat16),
        "d" * 32: torch.zeros(0, 4),
        "c" * 32: torch.tensor(3),
    }
    for chosen in (plain, dict(reversed(plain.items())), {}, {"a" * 32: torch.ones(3)}):
        part = tensors_part("x.safetensors", chosen)
        assert b"".join(bytes(block) for block in part.blocks()) == safetensors.torch.save(chosen)
        path = tmp_path / "x.safetensors"
        path.write_bytes(safetensors.torch.save(chosen, {"written": "elsewhere"}))
        again = folder.read_tensors(tmp_path, path.name, None)
        assert {name: (t.dtype, t.shape, t.tolist()) for name, t in again.items()} == {
            name: (t.dtype, t.shape, t.tolist()) for name, t in chosen.items()
        }
    turned = torch.arange(12).reshape(3, 4).T
    part = tensors_part("x.safetensors", {"a" * 32: turned})
    assert b"".join(map(bytes, part.blocks())) == safetensors.torch.save({"a" * 32: turned.contiguous()})


def test_mapped_predictions_can_be_changed_without_changing_the_file(tmp_path):
    OLD.save(tmp_path)
    Report.load(tmp_path).predictions["clean"].logits.zero_()
    assert content(Report.load(tmp_path)) == content(OLD)


@pytest.mark.parametrize(
    "header",
    [
        b'{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}}',
        b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}',
        b'{"a":{"dtype":"F32","shape":[-2],"data_offsets":[8,0]}}',
        b'{"a":{"dtype":"F32","shape":[-1,-2],"data_offsets":[0,8]}}',
        b'{"a":{"dtype":"P32","shape":[2],"data_offsets":[0,8]}}',
        b'{"a":{"shape":[2],"data_offsets":[0,8]}}',
        b"[]",
        b"",
    ],
)
def test_a_header_that_lies_is_refused(tmp_path, header):
    OLD.save(tmp_path)
    (tmp_path / "report.json").write_text(OLD.to_json())  # without digests, so that the header is looked at
    (tmp_path / "predictions.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(DataFileError, match="whole files"):
        Report.load(tmp_path)


def test_predictions_are_written_in_blocks_and_without_copies(tmp_path, monkeypatch):
    monkeypatch.setattr(tensors, "_BLOCK", 1000)
    logits = torch.randn(600, 5)
    sizes = [len(block) for block in tensors_part("x", {"a" * 32: logits}).blocks()]
    assert max(sizes[1:]) == 1000
    assert sum(sizes[1:]) == logits.numel() * 4
    block = list(tensors_part("x", {"a" * 32: logits}).blocks())[1]
    logits.zero_()
    assert bytes(block) == bytes(1000)  # a view of the tensor, not a copy


def test_a_killed_page_is_the_old_one_and_leaves_nothing_after_the_next(report, tmp_path):
    path = tmp_path / "report.html"
    path.write_text("old")
    for k in range(1, 5):
        with pytest.MonkeyPatch.context() as patch:
            Faults(patch, k)
            with pytest.raises(Killed):
                report.to_html(path)
        assert path.read_text() == "old"
    report.to_html(path)
    assert "<html" in path.read_text()
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


@pytest.mark.parametrize("way", ["save", "to_html"])
def test_a_place_that_cannot_be_written_is_refused(report, tmp_path, way):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataFileError, match="a place that can be written"):
        getattr(report, way)(tmp_path / "file" / "run")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to read-only folders")
def test_a_read_only_folder_is_refused_and_still_read(tmp_path):
    OLD.save(tmp_path)
    tmp_path.chmod(0o555)
    with pytest.raises(DataFileError, match="Permission denied"):
        NEW.save(tmp_path)
    assert content(Report.load(tmp_path)) == content(OLD)
    tmp_path.chmod(0o755)
