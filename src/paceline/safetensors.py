"""Files of the safetensors format, written with one tensor at a time in memory.

The format: the header's length in 8 bytes, little-endian; the header, JSON, with dtype, shape and
place of each tensor, and metadata, which is text; then the bytes of the tensors.
"""

import ctypes
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

# The format's names of dtypes. Floating-point numbers below 16 bits are left out: their scales are
# separate tensors.
DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8},
    **{"U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8},
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MOST = 10**8  # bytes of a header, by the format


class Form(NamedTuple):
    """What a header says of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """The bytes of its elements."""
        return math.prod(self.shape) * self.dtype.itemsize


def in_order(forms: Mapping[str, Form]) -> list[str]:
    """The names of tensors as a file has them: wide dtypes first, so that all are aligned."""
    return sorted(forms, key=lambda name: (-forms[name].dtype.itemsize, name))


def write_safetensors(
    path: Path, forms: Mapping[str, Form], tensors: Iterable[Tensor], metadata: Mapping[str, str]
) -> None:
    """Write a file.

    Args:
        path: of the file, which is replaced.
        forms: of the tensors, by name.
        tensors: contiguous and on the CPU, as `in_order` has them.
        metadata: to be put beside `format`.
    """
    header: dict[str, Any] = {"__metadata__": {**metadata, "format": "pt"}}
    end = 0
    for name in in_order(forms):
        start, end = end, end + forms[name].nbytes
        header[name] = {
            "dtype": NAMES[forms[name].dtype],
            "shape": list(forms[name].shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            if tensor.nbytes:  # without NumPy, which torch does not need
                file.write((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr()))
            del tensor  # before the next is made


def read_metadata(path: Path) -> dict[str, Any]:
    """The metadata of a file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not of this format.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > MOST:
            raise ValueError("its header is too long")
        header = json.loads(file.read(length))
    metadata = header.get("__metadata__", {}) if isinstance(header, dict) else None
    if not isinstance(metadata, dict):
        raise ValueError("its header is no object")
    return metadata
