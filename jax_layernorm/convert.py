"""Parameters from torch and Hugging Face state dicts, and back.

    torch                       here
    weight, or gamma            scale
    bias, or beta               bias

Only the names differ; no number changes, in either direction. Our parameters have the
shape of torch's `normalized_shape` if `axis` is in ascending order. A gain that is
stored around zero (that of Gemma 1 to 3) is stored that way here too, for
`scale_offset=1.0`.

torch is needed only if a caller passes a tensor, and safetensors only if a caller
passes a file.
"""

from __future__ import annotations

import difflib
import inspect
import os
import sys
import warnings
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from jax_layernorm._arguments import (
    DTYPES,
    check_array,
    check_epsilon,
    check_features,
    lacks_x64,
)
from jax_layernorm._functions import Params, layer_norm
from jax_layernorm._safetensors import Arrays, open_safetensors

_SPELLINGS = {"scale": ("weight", "gamma"), "bias": ("bias", "beta")}
_EPSILON: float = inspect.signature(layer_norm).parameters["epsilon"].default
_BFLOAT16 = jnp.dtype(jnp.bfloat16)


def from_torch(
    state_dict: Mapping[str, Any] | str | os.PathLike[str],
    prefix: str = "",
    *,
    features: int | tuple[int, ...] | None = None,
    epsilon: float | None = None,
) -> dict[str, Array]:
    """Reads the parameters of one norm from a torch or Hugging Face state dict.

    Pass them to `jln.layer_norm(params, x)` or another function, or use them as the
    "params" of `jln.linen.LayerNorm` and `RMSNorm`. They keep their bits and dtype.
    They share no memory with `state_dict`, so torch may go on training.

    Args:
      state_dict: a mapping from names to torch tensors, NumPy or JAX arrays, of dtype
        bfloat16, float16, float32 or float64; or the path of a safetensors file, or of
        the index of several files. Only this norm is read from the files.
      prefix: the name of the norm's module, such as "encoder.layer.0.output.LayerNorm",
        with or without a dot at its end. The state dict must hold `weight` (or
        `gamma`), `bias` (or `beta`), or both under this prefix.
      features: the shape that the parameters must have, as for `init_params`. A scale
        without a bias must have one axis unless this says otherwise, because it could
        also be the weight of a linear layer or an embedding.
      epsilon: the epsilon that the parameters were trained with (1e-5 in torch's
        `LayerNorm`, 1e-12 in BERT). If it differs from our default, a warning reminds
        you to pass it.

    Returns:
      A dict with `scale` and `bias`, in the shape of torch's `normalized_shape`. A
      parameter that the norm does not have is left out, such as the `bias` of an RMS
      norm.

    Warns:
      UserWarning: `epsilon` is not our default of 1e-6. The message says which keyword
        to pass. The parameters are the same as without `epsilon`.

    Raises:
      KeyError: no parameter is under `prefix`; the message lists the nearest keys.
      TypeError: `state_dict` is neither a mapping nor a path, or a value is not an
        array of a dtype that a norm can have.
      ValueError: the parameters cannot belong to a norm: a scale and a bias have
        different shapes, a lone weight has several axes, a bias stands beside other
        arrays without a weight, the module has submodules, or it is a batch norm with
        running statistics. Also: a parameter is in both spellings, a float64 array
        comes without x64, a tensor has no data, a file is truncated or in another
        format, or an index does not fit its files.
      ImportError: a path is given, but safetensors is not installed.

    Example:
      >>> import numpy as np
      >>> import jax_layernorm as jln
      >>> state_dict = {
      ...     "encoder.norm.weight": np.array([1.0, 2.0], np.float32),
      ...     "encoder.norm.bias": np.array([0.0, 0.5], np.float32),
      ... }
      >>> params = jln.convert.from_torch(state_dict, "encoder.norm")
      >>> params["scale"]
      Array([1., 2.], dtype=float32)
      >>> print(jln.layer_norm(params, np.array([3.0, 7.0], np.float32), epsilon=1e-12))
      [-1.   2.5]
    """
    if isinstance(state_dict, str | os.PathLike):
        state_dict = open_safetensors(state_dict)
    elif not isinstance(state_dict, Mapping):
        raise TypeError(
            "state_dict must be a mapping from names to arrays, or the path of a"
            f" safetensors file; got {_type_name(state_dict)}. For a torch module, pass"
            " module.state_dict()."
        )
    prefix = _with_dot(prefix)
    found = {name: _find(state_dict, prefix, name) for name in _SPELLINGS}
    if not any(found.values()):
        raise KeyError(_nothing_found(state_dict, prefix))
    if f"{prefix}running_mean" in state_dict:
        raise ValueError(
            "state_dict must hold a layer norm or an RMS norm under the prefix; got a"
            f" batch norm, because it has {prefix + 'running_mean'!r}. Its parameters"
            " mean something else; give the prefix of another module."
        )
    beside = [
        key
        for key in state_dict
        if isinstance(key, str) and key.startswith(prefix) and key not in found.values()
    ]
    inside = [key for key in beside if "." in key[len(prefix) :]]
    if inside:
        raise ValueError(
            "state_dict must hold a norm under the prefix, which has no submodules; got"
            f" {inside[0]!r} there. Give the prefix of the norm itself."
        )
    if found["scale"] is None and beside:
        raise ValueError(
            f"state_dict must hold {prefix + 'weight'!r} (or gamma) if it has more than a"
            f" bias there; got {beside[0]!r}. If that is the norm's scale, rename it to"
            f" {prefix + 'weight'!r}."
        )
    arrays = {
        name: _as_jax(f"state_dict[{key!r}]", stored)
        for name, key in found.items()
        if key is not None and (stored := state_dict[key]) is not None
    }
    _check_shapes(arrays, "state_dict", found)
    _check_features(arrays, found, features)
    if epsilon is not None:
        _warn_of(check_epsilon(epsilon))
    return arrays


