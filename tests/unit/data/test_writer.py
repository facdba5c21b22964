import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image

from robustlab.core.corruption import Corruption
from robustlab.core.errors import ConfigError, DataFileError, KindError, RangeError
from robustlab.core.levels import Levels
from robustlab.core.shift import ShiftContext, quantize
from robustlab.data import HistologyPhantom, load_data, subset, write_corrupted
from robustlab.data.folder import MANIFEST


@dataclass(frozen=True)
class _Noise(Corruption):
    """Gaussian noise, registered nowhere."""

    name: ClassVar[str] = "test noise"
    sigma: Levels = Levels((0.02, 0.04, 0.08, 0.16, 0.3), 0.0, "of full range")

    def draw(self, rng, shape) -> Mapping[str, torch.Tensor]:
        return {"noise": rng.normal("noise", shape)}

    def apply(self, images, draws, values):
        return images + values["sigma"] * draws["noise"]


@dataclass(frozen=True)
class _Drop(_Noise):
    """Adds nothing, but counts how often it works, and may fail."""

    name: ClassVar[str] = "drop"
    limit: ClassVar[int | None] = None
    drawn: ClassVar[list[int]] = []
    applied: ClassVar[list[float]] = []

    def draw(self, rng, shape):
        self.drawn.append(len(rng))
        return {}

    def apply(self, images, draws, values):
        if self.limit is not None and len(self.applied) >= self.limit:
            raise KeyboardInterrupt
        self.applied.append(values["sigma"])
        return images * (1 - values["sigma"])


@dataclass(frozen=True)
class _GreyOnly(_Noise):
    name: ClassVar[str] = "grey-only"
    channels: ClassVar[tuple[int, ...] | None] = (1,)


@pytest.fixture(autouse=True)
def _reset():
    _Drop.limit = None
    _Drop.drawn.clear()
    _Drop.applied.clear()


