"""The loop: overlapped reading, arrays beyond the memory budget, and answers that arrive in any order."""

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import robustlab
from robustlab.core.errors import DataFileError
from robustlab.evaluate import run, units
from robustlab.evaluate.plan import make_plan, resolve_shifts
from robustlab.evaluate.run import Arena
from tests.contracts.toys import ATTACK, Small, pixels, source

from .engine_toys import assert_same, evaluate, wrapped


def test_arrays_beyond_the_budget_lie_in_files(tmp_path):
    arena = Arena(tmp_path, budget=1000)
    kept, mapped, nothing = (arena.empty(shape, torch.float32) for shape in ((10, 10), (300, 4), (0, 4)))
    assert kept.shape == (10, 10)
    mapped[:] = torch.arange(1200.0).reshape(300, 4)
    assert torch.equal(mapped[7], torch.tensor([28.0, 29, 30, 31]))
    assert nothing.shape == (0, 4)
    assert list(tmp_path.iterdir()) == []  # the file has no name, so nothing can be left behind
    assert str(tmp_path) in mapped_files()
    del mapped
    assert str(tmp_path) not in mapped_files()


def mapped_files():
    return Path("/proc/self/maps").read_text()


def test_a_full_disk_is_an_error_and_not_a_crash(monkeypatch, tmp_path):
    def full(file, start, size):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(DataFileError, match="No space"):
        Arena(tmp_path, budget=0).empty((10, 10), torch.float32)


def test_mapped_predictions_give_the_same_report(monkeypatch, tmp_path):
    wanted = evaluate(attacks=ATTACK)
    monkeypatch.setattr(run.Arena.__init__, "__defaults__", (None, 0))
    found = evaluate(attacks=ATTACK)
    assert_same(wanted, found)
    found.save(tmp_path)
    assert torch.equal(robustlab.Report.load(tmp_path).predictions["clean"].logits, wanted.predictions["clean"].logits)


@pytest.fixture
def folder(tmp_path):
    images, _ = pixels(count=40)
    for i, image in enumerate(images):
        place = tmp_path / "data" / f"class{i % 3}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(place / f"{i:03d}.png")
    return tmp_path / "data"


def test_files_are_decoded_while_the_model_works(folder, monkeypatch):
    data = robustlab.load_data(folder)
    readers, starts = set(), []
    plain = type(data).pixels

    def watched(self, index):
        if len(index) == 8:
            readers.add(threading.current_thread().name)
            starts.append(index[0])
        return plain(self, index)

    monkeypatch.setattr(type(data), "pixels", watched)
    found = evaluate(wrapped(), data, val=None, ood=None)
    assert any(name.startswith("robustlab-read") for name in readers)
    assert starts[-5:] == [0, 8, 16, 24, 32]
    monkeypatch.setattr(type(data), "thread_safe", False)
    readers.clear()
    assert_same(found, evaluate(wrapped(), data, val=None, ood=None))
    assert readers == {"MainThread"}


def test_an_unreadable_file_is_told_by_the_thread_that_reads(folder):
    data = robustlab.load_data(folder)
    data.fingerprint()
    data.files[30].write_bytes(b"no longer a picture")
    report = evaluate(wrapped(), data, val=None, ood=None, shifts="gamma", severities=(3,))
    assert [failure["condition"] for failure in report.manifest["failures"]] == ["samples 24 to 31"]
    assert "DataFileError" in report.manifest["failures"][0]["error"]
    assert report.value("accuracy").n == 32


def test_a_unit_goes_on_where_it_failed(monkeypatch):
    """A pass that fails once is made again, and those before it are not."""
    calls = []

    class Shaky(Small):
        def forward(self, x):
            calls.append(len(x))
            if calls.count(8) == 9 and not self.failed:
                self.failed = True
                raise ConnectionError("planted, once")
            return super().forward(x)

    net = Shaky()
    net.failed = True
    wanted = evaluate(wrapped(net), shifts="gamma", val=None, ood=None)
    steady = calls.count(8)
    calls.clear()
    net.failed = False
    found = evaluate(wrapped(net), shifts="gamma", val=None, ood=None)
    assert found.manifest["failures"] == []
    assert calls.count(8) - steady <= 1
    for key, store in wanted.predictions.items():
        assert torch.equal(found.predictions[key].logits, store.logits)


def test_scores_of_a_model_travel_with_its_logits():
    ensemble = robustlab.defenses.DeepEnsemble([wrapped(Small(seed=i)) for i in range(2)])
    report = evaluate(ensemble, shifts="gamma", ood={"far/x": source(count=16, seed=2)})
    one = ensemble.predict(source(count=60).read(range(8)))
    score = report.predictions["clean"].scores["mutual-information"]
    assert torch.allclose(score[:8], one.scores["mutual-information"])
    assert any(row.scorer == "mutual-information" and np.isfinite(row.value) for row in report.rows)


def test_the_units_of_a_job_cover_every_sample_and_condition():
    data = source(count=20)
    plan = make_plan(resolve_shifts("gamma"), (1, 5), (), data.info.spec)
    job = units.Job(data, plan, data.info.spec, 0, 8, None)
    every = units.all_units(job)
    assert [(unit.start, len(unit.wanted)) for unit in every] == [(0, 3), (8, 3), (16, 3)]
