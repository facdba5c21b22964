"""Keyed random numbers: the bits are what the definition says, and depend on nothing but the keys."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from robustlab.core.errors import DuplicateNameError
from robustlab.core.rng import SampleRng, content_ids, hash_ids, in_blocks, stable_hash

MASK = 0xFFFFFFFF
GOLDEN_BITS = [963767485, 2228727173, 1413480402, 3625692641]
GOLDEN_NORMALS = [1.437896728515625, 0.46160888671875, 3.197052001953125, -0.7574615478515625, 0.04742431640625]


def mix32(x):
    x ^= x >> 16
    x = x * 0x7FEB352D & MASK
    x ^= x >> 15
    x = x * 0x846CA68B & MASK
    return x ^ (x >> 16)


def mix64(x):
    top = (1 << 64) - 1
    x = (x + 0x9E3779B97F4A7C15) & top
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & top
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & top
    return x ^ (x >> 31)


def reference_bits(seed, stream, sample, label, count):
    """The same definition in plain Python integers."""
    top = (1 << 64) - 1
    key = mix64(mix64(sample & top) ^ (stable_hash(seed, stream, 0, 0) & top))
    words = mix64(key ^ (stable_hash("draw", label) & top))
    low, high = words & MASK, words >> 32
    return [mix32((mix32(mix32(i * 0x9E3779B9 & MASK) ^ low) + high) & MASK) for i in range(count)]


def test_bits_equal_a_plain_python_implementation():
    ids = torch.tensor([0, 1, -7, 2**62, 12345])
    bits = SampleRng.make(3, "noise", ids).bits("z", 257)
    for row, sample in enumerate(ids.tolist()):
        assert [b & MASK for b in bits[row].tolist()] == reference_bits(3, "noise", sample, "z", 257)


def test_golden_values_do_not_move():
    rng = SampleRng.make(7, "golden", torch.tensor([42]))
    assert (rng.bits("z", 4)[0].to(torch.int64) & MASK).tolist() == GOLDEN_BITS
    assert rng.normal("z", (5,))[0].tolist() == GOLDEN_NORMALS


@given(order=st.permutations(range(12)), split=st.integers(1, 11), seed=st.integers(0, 2**31))
@settings(max_examples=25, deadline=None)
def test_draws_do_not_depend_on_batch_or_order(order, split, seed):
    ids = torch.arange(100, 112)
    whole = SampleRng.make(seed, "s", ids).normal("z", (3, 5, 7))
    shuffled = SampleRng.make(seed, "s", ids[list(order)]).normal("z", (3, 5, 7))
    assert torch.equal(shuffled, whole[list(order)])
    parts = [SampleRng.make(seed, "s", part).normal("z", (3, 5, 7)) for part in (ids[:split], ids[split:])]
    assert torch.equal(torch.cat(parts), whole)


def test_large_and_small_shapes_agree_across_block_borders():
    ids = torch.arange(40)
    whole = SampleRng.make(0, "s", ids).uniform("u", (3, 96, 96))
    alone = torch.cat([SampleRng.make(0, "s", ids[i : i + 1]).uniform("u", (3, 96, 96)) for i in range(40)])
    assert torch.equal(whole, alone)


def test_every_part_of_the_key_matters():
    ids = torch.arange(3)
    base = SampleRng.make(0, "a", ids)
    others = [
        SampleRng.make(1, "a", ids),
        SampleRng.make(0, "b", ids),
        SampleRng.make(0, "a", ids, epoch=1),
        SampleRng.make(0, "a", ids, step=1),
        SampleRng.make(0, "a", ids + 1),
        base.child("x"),
    ]
    for other in others:
        assert not torch.equal(base.bits("z", 8), other.bits("z", 8))
    assert not torch.equal(base.bits("z", 8), base.bits("y", 8))


def test_moments_distribution_and_independence():
    z = SampleRng.make(0, "m", torch.arange(16)).normal("z", (1, 128, 128)).double()
    n = z.numel()
    assert abs(z.mean()) < 4 / math.sqrt(n)
    assert abs(z.var() - 1) < 4 * math.sqrt(2 / n)
    assert abs((z**4).mean() - 3) < 5 * math.sqrt(96 / n)
    assert abs((z[..., 1:] * z[..., :-1]).mean()) < 4 / math.sqrt(n)
    flat = z.flatten(1)
    correlation = flat @ flat.T / flat.shape[1]
    assert (correlation - torch.eye(16)).abs().max() < 5 / math.sqrt(flat.shape[1])
    u = SampleRng.make(0, "m", torch.arange(16)).uniform("u", (4096,)).flatten().numpy()
    assert stats.kstest(u, "uniform").pvalue > 1e-3
    assert stats.kstest(z.flatten().numpy()[:50000], "norm").pvalue > 1e-3
    k = SampleRng.make(0, "m", torch.arange(16)).integers("k", 7, (3000,)).flatten().numpy()
    assert stats.chisquare(np.bincount(k, minlength=7)).pvalue > 1e-3


def test_normal_is_the_quantile_of_the_uniform_cells():
    rng = SampleRng.make(0, "q", torch.arange(4))
    z, u = rng.normal("z", (1000,)), rng.quantiles("z", (1000,))
    assert torch.allclose(z.double(), torch.special.ndtri(u.double()), atol=2e-3, rtol=2e-4)


def test_integer_normals_are_the_normals_rounded():
    rng = SampleRng.make(0, "q", torch.arange(4))
    whole = rng.normal_q12("z", (1001,))
    assert whole.dtype == torch.int16
    assert torch.equal(whole.double(), (rng.normal("z", (1001,)).double() * 4096).round())


def test_halves_are_the_words_low_half_first():
    rng = SampleRng.make(0, "h", torch.arange(3))
    words = rng.bits("u", 500).numpy().view(np.uint32).astype(np.int64)
    expected = np.stack((words % 65536, words // 65536), 2).reshape(3, -1)[:, :999]
    halves = rng.halves("u", (9, 111))
    assert halves.dtype == torch.int32
    assert np.array_equal(halves.numpy(), expected.reshape(3, 9, 111))
    counts = np.bincount(SampleRng.make(0, "h", torch.arange(64)).halves("u", (4096,)).flatten() >> 8, minlength=256)
    assert stats.chisquare(counts).pvalue > 1e-3


def test_blocks_threads_and_tensors_give_the_same_bits(monkeypatch):
    rng = SampleRng.make(2, "b", torch.arange(23))
    before, results = torch.get_num_threads(), []
    try:
        for threads, block in ((1, 1 << 17), (2, 700), (3, 64), (2, 4096)):
            torch.set_num_threads(threads)
            monkeypatch.setattr("robustlab.core.rng.BLOCK", block)
            results.append((rng.bits("x", 1201), rng.normal("x", (1201,)), rng.quantiles("x", (3, 7))))
    finally:
        torch.set_num_threads(before)
    monkeypatch.setattr("robustlab.core.rng.on_tensors", lambda stream: True)
    results.append((rng.bits("x", 1201), rng.normal("x", (1201,)), rng.quantiles("x", (3, 7))))
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


def test_a_block_covers_each_word_once(monkeypatch):
    monkeypatch.setattr("robustlab.core.rng.BLOCK", 50)
    for samples, count in ((7, 9), (3, 201), (1, 1), (0, 5), (4, 0), (2, 50)):
        stream = SampleRng.make(0, "c", torch.arange(samples)).stream("x")
        seen = np.zeros((samples, count), int)

        def make(size, seen=seen):
            def work(rows, columns, words):
                assert words.size <= size <= 50
                assert words.flags.c_contiguous
                seen[rows, columns] += 1

            return work

        in_blocks(stream, count, make)
        assert (seen == 1).all()


def test_an_error_in_a_block_reaches_the_caller(monkeypatch):
    monkeypatch.setattr("robustlab.core.rng.BLOCK", 16)
    before = torch.get_num_threads()

    def fail(rows, columns, words):
        raise ArithmeticError("planted")

    try:
        torch.set_num_threads(2)
        with pytest.raises(ArithmeticError, match="planted"):
            in_blocks(SampleRng.make(0, "e", torch.arange(20)).stream("x"), 16, lambda size: fail)
    finally:
        torch.set_num_threads(before)


def test_global_state_is_neither_read_nor_changed():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = SampleRng.make(0, "g", torch.arange(4)).normal("z", (9,))
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(1)
    assert torch.equal(first, SampleRng.make(0, "g", torch.arange(4)).normal("z", (9,)))


def test_content_ids_follow_the_pixels():
    images = SampleRng.make(0, "c", torch.arange(6)).uniform("u", (3, 9, 9))
    ids = content_ids(images)
    assert len(set(ids.tolist())) == 6
    assert torch.equal(content_ids(images.flip(0)), ids.flip(0))
    changed = images.clone()
    changed[2, 1, 4, 4] += 1 / 255
    assert (content_ids(changed) != ids).tolist() == [False, False, True, False, False, False]
    swapped = images[:1].flip(-1)
    assert content_ids(swapped) != ids[:1]


def test_hash_ids_refuses_duplicates():
    assert len(hash_ids(["a", "b"])) == 2
    with pytest.raises(DuplicateNameError, match="all different"):
        hash_ids(["a", "b", "a"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gives_the_same_bits():
    ids = torch.arange(10)
    for call in ("normal", "normal_q12", "uniform", "quantiles", "halves"):
        cpu = getattr(SampleRng.make(0, "s", ids), call)("z", (3, 31, 33))
        gpu = getattr(SampleRng.make(0, "s", ids.cuda()), call)("z", (3, 31, 33))
        assert torch.equal(cpu, gpu.cpu())
