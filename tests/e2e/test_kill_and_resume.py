"""A process that is killed and started again, over and over, ends with the files of one that was left alone."""

import os
import random
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

import robustlab
from robustlab.core.errors import RobustlabWarning
from tests.contracts.toys import source
from tests.helpers_resume import JOURNAL, Watched, again, evaluate, read_journal, read_saved, saved, shards, unfinished

pytestmark = pytest.mark.slow
KILLS = {"shards": 12, "saving": 4, "pool": 4}
COUNT, CHUNK = 480, 4
LARGE = {
    "severities": (1, 2, 3, 4, 5),
    "attacks": (),
    "batch_size": CHUNK,
    "metrics": "default",
    "detectors": ("msp", "energy"),
}
SHARDS = COUNT // CHUNK * 11 + 16 // CHUNK
PATIENCE = 120


def run(folder, workers=0):
    """What a child does: evaluate with a cache beside the report, save, write the page."""
    folder, pool = Path(folder), robustlab.ProcessPool(workers) if workers else None
    net = robustlab.wrap(Watched(), task="multiclass", output="logits", num_classes=3)
    data = source(count=COUNT)
    print("ready", flush=True)
    sys.stdin.readline()
    report = evaluate(net, folder, data=data, executor=pool, **LARGE)
    print("saving", flush=True)
    report.to_html(report.save(folder) / "report.html")
    print("done", flush=True)
    if pool is not None:
        pool.shutdown()


