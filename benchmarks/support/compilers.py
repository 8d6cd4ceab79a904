"""Compiles for a TPU or a CUDA GPU without one.

TPU needs the `libtpu` wheel (Linux, x86-64), which one process at a time can use. CUDA
needs the wheels of jax's CUDA plugin, in the version of jax, and of the compiler, but no
driver, cuBLAS or cuDNN. Our CUDA kernels also need the NVRTC wheel:

    pip install --no-deps jax-cuda13-plugin==JAX jax-cuda13-pjrt==JAX \
        'nvidia-cuda-nvcc==13.0.*' 'nvidia-nvvm==13.0.*' 'nvidia-cuda-runtime==13.0.*' \
        'nvidia-cuda-crt==13.0.*' 'nvidia-cuda-nvrtc==13.0.*'

Without a device, XLA for CUDA makes its default choices; with a device, its autotuner may
choose differently.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pathlib
import unittest.mock
from collections.abc import Iterator
from typing import Any

TPU_TOPOLOGY = {
    "v4": "v4:2x2x1",
    "v5e": "v5e:2x2",
    "v5p": "v5p:2x2x1",
    "v6e": "v6e:2x2",
    "v7x": "tpu7x:2x2x1",
}
CUDA_TARGET = {"sm_90a": "h100.textproto"}
GENERATIONS = {"tpu": tuple(TPU_TOPOLOGY), "cuda": tuple(CUDA_TARGET), "cpu": ("host",)}
_MODULES = {"tpu": ("libtpu",), "cuda": ("jax_cuda13_plugin",), "cpu": ()}


def unavailable(platform: str) -> str | None:
    """Why nothing can be compiled for `platform` here, or None."""
    for module in _MODULES[platform]:
        if importlib.util.find_spec(module) is None:
            return f"compiling for {platform} needs {module}, which is not installed"
    return None


def keep_to_the_host() -> None:
    """Keeps arrays on the host, asks no metadata server. Call it before `import jax`."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")


def device(platform: str, generation: str) -> Any:
    """A device to compile for; it cannot run anything unless it is the host."""
    return devices(platform, generation)[0]


def devices(platform: str, generation: str) -> list[Any]:
    """The devices of a small system of that kind."""
    import jax
    from jax.experimental import topologies

    if platform == "cpu":
        return jax.devices("cpu")
    if platform == "tpu":
        topology = topologies.get_topology_desc(
            platform="tpu", topology_name=TPU_TOPOLOGY[generation]
        )
    else:
        target = pathlib.Path(__file__).with_name(CUDA_TARGET[generation])
        topology = topologies.get_topology_desc(
            "", platform="cuda", target_config=target.read_text(), topology="1x1x1"
        )
    return list(topology.devices)


def compile_for(platform: str, device: Any, function: Any, arguments: Any) -> Any:
    """The compiled program of `function` on abstract `arguments`, on one device."""
    options = {"xla_gpu_autotune_level": 0} if platform == "cuda" else None
    lowered = lower_for(platform, device, function, arguments)
    return lowered.compile(compiler_options=options)


def lower_for(platform: str, device: Any, function: Any, arguments: Any) -> Any:
    """The program before XLA compiles it; our CUDA kernels are compiled here."""
    import jax

    sharding = jax.sharding.SingleDeviceSharding(device)
    placed = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), arguments
    )
    with _lowered_for(platform, device):
        return jax.jit(function).trace(*placed).lower(lowering_platforms=(platform,))


@contextlib.contextmanager
def _lowered_for(platform: str, device: Any) -> Iterator[None]:
    """Compiles our CUDA kernels for `device`, not for the GPU of this process."""
    from jax_layernorm._kernels.cuda import _tiles

    if platform != "cuda":
        yield
        return
    gpu = _tiles.gpu_of(device)
    with unittest.mock.patch.object(_tiles, "gpu", return_value=gpu):
        yield
