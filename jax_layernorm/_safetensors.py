"""A safetensors file as a mapping; safetensors is imported when there is one to read."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

# What the format calls the dtypes that a norm can have.
_DTYPES = ("BF16", "F16", "F32", "F64")


class SafetensorsFile(Mapping[str, np.ndarray]):
    """The floating arrays in a safetensors file, each read when it is asked for."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        path = os.fspath(path)
        try:
            import safetensors
        except ImportError as error:
            raise ImportError(
                f"state_dict is a path, {path!r}, and reading it needs safetensors, which"
                " is not installed. Run pip install safetensors, or pass a mapping from"
                " names to arrays.",
                name="safetensors",
            ) from error
        if not os.path.isfile(path):
            raise FileNotFoundError(
                "state_dict must be a mapping, or the path of a safetensors file; got"
                f" {path!r}, where there is no file. In a Hugging Face folder it is"
                " model.safetensors, or one of those that model.safetensors.index.json"
                " lists."
            )
        try:
            self._file: Any = safetensors.safe_open(path, framework="np")
        except safetensors.SafetensorError as error:
            raise ValueError(
                f"state_dict must be in the safetensors format; got {path!r}, which is"
                f" not ({error}). Load a torch file with"
                " torch.load(path, weights_only=True), and pass what it returns."
            ) from error
        self._keys = dict.fromkeys(self._file.keys())

    def __getitem__(self, key: str) -> np.ndarray:
        dtype = self._file.get_slice(key).get_dtype()
        if dtype not in _DTYPES:
            raise TypeError(
                f"state_dict[{key!r}] must be of one of the dtypes {', '.join(_DTYPES)};"
                f" got {dtype}. Is this a norm's parameter?"
            )
        return self._file.get_tensor(key)

    def __contains__(self, key: object) -> bool:
        return key in self._keys

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)
