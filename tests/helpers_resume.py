"""A small evaluation with a cache, a journal of the shards that are finished, and comparisons, for tests of resume."""

import os
import re
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import robustlab
from corruptions import PGD, Gamma, GaussianNoise
from robustlab.evaluate import cache
from tests.contracts.toys import Small, source
from tests.helpers_report import folder_without_times

CHUNK = 8
SEVERITIES = (1, 3)
SHIFTS = (GaussianNoise(), Gamma())
ATTACK = PGD(eps=(4 / 255,), steps=2)
MAIN = ("gaussian-noise@1", "gaussian-noise@3", "gamma@1", "gamma@3")
SHIFTED = dict.fromkeys(MAIN, 3)
PERTURBED = {"pgd-linf@5": 3}
EVERYTHING = {"clean": 3 + 2, **SHIFTED, **PERTURBED}
"""Shards by condition, those of the validation data among them."""
JOURNAL = "ROBUSTLAB_TEST_JOURNAL"


def model(**options):
    return robustlab.wrap(Small(), **{"task": "multiclass", "output": "logits", "num_classes": 3} | options)


class Watched(Small):
    """Whoever unpickles it imports this file, and then keeps the journal."""


def evaluate(net, folder, **options):
    """Evaluate on 24 images in chunks of 8, with validation data of two chunks."""
    settings = {
        "val": source(count=16, seed=3),
        "shifts": SHIFTS,
        "severities": SEVERITIES,
        "metrics": ("accuracy",),
        "detectors": ("msp",),
        "batch_size": CHUNK,
        "replicates": 100,
        "progress": False,
        "cache": folder,
    } | options
    data = settings.pop("data", None)
    return robustlab.evaluate_under_shift(net, source(count=24) if data is None else data, **settings)


@contextmanager
def counted():
    """Count the shards that are written: condition key to number."""
    found, write = Counter(), cache.Shelf.write

    def count(shelf, key, start, answers):
        write(shelf, key, start, answers)
        if key in shelf.names:
            found[key] += 1

    cache.Shelf.write = count
    try:
        yield found
    finally:
        cache.Shelf.write = write


@contextmanager
def passes(net):
    """Record the number of images of every forward pass, by a hook, which identities do not cover."""
    sizes = []
    handle = net.modules()[0].register_forward_hook(lambda module, inputs, output: sizes.append(len(inputs[0])))
    try:
        yield sizes
    finally:
        handle.remove()


def again(folder, net=None, **options):
    """Evaluate with this cache and return what was written to it, the sizes of the forward passes, and the report."""
    net = model() if net is None else net
    with counted() as found, passes(net) as sizes:
        report = evaluate(net, folder, **{"attacks": ATTACK} | options)
    return dict(found), sizes, report


def saved(report, folder, html=False):
    """Save a report and return the bytes of its files without their times."""
    report.save(folder)
    if html:
        report.to_html(Path(folder) / "report.html")
    return read_saved(Path(folder))


def read_saved(folder):
    files = folder_without_times(folder)
    if "report.html" in files:
        page = re.sub(rb"\d{4}-\d\d-\d\d(T[\d:+]+)?", b"", files["report.html"])
        files["report.html"] = re.sub(rb"(wall_seconds[^\d]{1,60})[\d.]+", rb"\1", page)
    return files


def shards(folder):
    """Return relative path to (inode, time of change) of all shards: what is written anew gets another inode."""
    root = Path(folder) / cache.FOLDER
    found = {}
    for path in sorted(root.rglob("*.safetensors")):
        if path.stem.isdecimal() and ".part" not in str(path.relative_to(root)):
            facts = path.stat()
            found[str(path.relative_to(root))] = (facts.st_ino, facts.st_mtime_ns)
    return found


def unfinished(folder):
    return [path for path in (Path(folder) / cache.FOLDER).rglob("*") if ".part" in path.name]


def _keep_journal(place):
    """Note every finished shard in a file, with the process that wrote it."""
    write = cache.Shelf.write

    def noted(shelf, key, start, answers):
        write(shelf, key, start, answers)
        file = os.open(place, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(file, f"{shelf.folder.name} {key} {start} {os.getpid()}\n".encode())
        os.close(file)

    cache.Shelf.write = noted


def read_journal(place):
    """Return [(source, condition, start), pid] of every whole line."""
    text = Path(place).read_text() if Path(place).exists() else ""
    lines = [line.split() for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return [((folder, key, int(start)), int(pid)) for folder, key, start, pid in lines]


if os.environ.get(JOURNAL):  # in a child, and in the workers of its pool, which import this file with the model
    _keep_journal(os.environ[JOURNAL])
