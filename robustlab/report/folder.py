"""A folder of files that changes as one: readers see all files of the old set or all of the new one, at any moment.

One file, the record, names the others with their digests. New files are first written beside their places, under
names that hold their digests. Replacing the record is the one step that makes the new set the valid one; only then are
the others moved to their places. A reader takes, for each file that the record names, the copy whose digest is right,
wherever it is; whoever writes next finishes the moves of a writer that died, and removes what it left.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from torch import Tensor

from robustlab.core.errors import DataFileError

from .tensors import Block, blocks_of, layout, map_tensors, read_header

_STAGED = re.compile(r"\.(?P<name>.+)\.(?P<digest>[0-9a-f]{32})\.new")


@dataclass(frozen=True, eq=False)
class Part:
    """One file to be written.

    Args:
        name: File name.
        digest: 32 hexadecimal digits that stand for the content.
        blocks: Returns the content, block by block.
    """

    name: str
    digest: str
    blocks: Callable[[], Iterable[Block]]


def bytes_part(name: str, content: bytes) -> Part:
    """Return the part of a file whose content is at hand."""
    return Part(name, _digest(content), lambda: (content,))


def tensors_part(name: str, tensors: Mapping[str, Tensor]) -> Part:
    """Return the part of a safetensors file; its digest is that of header and size, so names must tell the content."""
    return Part(name, _digest(*layout(tensors)), lambda: blocks_of(tensors))


def write_folder(
    folder: Path, parts: Sequence[Part], record: Callable[[Mapping[str, str]], Part], optional: str
) -> None:
    """Replace the files of a folder as one set.

    Args:
        folder: Made where it is missing.
        parts: All files but the record.
        record: Makes the record, a JSON file whose ``"files"`` are the digests that it is given, by name.
        optional: Name of a file that is removed where no part has it.

    Raises:
        DataFileError: A file cannot be written. The folder holds the old set, or the new one if only a move failed.
    """
    last = record({part.name: part.digest for part in parts})
    who = f"writing {', '.join(str(folder / part.name) for part in (*parts, last))}"
    with _refusals(who), _locked(folder):
        _recover(folder, last.name)
        try:
            for part in (*parts, last):
                _write(_staged(folder, part.name, part.digest), part.blocks())
            _sync_folder(folder)
            _move(_staged(folder, last.name, last.digest), folder / last.name)
        except BaseException:
            with suppress(OSError):
                _recover(folder, last.name)
            raise
        _sync_folder(folder)
        for part in parts:
            _move(_staged(folder, part.name, part.digest), folder / part.name)
        if optional not in {part.name for part in parts}:
            _remove(folder / optional)


def write_file(path: Path, content: bytes) -> Path:
    """Write one file, so that readers see the old or the new one, and return its path.

    Raises:
        DataFileError: The file cannot be written; the old one is left as it was.
    """
    spare = path.with_name(f".{path.name}.new")
    with _refusals(f"writing {path}"), _locked(path.parent):
        try:
            _write(spare, (content,))
            _move(spare, path)
        except BaseException:
            with suppress(OSError):
                _remove(spare)
            raise
        _sync_folder(path.parent)
    return path


def read_bytes(folder: Path, name: str, digest: str | None) -> bytes:
    """Return the content of a file of the set.

    Args:
        folder: The folder.
        name: File name.
        digest: What the record says; None for a folder whose record names no digests.

    Raises:
        OSError: No such file.
        ValueError: It is of another set, or damaged.
    """
    with _opened(folder, name, digest) as (file, content):
        del file
        return content


def read_tensors(folder: Path, name: str, digest: str | None) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file of the set, mapped; arguments and errors as in ``read_bytes``.

    Raises:
        KeyError, TypeError: It is damaged.
    """
    with _opened(folder, name, digest) as (file, header):
        return map_tensors(file, header)


@contextmanager
def _opened(folder: Path, name: str, digest: str | None) -> Iterator[tuple[BinaryIO, bytes]]:
    """Open the copy of a file whose digest is right; yield it with what was read of it."""
    place = folder / name
    # in this order: what is moved between the two looks is found at its place
    for path in (place,) if digest is None else (_staged(folder, name, digest), place):
        with ExitStack() as stack:
            try:
                file = stack.enter_context(path.open("rb"))
            except FileNotFoundError:
                if path is place:
                    raise
                continue
            content, found = _read(file, path.name)
            if found == digest or digest is None:
                yield file, content
                return
    raise ValueError(f"{name} is not the one that report.json names")


def _read(file: BinaryIO, name: str) -> tuple[bytes, str]:
    """Return content and digest; of safetensors those of the header (and size), whose names are digests themselves."""
    if ".safetensors" in name:
        header, size = read_header(file)
        return header, _digest(header, size)
    content = file.read()
    return content, _digest(content)


def _digest(content: bytes, size: int | None = None) -> str:
    digest = hashlib.blake2b(content, digest_size=16)
    if size is not None:
        digest.update(size.to_bytes(8, "little"))
    return digest.hexdigest()


def _staged(folder: Path, name: str, digest: str) -> Path:
    return folder / f".{name}.{digest}.new"


def _recover(folder: Path, record: str) -> None:
    """Finish what a writer that died had made valid, and remove what it had not."""
    leftovers = [(path, match) for path in sorted(folder.iterdir()) if (match := _STAGED.fullmatch(path.name))]
    if not leftovers:
        return
    try:
        valid = json.loads((folder / record).read_text(encoding="utf-8")).get("files", {})
    except (FileNotFoundError, ValueError, AttributeError):
        valid = {}
    for path, match in leftovers:
        name, digest = match["name"], match["digest"]
        if valid.get(name) == digest and _is_whole(path, digest):
            _move(path, folder / name)
        else:
            _remove(path)


def _is_whole(path: Path, digest: str) -> bool:
    with path.open("rb") as file:
        return _read(file, path.name)[1] == digest


@contextmanager
def _refusals(who: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataFileError(
            who, "a place that can be written", str(error), "Check the path, the rights and the free space."
        ) from error


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other writers out of a folder, which is made where it is missing; the lock ends with the process."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:  # not on Windows, where directories cannot be opened either
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems know no locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


# all that changes files goes through these


def _write(path: Path, blocks: Iterable[Block]) -> None:
    with path.open("wb") as file:
        for block in blocks:
            file.write(block)
        file.flush()
        os.fsync(file.fileno())


def _move(path: Path, target: Path) -> None:
    path.replace(target)


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Make the moves so far last through a loss of power, where the system can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
