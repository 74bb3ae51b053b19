"""rope_table: held to transformers, to formulas in float64, and to what it says of configs that it cannot read."""

import importlib
import json
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import jaxkv
import torchkv
from kvcore.rope_table import ROPE_TYPES, rope_table
from tests.cases.arrays import from_torch

transformers = pytest.importorskip("transformers")
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

POSITIONS = 4096

LLAMA3 = dict(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
)
YARN = dict(rope_type="yarn", factor=40.0, original_max_position_embeddings=4096)
PARAMETERS = {
    "default": dict(rope_type="default"),
    "linear by 4": dict(rope_type="linear", factor=4.0),
    "linear by 3": dict(rope_type="linear", factor=3),
    "llama3": LLAMA3,
    "llama3 by 32": LLAMA3 | {"factor": 32.0},
    "llama3 by 3": LLAMA3 | {"factor": 3.0},
    "yarn": dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32768),
    "yarn, not truncated": YARN | dict(factor=32.0, beta_fast=32.0, beta_slow=1.0, truncate=False),
    "yarn, mscale": YARN | dict(mscale=1.0, mscale_all_dim=0.8, beta_fast=16),
    "yarn, equal mscales": YARN | dict(mscale=1.0, mscale_all_dim=1.0),
    "yarn, no mscale": YARN | dict(mscale=0.707, mscale_all_dim=0),
    "yarn, attention_factor": YARN | dict(attention_factor=1.3),
    "yarn, small factor": dict(rope_type="yarn", factor=0.5, original_max_position_embeddings=4096),
    "yarn, no ramp": YARN | dict(beta_fast=16, beta_slow=16, truncate=False),
    "yarn, a ramp past both ends": YARN | dict(beta_fast=3000.0, beta_slow=1e-20),
}
THETAS, HEAD_SIZES = (10000.0, 500000.0, 1e6, 150000.0), (64, 128, 96, 80)

parameters_and_names = pytest.mark.parametrize("parameters", PARAMETERS.values(), ids=PARAMETERS)


def llama(parameters, theta=10000.0, head_size=64, **more):
    return transformers.LlamaConfig(
        head_dim=head_size, hidden_size=4 * head_size, num_attention_heads=4, max_position_embeddings=131072,
        rope_parameters={**parameters, "rope_theta": theta}, **more,
    )  # fmt: skip


def theirs(config):
    """Frequencies and attention factor of transformers."""
    if config.rope_parameters["rope_type"] == "default":
        frequencies, magnitude = LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    else:
        frequencies, magnitude = ROPE_INIT_FUNCTIONS[config.rope_parameters["rope_type"]](config)
    return frequencies.numpy(), magnitude


def table_of(frequencies, magnitude, positions=POSITIONS):
    """Angles in float32; cosines and sines rounded to it, and then multiplied in it."""
    angles = (np.arange(positions, dtype=np.float32)[:, None] * frequencies).astype(np.float64)
    table = np.concatenate([np.cos(angles), np.sin(angles)], -1).astype(np.float32)
    return table * np.float32(magnitude)


@pytest.fixture
def exact_powers(monkeypatch):
    """Powers of theta whose last bit is right: torch's own are off by one in some, depending on the CPU."""

    def power(exponents, theta):
        return torch.pow(float(theta), exponents.double()).float()

    monkeypatch.setattr(torch.Tensor, "__rpow__", power)


# ---- transformers


@pytest.mark.usefixtures("exact_powers")
@pytest.mark.parametrize("theta", THETAS)
@parameters_and_names
def test_bits_are_those_of_transformers_frequencies(parameters, theta):
    for head_size in HEAD_SIZES:
        config = llama(parameters, theta, head_size)
        np.testing.assert_array_equal(rope_table(config, POSITIONS), table_of(*theirs(config)))


