"""Executors: the same report everywhere, workers that die, units that always fail, and what cannot travel."""

import re
import sys
import types
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.utils.data import DataLoader, IterableDataset

import robustlab
from robustlab.core.errors import ConfigError, KindError, ModelError, RangeError
from robustlab.corruptions import PGD
from robustlab.evaluate import executors
from tests.contracts.toys import ATTACK, Small, pixels, source

from .engine_toys import COUNT, Dangerous, Hungry, Pickling, Unreadable, assert_same, evaluate, wrapped

NET = "from tests.contracts.toys import Small\nbuild = Small\n"
RANDOM = "import os\nfrom tests.contracts.toys import Small\ndef build():\n    return Small(seed=os.getpid())\n"


def own_device():
    return list(executors._DEVICE)


@pytest.fixture(scope="module")
def pool():
    with robustlab.ProcessPool(2) as executor:
        yield executor


@pytest.fixture(scope="module")
def here():
    return evaluate(attacks=ATTACK)


@pytest.mark.parametrize("kept", [False, True])
def test_processes_give_the_same_report_bit_for_bit(pool, here, kept, tmp_path):
    cache = {"cache": tmp_path} if kept else {}
    assert_same(here, evaluate(attacks=ATTACK, executor=pool, **cache))
    if kept:
        assert list(tmp_path.rglob("*.raw")) == []
        assert_same(here, evaluate(attacks=ATTACK, cache=tmp_path))


def test_dask_gives_the_same_report_bit_for_bit(here, tmp_path):
    distributed = pytest.importorskip("distributed", reason="robustlab[dask] is not installed")
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, dashboard_address=None, local_directory=str(tmp_path)
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        assert_same(here, evaluate(attacks=ATTACK, executor=client.get_executor(), cache=tmp_path / "cache"))
        again = Dangerous(source(count=COUNT), tmp_path, position=20, times=1)
        assert_same(here, evaluate(data=again, attacks=ATTACK, executor=client.get_executor()))
        assert not list(tmp_path.glob("mark-*"))


@pytest.mark.parametrize("executor", [Pickling(), ThreadPoolExecutor(3)], ids=["pickling", "threads"])
def test_any_executor_will_do(executor, here):
    assert_same(here, evaluate(attacks=ATTACK, executor=executor))


@pytest.mark.parametrize(("times", "kept"), [(1, False), (2, True)])
def test_a_worker_that_dies_changes_nothing(pool, here, tmp_path, times, kept):
    data = Dangerous(source(count=COUNT), tmp_path, position=20, times=times)
    cache = {"cache": tmp_path} if kept else {}
    assert_same(here, evaluate(data=data, attacks=ATTACK, executor=pool, **cache))
    assert not list(tmp_path.glob("mark-*"))


def test_an_executor_of_the_standard_library_that_broke_is_replaced(here, tmp_path):
    data = Dangerous(source(count=COUNT), tmp_path, position=20, times=1)
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as executor:
        assert_same(here, evaluate(data=data, attacks=ATTACK, executor=executor))


def test_samples_that_always_kill_their_worker_are_listed_and_the_rest_finishes(pool, here, tmp_path):
    data = Dangerous(source(count=COUNT), tmp_path, position=20, times=50)
    report = evaluate(data=data, attacks=ATTACK, executor=pool)
    assert [failure["condition"] for failure in report.manifest["failures"]] == ["samples 16 to 23"]
    assert "died 3 times" in report.manifest["failures"][0]["error"]
    left = [i for i in range(COUNT) if not 16 <= i <= 23]
    for key, store in here.predictions.items():
        rows = left if not key.startswith("ood:") else list(range(16))
        assert torch.equal(report.predictions[key].logits, store.logits[rows]), key
    assert report.value("accuracy").n == COUNT - 8