def to_torch(params: Params, prefix: str = "") -> dict[str, np.ndarray]:
    """Converts the parameters of one norm to NumPy arrays under torch's names.

    This is the inverse of `from_torch`, bit for bit. The arrays are copies. A bfloat16
    array has the NumPy dtype of `ml_dtypes`, as in JAX. torch does not know that dtype,
    so convert such arrays like this:

        tensors = {
            key: torch.from_numpy(value.view(np.int16)).view(torch.bfloat16)
            for key, value in jln.convert.to_torch(params).items()
        }

    For the other dtypes `torch.from_numpy(value)` is enough, and
    `safetensors.numpy.save_file` writes all of them.

    Args:
      params: a mapping with `scale`, `bias` or both. A parameter that is missing or
        None is left out.
      prefix: the name of the norm's module, with or without a dot at its end.

    Returns:
      A dict with `weight` and `bias` under `prefix`, for the `load_state_dict` of
      torch's `LayerNorm` and `RMSNorm`.

    Raises:
      TypeError: `params` is not a mapping, or a value is not an array of a floating
        dtype.
      ValueError: `params` has an unknown key, or a scale and a bias of different
        shapes.

    Example:
      >>> import jax_layernorm as jln
      >>> jln.convert.to_torch(jln.init_params(2), "norm")
      {'norm.weight': array([1., 1.], dtype=float32),
       'norm.bias': array([0., 0.], dtype=float32)}
    """
    if not isinstance(params, Mapping):
        raise TypeError(
            "params must be a mapping with optional 'scale' and 'bias'; got"
            f" {_type_name(params)}. For a flax.nnx module, pass nnx.state(module)."
        )
    unknown = [key for key in params if key not in _SPELLINGS]
    if unknown:
        raise ValueError(
            f"params may hold 'scale' and 'bias' and nothing else; got {unknown}. Pass"
            " the parameters of one norm, and call once for each."
        )
    prefix = _with_dot(prefix)
    arrays = {
        name: _as_numpy(f"params[{name!r}]", params[name])
        for name in _SPELLINGS
        if params.get(name) is not None
    }
    _check_shapes(arrays, "params", {name: name for name in arrays})
    return {prefix + _SPELLINGS[name][0]: array for name, array in arrays.items()}


def _with_dot(prefix: Any) -> str:
    if not isinstance(prefix, str):
        raise TypeError(
            f"prefix must be a string; got {prefix!r}. Give the name of the norm's"
            " module, or '' if its parameters have no prefix."
        )
    return prefix if not prefix or prefix.endswith(".") else prefix + "."


def _find(state_dict: Mapping[str, Any], prefix: str, name: str) -> str | None:
    """The key of a parameter, in whichever spelling, or None."""
    keys = [key for word in _SPELLINGS[name] if (key := prefix + word) in state_dict]
    if len(keys) > 1:
        keys = [key for key in keys if state_dict[key] is not None] or keys[:1]
    if len(keys) > 1:
        raise ValueError(
            f"state_dict must hold {name} in one spelling; got both {keys[0]!r} and"
            f" {keys[1]!r}. Remove the one that is not the norm's."
        )
    return keys[0] if keys else None


def _nothing_found(state_dict: Mapping[str, Any], prefix: str) -> str:
    rule = (
        f"state_dict must hold {prefix + 'weight'!r} (or gamma), {prefix + 'bias'!r} (or"
        " beta), or both"
    )
    if not state_dict:
        return f"{rule}; it is empty. Pass that of the model."
    keys = list(map(str, state_dict))
    norms = [key for key in keys if "norm" in key.lower() or "ln" in key.lower()]
    near = difflib.get_close_matches(prefix + "weight", norms or keys, n=3, cutoff=0)
    fix = "Give the name of the norm's module as prefix."
    module, _, last = prefix[:-1].rpartition(".")
    # A file has no mappings in it, and would be read whole.
    values = {} if isinstance(state_dict, Arrays) else state_dict
    nested = [key for key, value in values.items() if isinstance(value, Mapping)]
    if nested:
        fix = (
            f"Its values are mappings; pass one of them, as state_dict[{nested[0]!r}]."
        )
    elif prefix[:-1] in state_dict and last in sum(_SPELLINGS.values(), ()):
        fix = f"Leave {last!r} out of the prefix."
    elif prefix[:-1] in state_dict:
        fix = (
            f"If {prefix[:-1]!r} is a scale, rename it to {_with_dot(module)}weight, and"
            f" pass {module!r} as prefix."
        )
    return (
        f"{rule}; the nearest of its {len(state_dict)} keys are"
        f" {', '.join(map(repr, near))}. {fix}"
    )