@parameters_and_names
def test_tables_are_near_what_transformers_models_compute(parameters):
    """With torch's own powers and float32 cosines: off by a last bit, and by one of a frequency, times positions."""
    for theta in THETAS:
        config = llama(parameters, theta, 128)
        cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(POSITIONS)[None])
        want = torch.cat([cos[0, :, :64], sin[0, :, :64]], -1).numpy()
        got = rope_table(config, POSITIONS)
        frequencies, magnitude = theirs(config)
        last_bits = 2 * POSITIONS * np.spacing(frequencies)  # of a frequency, and of the product with a position
        assert (np.abs(got - want) <= magnitude * np.tile(last_bits, 2) + 2.0**-22).all()
        assert (np.abs(got - want) < 1e-4).all()
        assert (got != want).mean() < 0.15


@pytest.mark.parametrize("parameters", [YARN, LLAMA3], ids=["yarn", "llama3"])
def test_frequencies_are_stretched(parameters):
    """That the comparison is not of equal things: other types have other tables, beyond their first pairs."""
    plain, stretched = (rope_table(llama(p), 64) for p in (PARAMETERS["default"], parameters))
    assert (plain[:, 31] != stretched[:, 31]).sum() > 32


# ---- a formula in float64


def test_the_table_of_a_plain_config():
    got = rope_table({"head_dim": 8, "rope_theta": 100.0}, 50)
    angles = np.arange(50)[:, None] / 100.0 ** (np.arange(4) / 4)
    np.testing.assert_allclose(got, np.concatenate([np.cos(angles), np.sin(angles)], -1), atol=3e-6)
    assert got.dtype == np.float32
    assert got.flags.c_contiguous
    np.testing.assert_array_equal(got[0], [1, 1, 1, 1, 0, 0, 0, 0])


def test_cosines_of_many_turns_are_rounded_once():
    """The largest angle is 131071, where a cosine computed in float32 could be anything."""
    got = rope_table({"head_dim": 2, "rope_theta": 10000.0}, 131072)
    np.testing.assert_array_equal(got[:, 0], np.cos(np.arange(131072.0)).astype(np.float32))
    np.testing.assert_array_equal(got[:, 1], np.sin(np.arange(131072.0)).astype(np.float32))


def test_yarn_multiplies_cosines_and_sines():
    plain, yarn = (rope_table(llama(p), 2) for p in (PARAMETERS["default"], YARN))
    np.testing.assert_allclose(yarn[0, :32], 1 + 0.1 * math.log(40), rtol=1e-6)
    np.testing.assert_allclose(yarn[1, 0] / plain[1, 0], 1 + 0.1 * math.log(40), rtol=1e-6)


# ---- spellings


def plain_dict(config):
    return json.loads(config.to_json_string())


@parameters_and_names
def test_both_spellings_dicts_and_objects_are_one(parameters):
    config = llama(parameters, 500000.0)
    want = rope_table(config, 100)
    base = dict(head_dim=64, hidden_size=256, num_attention_heads=4, max_position_embeddings=131072)
    old = {name: value for name, value in parameters.items() if name != "rope_type"}
    spellings = [
        plain_dict(config),
        base | dict(rope_parameters={**parameters, "rope_theta": 500000.0}),
        base | dict(rope_parameters=parameters, rope_theta=500000.0),
        base | dict(rope_scaling=parameters, rope_theta=500000.0),
        base | dict(rope_scaling={**old, "type": parameters["rope_type"]}, rope_theta=500000.0, rope_parameters=None),
    ]
    for spelling in spellings:
        np.testing.assert_array_equal(rope_table(spelling, 100), want)
        np.testing.assert_array_equal(rope_table(SimpleNamespace(**spelling), 100), want)