@pytest.mark.parametrize("elsewhere", [False, True])
def test_samples_that_cannot_be_read_are_listed_and_the_rest_finishes(pool, elsewhere):
    data = Unreadable(source(count=COUNT), 59)
    report = evaluate(data=data, shifts="gamma", executor=pool if elsewhere else None)
    assert [failure["condition"] for failure in report.manifest["failures"]] == ["samples 56 to 59"]
    assert "planted" in report.manifest["failures"][0]["error"]
    assert report.value("accuracy").n == 56
    assert any("samples 56 to 59" in sentence for sentence in report.manifest["not_tested"])


def test_nothing_that_can_be_evaluated_is_an_error():
    class Fussy(Small):
        def forward(self, x):
            if len(x) == 6:
                raise ValueError("planted")
            return super().forward(x)

    with pytest.raises(ModelError, match="planted"):
        evaluate(wrapped(Fussy()), shifts=(), val=None, ood=None, batch_size=6)


def test_a_chunk_that_is_too_large_for_a_worker_is_halved(pool):
    here, there = (evaluate(wrapped(Hungry(9)), batch_size=None, executor=executor) for executor in (None, pool))
    assert there.manifest["chunk"] <= 9
    assert_same(here, there)
    with pytest.raises(ModelError, match="out of memory"):
        evaluate(wrapped(Hungry(8)), batch_size=16, executor=pool)


def test_a_model_by_name_is_built_by_every_worker(pool, here, tmp_path):
    (tmp_path / "net.py").write_text(NET)
    save_file(Small(seed=3).state_dict(), tmp_path / "w.safetensors")
    spec = robustlab.ModelSpec(
        f"{tmp_path / 'net.py'}:build", weights=tmp_path / "w.safetensors", output="logits", name="net"
    )
    wanted = evaluate(wrapped(Small(seed=3)))
    for executor in (None, pool):
        report = evaluate(spec, executor=executor)
        for key, store in wanted.predictions.items():
            assert torch.equal(report.predictions[key].logits, store.logits), key


def test_workers_with_other_weights_are_refused(pool, tmp_path):
    (tmp_path / "net.py").write_text(RANDOM)
    with pytest.raises(ConfigError, match="answers that differ by up to") as caught:
        evaluate(robustlab.ModelSpec(f"{tmp_path / 'net.py'}:build"), executor=pool)
    assert "executor=None" in caught.value.fix


def test_what_cannot_travel_is_refused_early(pool):
    calls = []
    net = Small()

    def local(x):
        calls.append(len(x))
        return net(x)

    with pytest.raises(ConfigError, match="model 'function'") as caught:
        evaluate(robustlab.wrap(local, output="logits", channels=3), executor=pool)
    assert "ModelSpec" in caught.value.fix
    assert sum(calls) <= 120  # what is looked at before every evaluation, and no chunk of it

    data = source(count=COUNT)
    data.transform = lambda image: image
    with pytest.raises(ConfigError, match="data 'array'"):
        evaluate(data=data, executor=pool)


def test_an_iterable_loader_is_read_into_memory_and_travels(pool):
    class Stream(IterableDataset):
        def __iter__(self):
            for i in range(20):
                yield torch.full((3, 12, 12), i / 20), i % 3

    data = robustlab.load_data(DataLoader(Stream(), batch_size=4), task="multiclass", name="stream")
    assert_same(evaluate(data=data), evaluate(data=data, executor=pool))


@pytest.mark.parametrize("executor", ["processes", 4, robustlab.ProcessPool])
def test_what_is_no_executor_is_refused(executor):
    with pytest.raises(KindError, match=re.escape("concurrent.futures.Executor")):
        evaluate(executor=executor)


def test_a_pool_that_was_shut_down_is_refused():
    pool = robustlab.ProcessPool(1)
    pool.shutdown()
    with pytest.raises(ConfigError, match="shut down"):
        evaluate(executor=pool)