def _type_name(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _check_shapes(
    arrays: Mapping[str, Array | np.ndarray], where: str, keys: Mapping[str, str | None]
) -> None:
    if len(arrays) < 2 or arrays["scale"].shape == arrays["bias"].shape:
        return
    scale, bias = (f"{where}[{keys[name]!r}]" for name in ("scale", "bias"))
    raise ValueError(
        f"{bias} must have the shape of {scale}, {arrays['scale'].shape}; got"
        f" {arrays['bias'].shape}. Is this a linear layer, and no norm?"
    )


def _check_features(
    arrays: Mapping[str, Array], keys: Mapping[str, str | None], features: Any
) -> None:
    """Raises unless these could be the parameters of a norm over `features`."""
    for name, array in arrays.items():
        shape, key = array.shape, f"state_dict[{keys[name]!r}]"
        if features is not None:
            if shape != (expected := check_features(features)):
                raise ValueError(
                    f"{key} must have the shape given as features, {expected}; got"
                    f" {shape}. Is this another norm?"
                )
        elif len(shape) != 1 and shape.count(1) >= len(shape) - 1:
            raise ValueError(
                f"{key} must have one axis, or the shape given as features; got {shape}."
                f" Reshape it to ({array.size},)."
            )
        elif len(shape) != 1 and len(arrays) == 1:
            raise ValueError(
                f"{key} must have one axis, or the shape given as features; got {shape},"
                " which may be a linear layer or an embedding. If it is a norm over"
                f" several axes, pass features={shape}."
            )


def _warn_of(epsilon: float) -> None:
    # A checkpoint's configuration may hold 1e-6 in single precision.
    if np.float32(epsilon) == np.float32(_EPSILON):
        return
    warnings.warn(
        f"these parameters came with epsilon={epsilon!r}, and the default here is"
        f" {_EPSILON!r}. Pass epsilon={epsilon!r} to what uses them, as in"
        f" jln.layer_norm(params, x, epsilon={epsilon!r}) or"
        f" jln.linen.LayerNorm(epsilon={epsilon!r}), or rms_norm and RMSNorm.",
        UserWarning,
        stacklevel=3,
    )


def _as_jax(name: str, value: Any) -> Array:
    """A copy of a torch tensor, or of a NumPy or JAX array, on the default device."""
    torch: Any = sys.modules.get("torch")  # a caller with a tensor has imported it
    if torch is not None and isinstance(value, torch.Tensor):
        value = _of_tensor(name, value, torch)
    if isinstance(value, np.ndarray) and lacks_x64(value.dtype):
        raise ValueError(
            f"{name} must not lose bits, and float64 needs 64-bit types, which are off;"
            " got dtype float64. Turn them on with"
            " jax.config.update('jax_enable_x64', True), or cast it to float32 first."
        )
    return jnp.array(check_array(name, value))


def _as_numpy(name: str, value: Any) -> np.ndarray:
    """A copy of a JAX or NumPy array, writable."""
    array = check_array(name, value)
    return np.array(value if isinstance(value, np.ndarray) else array)


def _of_tensor(name: str, tensor: Any, torch: Any) -> np.ndarray:
    """The data of a torch tensor, in the tensor's memory."""
    missing = _without_data(tensor, torch)
    if missing:
        raise ValueError(
            f"{name} must hold data; got a tensor {missing}, which has none. Load the"
            " checkpoint into the model first, or gather it from all processes."
        )
    if str(tensor.dtype).removeprefix("torch.") not in map(str, DTYPES):
        raise TypeError(
            f"{name} must be of dtype {', '.join(map(str, DTYPES))}; got {tensor.dtype}."
            " Is this a norm's parameter? Quantized checkpoints keep those unquantized."
        )
    if tensor.layout != torch.strided:
        raise TypeError(
            f"{name} must be dense; got a tensor with the layout {tensor.layout}."
            " Convert it first, with to_dense()."
        )
    tensor = tensor.detach().cpu().resolve_neg()
    if tensor.dtype == torch.bfloat16:  # NumPy has it only through ml_dtypes
        return tensor.view(torch.int16).numpy().view(_BFLOAT16)
    return tensor.numpy()


def _without_data(tensor: Any, torch: Any) -> str:
    """Where the data of a tensor should be, if it is not there; otherwise ''."""
    if torch.nn.parameter.is_lazy(tensor):
        return "that is not initialized"
    if tensor.is_meta:
        return "on torch's meta device"
    if tensor.layout == torch.strided and tensor.numel():
        sizes = zip(tensor.shape, tensor.stride(), strict=True)
        last = tensor.storage_offset() + sum((n - 1) * stride for n, stride in sizes)
        if (last + 1) * tensor.element_size() > tensor.untyped_storage().nbytes():
            return "whose storage was freed"
    return ""