SIZES = {
    "hidden_size and heads": (dict(hidden_size=96, num_attention_heads=4), 24),
    "head_dim first": (dict(hidden_size=96, num_attention_heads=4, head_dim=32), 32),
    "head_dim of None": (dict(hidden_size=96, num_attention_heads=4, head_dim=None), 24),
    "partial_rotary_factor": (dict(head_dim=128, partial_rotary_factor=0.25), 32),
    "its floor": (dict(head_dim=192, partial_rotary_factor=0.334), 64),
    "in rope_parameters": (dict(head_dim=128, rope_parameters=dict(partial_rotary_factor=0.5)), 64),
    "which goes first": (
        dict(head_dim=128, partial_rotary_factor=1.0, rope_parameters=dict(partial_rotary_factor=0.5)), 64,
    ),
    "GPT-NeoX": (dict(hidden_size=512, num_attention_heads=8, rotary_pct=0.25), 16),
    "MiniMax": (dict(head_dim=128, rotary_dim=64), 64),
    "MLA": (dict(hidden_size=2048, num_attention_heads=16, qk_rope_head_dim=64, kv_lora_rank=512), 64),
    "MLA, whose head_dim is all of it": (dict(head_dim=192, qk_rope_head_dim=64), 64),
    "MLA, of which that is a part": (dict(head_dim=128, qk_rope_head_dim=64, partial_rotary_factor=0.5), 64),
}  # fmt: skip


@pytest.mark.parametrize(("config", "rotary_dim"), SIZES.values(), ids=SIZES)
def test_how_much_is_rotated(config, rotary_dim):
    got = rope_table(config | {"rope_theta": 1000.0}, 9)
    np.testing.assert_array_equal(got, rope_table({"head_dim": rotary_dim, "rope_theta": 1000.0}, 9))
    assert got.shape == (9, rotary_dim)


@pytest.mark.parametrize(
    "scaling", [dict(type="mrope", mrope_section=[16, 24, 24]), dict(rope_type="default", type="mrope")]
)
def test_mrope_is_the_default(scaling):
    want = rope_table({"head_dim": 128}, 9)
    np.testing.assert_array_equal(rope_table({"head_dim": 128, "rope_scaling": scaling}, 9), want)


def test_what_is_taken_where_config_says_nothing():
    config = {"head_dim": 8, "max_position_embeddings": 7, "rope_scaling": None}
    assert rope_table(config).shape == (7, 8)
    assert rope_table(config, np.int64(3)).shape == (3, 8)
    np.testing.assert_array_equal(rope_table(config), rope_table(config | {"rope_theta": 10000}))
    np.testing.assert_array_equal(
        rope_table(config | {"rotary_emb_base": 500}), rope_table(config | {"rope_theta": 500})
    )


@pytest.mark.parametrize("parameters", [YARN, LLAMA3], ids=["yarn", "llama3"])
def test_positions_of_the_training(parameters):
    """Config's own go first, as Phi's; those of rope_parameters next; else all that it has."""
    few = parameters | {"original_max_position_embeddings": 1024}
    none = {name: value for name, value in parameters.items() if name != "original_max_position_embeddings"}
    base = {"head_dim": 64, "max_position_embeddings": 1024}
    want = rope_table(base | {"rope_parameters": few}, 9)
    assert (want != rope_table(base | {"rope_parameters": parameters}, 9)).any()
    own = base | {"rope_parameters": parameters, "original_max_position_embeddings": 1024}
    np.testing.assert_array_equal(rope_table(own, 9), want)
    np.testing.assert_array_equal(rope_table(base | {"rope_parameters": none}, 9), want)


def test_yarns_factor_is_how_many_times_more_positions():
    base = {"head_dim": 64, "max_position_embeddings": 163840}
    without = {name: value for name, value in YARN.items() if name != "factor"}
    want = rope_table(base | {"rope_parameters": YARN}, 9)
    for parameters in (without, without | {"factor": None}):
        np.testing.assert_array_equal(rope_table(base | {"rope_parameters": parameters}, 9), want)


def test_types_of_layers():
    full, sliding = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}, {"rope_theta": 1e4}
    config = {"head_dim": 64, "rope_parameters": {"full_attention": full, "sliding_attention": sliding}}
    for layer_type, parameters in config["rope_parameters"].items():
        want = rope_table({"head_dim": 64, "rope_parameters": parameters}, 9)
        np.testing.assert_array_equal(rope_table(config, 9, layer_type), want)
        np.testing.assert_array_equal(jaxkv.rope_table(config, 9, layer_type=layer_type), want)
        np.testing.assert_array_equal(torchkv.rope_table(config, 9, layer_type=layer_type), want)
    text = "layer_type must be 'full_attention' or 'sliding_attention', as in config's rope_parameters, got None"
    with pytest.raises(ValueError, match=text):
        rope_table(config, 9)


