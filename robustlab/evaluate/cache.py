"""The prediction cache: one checked safetensors shard a (condition, chunk), written whole or not at all.

Below the folder that the user names::

    cache/MODEL/about.json             what is known of the model, for people and for the next run
    cache/MODEL/probe.safetensors      its answers to eight images
    cache/MODEL/SOURCE/CONDITION/START.safetensors

Every capital word is a key: a hash of all that decides the answers below it. Whatever cannot be hashed is not kept;
whatever cannot be read, or does not match its checksum, counts as missing. Sample ids are not stored.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
import os
import platform
import re
import shutil
import socket
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from corruptions.adversarial import DetectorAttack
from robustlab import __version__
from robustlab.core.attack import Attack
from robustlab.core.corruption import Corruption
from robustlab.core.detector import Detector
from robustlab.core.errors import ConfigError, DataFileError, KindError
from robustlab.core.identity import code_identity, is_library_code, model_identity
from robustlab.core.model import Model
from robustlab.core.shift import Shift
from robustlab.core.source import Source
from robustlab.core.spec import array_fingerprint, canonical_json
from robustlab.core.types import ImageSpec, ModelOutputs

from .plan import CLEAN, Condition, Plan

logger = logging.getLogger("robustlab")

FORMAT = 1
FOLDER = "cache"
TOLERANCE = 1e-5
"""Largest difference, absolute and relative, between a stored and a fresh probe of one model."""

_PROBE, _ABOUT, _MARK, _SUFFIX = "probe.safetensors", "about.json", "format.json", ".safetensors"


@dataclass(frozen=True, eq=False)
class Answers:
    """What a model said of some consecutive samples, on the CPU.

    Args:
        logits: float32 (n, C).
        scores: Score name to (n,), for scores that the model itself returns.
    """

    logits: Tensor
    scores: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.logits)

    def __reduce__(self) -> tuple[Any, ...]:
        # arrays, because processes would hand torch tensors on as open files
        return _rebuild, (self.logits.numpy(), {name: value.numpy() for name, value in self.scores.items()})


def _rebuild(logits: np.ndarray[Any, Any], scores: Mapping[str, np.ndarray[Any, Any]]) -> Answers:
    return Answers(torch.from_numpy(logits), {name: torch.from_numpy(value) for name, value in scores.items()})


@dataclass(frozen=True, eq=False)
class Shelf:
    """The shards of one model on one source; processes may share it.

    Args:
        folder: Where they lie.
        names: Condition key to folder name; conditions that are not kept are missing.
        classes: Columns of the logits.
    """

    folder: Path
    names: Mapping[str, str]
    classes: int

    def finished(self) -> dict[str, set[int]]:
        """Return condition key to the first samples of all its shards."""
        found: dict[str, set[int]] = {}
        for key, name in self.names.items():
            place = self.folder / name
            files = [file.name for file in place.iterdir()] if place.is_dir() else []
            starts = (name.removesuffix(_SUFFIX) for name in files if name.endswith(_SUFFIX))
            found[key] = {int(start) for start in starts if start.isdecimal()}
        return found

    def read(self, key: str, start: int, count: int) -> Answers | None:
        """Return a shard, or None where it is missing, damaged or of another shape."""
        found = read_shard(self._path(key, start))
        if found is None or found.logits.shape != (count, self.classes):
            return None
        return found if all(score.shape == (count,) for score in found.scores.values()) else None

    def write(self, key: str, start: int, answers: Answers) -> None:
        """Keep a shard; does nothing for conditions that are not kept.

        Raises:
            OSError: The disk is full, or the folder is gone.
        """
        if key in self.names:
            write_shard(self._path(key, start), answers)

    def _path(self, key: str, start: int) -> Path:
        return self.folder / self.names[key] / f"{start:09d}{_SUFFIX}"


def read_shard(path: Path) -> Answers | None:
    """Read a shard; None where it is missing, truncated or altered."""
    try:
        data = path.read_bytes()
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        tensors = safetensors.torch.load(data)
        if header["__metadata__"]["checksum"] != array_fingerprint(sorted(tensors.items())):
            raise ValueError("the checksum differs")
        scores = {name.removeprefix("score "): value for name, value in tensors.items() if name.startswith("score ")}
        return Answers(tensors["logits"], scores)
    except FileNotFoundError:
        return None
    except Exception as error:  # damage takes any form, safetensors' own errors among them
        logger.warning("cache: %s is damaged (%s) and is computed again", path.name, error)
        return None


def write_shard(path: Path, answers: Answers) -> None:
    """Write a shard so that its name never stands for half of it."""
    scores = {f"score {name}": value.contiguous() for name, value in answers.scores.items()}
    tensors = {"logits": answers.logits.contiguous(), **scores}
    checksum = array_fingerprint(sorted(tensors.items()))
    replace_file(path, safetensors.torch.save(tensors, {"checksum": checksum}))


def replace_file(path: Path, data: bytes) -> None:
    """Put a file in its place whole: written under a name of this process, then moved."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{threading.get_ident()}.{writer()}.part")
    try:
        part.write_bytes(data)
        part.replace(path)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def writer() -> str:
    """Return the name of this process in unfinished files: machine and number."""
    host = re.sub("[^A-Za-z0-9-]", "-", socket.gethostname())
    return f"{host}-{_namespace()}.{os.getpid()}"


