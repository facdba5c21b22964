"""Kept threads: all work is done once, errors come out, forked children and nested calls work, scratch is apart."""

import multiprocessing
import threading

import numpy as np
import pytest

from robustlab.core.threads import scratch, share


def shared_squares(count, threads):
    left, done = iter(range(count)), []

    def run():
        for number in left:
            done.append(number**2)  # appended by several threads

    share(run, threads)
    return sorted(done)


def threads_that_meet():
    """Return how many threads work at the same time: each waits until two are there."""
    both, seen = threading.Barrier(2, timeout=60), set()

    def run():
        both.wait()
        seen.add(threading.get_ident())

    share(run, 2)
    return len(seen)


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_every_piece_is_worked_on_once(threads):
    assert shared_squares(1000, threads) == [number**2 for number in range(1000)]


def test_calls_run_at_the_same_time_and_in_this_thread():
    both, seen = threading.Barrier(2, timeout=60), set()

    def run():
        both.wait()
        seen.add(threading.get_ident())

    share(run, 2)
    assert len(seen) == 2
    assert threading.get_ident() in seen


@pytest.mark.parametrize("mine", [True, False])
def test_an_error_in_any_thread_comes_out(mine):
    both = threading.Barrier(2, timeout=60)
    here = threading.get_ident()

    def run():
        both.wait()
        if (threading.get_ident() == here) == mine:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        share(run, 2)


def test_threads_that_share_in_turn_do_not_wait_for_each_other():
    results, left = [], iter(range(64))

    def run():
        for _ in left:
            results.append(shared_squares(20, 64))

    share(run, 64)
    assert results == [[number**2 for number in range(20)]] * 64


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork on this system")
def test_a_forked_child_has_threads_of_its_own():
    shared_squares(100, 3)
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply_async(threads_that_meet).get(timeout=120) == 2


def test_scratch_is_kept_by_label_and_thread():
    first = scratch("test.a", 100, np.float32)
    assert first.shape == (100,)
    assert np.shares_memory(first, scratch("test.a", 40, np.uint16))
    assert not np.shares_memory(first, scratch("test.b", 100, np.float32))
    found = []
    thread = threading.Thread(target=lambda: found.append(scratch("test.a", 100, np.float32)))
    thread.start()
    thread.join()
    assert not np.shares_memory(first, found[0])
    assert len(scratch("test.a", 10**5, np.int64)) == 10**5