MODELS = {
    "Qwen3Config": (dict(head_dim=128), 128),
    "Gemma3TextConfig": (dict(head_dim=64), 64),
    "Qwen2VLTextConfig": (dict(hidden_size=512, num_attention_heads=4), 128),
    "GPTNeoXConfig": (dict(hidden_size=512, num_attention_heads=8), 16),
    "PhiConfig": (dict(hidden_size=512, num_attention_heads=8), 32),
    "DeepseekV3Config": (dict(qk_rope_head_dim=32), 32),
    "GptOssConfig": (dict(head_dim=64), 64),
    "Glm4MoeConfig": (dict(head_dim=128), 64),
}


@pytest.mark.usefixtures("exact_powers")
@pytest.mark.parametrize("name", MODELS)
def test_models_of_transformers(name):
    """Configs as transformers makes them, also saved and read: the frequencies of the models' own classes."""
    given, rotary_dim = MODELS[name]
    config = getattr(transformers, name)(**given)
    module = importlib.import_module(config.__module__.replace("configuration", "modeling"))
    (embedding,) = (x for n, x in vars(module).items() if n.endswith("RotaryEmbedding") and "Vision" not in n)
    model = embedding(config)
    types = {None: "inv_freq"}
    if hasattr(model, "full_attention_inv_freq"):
        types = {t: f"{t}_inv_freq" for t in ("full_attention", "sliding_attention")}
    for layer_type, attribute in types.items():
        scaling = "attention_scaling" if layer_type is None else f"{layer_type}_attention_scaling"
        want = table_of(getattr(model, attribute).numpy(), getattr(model, scaling), 64)
        assert want.shape == (64, rotary_dim)
        for each in (config, plain_dict(config)):
            np.testing.assert_array_equal(rope_table(each, 64, layer_type), want)


# ---- twins


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_twins_round_the_same_table(dtype):
    config = llama(YARN)
    want = rope_table(config, 99).astype(jnp.dtype(dtype))
    ours = [
        jaxkv.rope_table(config, 99, dtype=dtype),
        jaxkv.rope_table(config, 99, dtype=jnp.dtype(dtype)),
        from_torch(torchkv.rope_table(config, 99, dtype=dtype)),
        from_torch(torchkv.rope_table(config, 99, dtype=getattr(torch, dtype), device="cpu")),
    ]
    for table in ours:
        assert str(table.dtype) == dtype
        np.testing.assert_array_equal(np.asarray(table), want)
    assert torchkv.rope_table(config, 9, device="meta").device.type == "meta"


def test_twins_tables_are_of_their_frameworks():
    assert isinstance(jaxkv.rope_table({"head_dim": 4}, 2), jax.Array)
    assert isinstance(torchkv.rope_table({"head_dim": 4}, 2), torch.Tensor)
    with torch.device("meta"):
        assert torchkv.rope_table({"head_dim": 4}, 2).device.type == "meta"
    in_jit = jax.jit(lambda: jaxkv.rope_table({"head_dim": 4}, 2))()
    np.testing.assert_array_equal(in_jit, rope_table({"head_dim": 4}, 2))


# ---- errors

GOOD = {"head_dim": 64, "max_position_embeddings": 16}


def scaled(**parameters):
    return GOOD | {"rope_scaling": parameters}


