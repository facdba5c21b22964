"""Rival libraries in environments of their own, each driven as a subprocess that speaks JSON lines."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(__file__).parent / "rivals"
_BORROWED = ("torch", "torchvision", "torchgen", "functorch", "torchvision.libs", "nvidia", "triton", "sympy", "mpmath",
             "jinja2", "markupsafe", "filelock", "fsspec", "typing_extensions.py")  # fmt: skip

Array = np.ndarray[Any, np.dtype[np.uint8]]


class RivalMissingError(RuntimeError):
    """A rival cannot be had here; the message says why."""


class RivalError(RuntimeError):
    """A rival failed at one piece of work."""


def environment(name: str) -> Path:
    """Return the interpreter of a rival's environment, which is made at the first call.

    It holds what ``rivals/NAME.txt`` pins, installed without dependencies, and the Pillow that runs here, since codecs
    are compared bit for bit; torch and torchvision are linked from the interpreter that runs.

    Raises:
        RivalMissingError: It cannot be installed.
    """
    pins = [line for line in (FOLDER / f"{name}.txt").read_text().splitlines() if line and line[0] != "#"]
    pins.append(f"pillow=={version('pillow')}")
    torch_at = importlib.util.find_spec("torch")
    if torch_at is None or torch_at.origin is None:
        raise RivalMissingError(f"{name}: there is no torch to lend it")
    lender = Path(torch_at.origin).parents[1]
    key = hashlib.sha256("\n".join([sys.executable, str(lender), version("torch"), *pins]).encode()).hexdigest()[:10]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    place = cache / "robustlab" / "rivals" / f"{name}-{key}"
    python = place / "bin" / "python"
    if (place / "complete").exists():
        return python
    for command in (
        [sys.executable, "-m", "venv", "--clear", str(place)],
        [str(python), "-m", "pip", "install", "--quiet", "--no-deps", "--only-binary", ":all:", *pins],
    ):
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            raise RivalMissingError(f"{name}: {' '.join(command[1:4])} failed: {_last(done.stdout)}")
    _lend(lender, next((place / "lib").glob("python*/site-packages")))
    (place / "complete").touch()
    return python


def _lend(lender: Path, site: Path) -> None:
    """Let an environment see torch, torchvision and what they import, and nothing else, of another one."""
    borrowed = site.parent / "borrowed"
    borrowed.mkdir()
    for part in _BORROWED:
        if (lender / part).exists():
            (borrowed / part).symlink_to(lender / part)
    (site / "borrowed.pth").write_text(f"{borrowed}\n")


def _last(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no message"


class Rival:
    """A running rival; its images are handed over through a temporary file, so that only calls travel as text.

    Args:
        name: ``"imagecorruptions"`` or ``"medmnistc"``.

    Raises:
        RivalMissingError: It cannot be installed, or does not start.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._folder = tempfile.TemporaryDirectory()
        self._errors = (Path(self._folder.name) / "errors.txt").open("w+")
        self._process = subprocess.Popen(
            [str(environment(name)), str(FOLDER / f"run_{name}.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")},
        )
        try:
            self.versions: dict[str, str] = self._ask({"do": "versions"})["versions"]
        except RivalError as error:
            self.close()
            raise RivalMissingError(str(error)) from None

    def load(self, key: str, images: Array) -> None:
        """Hand over images, uint8 (N, H, W) or (N, H, W, 3), to be named by ``key`` from here on."""
        path = Path(self._folder.name) / f"{key}.npy"
        np.save(path, images)
        self._ask({"do": "load", "key": key, "path": str(path)})
        path.unlink()

    def seconds(self, key: str, name: str, severity: int, *, count: int, **options: Any) -> float:
        """Return how long the rival's own loop over the first ``count`` images takes, as its users would write it."""
        job = {"do": "run", "key": key, "name": name, "severity": severity, "count": count, **options}
        return float(self._ask(job)["seconds"])

    def images(self, key: str, name: str, severity: int, *, count: int, seed: int = 0, **options: Any) -> Array:
        """Return what the rival makes of the first ``count`` images, with all of its random state seeded."""
        path = Path(self._folder.name) / "result.npy"
        job = {"do": "run", "key": key, "name": name, "severity": severity, "count": count, **options}
        self._ask({**job, "seed": seed, "save": str(path)})
        result: Array = np.load(path)
        return result

    def close(self) -> None:
        """End the rival and remove its files."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.wait()
        self._errors.close()
        self._folder.cleanup()

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        sender, receiver = self._process.stdin, self._process.stdout
        if sender is None or receiver is None:
            raise RivalError(f"{self.name}: no pipes")
        try:
            sender.write(json.dumps(request) + "\n")
            sender.flush()
            line = receiver.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self._errors.seek(0)
            raise RivalError(f"{self.name} stopped: {_last(self._errors.read())}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise RivalError(f"{self.name}: {answer['error']}")
        return answer