@functools.cache
def _namespace() -> str:
    """Return what tells apart containers of one host name, whose process numbers mean other processes."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
        return _hash(boot, str(Path("/proc/self/ns/pid").readlink()))[:8]
    except OSError:
        return "unknown"


@dataclass(frozen=True, eq=False)
class ModelEntry:
    """What a cache holds of one model.

    Args:
        folder: Its folder.
        known: What an earlier run found out about it; empty for a new one.
        classes: Columns of its logits.
    """

    folder: Path
    known: Mapping[str, Any]
    classes: int

    def remember(self, facts: Mapping[str, Any]) -> None:
        """Store JSON facts for the next run."""
        replace_file(self.folder / _ABOUT, (json.dumps(dict(facts), indent=1, sort_keys=True) + "\n").encode())

    def shelf(self, source: Source, spec: ImageSpec, plan: Plan, *, chunk: int, seed: int) -> Shelf:
        """Return the shards of a source under the conditions of a plan.

        Args:
            source: The data.
            spec: What its images are made into before the first shift.
            plan: Conditions.
            chunk: Samples of every forward pass.
            seed: Seed of the draws.
        """
        key = _hash(source.content_fingerprint(), repr(dataclasses.astuple(spec)), chunk, len(source))
        names = {CLEAN.key: CLEAN.key}
        for sweep in plan.sweeps:
            identity = shift_identity(sweep.shift)
            if identity is None:
                logger.warning(
                    "cache: %s is not kept; give it a name of its own, or register its class", sweep.conditions[0].label
                )
                continue
            labels = _seen(sweep.shift, source, plan.thresholds)
            for condition in sweep.conditions:
                names[condition.key] = _condition_name(condition, identity, labels, seed)
        return Shelf(self.folder / key, names, self.classes)


def open_cache(folder: str | Path) -> Path:
    """Return the cache inside a folder, made if missing, cleared of what killed processes left half-written.

    Raises:
        DataFileError: The folder cannot be written.
        ConfigError: It was written by another release.
    """
    root = Path(folder).expanduser().absolute() / FOLDER  # workers may stand in another folder
    try:
        root.mkdir(parents=True, exist_ok=True)
        found = _format(root / _MARK)
        if found != FORMAT:
            raise ConfigError(f"cache={str(folder)!r}", f"format {FORMAT}", f"format {found}", "Choose another folder.")
        for place, folders, files in os.walk(root):  # which passes over what another process removes meanwhile
            for name in (*folders, *files):
                if name.endswith(".part") and _is_left_over(name):
                    _discard(Path(place, name))
        replace_file(root / _MARK, json.dumps({"format": FORMAT}).encode())
    except OSError as error:
        raise _refusal(folder, error) from error
    return root


def _format(mark: Path) -> Any:
    """Return the format of a cache; where it cannot be told, this one: the shards have checksums of their own."""
    try:
        return json.loads(mark.read_bytes())["format"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return FORMAT


def _refusal(folder: str | Path, error: OSError) -> DataFileError:
    return DataFileError(
        f"cache={str(folder)!r}",
        "a folder that can be written",
        f"{type(error).__name__}: {error}",
        "Choose another folder, or mend its rights and free space; finished shards are kept.",
    )


def _discard(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _is_left_over(name: str) -> bool:
    """Tell whether an unfinished file belongs to a process of this machine that is gone."""
    host, _, pid = name.removesuffix(".part").rpartition(".")
    if not host.endswith(f".{writer().rpartition('.')[0]}") or not pid.isdecimal():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False


def model_key(model: Model, images: Tensor) -> str | None:
    """Return the key of a model on this machine, or None where too little is known of it to keep its answers.

    Args:
        model: The model, on its device.
        images: Probe images (up to 8).
    """
    identity = model_identity(model)
    if identity is None:
        logger.warning(
            "cache: the answers of %s are not kept, since a function cannot be told from another one; name its "
            "version: wrap(net, model_id=...)",
            model.model_name,
        )
        return None
    return _hash(identity, _machine(model.device), array_fingerprint([("", images)]), model.task)


def find_model(root: Path, key: str, outputs: ModelOutputs, *, new: bool) -> ModelEntry | None:
    """Return the entry of a model whose stored probe matches its fresh one, or None where there is none.

    Args:
        root: The cache.
        key: The model's key.
        outputs: The model's fresh answers to the probe images.
        new: Make an entry where there is none.

    Raises:
        DataFileError: The entry cannot be written.
    """
    classes = outputs.logits.shape[1]
    scores = {name: value.detach().cpu() for name, value in outputs.scores.items()}
    fresh = Answers(outputs.logits.detach().to("cpu", torch.float32), scores)
    number = 0
    while True:
        folder = root / (key + (f"-{number}" if number else ""))
        if not folder.is_dir():
            if not new:
                return None
            if _placed(folder, fresh):
                return ModelEntry(folder, {}, classes)
        stored = read_shard(folder / _PROBE)
        if stored is not None and _same(stored, fresh):
            return ModelEntry(folder, _facts(folder / _ABOUT), classes)
        if new:
            what = "its stored probe is damaged" if stored is None else "it answers otherwise than its stored probe"
            logger.warning("cache: the model is known, but %s; all is run again", what)
        number += 1


def _same(stored: Answers, fresh: Answers) -> bool:
    pairs = [(stored.logits, fresh.logits)]
    if stored.scores.keys() != fresh.scores.keys():
        return False
    pairs += [(stored.scores[name], fresh.scores[name]) for name in fresh.scores]
    return all(
        one.shape == two.shape
        and torch.allclose(one, two.to(one.dtype), rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True)
        for one, two in pairs
    )


def _placed(folder: Path, probe: Answers) -> bool:
    try:
        return _place(folder, probe)
    except OSError as error:
        raise _refusal(folder.parent.parent, error) from error


def _place(folder: Path, probe: Answers) -> bool:
    """Make a model's folder with its probe in it, in one step; False if another process was faster."""
    spare = folder.with_name(f".{folder.name}.{writer()}.part")
    shutil.rmtree(spare, ignore_errors=True)
    try:
        write_shard(spare / _PROBE, probe)
        spare.rename(folder)
    except OSError:
        shutil.rmtree(spare, ignore_errors=True)
        if not folder.is_dir():
            raise
        return False
    return True


