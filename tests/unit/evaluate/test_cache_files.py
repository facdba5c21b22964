"""What the prediction cache keeps on the disk: damage is noticed, leftovers go, and no name of a person gets there."""

import json
import logging
import os
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from robustlab.core.errors import ConfigError
from robustlab.evaluate import cache
from robustlab.evaluate.cache import Answers, open_cache, read_shard, write_shard
from tests.contracts.toys import pixels, source
from tests.helpers_resume import ATTACK, EVERYTHING, again, evaluate, model, saved, shards

# ---- damage


@pytest.fixture(scope="module")
def shard(tmp_path_factory):
    path = tmp_path_factory.mktemp("shard") / "000000000.safetensors"
    generator = torch.Generator().manual_seed(0)
    answers = Answers(torch.randn(3, 2, generator=generator), {"own": torch.randn(3, generator=generator).double()})
    write_shard(path, answers)
    return path, answers


def equal(found, answers):
    return (
        torch.equal(found.logits, answers.logits)
        and found.scores.keys() == answers.scores.keys()
        and all(torch.equal(found.scores[name], value) for name, value in answers.scores.items())
    )


def test_a_shard_is_read_as_it_was_written(shard):
    path, answers = shard
    assert equal(read_shard(path), answers)
    assert read_shard(path).scores["own"].dtype == torch.float64


def read(data):
    return read_shard(SimpleNamespace(name="shard", read_bytes=lambda: bytes(data)))


def test_no_flipped_bit_gives_other_answers(shard, caplog):
    caplog.set_level(logging.CRITICAL)
    path, answers = shard
    data = path.read_bytes()
    refused = 0
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        found = read(damaged)
        refused += found is None
        assert found is None or equal(found, answers), f"bit {bit} of {8 * len(data)}"
    assert refused > 7.5 * len(data)


def test_no_part_of_a_shard_is_taken_for_the_whole(shard, caplog):
    caplog.set_level(logging.CRITICAL)
    data = shard[0].read_bytes()
    assert read(data) is not None
    assert [length for length in range(len(data)) if read(data[:length]) is not None] == []
    assert read(data + b"\0") is None


def other_shape(path):
    write_shard(path, Answers(read_shard(path).logits[:, :2]))


def other_count(path):
    write_shard(path, Answers(read_shard(path).logits[:5]))


def broadcast(path):
    write_shard(path, Answers(read_shard(path).logits[:, :1]))


def other_scores(path):
    write_shard(path, Answers(read_shard(path).logits, {"own": torch.zeros(5)}))


def flipped(where):
    def damage(path):
        data = bytearray(path.read_bytes())
        data[where if where >= 0 else len(data) + where] ^= 4
        path.write_bytes(data)

    return damage


def cut(share):
    return lambda path: path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


DAMAGE = {
    "empty": cut(0),
    "cut in the length": lambda path: path.write_bytes(path.read_bytes()[:5]),
    "cut in the header": lambda path: path.write_bytes(path.read_bytes()[:40]),
    "cut in the data": cut(0.9),
    "flipped in the header": flipped(30),
    "flipped in the data": flipped(-3),
    "fewer rows": other_count,
    "fewer columns": other_shape,
    "one column": broadcast,
    "scores of another length": other_scores,
    "missing": lambda path: path.unlink(),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_shards_are_computed_again_and_no_others(place, tmp_path, what):
    before = again(place)[2]
    (entry,) = (place / "cache").glob("*/*/gamma@3-*")
    first, *_, last = sorted(entry.glob("*.safetensors"))
    contents = [path.read_bytes() for path in (first, last)]
    for path in (first, last):
        DAMAGE[what](path)
    before_run = shards(place)
    written, _, report = again(place)
    assert written == {"gamma@3": 2}
    assert [path.read_bytes() for path in (first, last)] == contents
    after, mended = shards(place), {str(path.relative_to(place / "cache")) for path in (first, last)}
    assert {name for name, facts in after.items() if before_run.get(name) != facts} == mended
    assert saved(report, tmp_path / "a") == saved(before, tmp_path / "b")


@pytest.mark.parametrize("name", ["about.json", "format.json", "probe.safetensors"])
@pytest.mark.parametrize("length", [0, 1, 9, -2])
def test_half_written_notes_are_recovered(place, tmp_path, name, length):
    before = again(place)[2]
    (path,) = (place / "cache").rglob(name)
    content = path.read_bytes()
    path.write_bytes(content[:length])
    written, _, report = again(place)
    assert written == (EVERYTHING if name.startswith("probe") else {}), "without a probe nothing is known of the shards"
    assert saved(report, tmp_path / "a") == saved(before, tmp_path / "b")
    assert again(place)[:2] == ({}, [8])
    if not name.startswith("probe"):
        assert path.read_bytes() == content


def test_the_cache_of_another_release_is_refused_every_time(place):
    mark = place / "cache" / "format.json"
    mark.write_text(json.dumps({"format": 99}))
    for _ in range(2):
        with pytest.raises(ConfigError, match="expected format 1, got format 99"):
            open_cache(place)
    assert json.loads(mark.read_text()) == {"format": 99}


# ---- leftovers


def left_over(pid, host=None):
    return f".000000000.safetensors.{host or cache.writer().rpartition('.')[0]}.{pid}.part"


def test_what_the_dead_left_is_removed_and_what_the_living_write_is_not(place):
    entry = min((place / "cache").glob("*/*/clean"))
    dead = 2**22 + 1  # beyond the largest number that Linux gives
    kept = [entry / left_over(os.getpid()), entry / left_over(dead, "another-machine"), entry / ".mine.part"]
    gone = [entry / left_over(dead), place / "cache" / left_over(dead), entry / f".arrays-x{left_over(dead)}"]
    for path in (*kept, *gone[:2]):
        path.write_bytes(b"half")
    gone[2].mkdir()
    (gone[2] / "x.raw").write_bytes(b"half")
    assert again(place)[0] == {}
    assert [path.exists() for path in kept] == [True] * 3
    assert [path.exists() for path in gone] == [False] * 3


def test_folders_that_vanish_while_it_looks_for_leftovers_are_no_error(place, monkeypatch):
    (place / "cache" / ".spare.part").mkdir()
    look = cache._is_left_over

    def vanish(name):
        if name == ".spare.part":
            shutil.rmtree(place / "cache" / name)
        return look(name)

    monkeypatch.setattr(cache, "_is_left_over", vanish)
    assert open_cache(place) == place / "cache"


# ---- privacy


def test_no_name_of_a_person_or_place_reaches_the_disk(tmp_path):
    folder = tmp_path / "st-elsewhere-hospital"
    secrets = [f"Jane Q. Patient {i:02d}" for i in range(24)]
    for i, (image, name) in enumerate(zip(pixels(24)[0], secrets, strict=True)):
        file = folder / "scans" / f"class{i % 3}" / f"{name}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(file)
    arrays = source(count=24, ids=secrets, groups={"pid": [name[:-1] for name in secrets]})
    for data in (arrays, folder / "scans"):
        evaluate(
            model(), tmp_path / "run", data=data, attacks=ATTACK, val=None, cluster="pid" if data is arrays else None
        )
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(files) > 40
    for path in files:
        text = str(path.relative_to(tmp_path)).encode() + path.read_bytes()
        assert not re.search(rb"Jane|Patient|elsewhere|hospital|\.png|" + re.escape(str(tmp_path).encode()), text), path
