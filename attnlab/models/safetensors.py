"""Files of named arrays: safetensors (https://huggingface.co/docs/safetensors) and `.npz`, read and written without pickle.

A safetensors file is the length of a header (8 bytes, little endian), the header (JSON: name to dtype, shape and offsets), and
the arrays' bytes one after another.
"""

from __future__ import annotations

import json
import math
import os
import struct
import tempfile
import zipfile
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from attnlab.errors import ConfigError

_TYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16, "I64": np.int64, "I32": np.int32,
    "I16": np.int16, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip
_NAMES = {np.dtype(kind): name for name, kind in _TYPES.items()}
_LARGEST_HEADER = 100_000_000  # bytes, the format's own limit


def read_arrays(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Reads a `.safetensors` or `.npz` file; arrays of the former are read-only views of the mapped file.

    Raises:
        ConfigError: no such file, another kind of file, or a damaged one.
    """
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise ConfigError(f"weights = {path!r}: is no file. Give a .safetensors or .npz file.")
    if path.endswith(".npz"):
        try:
            with np.load(path, allow_pickle=False) as stored:
                return {name: stored[name] for name in stored}
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            raise ConfigError(f"weights = {path!r}: cannot be read ({error}). Write the file again.") from None
    if not path.endswith(".safetensors"):
        raise ConfigError(
            f"weights = {path!r}: is neither .safetensors nor .npz, and pickles are not opened. Convert it where PyTorch is: "
            f'safetensors.torch.save_file(torch.load(path, weights_only=True)["model"], "weights.safetensors").'
        )
    try:
        return _read_safetensors(path)
    except (AttributeError, KeyError, TypeError, ValueError, struct.error) as error:
        raise ConfigError(f"weights = {path!r}: is no intact safetensors file ({error}). Write the file again.") from None


def _read_safetensors(path: str) -> dict[str, np.ndarray]:
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > min(_LARGEST_HEADER, size - 8):
            raise ValueError(f"a header of {length} bytes in a file of {size}")
        header = json.loads(file.read(length))
    data = np.memmap(path, np.uint8, "r", offset=8 + length) if size > 8 + length else np.zeros(0, np.uint8)
    arrays = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        kind, shape, (start, end) = np.dtype(_TYPES[entry["dtype"]]), tuple(entry["shape"]), entry["data_offsets"]
        if not 0 <= start <= end <= data.size or end - start != math.prod(shape) * kind.itemsize:
            raise ValueError(f"{name} of shape {shape} lies at {start} to {end} of {data.size} bytes")
        arrays[name] = data[start:end].view(kind).reshape(shape)
    return arrays


def write_safetensors(path: str | os.PathLike, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes arrays by name, as `safetensors.torch.load_file` reads them; a file that is there is replaced as a whole.

    Raises:
        ConfigError: a type that the format does not have.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    # The widest type first: then every array is aligned.
    ordered = sorted(arrays.items(), key=lambda item: (-np.asarray(item[1]).dtype.itemsize, item[0]))
    start = 0
    for name, array in ordered:
        array = np.asarray(array)
        if array.dtype not in _NAMES:
            raise ConfigError(f"{name} has type {array.dtype}: safetensors knows {', '.join(sorted(map(str, _NAMES)))}.")
        header[name] = {"dtype": _NAMES[array.dtype], "shape": list(array.shape), "data_offsets": [start, start + array.nbytes]}
        start += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path = os.fspath(path)
    # Beside it first: the arrays may be views of the very file that is written.
    with tempfile.NamedTemporaryFile(dir=os.path.dirname(path) or ".", delete=False) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, array in ordered:
            file.write(np.ascontiguousarray(array).tobytes())
    os.replace(file.name, path)
