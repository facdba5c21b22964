"""safetensors files written block by block and read by mapping them, each through one open file.

``safetensors.torch.save`` makes the whole file in memory, and ``load_file`` opens its path twice: between the two, the
file may have been replaced.
"""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Iterator, Mapping
from typing import BinaryIO

import torch
from torch import Tensor

Block = bytes | memoryview
_BLOCK = 1 << 24
_DTYPES = {
    "I64": torch.int64,
    "F64": torch.float64,
    "F32": torch.float32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_ORDER = list(_NAMES)  # that of safetensors, which sorts by type and then by name


def layout(tensors: Mapping[str, Tensor]) -> tuple[bytes, int]:
    """Return the header of a file and the size of the whole file in bytes."""
    entries, end = {}, 0
    for key, tensor in _ordered(tensors):
        begin, end = end, end + tensor.numel() * tensor.element_size()
        entries[key] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    header = text + b" " * (-len(text) % 8)
    return header, 8 + len(header) + end


def blocks_of(tensors: Mapping[str, Tensor]) -> Iterator[Block]:
    """Yield a file's content: the bytes of ``safetensors.torch.save``, never more than one tensor of them copied."""
    header, _ = layout(tensors)
    yield len(header).to_bytes(8, "little") + header
    for _, tensor in _ordered(tensors):
        if tensor.numel():
            data = memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
            yield from (data[start : start + _BLOCK] for start in range(0, len(data), _BLOCK))


def read_header(file: BinaryIO) -> tuple[bytes, int]:
    """Return the header of an open file, empty where it is cut off, and the size of the whole file in bytes."""
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    return file.read(length) if 8 + length <= size else b"", size


def map_tensors(file: BinaryIO, header: bytes) -> dict[str, Tensor]:
    """Return the tensors of an open file; their pages are read when they are used, and writing changes no file.

    Raises:
        KeyError, TypeError, ValueError: The file is damaged.
    """
    entries = json.loads(header)
    if not isinstance(entries, dict):
        raise ValueError("the header is no mapping")
    memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    start = 8 + len(header)
    return {key: _view(memory, start, **entry) for key, entry in entries.items() if key != "__metadata__"}


def _view(memory: mmap.mmap, start: int, dtype: str, shape: list[int], data_offsets: list[int]) -> Tensor:
    kind, count = _DTYPES[dtype], math.prod(shape)
    begin, end = data_offsets
    inside = 0 <= begin <= end <= len(memory) - start
    if not inside or min(shape, default=0) < 0 or end - begin != count * kind.itemsize:
        raise ValueError("the header does not fit the data")
    if count == 0:
        return torch.empty(shape, dtype=kind)
    return torch.frombuffer(memory, dtype=kind, count=count, offset=start + begin).reshape(shape)


def _ordered(tensors: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
    return sorted(tensors.items(), key=lambda item: (_ORDER.index(item[1].dtype), item[0]))
