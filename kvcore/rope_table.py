"""The cosines and sines that `rope_and_cache` rotates with, out of a model's config.

The arithmetic is that of Hugging Face's transformers: frequencies and angles in float32, every operation rounded by
itself, division by a tensor as torch does it where it multiplies by a reciprocal. More exact are powers and cosines,
which are computed in float64 and rounded once: so a table has the same bits on every machine.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from kvcore.contract.checks import either, is_bool, is_integer, is_number
from kvcore.formats import FLOATS

ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""What may be done to frequencies so that a model handles more positions than it was trained with."""

_CONFIG = (
    "head_dim",
    "hidden_size",
    "num_attention_heads",
    "qk_rope_head_dim",
    "max_position_embeddings",
    "rope_theta",
    "rotary_emb_base",
    "partial_rotary_factor",
    "rotary_pct",
    "rotary_dim",
)
"""What is read of a config itself; rope_parameters and rope_scaling have the rest, or the same."""

Settings = dict[str, Any]
"""What a config says, with the names of rope_parameters; nothing is None."""

ONE = np.float32(1)


def rope_table(config: Any, max_position: int | None = None, layer_type: str | None = None) -> np.ndarray:
    """Cosines and sines of each position, float32 `[max_position, rotary_dim]`: the first half of a row is cosines.

    Args:
        config: A dict, or an object with attributes, with the names of Hugging Face's configs.
        max_position: Rows; None means config's max_position_embeddings.
        layer_type: Which of config's rope_parameters is meant, where types of layers have their own.

    Raises:
        ValueError: something is missing, unknown or out of range.
        TypeError: something is of another type.
    """
    settings = _settings(config, layer_type)
    rope_type = _rope_type(settings)
    if max_position is None:
        max_position = _integer(settings, "max_position_embeddings")
    elif not is_integer(max_position):
        raise TypeError(f"max_position must be None or an int, got {max_position!r}")
    if max_position < 1:
        raise ValueError(f"max_position must be at least 1, got {max_position}")

    rotary_dim, theta = _rotary_dim(settings), _number(settings, "rope_theta", above=1)
    exponents = np.arange(0, rotary_dim, 2, dtype=np.float32) / np.float32(rotary_dim)
    periods = (np.float64(np.float32(theta)) ** exponents.astype(np.float64)).astype(np.float32)
    frequencies, magnitude = ONE / periods, 1.0
    if rope_type == "linear":
        frequencies = frequencies / np.float32(_number(settings, "factor"))
    elif rope_type == "llama3":
        frequencies = _llama3(frequencies, settings)
    elif rope_type == "yarn":
        frequencies, magnitude = _yarn(periods, theta, settings)

    angles = np.arange(max_position, dtype=np.float32)[:, None] * frequencies
    table = np.empty((max_position, rotary_dim), np.float32)
    halves = table[:, : rotary_dim // 2], table[:, rotary_dim // 2 :]
    for function, half in zip((np.cos, np.sin), halves, strict=True):
        function(angles, out=half, dtype=np.float64, casting="same_kind")
    table *= np.float32(magnitude)
    return table


def check_table_dtype(dtype: Any) -> None:
    """Checks the name of the dtype that a framework is to make a table of.

    Raises:
        TypeError: it is none that `rope_and_cache` takes.
    """
    if dtype not in FLOATS:
        raise TypeError(f"dtype must be {either(FLOATS)}, got {dtype}")


def _llama3(frequencies: np.ndarray, settings: Settings) -> np.ndarray:
    """High frequencies stay, low ones are divided by factor, and between the two wavelengths one blends into the other.

    Args:
        frequencies: Of the pairs, `[rotary_dim / 2]`.
        settings: What config says.
    """
    factor, trained = np.float32(_number(settings, "factor")), _number(settings, "original_max_position_embeddings")
    low, high = _number(settings, "low_freq_factor"), _number(settings, "high_freq_factor")
    if high <= low:
        raise ValueError(f"config's high_freq_factor must be above low_freq_factor = {low}, got {high}")
    wavelengths = ONE / frequencies * np.float32(2 * math.pi)
    long, short = wavelengths > np.float32(trained / low), wavelengths < np.float32(trained / high)
    divided = np.where(long, frequencies / factor, frequencies)
    weight = (ONE / wavelengths * np.float32(trained) - np.float32(low)) / np.float32(high - low)
    between = (ONE - weight) * divided / factor + weight * divided
    return np.where(long | short, divided, between)


def _yarn(periods: np.ndarray, theta: float, settings: Settings) -> tuple[np.ndarray, float]:
    """Frequencies of the first pairs stay, those of the last are divided by factor, with a ramp between them.

    Args:
        periods: Reciprocals of the frequencies of the pairs, `[rotary_dim / 2]`.
        theta: The largest of them, if there were one pair more.
        settings: What config says.

    Returns:
        The frequencies, and what cosines and sines are multiplied by.
    """
    rotary_dim, trained = 2 * len(periods), _number(settings, "original_max_position_embeddings")
    factor = _number(settings, "factor", settings.get("max_position_embeddings", trained) / trained)

    def pair_of(rotations: float) -> float:
        """The pair that turns this often in all positions of the training."""
        return rotary_dim * math.log(trained / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    first, last = pair_of(_number(settings, "beta_fast", 32)), pair_of(_number(settings, "beta_slow", 1))
    truncate = settings.get("truncate", True)
    if not is_bool(truncate):
        raise TypeError(f"config's truncate must be a bool, got {truncate!r}")
    if truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rotary_dim - 1)
    if first == last:
        last += 0.001
    ramp = (np.arange(len(periods), dtype=np.float32) - np.float32(first)) / np.float32(last - first)
    kept = ONE - np.clip(ramp, np.float32(0), ONE)
    frequencies = ONE / (np.float32(factor) * periods) * (ONE - kept) + ONE / periods * kept

    def magnitude(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

    if "attention_factor" in settings:
        return frequencies, _number(settings, "attention_factor")
    if settings.get("mscale") and settings.get("mscale_all_dim"):  # zeros count as none
        return frequencies, magnitude(_number(settings, "mscale")) / magnitude(_number(settings, "mscale_all_dim"))
    return frequencies, magnitude(1)


# ---- what a config says


def _settings(config: Any, layer_type: str | None) -> Settings:
    """All that is read of a config, in one dict: what belongs to the rotation goes before what the model has."""
    names = (*_CONFIG, "original_max_position_embeddings", "rope_parameters", "rope_scaling", "text_config")
    if isinstance(config, Mapping):
        found = {name: config[name] for name in names if config.get(name) is not None}
    else:
        found = {name: getattr(config, name) for name in names if getattr(config, name, None) is not None}
        if not found:
            raise TypeError(f"config must be a dict or an object like a PretrainedConfig, got {config!r}")
    settings = {name: found[name] for name in _CONFIG if name in found}
    settings.setdefault("rope_theta", found.get("rotary_emb_base", 10000.0))  # GPT-NeoX's name; transformers' default
    if "rotary_pct" in found:
        settings.setdefault("partial_rotary_factor", found["rotary_pct"])
    settings |= {name: each for name, each in _rope_parameters(found, layer_type).items() if each is not None}
    if "max_position_embeddings" in settings:
        settings.setdefault("original_max_position_embeddings", settings["max_position_embeddings"])
    if "original_max_position_embeddings" in found:
        settings["original_max_position_embeddings"] = found["original_max_position_embeddings"]
    if "text_config" in found and not settings.keys() & {"head_dim", "hidden_size", "qk_rope_head_dim"}:
        raise ValueError("config must be that of the text model alone: pass config's text_config")
    return settings


def _rope_parameters(found: Settings, layer_type: str | None) -> Mapping[str, Any]:
    """The dict that transformers 5 calls rope_parameters, and earlier versions rope_scaling."""
    name = "rope_parameters" if "rope_parameters" in found else "rope_scaling"
    parameters = found.get(name, {})
    if not isinstance(parameters, Mapping):
        raise TypeError(f"config's {name} must be a dict or None, got {parameters!r}")
    types = [each for each, its_own in parameters.items() if isinstance(its_own, Mapping)]
    if layer_type not in (types or [None]):
        wanted = either(map(repr, types)) if types else "None"
        raise ValueError(f"layer_type must be {wanted}, as in config's {name}, got {layer_type!r}")
    return parameters if layer_type is None else parameters[layer_type]


def _rope_type(settings: Settings) -> str:
    """The name that is one of `ROPE_TYPES`."""
    rope_type = settings.get("rope_type", settings.get("type", "default"))
    if not isinstance(rope_type, str):
        raise TypeError(f"config's rope_type must be a string, got {rope_type!r}")
    if rope_type == "mrope":  # frequencies are the default's; which positions they turn with is not the table's affair
        return "default"
    if rope_type not in ROPE_TYPES:
        raise ValueError(f"config's rope_type must be {either(map(repr, ROPE_TYPES))}, got {rope_type!r}")
    return rope_type


def _rotary_dim(settings: Settings) -> int:
    """How many elements of a head are rotated."""
    if "qk_rope_head_dim" in settings:  # of MLA, where head_dim may be this part or the whole
        head_size = rotary_dim = _integer(settings, "qk_rope_head_dim")
    else:
        if "head_dim" in settings:
            head_size = _integer(settings, "head_dim")
        else:
            head_size = _integer(settings, "hidden_size") // _integer(settings, "num_attention_heads")
        rotary_dim = head_size
        if "partial_rotary_factor" in settings:
            rotary_dim = int(head_size * _number(settings, "partial_rotary_factor"))
        elif "rotary_dim" in settings:  # MiniMax's and GPT-J's
            rotary_dim = _integer(settings, "rotary_dim")
    if not 2 <= rotary_dim <= head_size or rotary_dim % 2:
        raise ValueError(
            f"config must have an even number of rotated elements, from 2 to head_dim = {head_size}, got {rotary_dim}"
        )
    return rotary_dim


def _number(settings: Settings, name: str, default: float | None = None, above: float = 0) -> float:
    """A setting that is a number."""
    number = settings.get(name, default)
    if number is None:
        raise ValueError(f"config must have {name}, got none")
    if not is_number(number):
        raise TypeError(f"config's {name} must be a number, got {number!r}")
    if not above < number < math.inf:
        raise ValueError(f"config's {name} must be finite and above {above}, got {number}")
    return number


def _integer(settings: Settings, name: str) -> int:
    """A setting that is an integer."""
    number = _number(settings, name)
    if not is_integer(number):
        raise TypeError(f"config's {name} must be an int, got {number!r}")
    return int(number)