def _facts(path: Path) -> dict[str, Any]:
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}


def _machine(device: torch.device) -> str:
    """Return what decides the last bits of a forward pass besides the model and its input."""
    kind = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    if device.type == "cuda":
        kind = f"{torch.cuda.get_device_name(device)} tf32={torch.backends.cudnn.allow_tf32}"
    return f"{device.type} {kind} {torch.get_float32_matmul_precision()} {torch.__version__} {__version__}"


def shift_identity(shift: Shift) -> str | None:
    """Return a hash of a shift's configuration, versions and, outside robustlab, source; None if it cannot be known."""
    tree = list(_tree(shift))
    if not all(part.cacheable for part in tree):
        return None
    try:
        text = canonical_json(shift)
    except KindError:
        return None
    parts: list[Shift | Detector] = [*tree, *(part.resolved() for part in tree if isinstance(part, DetectorAttack))]
    return _hash(text, *(f"{code_identity(type(part))} {part.version}" for part in parts))


def _tree(shift: Shift) -> Iterator[Shift]:
    """Iterate over a shift and everything that it is composed of."""
    yield shift
    configured: Any = shift
    if dataclasses.is_dataclass(configured):
        for item in dataclasses.fields(configured):
            value = getattr(shift, item.name)
            for child in value if isinstance(value, (list, tuple)) else [value]:
                if isinstance(child, Shift):
                    yield from _tree(child)


def _seen(shift: Shift, source: Source, thresholds: tuple[float, ...]) -> str:
    """Return a hash of what a shift sees of the samples besides their images.

    Corruptions see nothing but the columns that they name, attacks labels and the thresholds at which they are decided,
    and a shift that is written from scratch the whole batch.
    """
    info, parts = source.info, list(_tree(shift))
    scratch = any(not isinstance(part, Corruption) and not is_library_code(type(part)) for part in parts)
    named = {column for part in parts for column in part.columns}
    columns = [(name, codes) for name, codes in sorted(info.groups.items()) if scratch or name in named]
    if info.labels is not None and (scratch or any(_sees_labels(part) for part in parts)):
        columns.append(("labels", info.labels))
        if thresholds:
            columns.append(("thresholds", torch.tensor(thresholds, dtype=torch.float64)))
    return array_fingerprint(columns) if columns else ""


def _sees_labels(part: Shift) -> bool:
    return isinstance(part, Attack) and part.goal == "answer"


def _condition_name(condition: Condition, identity: str, labels: str, seed: int) -> str:
    key = _hash(identity, repr(condition.severity), labels, seed)
    return f"{_slug(condition.label.partition('#')[0])}@{condition.severity:g}-{key}"


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.+-]+", "-", text).strip("-.")[:40] or "unnamed"


def _hash(*parts: str | int) -> str:
    return hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=16).hexdigest()