def launch(folder, journal, workers=0):
    """Start a child, which has imported everything and waits."""
    code = "import sys; from tests.e2e.test_kill_and_resume import run; run(sys.argv[1], int(sys.argv[2]))"
    root = str(Path(__file__).resolve().parents[2])
    return subprocess.Popen(
        [sys.executable, "-c", code, str(folder), str(workers)],
        env={**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", JOURNAL: str(journal)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def start(*children):
    """Let children begin together, once all of them are ready."""
    for child in children:
        assert child.stdout.readline() == "ready\n", child.communicate()[1]
    for child in children:
        child.stdin.write("go\n")
        child.stdin.flush()
    return children[0]


def finish(child):
    """Wait for the end of a child, which must be a good one."""
    errors = child.communicate(timeout=PATIENCE)[1]
    assert child.returncode == 0, errors


def ends_within(child, seconds):
    """Wait for the end of a child, but no longer than this; tell whether it ended."""
    watch = os.pidfd_open(child.pid)
    try:
        return bool(select.select([watch], [], [], seconds)[0])
    finally:
        os.close(watch)


def killed(child, seconds):
    """Kill a child after a while; tell whether it was still running."""
    if ends_within(child, seconds):
        finish(child)
        return False
    child.kill()
    child.wait()
    return True


def killed_amid(place, draw, workers=0):
    """Start a child, let it finish a drawn number of shards, and kill it within the next ones."""
    have, more = len(read_journal(place / "journal")), draw.randrange(SHARDS // 8)
    child = start(launch(place / "run", place / "journal", workers))
    ended = False
    while not ended and len(read_journal(place / "journal")) < have + more:
        ended = ends_within(child, 0.005)
    dead = killed(child, draw.uniform(0, 0.01))
    for pid in {pid for _, pid in read_journal(place / "journal")}:
        wait_for_end(pid)
    return dead


def wait_for_end(pid):
    """Wait for the end of a process that is no child of this one."""
    try:
        watch = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        assert select.select([watch], [], [], PATIENCE)[0], f"process {pid} goes on though its parent is dead"
    finally:
        os.close(watch)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The files of a child that was left alone, and how long it took to save them."""
    place = tmp_path_factory.mktemp("undisturbed")
    child = start(launch(place / "run", place / "journal"))
    assert child.stdout.readline() == "saving\n", child.communicate()[1]
    begun = time.monotonic()
    assert child.stdout.readline() == "done\n", child.communicate()[1]
    seconds = time.monotonic() - begun
    finish(child)
    shelves = [shard for shard, _ in read_journal(place / "journal")]
    assert len(shelves) == len(set(shelves)) == SHARDS
    return read_saved(place / "run"), seconds


def check(place, wanted, before):
    """Compare a finished run with the undisturbed one, and with the shards that were there after each kill."""
    assert read_saved(place / "run") == wanted
    shelves = [shard for shard, _ in read_journal(place / "journal")]
    assert len(shelves) == len(set(shelves)), "a shard was finished twice"
    assert len(shelves) >= SHARDS - 2 * len(before), "a kill may come between a shard and its note, in two workers"
    after = shards(place / "run")
    assert len(after) == SHARDS
    for earlier in before:
        assert {name: after[name] for name in earlier} == earlier, "a finished shard was written anew"
    assert unfinished(place / "run") == []


@pytest.mark.parametrize("kind", ["shards", "pool"])
def test_killed_amid_the_forward_passes(kind, undisturbed, tmp_path):
    wanted, _ = undisturbed
    workers = 2 if kind == "pool" else 0
    draw = random.Random(f"kill {kind}")
    left, amid = KILLS[kind], 0
    for number in range(KILLS[kind]):  # a run that finishes before it is killed is compared, and another one begins
        place, before = tmp_path / str(number), []
        place.mkdir()
        while left and killed_amid(place, draw, workers):
            left -= 1
            before.append(shards(place / "run"))
            amid += 0 < len(before[-1]) < SHARDS
        finish(start(launch(place / "run", place / "journal", workers)))
        check(place, wanted, before)
        if not left:
            break
    assert left == 0
    assert amid >= KILLS[kind] // 2, "too many kills came before the first shard or after the last one"


def test_killed_while_the_report_is_saved(undisturbed, tmp_path):
    wanted, seconds = undisturbed
    draw, before = random.Random("kill saving"), []
    for _ in range(KILLS["saving"]):
        child = start(launch(tmp_path / "run", tmp_path / "journal"))
        assert child.stdout.readline() == "saving\n", child.communicate()[1]
        before.append(shards(tmp_path / "run"))
        assert len(before[-1]) == SHARDS
        if not killed(child, draw.uniform(0, 0.7) * seconds):
            check(tmp_path, wanted, before)
    finish(start(launch(tmp_path / "run", tmp_path / "journal")))
    check(tmp_path, wanted, before)


def test_two_processes_that_share_a_cache(undisturbed, tmp_path):
    wanted, _ = undisturbed
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "cache").symlink_to(tmp_path / "cache")
    (tmp_path / "cache").mkdir()
    children = [launch(tmp_path / name, tmp_path / "journal") for name in "ab"]
    start(*children)
    for child in children:
        finish(child)
    for name in "ab":
        assert read_saved(tmp_path / name) == wanted
    pids = {pid for _, pid in read_journal(tmp_path / "journal")}
    assert len(pids) == 2, "both were at work"
    net = robustlab.wrap(Watched(), task="multiclass", output="logits", num_classes=3)
    written, sizes, _ = again(tmp_path / "a", net, data=source(count=COUNT), **LARGE)
    assert (written, sizes) == ({}, [8])


def test_a_disk_that_is_really_full(tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(small)], capture_output=True)
    if mount.returncode:
        pytest.skip("needs the right to mount a file system")
    try:
        wanted = saved(evaluate(robustlab.wrap(Watched(), num_classes=3, output="logits"), None), tmp_path / "wanted")
        net = robustlab.wrap(Watched(), num_classes=3, output="logits")
        (small / "mine").write_bytes(bytes(64 << 10))
        with pytest.warns(RobustlabWarning, match="No space left"):
            report = evaluate(net, small)
        assert saved(report, tmp_path / "report") == wanted
        kept = shards(small)
        assert 0 < len(kept) < 17
        assert unfinished(small) == []
        (small / "mine").unlink()
        written, _, report = again(small, net, attacks=())
        assert sum(written.values()) == 17 - len(kept)
        assert {name: shards(small)[name] for name in kept} == kept
        assert saved(report, tmp_path / "report") == wanted
    finally:
        subprocess.run(["umount", str(small)], check=True)
