"""Test workers share the cores: two threads each on two cores would wait for one another most of the time."""

import os

if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    share = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, share)))  # read when torch is imported, also by subprocesses
