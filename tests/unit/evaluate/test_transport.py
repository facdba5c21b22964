"""What travels to other processes: values, types, sharing and size."""

import numpy as np
import pytest
import torch
from torch import nn

from robustlab.core.errors import ConfigError
from robustlab.evaluate.transport import LARGE, pack, unpack


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(200, 200, bias=False)
        self.second = nn.Linear(200, 200, bias=False)
        self.second.weight = self.first.weight
        self.register_buffer("table", torch.arange(40_000).reshape(200, 200).t(), persistent=False)
        self.first.weight.requires_grad_(False)
        self.third = nn.Linear(200, 200)


def test_modules_arrive_whole(tmp_path):
    net = Tied()
    message = pack(net, tmp_path, "net")
    back = unpack(message)
    assert len(message) < 20_000 < sum(p.numel() * 4 for p in net.parameters())
    assert back.first.weight is back.second.weight
    assert isinstance(back.first.weight, nn.Parameter)
    assert not back.first.weight.requires_grad
    assert back.third.weight.requires_grad
    for (name, value), (other, found) in zip(net.state_dict().items(), back.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(value, found)
    assert torch.equal(back.table, net.table)
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.complex64])
def test_tensors_of_every_kind_arrive(dtype, tmp_path):
    value = (torch.arange(LARGE) % 7).to(dtype)[::2]
    (back,) = unpack(pack([value], tmp_path, "value"))
    assert back.dtype == dtype
    assert torch.equal(back, value)


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", ["<u2", ">f4", "U3", "bool"])
def test_arrays_of_every_kind_arrive(dtype, order, tmp_path):
    value = np.asarray(np.arange(90_000).reshape(300, 300).astype(dtype), order=order)
    back = unpack(pack({"x": value}, tmp_path, "value"))["x"]
    assert back.dtype == value.dtype
    assert np.array_equal(back, value)


def test_writing_to_what_arrived_leaves_the_file_alone(tmp_path):
    message = pack(np.zeros(LARGE), tmp_path, "value")
    unpack(message)[:] = 1
    assert unpack(message).sum() == 0


def test_equal_arrays_lie_in_one_file(tmp_path):
    pack([np.ones(LARGE), torch.ones(LARGE, dtype=torch.float64)], tmp_path, "value")
    pack(np.ones(LARGE), tmp_path, "value")
    assert len(list(tmp_path.iterdir())) == 1


def test_small_things_need_no_file(tmp_path):
    value = {"a": np.arange(5), "b": torch.arange(3.0), "c": np.array(["x", None], dtype=object)}
    back = unpack(pack(value, tmp_path / "none", "value"))
    assert back["a"].tolist() == [0, 1, 2, 3, 4]
    assert back["c"].tolist() == ["x", None]
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    "value", [lambda: 1, torch.jit.script(nn.ReLU()), (i for i in range(3))], ids=["lambda", "torchscript", "generator"]
)
def test_what_cannot_travel_says_so(value, tmp_path):
    with pytest.raises(ConfigError, match="model 'x'") as caught:
        pack(value, tmp_path, "model 'x'")
    assert "ModelSpec" in caught.value.fix
