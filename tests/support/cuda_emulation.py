"""The CUDA kernels on the CPU: what `implementation="cuda"` means without a GPU.

The whole package runs unchanged except the launches. They run the same CUDA C++, built by
the host's compiler, with a fiber for each thread (tests/kernels/cuda).
"""

import ctypes
import functools
import hashlib
import pathlib
import shutil
import subprocess
import tempfile

import jax
import numpy as np

import jax_layernorm
from jax_layernorm._kernels import KERNELS, cuda

HERE = pathlib.Path(__file__).parents[1] / "kernels" / "cuda"
SOURCES = pathlib.Path(cuda.__file__).parent
BUILT = pathlib.Path(tempfile.gettempdir()) / "jax_layernorm_cuda_emulated"
SEEDS = (0, 1)
GPU = cuda._tiles.Gpu(90, 3)
"""It has few multiprocessors, so that each has several rows of a small matrix."""


def missing():
    """Why nothing can be emulated here, or None."""
    return None if shutil.which("g++") else "the emulation of CUDA needs g++"


def build(target, text, *arguments):
    """What g++ makes of these arguments, built once on this machine for each `text`."""
    name = hashlib.sha256((text + repr(arguments)).encode()).hexdigest()[:32]
    path = BUILT / f"{name}{target}"
    if not path.exists():
        BUILT.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=BUILT) as folder:
            new = pathlib.Path(folder) / f"new{target}"
            command = ["g++", "-std=c++17", "-O1", "-fPIC", "-march=native"]
            subprocess.run([*command, *arguments, "-o", str(new)], check=True)
            new.rename(path)
    return path


@functools.cache
def library(macros, sources=SOURCES):
    """The kernel that these macros describe."""
    header, fibers, kernel = (
        HERE / name for name in ("emulate.h", "emulate.cc", "emulated.cc")
    )
    text = header.read_text() + fibers.read_text()
    fibers = build(".o", text, "-c", str(fibers))
    text += "".join(
        path.read_text() for path in (kernel, *sorted(sources.glob("*.cu*")))
    )
    path = build(
        ".so", text, "-w", "-ffp-contract=off", "-fno-strict-aliasing", "-shared",
        "-DJLN_EMULATED", f"-I{HERE}", f"-I{sources}", *(f"-D{macro}" for macro in macros),
        str(kernel), str(fibers),
    )  # fmt: skip
    found = ctypes.CDLL(str(path))
    found.launch.restype = ctypes.c_char_p
    return found


class EmulatedLaunch(ctypes.Structure):
    """`emulated::Launch` in emulate.h."""

    _fields_ = (
        ("blocks", ctypes.c_int),
        ("threads", ctypes.c_int),
        ("shared_bytes", ctypes.c_int),
        ("cluster", ctypes.c_int),
        ("seed", ctypes.c_uint),
        ("arrays", ctypes.c_int),
        ("begins", ctypes.POINTER(ctypes.c_void_p)),
        ("bytes", ctypes.POINTER(ctypes.c_longlong)),
    )


class GuardedArray:
    """An array in memory aligned as XLA aligns it, beside which nothing may be written."""

    def __init__(self, like, value=None):
        dtype = np.dtype(like.dtype)
        self.bytes = int(np.prod(like.shape)) * dtype.itemsize
        self.memory = np.full(self.bytes + 1024, 0xFF, np.uint8)
        self.first = 256 + -(self.memory.ctypes.data + 256) % 256
        inner = self.memory[self.first : self.first + self.bytes]
        self.array = inner.view(dtype).reshape(like.shape)
        self.address = self.array.ctypes.data
        if value is not None:
            self.array[...] = value

    def check(self):
        before, after = (
            self.memory[: self.first],
            self.memory[self.first + self.bytes :],
        )
        assert (before == 0xFF).all() and (after == 0xFF).all(), (
            "the kernel wrote outside an array"
        )


def run_once(launch, operands, results, seed, sources=SOURCES):
    """What the launch writes. By name, `operands` are arrays and `results` are shapes."""
    arrays = {name: GuardedArray(a, a) for name, a in operands.items()}
    arrays |= {name: GuardedArray(a) for name, a in results.items()}
    number = ctypes.c_longlong(launch.number)
    parameters = [
        arrays[name].address if name in arrays else None
        for name in cuda.PARAMETERS[launch.kernel]
    ]
    tile = launch.tile
    emulated = EmulatedLaunch(
        tile.blocks,
        tile.threads * tile.groups,
        tile.shared_bytes,
        tile.cluster,
        seed,
        len(arrays),
        _pointers([a.address for a in arrays.values()]),
        (ctypes.c_longlong * len(arrays))(*(a.bytes for a in arrays.values())),
    )
    wrong = library(launch.macros, sources).launch(
        ctypes.byref(emulated), _pointers([*parameters, ctypes.addressof(number)])
    )
    assert not wrong, wrong.decode()
    for array in arrays.values():
        array.check()
    return [arrays[name].array for name in results]


def call(launch, operands, results, sources=SOURCES):
    """Takes the place of `cuda.call`."""
    operands = {name: a for name, a in operands.items() if a is not None}

    def run(*values):
        given = dict(zip(operands, map(np.asarray, values), strict=True))
        first, *others = (
            run_once(launch, given, results, seed, sources) for seed in SEEDS
        )
        for other in others:
            for a, b in zip(first, other, strict=True):
                assert a.tobytes() == b.tobytes(), (
                    "the order of threads changes the result"
                )
        return first

    out = jax.pure_callback(run, list(results.values()), *operands.values())
    return dict(zip(results, out, strict=True))


class EmulatedCuda:
    """The CUDA kernels, on the CPU."""

    platforms = ("cpu",)

    def not_default(self, problem):
        return cuda.not_default(problem._replace(platform="cuda"))

    def forward(self, problem):
        return cuda.forward(problem._replace(platform="cuda"))

    def backward(self, problem):
        return cuda.backward(problem._replace(platform="cuda"))


def install(monkeypatch, gpu=GPU, sources=SOURCES):
    """From now on `implementation="cuda"` runs here as on this GPU."""
    monkeypatch.setitem(KERNELS, "cuda", EmulatedCuda())
    monkeypatch.setattr(cuda, "call", functools.partial(call, sources=sources))
    monkeypatch.setattr(cuda, "_unavailable", lambda gpu: None)
    monkeypatch.setattr(cuda._tiles, "gpu", lambda: gpu)
    assert jax_layernorm._kernels.KERNELS is KERNELS


def _pointers(addresses):
    return (ctypes.c_void_p * len(addresses))(*addresses)
