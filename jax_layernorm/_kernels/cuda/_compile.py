"""Compiles CUDA C++ with NVRTC, which comes with `jax[cuda13]`. It needs no GPU."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import pathlib
from collections.abc import Iterator
from typing import NamedTuple

FOLDER = pathlib.Path(__file__).parent
SOURCE, HEADERS = "norm.cu", ("gpu.cuh", "row.cuh")
LEAST_CAPABILITY = 80  # the first with asynchronous copies
VERSIONS = (13, 12)


class Image(NamedTuple):
    """A kernel for one kind of GPU, and a digest of its content."""

    data: bytes
    digest: str


def unavailable(capability: int) -> str | None:
    """Why nothing can be compiled for this compute capability, or None."""
    library = _nvrtc()
    if isinstance(library, str):
        return library
    if not capability:
        return None
    if capability < LEAST_CAPABILITY:
        return (
            "it needs a GPU of compute capability 8.0 or above, and this one has"
            f" {capability / 10}"
        )
    if capability not in _architectures(library):
        return f"the NVRTC that is installed is too old for sm_{capability}"
    return None


@functools.lru_cache(maxsize=4096)
def image(macros: tuple[str, ...], capability: int) -> Image:
    """The kernel that the macros of norm.cu describe.

    Machine code for one architecture, or PTX for all of them if `capability` is 0.

    Raises:
      RuntimeError: with the compiler's message.
    """
    return compiled(macros, capability)[0]


def compiled(
    macros: tuple[str, ...], capability: int, *options: str
) -> tuple[Image, str]:
    """Like `image`, but not cached, and with the compiler's log."""
    library = _nvrtc()
    if isinstance(library, str):
        raise RuntimeError(library)
    program = ctypes.c_void_p()
    headers = [(FOLDER / name).read_bytes() for name in HEADERS]
    failed = library.nvrtcCreateProgram(
        ctypes.byref(program),
        (FOLDER / SOURCE).read_bytes(),
        SOURCE.encode(),
        len(headers),
        _strings(*headers),
        _strings(*(name.encode() for name in HEADERS)),
    )
    if failed:
        raise RuntimeError(f"NVRTC failed with its error {failed}")
    try:
        target = f"sm_{capability}" if capability else f"compute_{LEAST_CAPABILITY}"
        arguments = [
            f"--gpu-architecture={target}",
            "--std=c++17",
            "--fmad=false",  # the source decides what is fused
            *options,
            *(f"-D{macro}" for macro in macros),
        ]
        failed = library.nvrtcCompileProgram(
            program, len(arguments), _strings(*map(str.encode, arguments))
        )
        log = _output(library, program, "ProgramLog").rstrip(b"\0").decode()
        if failed:
            raise RuntimeError(f"NVRTC cannot compile {SOURCE}:\n{log}")
        data = _output(library, program, "CUBIN" if capability else "PTX")
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))
    return Image(data, hashlib.sha256(data).hexdigest()[:32]), log


@functools.cache
def _nvrtc() -> ctypes.CDLL | str:
    """The newest NVRTC that fits the driver, or why none can be used."""
    driver = _driver_version()
    others = []
    for version, path in _candidates():
        if driver is not None and version > driver:
            others.append(version)
            continue
        try:
            if path.is_absolute():
                # NVRTC opens its builtins by name, and does not look in its folder.
                for builtins in path.parent.glob("libnvrtc-builtins.so.*"):
                    ctypes.CDLL(str(builtins))
            return ctypes.CDLL(str(path))
        except OSError:  # it does not exist, or is for another machine
            continue
    if others:
        return (
            f"the NVRTC that is installed is of CUDA {max(others)}, and the driver knows"
            f" CUDA {driver}"
        )
    return "NVRTC, which comes with jax[cuda13], is not installed"


def _candidates() -> Iterator[tuple[int, pathlib.Path]]:
    """For each version of CUDA, NVRTC in NVIDIA's wheels and then in the system."""
    spec = importlib.util.find_spec("nvidia")
    places = (spec.submodule_search_locations or ()) if spec else ()
    for version in VERSIONS:
        for place in map(pathlib.Path, places):
            for folder in (f"cu{version}", "cuda_nvrtc"):
                path = place / folder / "lib" / f"libnvrtc.so.{version}"
                if path.exists():
                    yield version, path
        yield version, pathlib.Path(f"libnvrtc.so.{version}")


def _driver_version() -> int | None:
    """The newest version of CUDA that the driver knows; None without a driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int()
    if driver.cuDriverGetVersion(ctypes.byref(version)):
        return None
    return version.value // 1000


def _architectures(library: ctypes.CDLL) -> list[int]:
    count = ctypes.c_int()
    library.nvrtcGetNumSupportedArchs(ctypes.byref(count))
    found = (ctypes.c_int * count.value)()
    library.nvrtcGetSupportedArchs(found)
    return list(found)


def _strings(*values: bytes) -> ctypes.Array[ctypes.c_char_p]:
    return (ctypes.c_char_p * len(values))(*values)


def _output(library: ctypes.CDLL, program: ctypes.c_void_p, name: str) -> bytes:
    size = ctypes.c_size_t()
    getattr(library, f"nvrtcGet{name}Size")(program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    getattr(library, f"nvrtcGet{name}")(program, buffer)
    return buffer.raw