WRONG = [
    (scaled(type="dynamic", factor=2.0), {}, ValueError,
     "config's rope_type must be 'default', 'linear', 'llama3' or 'yarn', got 'dynamic'"),
    (GOOD | {"rope_parameters": {"rope_type": "longrope"}}, {}, ValueError,
     "config's rope_type must be 'default', 'linear', 'llama3' or 'yarn', got 'longrope'"),
    (scaled(rope_type=3), {}, TypeError, "config's rope_type must be a string, got 3"),
    (scaled(type="linear"), {}, ValueError, "config must have factor, got none"),
    (scaled(type="linear", factor="8"), {}, TypeError, "config's factor must be a number, got '8'"),
    (scaled(type="linear", factor=True), {}, TypeError, "config's factor must be a number, got True"),
    (scaled(type="linear", factor=0), {}, ValueError, "config's factor must be finite and above 0, got 0"),
    (scaled(type="yarn", factor=math.nan), {}, ValueError, "config's factor must be finite and above 0, got nan"),
    (scaled(type="yarn", factor=2.0, truncate="no"), {}, TypeError, "config's truncate must be a bool, got 'no'"),
    (scaled(**LLAMA3 | {"high_freq_factor": 1}), {}, ValueError,
     "config's high_freq_factor must be above low_freq_factor = 1.0, got 1"),
    (scaled(rope_type="llama3", factor=8.0, high_freq_factor=4.0), {}, ValueError,
     "config must have low_freq_factor, got none"),
    ({"head_dim": 64, "rope_scaling": dict(type="yarn", factor=2.0)}, dict(max_position=4), ValueError,
     "config must have original_max_position_embeddings, got none"),
    (GOOD | {"rope_scaling": "yarn"}, {}, TypeError, "config's rope_scaling must be a dict or None, got 'yarn'"),
    (GOOD | {"rope_theta": "1e4"}, {}, TypeError, "config's rope_theta must be a number, got '1e4'"),
    (GOOD | {"rope_theta": 1}, {}, ValueError, "config's rope_theta must be finite and above 1, got 1"),
    (GOOD | {"head_dim": 64.0}, {}, TypeError, "config's head_dim must be an int, got 64.0"),
    (GOOD | {"head_dim": 7}, {}, ValueError,
     "config must have an even number of rotated elements, from 2 to head_dim = 7, got 7"),
    (GOOD | {"partial_rotary_factor": 2.0}, {}, ValueError,
     "config must have an even number of rotated elements, from 2 to head_dim = 64, got 128"),
    ({"hidden_size": 64, "max_position_embeddings": 4}, {}, ValueError,
     "config must have num_attention_heads, got none"),
    ({"max_position_embeddings": 4}, {}, ValueError, "config must have hidden_size, got none"),
    ({}, dict(max_position=4), ValueError, "config must have hidden_size, got none"),
    ({"head_dim": 64}, {}, ValueError, "config must have max_position_embeddings, got none"),
    ({"text_config": GOOD}, {}, ValueError, "config must be that of the text model alone: pass config's text_config"),
    (GOOD, dict(max_position=0), ValueError, "max_position must be at least 1, got 0"),
    (GOOD, dict(max_position=4.0), TypeError, "max_position must be None or an int, got 4.0"),
    (GOOD, dict(layer_type="full_attention"), ValueError,
     "layer_type must be None, as in config's rope_scaling, got 'full_attention'"),
    ("Qwen/Qwen3-8B", {}, TypeError, "config must be a dict or an object like a PretrainedConfig, got 'Qwen/Qwen3-8B'"),
    (None, {}, TypeError, "config must be a dict or an object like a PretrainedConfig, got None"),
    (GOOD, dict(dtype="int8"), TypeError, "dtype must be float32, bfloat16 or float16, got int8"),
]  # fmt: skip


@pytest.mark.parametrize(("config", "arguments", "kind", "text"), WRONG, ids=[text for *_, text in WRONG])
@pytest.mark.parametrize("twin", [jaxkv, torchkv], ids=["jax", "torch"])
def test_errors(twin, config, arguments, kind, text):
    with pytest.raises(kind) as error:
        twin.rope_table(config, **arguments)
    assert str(error.value) == text


def test_every_type_is_tried_here():
    assert {p["rope_type"] for p in PARAMETERS.values()} == set(ROPE_TYPES)