def test_pools_with_devices_have_one_worker_each():
    with pytest.raises(ConfigError, match="cuda:99"):
        robustlab.ProcessPool(devices=("cuda:99",))
    with pytest.raises(ConfigError, match="one worker a device"):
        robustlab.ProcessPool(3, devices=("cpu", "cpu"))
    with pytest.raises(RangeError):
        robustlab.ProcessPool(0)
    assert robustlab.ProcessPool(devices=("cpu", "cpu")).workers == 2


def test_every_worker_of_a_pool_owns_one_device():
    with robustlab.ProcessPool(devices=("cpu", "cpu")) as pool:
        assert_same(evaluate(shifts=()), evaluate(shifts=(), executor=pool))
        owned = [pool.submit(own_device) for _ in range(8)]
        assert [future.result() for future in owned] == [["cpu"]] * 8


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_one_process_a_gpu_gives_the_same_report():
    with robustlab.ProcessPool(devices="cuda") as pool:
        assert_same(evaluate(device="cuda", attacks=PGD()), evaluate(executor=pool, attacks=PGD()))


# ---- recipes


def recipe(name):
    """Return the names that a recipe in the documentation defines."""
    page = Path(__file__).resolve().parents[3] / "docs" / "how-to" / "executors.md"
    code = re.search(rf"<!-- recipe: {name} -->\n```python\n(.*?)```", page.read_text(), re.S).group(1)
    space = {}
    exec(compile(code, f"{page.name}:{name}", "exec"), space)
    return space


class FakeJob:
    def __init__(self, call):
        self.future = Pickling().submit(*call)

    def result(self):
        return self.future.result()


class FakeAutoExecutor:
    """submitit's interface: jobs with result(), which are no futures."""

    made = None

    def __init__(self, folder):
        self.folder, self.parameters, self.count = folder, {}, 0
        FakeAutoExecutor.made = self

    def update_parameters(self, **parameters):
        self.parameters |= parameters

    def submit(self, fn, *args, **kwargs):
        self.count += 1
        return FakeJob((fn, *args))


def test_the_recipe_for_slurm_works(monkeypatch, here, tmp_path):
    monkeypatch.setitem(sys.modules, "submitit", types.SimpleNamespace(AutoExecutor=FakeAutoExecutor))
    with recipe("slurm")["SlurmExecutor"](str(tmp_path), 2, timeout_min=5) as executor:
        assert_same(here, evaluate(attacks=ATTACK, executor=executor))
    assert FakeAutoExecutor.made.parameters == {"timeout_min": 5}
    assert 8 <= FakeAutoExecutor.made.count <= 1 + 8 + 3 + 2  # the trial, the test data, validation and foreign data


def test_the_recipe_for_ray_works(monkeypatch, here):
    seen = []

    class Remote:
        def __init__(self, fn):
            self.fn = fn

        def options(self, **options):
            seen.append(options)
            return self

        def remote(self, *args, **kwargs):
            future = Pickling().submit(self.fn, *args, **kwargs)
            return types.SimpleNamespace(future=lambda: future)

    monkeypatch.setitem(sys.modules, "ray", types.SimpleNamespace(remote=Remote))
    with recipe("ray")["RayExecutor"](2, num_gpus=1) as executor:
        assert_same(here, evaluate(attacks=ATTACK, executor=executor))
    assert seen[0] == {"num_gpus": 1}


def test_grey_files_have_one_layout_everywhere(pool, tmp_path):
    """An axis of length 1 may have any stride, and a convolution chooses its kernel by strides."""
    images, _ = pixels(count=COUNT)
    np.savez(tmp_path / "grey.npz", test_images=images[..., 0], test_labels=np.arange(COUNT)[:, None] % 3)
    data = robustlab.load_data(tmp_path / "grey.npz")
    assert data.read(range(4)).images.stride() == (144, 144, 12, 1)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(1, 16, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(16, 8, 3, 2), torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten(), torch.nn.Linear(32, 3),
    ).eval()  # fmt: skip
    model = robustlab.wrap(net, output="logits")
    settings = {"val": None, "ood": None}
    assert_same(evaluate(model, data, **settings), evaluate(model, data, executor=pool, **settings))
