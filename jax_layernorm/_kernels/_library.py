"""The C++ library: the CPU kernel, and the code that launches the GPU kernels.

XLA calls it through its foreign function interface (FFI). It is compiled when the package
is installed; without it, only speed is lost. It is loaded at import, because a process
may run a compiled program that another process saved, and then it lowers nothing.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import pathlib
import re

import jax

FOLDER = pathlib.Path(__file__).parent
LIBRARY = "libjax_layernorm.so"
CPU_FORWARD, CPU_BACKWARD = "jax_layernorm_forward", "jax_layernorm_backward"
CUDA_LAUNCH = "jax_layernorm_cuda_launch"
REGISTERED = "_jax_layernorm_library"
"""An attribute of `jax.ffi`: the library whose handlers this process has. A second one
would make the whole CPU backend fail, and this module does not know of another copy."""
HANDLERS = ("native_cpu/ffi.cc", "cuda/launch.cc")
"""The sources of the handlers that XLA calls. A wheel does not have them."""


@functools.cache
def not_loaded() -> str | None:
    """Loads the library and registers its handlers; returns why it cannot, or None."""
    library = path()
    if library is None:
        return (
            "its library was not compiled when the package was installed, which takes a"
            " C++ compiler"
        )
    return load(library, pathlib.Path(jax.ffi.include_dir()))


def path() -> pathlib.Path | None:
    """The library's path. An editable install does not have it beside this file."""
    from jax_layernorm import _kernels

    found = (pathlib.Path(folder, LIBRARY) for folder in _kernels.__path__)
    return next((path for path in found if path.exists()), None)


def load(library: pathlib.Path, headers: pathlib.Path) -> str | None:
    try:
        handlers = ctypes.CDLL(str(library))
    except OSError as error:
        return f"its library does not load: {error}"
    try:
        needed = (ctypes.c_int * 2).in_dll(handlers, "jax_layernorm_ffi_api_version")
    except ValueError as error:
        return f"its library is none of this package: {error}"
    spoken = ffi_api_version(headers)
    # Compare the versions first. A registered handler that XLA finds too new would make
    # the whole backend fail.
    if spoken is None:
        return f"the version of jaxlib's FFI is not found in {headers}"
    if spoken[0] != needed[0] or spoken[1] < needed[1]:
        return (
            f"its library needs version {needed[0]}.{needed[1]} of XLA's FFI, and this"
            f" jaxlib has {spoken[0]}.{spoken[1]}; build it against an older one"
        )
    if is_old(handlers):
        return (
            "its library was built from older sources than those beside it; install the"
            " package again, with pip install --editable ."
        )
    registered = getattr(jax.ffi, REGISTERED, str(library))
    if registered != str(library):
        return (
            f"another copy of the package, with the library {registered}, has registered"
            " its handlers in this process; start another process"
        )
    setattr(jax.ffi, REGISTERED, str(library))
    for name in (CPU_FORWARD, CPU_BACKWARD):
        handler = jax.ffi.pycapsule(getattr(handlers, name))
        jax.ffi.register_ffi_target(name, handler, platform="cpu")
    stages = {"initialize": "jax_layernorm_cuda_prepare", "execute": CUDA_LAUNCH}
    jax.ffi.register_ffi_target(
        CUDA_LAUNCH,
        {stage: jax.ffi.pycapsule(getattr(handlers, n)) for stage, n in stages.items()},
        platform="CUDA",
    )
    return None


def is_old(handlers: ctypes.CDLL, folder: pathlib.Path = FOLDER) -> bool:
    """Whether the handlers were built from other sources than those in `folder`, if any.

    Such a library would refuse what this package passes to it, when a program runs.
    """
    sources = [folder / name for name in HANDLERS]
    if not all(source.exists() for source in sources):
        return False
    digests = (hashlib.sha256(source.read_bytes()).hexdigest() for source in sources)
    expected = hashlib.sha256("".join(digests).encode()).hexdigest()
    try:
        built_from = (ctypes.c_char * 64).in_dll(handlers, "jax_layernorm_handlers")
    except ValueError:  # from before the library had it
        return True
    return bytes(built_from) != expected.encode()


def ffi_api_version(headers: pathlib.Path) -> tuple[int, int] | None:
    """The FFI version of the installed jaxlib, from the headers that it comes with."""
    try:
        text = (headers / "xla" / "ffi" / "api" / "c_api.h").read_text()
    except OSError:
        return None
    found = dict(re.findall(r"#define XLA_FFI_API_(MAJOR|MINOR) (\d+)", text))
    return (int(found["MAJOR"]), int(found["MINOR"])) if len(found) == 2 else None


not_loaded()