def _grey(count=10, dtype=np.uint8):
    high = np.iinfo(dtype).max
    images = np.random.default_rng(0).integers(0, high, (count, 9, 7), dtype=dtype, endpoint=True)
    return load_data(
        images,
        labels=[i % 2 for i in range(count)],
        ids=[f"case {i}" for i in range(count)],
        groups={"age": np.arange(count) * 9, "sex": ["F", "M"] * (count // 2)},
        class_names=("no finding", "a/b"),
        modality="xray",
    )


def _fly(source, shift, severity, seed, row):
    """One sample alone, as the evaluation would see it."""
    context = ShiftContext(seed=seed, spec=source.info.spec)
    return quantize(shift.on(source.read([row]), severity, context).images, source.info.spec)[0]


def _same_samples(stored, source):
    assert torch.equal(stored.info.ids, source.info.ids)
    assert (stored.info.labels is None) == (source.info.labels is None)
    if source.info.labels is not None:
        assert torch.equal(stored.info.labels, source.info.labels)
    assert stored.info.class_names == source.info.class_names
    assert stored.info.task == source.info.task
    assert stored.info.spec == source.info.spec
    assert dict(stored.info.group_levels) == dict(source.info.group_levels)
    for column, codes in source.info.groups.items():
        assert torch.equal(stored.column(column), codes)


@pytest.mark.parametrize("kind", ["npz", "png"])
@pytest.mark.parametrize("make", [_grey, lambda: HistologyPhantom(10, size=16), lambda: _grey(dtype=np.uint16)])
def test_on_the_fly_equals_stored_equals_reloaded(tmp_path, make, kind):
    source, shift = make(), _Noise()
    out = write_corrupted(source, [shift], (0, 2.5, 5), tmp_path / "set", seed=7, format=kind, chunk=4, progress=False)
    for severity in (0, 2.5, 5):
        stored = load_data(out / (f"test-noise_s{severity:g}" + (".npz" if kind == "npz" else "")))
        _same_samples(stored, source)
        reloaded = stored.pixels(range(10))
        assert torch.equal(reloaded, torch.stack([_fly(source, shift, severity, 7, row) for row in range(10)]))
    assert not torch.equal(reloaded, source.pixels(range(10)))


def test_float_sources_are_stored_as_floats_with_their_range(tmp_path):
    images = np.random.default_rng(1).normal(0, 300, (6, 5, 5, 2)).clip(-1000, 1000)
    source = load_data(images, value_range=(-1000, 1000), labels=[[0, 1, 0], [1, 1, 1], [0, 0, -1]] * 2)
    out = write_corrupted(source, [_Noise()], [3], tmp_path, chunk=6, progress=False)
    stored = load_data(out / "test-noise_s3.npz")
    _same_samples(stored, source)
    batch = _Noise().on(source.read(range(6)), 3, ShiftContext(seed=0, spec=source.info.spec))
    assert torch.equal(stored.pixels(range(6)), batch.images)
    with pytest.raises(ConfigError, match="float images with 2 channels"):
        write_corrupted(source, [_Noise()], [3], tmp_path / "png", format="png")


def test_npz_files_are_plain_medmnist(tmp_path):
    source = HistologyPhantom(5, size=16)
    out = write_corrupted(source, [_Noise()], [1], tmp_path, progress=False)
    with np.load(out / "test-noise_s1.npz", allow_pickle=False) as archive:
        assert archive["test_images"].shape == (5, 16, 16, 3)
        assert archive["test_images"].dtype == np.uint8
        assert archive["test_labels"].shape == (5, 1)
        assert archive["test_labels"].dtype == np.uint8
        assert archive["test_ids"].tolist() == source.info.ids.tolist()
        assert set(archive["test_sex"].tolist()) <= {"F", "M"}


def test_png_folders_hold_one_file_an_id(tmp_path):
    source = _grey()
    out = write_corrupted(source, [_Noise()], [1], tmp_path, format="png", progress=False)
    folder = out / "test-noise_s1"
    first = int(source.info.ids[0])
    with Image.open(folder / "no-finding" / f"{first}.png") as image:
        assert image.size == (7, 9)
    assert (folder / "a-b" / f"{int(source.info.ids[1])}.png").is_file()
    (folder / "a-b" / f"{int(source.info.ids[1])}.png").write_text("torn")
    stored = load_data(folder)
    assert stored.info.ids.tolist() == [first, *source.info.ids.tolist()[2:]]
    assert "1 unreadable files" in stored.info.notes[0]
    with pytest.raises(DataFileError, match="one condition"):
        load_data(out)


def test_the_manifest_tells_everything(tmp_path):
    source = HistologyPhantom(5, size=16)
    fixed = _Noise.at(sigma=0.5)
    out = write_corrupted(source, [_Noise(), fixed, _GreyOnly()], (1, 3), tmp_path, seed=9, progress=False)
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["schema"] == 1
    assert manifest["seed"] == 9
    assert manifest["complete"] is True
    assert manifest["source"] == {"name": "phantom-histology", "fingerprint": source.fingerprint(), "count": 5}
    assert manifest["skipped"] == [{"shift": "grey-only", "reason": "needs 1 channels, the images have 3"}]
    conditions = manifest["conditions"]
    assert [c["file"] for c in conditions] == [
        *("test-noise_s1.npz", "test-noise_s3.npz"),
        *("test-noise_2_s1.npz", "test-noise_2_s3.npz"),
    ]
    assert conditions[1]["parameters"] == {"sigma": [0.08, "of full range"]}
    assert conditions[2]["parameters"] == {"sigma": [0.5, "of full range"]}
    assert all(len(c["blake2b"]) == 32 for c in conditions)


def test_draws_are_made_once_a_chunk(tmp_path):
    write_corrupted(_grey(), [_Drop()], (1, 2, 3), tmp_path, chunk=4, progress=False)
    assert _Drop.drawn == [4, 4, 2]
    assert len(_Drop.applied) == 9


def _tree(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("kind", ["npz", "png"])
def test_killed_and_resumed_gives_the_same_bytes_and_redoes_nothing(tmp_path, kind):
    source, shifts = _grey(), [_Noise(), _Drop()]
    arguments = {"seed": 1, "format": kind, "progress": False}
    whole = write_corrupted(source, shifts, (1, 2), tmp_path / "whole", chunk=4, **arguments)
    _Drop.applied.clear()
    _Drop.limit = 3
    with pytest.raises(KeyboardInterrupt):
        write_corrupted(source, shifts, (1, 2), tmp_path / "torn", chunk=4, **arguments)
    names = {path.name for path in (tmp_path / "torn").iterdir()}
    suffix = ".npz" if kind == "npz" else ""
    assert names == {"manifest.json", f"test-noise_s1{suffix}", f"test-noise_s2{suffix}"}
    assert json.loads((tmp_path / "torn" / "manifest.json").read_text())["complete"] is False
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "torn").glob("test-noise*")}
    _Drop.limit = None
    # left behind by a process that could not clean up
    (tmp_path / "torn" / f".drop_s1{suffix}.part").mkdir() if kind == "png" else (
        tmp_path / "torn" / f".drop_s1{suffix}.part"
    ).write_bytes(b"half")
    torn = write_corrupted(source, shifts, (1, 2), tmp_path / "torn", chunk=3, **arguments)
    assert _tree(torn) == _tree(whole)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    _Drop.applied.clear()
    write_corrupted(source, shifts, (1, 2), tmp_path / "torn", **arguments)
    assert _Drop.applied == []


def test_a_damaged_file_is_written_again(tmp_path):
    out = write_corrupted(_grey(), [_Drop()], (1, 2), tmp_path, progress=False)
    whole = _tree(out)
    path = out / "drop_s2.npz"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    _Drop.applied.clear()
    write_corrupted(_grey(), [_Drop()], (1, 2), tmp_path, progress=False)
    assert len(_Drop.applied) == 1
    assert _tree(out) == whole


@pytest.mark.parametrize(
    ("changes", "differing"),
    [
        ({"seed": 5}, "seed"),
        ({"severities": (1,)}, "severities"),
        ({"source": lambda: subset(_grey(), range(5))}, "source"),
        ({"shifts": [_Noise.at(sigma=0.1)]}, "shifts"),
        ({"format": "png"}, "format"),
    ],
)
def test_a_folder_of_another_data_set_is_refused(tmp_path, changes, differing):
    write_corrupted(_grey(), [_Noise()], (1, 2), tmp_path, progress=False)
    source = changes.get("source", _grey)()
    with pytest.raises(ConfigError, match=f"differs in {differing}"):
        write_corrupted(
            source,
            changes.get("shifts", [_Noise()]),
            changes.get("severities", (1, 2)),
            tmp_path,
            seed=changes.get("seed", 0),
            format=changes.get("format", "npz"),
        )


@pytest.mark.parametrize(
    ("shifts", "severities", "format", "chunk", "kind"),
    [
        (["gaussian-noise"], (1,), "npz", 4, KindError),
        ([_Noise()], (7,), "npz", 4, RangeError),
        ([_Noise()], (1, 1), "npz", 4, ConfigError),
        ([], (1,), "npz", 4, ConfigError),
        ([_Noise()], (), "npz", 4, ConfigError),
        ([_Noise()], (1,), "tiff", 4, ConfigError),
        ([_Noise()], (1,), "npz", 0, ConfigError),
        ([_Noise()], (math.nan,), "npz", 4, RangeError),
    ],
)
def test_writer_mistakes(tmp_path, shifts, severities, format, chunk, kind):
    with pytest.raises(kind, match="expected"):
        write_corrupted(_grey(), shifts, severities, tmp_path / "new", format=format, chunk=chunk)
    assert not (tmp_path / "new").exists()


def test_manifest_names_each_condition_as_the_evaluation_does(tmp_path):
    from robustlab.evaluate.plan import make_plan

    source, shifts = _grey(), (_Noise(), _Drop(), _Noise(sigma=Levels((0.1,) * 5, 0.0, "of full range")), _GreyOnly())
    folder = write_corrupted(source, shifts, (0, 1, 2.5), tmp_path, progress=False)
    entries = json.loads((folder / MANIFEST).read_text())["conditions"]
    plan = make_plan(shifts, (1, 2.5), (), source.info.spec)
    assert [e["condition"] for e in entries if e["severity"]] == [c.key for c in plan.conditions[1:]]
    assert {e["condition"] for e in entries if not e["severity"]} == {"clean"}
    assert "test noise#2@2.5" in {e["condition"] for e in entries}


def test_a_manifest_from_before_conditions_had_names_is_completed_without_work(tmp_path):
    folder = write_corrupted(_grey(), [_Drop()], (1, 2), tmp_path, progress=False)
    whole = (folder / MANIFEST).read_text()
    old = json.loads(whole)
    for entry in old["conditions"]:
        del entry["condition"]
    (folder / MANIFEST).write_text(json.dumps(old))
    _Drop.applied.clear()
    write_corrupted(_grey(), [_Drop()], (1, 2), tmp_path, progress=False)
    assert _Drop.applied == []
    assert (folder / MANIFEST).read_text() == whole
