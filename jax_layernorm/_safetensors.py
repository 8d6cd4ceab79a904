"""safetensors files as a mapping; safetensors is imported when a file is read."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

# What the format calls the dtypes that a norm can have.
_DTYPES = ("BF16", "F16", "F32", "F64")


INDEX = ".index.json"


def open_safetensors(path: str | os.PathLike[str]) -> Mapping[str, np.ndarray]:
    """The floating arrays in a file, or in the files that an index lists."""
    path = os.fspath(path)
    return SafetensorsIndex(path) if path.endswith(INDEX) else SafetensorsFile(path)


class Arrays(Mapping[str, np.ndarray]):
    """Names that are known without reading the arrays."""

    _names: Mapping[str, Any]

    def __contains__(self, key: object) -> bool:
        return key in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class SafetensorsIndex(Arrays):
    """A checkpoint in several files, each opened when one of its arrays is asked for."""

    def __init__(self, path: str) -> None:
        _check_is_file(path)
        with open(path, encoding="utf-8") as file:
            try:
                self._names = _weight_map(json.load(file, object_pairs_hook=_once))
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    "state_dict must be the index of safetensors files, JSON with a"
                    " 'weight_map' from names to files beside it; got"
                    f" {path!r}, which is not ({error!r}). Pass the path of the"
                    " safetensors file itself."
                ) from error
        self._path, self._folder = path, os.path.dirname(path)
        self._opened: dict[str, SafetensorsFile] = {}

    def __getitem__(self, key: str) -> np.ndarray:
        file = self._names[key]
        if file not in self._opened:
            self._opened[file] = SafetensorsFile(os.path.join(self._folder, file))
        if key not in self._opened[file]:
            raise ValueError(
                f"the index {self._path!r} must fit its files; it says that {key!r} is in"
                f" {file!r}, where it is not. Download both again."
            )
        return self._opened[file][key]


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError("a name is there twice")
    return made


def _weight_map(index: Any) -> dict[str, str]:
    files = index["weight_map"]
    if not isinstance(files, dict):
        raise TypeError("'weight_map' is no mapping")
    for file in set(files.values()):
        if os.path.isabs(file) or os.path.normpath(file).startswith(os.pardir):
            raise ValueError(f"{file!r} is in another folder")
    return files


class SafetensorsFile(Arrays):
    """The floating arrays in a safetensors file, each read when it is asked for."""

    def __init__(self, path: str) -> None:
        try:
            import safetensors
        except ImportError as error:
            raise ImportError(
                f"state_dict is a path, {path!r}, and reading it needs safetensors, which"
                " is not installed. Run pip install safetensors, or pass a mapping from"
                " names to arrays.",
                name="safetensors",
            ) from error
        _check_is_file(path)
        try:
            self._file: Any = safetensors.safe_open(path, framework="np")
        except safetensors.SafetensorError as error:
            if _is_truncated(path):
                raise ValueError(
                    "state_dict must be a whole safetensors file; got"
                    f" {path!r}, which is truncated ({error}). Copy or download it again."
                ) from error
            if _begins(path, b"version https://git-lfs"):
                raise ValueError(
                    f"state_dict must be a safetensors file; got {path!r}, which only"
                    " stands for one in Git LFS. Run git lfs pull in that folder."
                ) from error
            raise ValueError(
                f"state_dict must be in the safetensors format; got {path!r}, which is"
                f" not ({error}). Load a torch file with"
                " torch.load(path, weights_only=True), and pass what it returns."
            ) from error
        self._names = dict.fromkeys(self._file.keys())

    def __getitem__(self, key: str) -> np.ndarray:
        dtype = self._file.get_slice(key).get_dtype()
        if dtype not in _DTYPES:
            raise TypeError(
                f"state_dict[{key!r}] must be of one of the dtypes {', '.join(_DTYPES)};"
                f" got {dtype}. Is this a norm's parameter?"
            )
        return self._file.get_tensor(key)


def _check_is_file(path: str) -> None:
    if not os.path.isfile(path):
        raise FileNotFoundError(
            "state_dict must be a mapping, or the path of a safetensors file; got"
            f" {path!r}, where there is no file. In a Hugging Face folder it is"
            f" model.safetensors, or model.safetensors{INDEX} if there are several."
        )


def _begins(path: str, words: bytes) -> bool:
    with open(path, "rb") as file:
        return file.read(len(words)) == words


def _is_truncated(path: str) -> bool:
    """Whether a file begins like a safetensors file, but is shorter than it says.

    Such a file has the length of the header in 8 bytes, the header in JSON, and the
    data.
    """
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        begins = file.read(1)
        rest = os.fstat(file.fileno()).st_size - 8
        if begins not in (b"{", b"") or length > 100_000_000:  # the format's limit
            return False
        if rest < length:
            return True
        file.seek(8)
        try:
            header = json.loads(file.read(length))
            ends = [
                int(entry["data_offsets"][1])
                for name, entry in header.items()
                if name != "__metadata__"
            ]
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            return False  # it is malformed in another way, which safetensors reports
    return rest - length < max(ends, default=0)
