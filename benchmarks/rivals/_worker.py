"""The rival's side of the pipe: one JSON request a line in, one JSON answer a line out."""

from __future__ import annotations

import json
import os
import random
import sys
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import numpy as np

Prepare = Callable[[np.ndarray, str, int, dict[str, Any]], Callable[[np.ndarray], np.ndarray]]


def serve(packages: tuple[str, ...], prepare: Prepare) -> None:
    """Answer until the input ends.

    Args:
        packages: Whose versions to report.
        prepare: Maps (images, corruption, severity 1 to 5, the request) to a function of one image.
    """
    warnings.simplefilter("ignore")
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever the rival prints may not mix with answers
    held: dict[str, np.ndarray] = {}
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = _answer(request, held, packages, prepare)
        except Exception as error:  # anything may go wrong in a rival, and its caller reports it
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _answer(
    request: dict[str, Any], held: dict[str, np.ndarray], packages: tuple[str, ...], prepare: Prepare
) -> dict[str, Any]:
    if request["do"] == "versions":
        return {"versions": {name: version(name) for name in (*packages, "numpy", "pillow")}}
    if request["do"] == "load":
        held[request["key"]] = np.load(request["path"])
        return {}
    images = held[request["key"]][: request["count"]]
    if "seed" in request:
        random.seed(request["seed"])
        np.random.seed(request["seed"])  # noqa: NPY002 - the rivals draw from it
    call = prepare(images, request["name"], request["severity"], request)
    started = time.perf_counter()
    results = [call(image) for image in images]
    seconds = time.perf_counter() - started
    if "save" in request:
        np.save(request["save"], np.stack(results))
    return {"seconds": seconds}
