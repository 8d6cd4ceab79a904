"""`jln.convert`: torch's names and back, bit for bit, and errors that name the key."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import jax_layernorm as jln

DTYPES = ("bfloat16", "float16", "float32", "float64")
NAME = "encoder.layer.0.attention.output.LayerNorm"


def any_bits(dtype, shape=(64,), seed=0):
    """An array of random bits: NaN with payloads, subnormals and infinities too."""
    dtype = jnp.dtype(dtype)
    words = np.random.default_rng(seed).integers(
        0, 256, (*shape, dtype.itemsize), np.uint8
    )
    return words.view(dtype)[..., 0]


def bits(array):
    array = np.asarray(array)
    return array.dtype, array.shape, array.tobytes()


def parameters(dtype="float32", features=4, prefix=NAME + "."):
    return {
        f"{prefix}weight": np.arange(1, features + 1).astype(jnp.dtype(dtype)),
        f"{prefix}bias": np.linspace(-1, 1, features).astype(jnp.dtype(dtype)),
    }


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("kind", ["NumPy", "JAX", "safetensors", "torch"])
@pytest.mark.parametrize("shape", [(64,), (3, 5), (0,)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_round_trip_keeps_every_bit(dtype, shape, kind, tmp_path):
    arrays = {"n.weight": any_bits(dtype, shape), "n.bias": any_bits(dtype, shape, 1)}
    state_dict = arrays
    if kind == "JAX":
        state_dict = {key: jnp.array(value) for key, value in arrays.items()}
    elif kind == "safetensors":
        numpy = pytest.importorskip(
            "safetensors.numpy", reason="needs safetensors, which is not installed"
        )
        state_dict = tmp_path / "model.safetensors"
        numpy.save_file(arrays, state_dict)
    elif kind == "torch":
        state_dict = {key: tensor(value) for key, value in arrays.items()}
    params = jln.convert.from_torch(state_dict, "n")
    assert all(isinstance(value, jax.Array) for value in params.values())
    back = jln.convert.to_torch(params, "n.")
    assert {key: bits(value) for key, value in back.items()} == {
        key: bits(value) for key, value in arrays.items()
    }


def torch():
    return pytest.importorskip("torch", reason="needs torch, which is not installed")


def tensor(array):
    """An array as a torch tensor, by the recipe in the docstring of `to_torch`."""
    if array.dtype == jnp.bfloat16:
        return torch().from_numpy(array.view(np.int16)).view(torch().bfloat16)
    return torch().from_numpy(array)


@given(
    names=st.sets(st.sampled_from(["scale", "bias"]), min_size=1),
    features=st.integers(0, 9),
    prefix=st.sampled_from(["", "norm", "norm.", "a.b.c"]),
)
@settings(deadline=None)
def test_what_goes_to_torch_comes_back(names, features, prefix):
    params = {name: jnp.arange(features) + 0.5 for name in names}
    there = jln.convert.to_torch(params, prefix)
    back = jln.convert.from_torch(there, prefix)
    assert back.keys() == names
    assert all(bits(back[name]) == bits(params[name]) for name in names)


@pytest.mark.parametrize("prefix", [NAME, NAME + "."])
def test_the_prefix_chooses_the_norm_and_may_end_in_a_dot(prefix):
    others = parameters(features=7, prefix="encoder.layer.1.LayerNorm.")
    params = jln.convert.from_torch({**others, **parameters()}, prefix)
    assert {name: value.tolist() for name, value in params.items()} == {
        "scale": [1, 2, 3, 4],
        "bias": np.linspace(-1, 1, 4, dtype=np.float32).tolist(),
    }
    assert jln.convert.to_torch(params, prefix).keys() == parameters().keys()


def test_without_a_prefix_the_names_stand_alone():
    state_dict = parameters(prefix="")
    assert jln.convert.from_torch(state_dict).keys() == {"scale", "bias"}
    assert jln.convert.to_torch(jln.init_params(4)).keys() == {"weight", "bias"}


def test_gamma_and_beta_are_the_older_spelling():
    state_dict = {"n.gamma": np.ones(3, np.float32), "n.beta": np.zeros(3, np.float32)}
    params = jln.convert.from_torch(state_dict, "n")
    assert params["scale"].tolist() == [1, 1, 1]
    assert params["bias"].tolist() == [0, 0, 0]


@pytest.mark.parametrize("absent", [{}, {"n.bias": None}], ids=str)
def test_a_norm_without_bias_gives_a_scale_alone(absent):
    state_dict = {"n.weight": np.ones(3, np.float32), **absent}
    assert jln.convert.from_torch(state_dict, "n").keys() == {"scale"}
    params = {"scale": jnp.ones(3), "bias": None}
    assert jln.convert.to_torch(params).keys() == {"weight"}


def test_the_parameters_run_in_every_norm():
    params = jln.convert.from_torch(parameters(), NAME)
    x = jax.random.normal(jax.random.key(0), (2, 4))
    y = jln.layer_norm(params, x, epsilon=1e-12)
    linen = jln.linen.LayerNorm(epsilon=1e-12)
    np.testing.assert_array_equal(linen.apply({"params": params}, x), y)
    module = jln.nnx.LayerNorm(4, epsilon=1e-12, rngs=nnx.Rngs(0))
    nnx.update(module, params)
    np.testing.assert_array_equal(module(x), y)
    back = jln.convert.to_torch(nnx.state(module), NAME)
    assert all(bits(back[key]) == bits(value) for key, value in parameters().items())
    scale = {"scale": params["scale"]}
    module = jln.nnx.RMSNorm(4, rngs=nnx.Rngs(0))
    nnx.update(module, scale)
    np.testing.assert_array_equal(module(x), jln.rms_norm(scale, x))


def test_nothing_is_shared_in_either_direction():
    source = {key: value.repeat(1024) for key, value in parameters().items()}
    params = jln.convert.from_torch(source, NAME)
    before = {name: bits(value) for name, value in params.items()}
    for value in source.values():
        value[:] = 7
    for value in jln.convert.to_torch(params).values():
        value[:] = 8  # it is writable, which torch.from_numpy asks for
    given = {"scale": np.ones(3, np.float32)}
    jln.convert.to_torch(given)["weight"][:] = 9
    assert {name: bits(value) for name, value in params.items()} == before
    assert given["scale"].tolist() == [1, 1, 1]


def test_a_donated_source_leaves_the_parameters():
    source = jnp.ones(3)
    params = jln.convert.from_torch({"weight": source})
    source.delete()  # as donation to a jitted function does
    assert params["scale"].tolist() == [1, 1, 1]


def test_float64_is_kept_or_refused_but_never_cut():
    state_dict = {"n.weight": np.full(3, 1 + 1e-12)}
    with pytest.raises(ValueError, match=r"state_dict\['n.weight'\].*jax_enable_x64"):
        jln.convert.from_torch(state_dict, "n")
    back = jln.convert.to_torch({"scale": state_dict["n.weight"]}, "n")
    assert bits(back["n.weight"]) == bits(state_dict["n.weight"])


@pytest.mark.parametrize("epsilon", [1e-5, 1e-12, 0.0, 1.1e-6])
def test_another_epsilon_is_a_warning_that_says_what_to_pass(epsilon):
    with pytest.warns(
        UserWarning, match=rf"layer_norm\(params, x, epsilon={epsilon}\)"
    ) as w:
        params = jln.convert.from_torch(parameters(), NAME, epsilon=epsilon)
    assert w[0].filename == __file__  # it points at the caller
    assert len(w) == 1 and params.keys() == {"scale", "bias"}


@pytest.mark.parametrize("epsilon", [None, 1e-6, float(np.float32(1e-6))])
def test_our_epsilon_or_none_is_no_warning(epsilon):
    jln.convert.from_torch(parameters(), NAME, epsilon=epsilon)  # warnings are errors


def test_an_impossible_epsilon_is_an_error():
    with pytest.raises(ValueError, match="epsilon must be zero or positive"):
        jln.convert.from_torch(parameters(), NAME, epsilon=-1.0)


@pytest.mark.parametrize(
    ("prefix", "near", "fix"),
    [
        ("bert." + NAME, NAME + ".weight", "Give the name"),
        (NAME.lower(), NAME + ".weight", "Give the name"),
        ("encoder.layer.0", "encoder.layer.0.output.LayerNorm.weight", "Give the name"),
        (NAME + ".weight", NAME + ".weight", "Leave 'weight' out of the prefix"),
        ("", "embeddings.LayerNorm.weight", "Give the name"),
    ],
)
def test_a_missing_key_is_named_beside_the_nearest(prefix, near, fix):
    modules = ("embeddings.LayerNorm", NAME, "encoder.layer.0.output.LayerNorm")
    state_dict = {"embeddings.word.weight": np.ones((9, 4), np.float32)}
    for module in modules:
        state_dict |= parameters(prefix=module + ".")
    with pytest.raises(KeyError) as error:
        jln.convert.from_torch(state_dict, prefix)
    (message,) = error.value.args
    wanted = f"{prefix}.weight" if prefix else "weight"
    assert f"must hold '{wanted}' (or gamma)" in message
    assert f"nearest of its 7 keys are '{near}'" in message
    assert fix in message


@pytest.mark.parametrize(
    ("state_dict", "error", "message"),
    [
        ({}, KeyError, "'n.weight'.*it is empty"),
        ({0: np.ones(3)}, KeyError, "nearest of its 1 keys are '0'"),
        (
            {"n.weight": np.ones((3, 2), "f"), "n.bias": np.ones(3, "f")},
            ValueError,
            r"state_dict\['n.bias'\] must have the shape of state_dict\['n.weight'\],"
            r" \(3, 2\); got \(3,\). Is this a linear layer",
        ),
        (
            {"n.weight": np.ones(3, "f"), "n.gamma": np.ones(3, "f")},
            ValueError,
            "scale in one spelling; got both 'n.weight' and 'n.gamma'",
        ),
        (
            {"n.weight": np.ones(3, "f"), "n.running_mean": np.ones(3, "f")},
            ValueError,
            "batch norm, because it has 'n.running_mean'",
        ),
        (
            {"n.weight": np.ones((8, 8), "f")},
            ValueError,
            r"must have one axis.*got \(8, 8\), which may be a linear layer or an"
            r" embedding.*features=\(8, 8\)",
        ),
        (
            {"n.weight": np.ones((8, 1, 1), "f"), "n.bias": np.ones((8, 1, 1), "f")},
            ValueError,
            r"one axis.*got \(8, 1, 1\). Reshape it to \(8,\)",
        ),
        ({"n.weight": np.array(1, "f")}, ValueError, r"got \(\). Reshape it to \(1,\)"),
        (
            {"n.gamma": np.ones(8, "f"), "n.dwconv.weight": np.ones((8, 1, 7, 7), "f")},
            ValueError,
            "no submodules; got 'n.dwconv.weight'",
        ),
        (
            {"n.scale": np.ones(3, "f"), "n.bias": np.ones(3, "f")},
            ValueError,
            "if it has more than a bias there; got 'n.scale'.*rename it to 'n.weight'",
        ),
        (  # of torch.nn.utils.prune
            {"n.weight_orig": np.ones(3, "f"), "n.bias": np.ones(3, "f")},
            ValueError,
            "got 'n.weight_orig'",
        ),
        ({"n.scale": np.ones(3, "f")}, KeyError, "Give the name"),
        ({"n": {"weight": np.ones(3, "f")}}, KeyError, r"pass one.*state_dict\['n'\]"),
        ({"model": {}, "step": 1}, KeyError, r"as state_dict\['model'\]"),
        ({"n.weight": np.ones(3, int)}, TypeError, r"\['n.weight'\].*got dtype int"),
        ({"n.weight": np.ones(3, "f,f")}, TypeError, r"\['n.weight'\].*got dtype"),
        ({"n.weight": [1.0, 2.0]}, TypeError, r"\['n.weight'\].*got list"),
        ([("n.weight", np.ones(3))], TypeError, r"list.*module.state_dict\(\)"),
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_a_norm_is_an_error_that_names_the_key(
    state_dict, error, message
):
    with pytest.raises(error, match=message):
        jln.convert.from_torch(state_dict, "n")


def test_a_key_of_a_scale_as_prefix_gets_its_own_advice():
    with pytest.raises(KeyError, match=r"rename it to a.n.weight, and pass 'a.n'"):
        jln.convert.from_torch({"a.n.scale": np.ones(3, "f")}, "a.n.scale")


def test_without_a_prefix_submodules_are_refused_too():
    bias, inner = np.ones(3, "f"), "parametrizations.weight.original"
    with pytest.raises(ValueError, match=f"no submodules; got '{inner}'"):
        jln.convert.from_torch({"bias": bias, inner: bias})


def test_none_stands_for_no_parameter_in_either_spelling():
    state_dict = {"n.weight": None, "n.gamma": np.ones(3, "f"), "n.mask": None}
    assert jln.convert.from_torch(state_dict, "n").keys() == {"scale"}


def test_features_are_the_shape_that_the_parameters_must_have():
    weight = {"n.weight": np.ones((3, 5), "f")}
    params = jln.convert.from_torch(weight, "n", features=(3, 5))
    assert params["scale"].shape == (3, 5)
    with pytest.raises(ValueError, match=r"given as features, \(5,\); got \(3, 5\)"):
        jln.convert.from_torch(weight, "n", features=5)


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        ({"weight": jnp.ones(3)}, ValueError, r"nothing else; got \['weight'\]"),
        ({"norm": jln.init_params(3)}, ValueError, "call once for each"),
        (
            {"scale": jnp.ones(3), "bias": jnp.ones(2)},
            ValueError,
            r"params\['bias'\] must have the shape of params\['scale'\].*got \(2,\)",
        ),
        ({"scale": jnp.ones(3, int)}, TypeError, r"params\['scale'\].*got dtype int32"),
        (jnp.ones(3), TypeError, "params must be a mapping"),
    ],
    ids=str,
)
def test_what_cannot_go_to_torch_is_an_error(params, error, message):
    with pytest.raises(error, match=message):
        jln.convert.to_torch(params)


@pytest.mark.parametrize(
    "convert",
    [
        lambda: jln.convert.from_torch(parameters(), None),
        lambda: jln.convert.to_torch(jln.init_params(3), 0),
    ],
)
def test_a_prefix_is_a_string(convert):
    with pytest.raises(TypeError, match=r"prefix must be a string; got (None|0)"):
        convert()


class TestFiles:
    @pytest.fixture(autouse=True)
    def safetensors(self):
        reason = "needs safetensors, which is not installed"
        self.save_file = pytest.importorskip(
            "safetensors.numpy", reason=reason
        ).save_file

    @pytest.mark.parametrize("kind", [str, lambda path: path])
    def test_a_path_reads_the_one_norm(self, kind, tmp_path):
        path = tmp_path / "model.safetensors"
        self.save_file(parameters() | {"ids": np.arange(3)}, path)
        params = jln.convert.from_torch(kind(path), NAME)
        assert params["scale"].tolist() == [1, 2, 3, 4]

    def test_missing_keys_and_integers_are_named(self, tmp_path):
        path = tmp_path / "model.safetensors"
        self.save_file(parameters() | {"step.weight": np.arange(3)}, path)
        with pytest.raises(KeyError, match="nearest of its 3 keys are"):
            jln.convert.from_torch(path, "encoder")
        with pytest.raises(TypeError, match=r"state_dict\['step.weight'\].*got I64"):
            jln.convert.from_torch(path, "step")

    def test_no_file_or_one_of_another_format_is_an_error(self, tmp_path):
        for path in (tmp_path, tmp_path / "nothing"):
            with pytest.raises(FileNotFoundError, match="there is no file"):
                jln.convert.from_torch(path)
        other = tmp_path / "pytorch_model.bin"
        other.write_bytes(b"not a safetensors file")
        with pytest.raises(
            ValueError, match=r"pytorch_model.bin.*torch.load\(path, we"
        ):
            jln.convert.from_torch(other)

    def test_an_index_is_followed_to_its_files(self, tmp_path):
        other = parameters(prefix="other.")
        self.save_file(parameters(), tmp_path / "model-1-of-2.safetensors")
        self.save_file(other, tmp_path / "model-2-of-2.safetensors")
        files = dict.fromkeys(parameters(), "model-1-of-2.safetensors")
        files |= dict.fromkeys(other, "model-2-of-2.safetensors")
        files["lost.weight"] = "model-3-of-2.safetensors"
        index = tmp_path / "model.safetensors.index.json"
        index.write_text(json.dumps({"metadata": {}, "weight_map": files}))
        for name in (NAME, "other"):
            params = jln.convert.from_torch(index, name)
            assert params["scale"].tolist() == [1, 2, 3, 4]
        with pytest.raises(FileNotFoundError, match=r"model-3-of-2.safetensors'"):
            jln.convert.from_torch(index, "lost")
        for content, reason in (
            ("{}", "KeyError"),
            ('{"weight_map": ["ab", "cd"]}', "is no mapping"),
            ('{"weight_map": {"n.weight": 3}}', "TypeError"),
            ('{"weight_map": {"n.weight": "../x"}}', "'../x' is in another folder"),
            ('{"weight_map": {"n.weight": "/x"}}', "'/x' is in another folder"),
            ('{"weight_map": {"a": "x", "a": "y"}}', "a name is there twice"),
        ):
            index.write_text(content)
            with pytest.raises(ValueError, match=f"JSON with a 'weight_map'.*{reason}"):
                jln.convert.from_torch(index, "n")

    def test_an_index_that_does_not_fit_its_files_is_refused(self, tmp_path):
        self.save_file(parameters(), tmp_path / "a.safetensors")
        index = tmp_path / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": {"n.weight": "a.safetensors"}}))
        with pytest.raises(
            ValueError, match=r"'n.weight' is in 'a.safetensors', where"
        ):
            jln.convert.from_torch(index, "n")

    def test_what_stands_for_a_file_in_git_is_called_so(self, tmp_path):
        path = tmp_path / "model.safetensors"
        path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
        with pytest.raises(ValueError, match="Run git lfs pull"):
            jln.convert.from_torch(path, NAME)

    def test_a_truncated_file_is_called_truncated(self, tmp_path):
        path = tmp_path / "model.safetensors"
        self.save_file(parameters(features=1000), path)
        whole = path.read_bytes()
        for length in (8, 9, 50, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:length])
            with pytest.raises(ValueError, match="which is truncated"):
                jln.convert.from_torch(path, NAME)

    def test_a_malformed_header_is_called_so(self, tmp_path):
        path = tmp_path / "model.safetensors"
        for header in (b'{"a":{"dtype":"F32"}}', b'{"a":3}', b'{"a"', b"[1]"):
            path.write_bytes(len(header).to_bytes(8, "little") + header)
            with pytest.raises(ValueError, match="must be in the safetensors format"):
                jln.convert.from_torch(path, NAME)


class TestTorch:
    """Torch's own modules, and ours with their parameters."""

    @pytest.fixture(autouse=True)
    def torch(self):
        self.torch = torch()

    @pytest.mark.parametrize(
        ("kind", "shape", "options"),
        [
            ("LayerNorm", (8,), {}),
            ("LayerNorm", (8,), {"bias": False}),
            ("LayerNorm", (4, 8), {}),
            ("RMSNorm", (8,), {}),
        ],
    )
    def test_the_same_numbers_come_out(self, kind, shape, options):
        module = getattr(self.torch.nn, kind)(shape, eps=1e-3, **options)
        self.torch.manual_seed(0)
        for parameter in module.parameters():
            self.torch.nn.init.normal_(parameter)
        x = self.torch.randn(3, 4, 8)
        params = jln.convert.from_torch(module.state_dict(), features=shape)
        norm = jln.layer_norm if kind == "LayerNorm" else jln.rms_norm
        axis = tuple(range(-len(shape), 0))
        y = norm(params, x.numpy(), axis=axis, epsilon=1e-3)
        np.testing.assert_allclose(y, module(x).detach().numpy(), atol=2e-6)

        fresh = getattr(self.torch.nn, kind)(shape, eps=1e-3, **options)
        fresh.load_state_dict(
            {key: tensor(value) for key, value in jln.convert.to_torch(params).items()}
        )
        assert self.torch.equal(fresh(x), module(x))

    def test_training_on_in_torch_leaves_ours_alone(self):
        module = self.torch.nn.LayerNorm(4096)
        params = jln.convert.from_torch(dict(module.named_parameters()))  # with grad
        with self.torch.no_grad():
            module.weight.fill_(7)
        assert params["scale"].tolist() == [1] * 4096

    def test_strided_tensors_are_read_in_order(self):
        for dtype in (self.torch.bfloat16, self.torch.float32):
            every_second = self.torch.arange(6, dtype=dtype)[::2]
            params = jln.convert.from_torch({"weight": every_second})
            assert params["scale"].tolist() == [0, 2, 4]
        negative = self.torch._neg_view(self.torch.ones(3))
        assert (
            jln.convert.from_torch({"weight": negative})["scale"].tolist() == [-1] * 3
        )

    def test_tensors_that_no_norm_can_have_are_named(self):
        eights = self.torch.ones(3).to(self.torch.float8_e4m3fn)
        freed = self.torch.ones(3)
        freed.untyped_storage().resize_(0)  # as FSDP does
        lazy = self.torch.nn.UninitializedParameter()
        for state_dict, error, message in (
            ({"weight": self.torch.ones(3, device="meta")}, ValueError, "meta device"),
            ({"weight": freed}, ValueError, "whose storage was freed"),
            ({"weight": lazy}, ValueError, "not initialized"),
            ({"weight": self.torch.ones(3).to_sparse()}, TypeError, "must be dense"),
            ({"weight": eights}, TypeError, "float8"),
            ({"weight": self.torch.arange(3)}, TypeError, "int64"),
            (self.torch.nn.LayerNorm(3), TypeError, r"module.state_dict\(\)"),
        ):  # fmt: skip
            with pytest.raises(error, match=message):
                jln.convert.from_torch(state_dict)


def run(script):
    """What `script` prints in a fresh interpreter, where a warning is an error."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_flax_torch_and_safetensors_are_not_needed():
    printed = run(
        """
import sys

class Without:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("flax", "torch", "safetensors"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Without())
import numpy as np
import jax_layernorm as jln
print("jax_layernorm.convert" in sys.modules)
state_dict = {"n.weight": np.ones(2, np.float32)}
print(jln.convert.to_torch(jln.convert.from_torch(state_dict, "n"), "n"))
try:
    jln.convert.from_torch("model.safetensors", "n")
except ImportError as error:
    print(error.name, "pip install safetensors" in str(error))
"""
    )
    assert printed.splitlines() == [
        "False",
        "{'n.weight': array([1., 1.], dtype=float32)}",
        "safetensors True",
    ]
