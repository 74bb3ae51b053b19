"""The table of a model's rotary embedding."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

import kvcore.rope_table
from jaxkv._arguments import dtype_name


def rope_table(
    config: Any, max_position: int | None = None, *, layer_type: str | None = None, dtype: DTypeLike = jnp.float32
) -> jax.Array:
    """Cosines and sines of each position, which `rope_and_cache` rotates with, out of a model's config.

    In row p, column i holds the cosine of `p * frequency_i`, and column `rotary_dim / 2 + i` the sine. The frequencies
    are those of Hugging Face's transformers, in the same float32 arithmetic, but for the last bit of their power of
    theta, which is rounded correctly here; cosines and sines are correctly rounded, too. Where config says "yarn", they
    are multiplied by its attention factor. What a model multiplies its scores by (DeepSeek's mscale) is not in them.

    Args:
        config: A dict such as `config.json` holds, or an object such as a `PretrainedConfig`; of a model of several
            parts, its text_config. Read are rope_theta (10000 where there is none) and rope_parameters, or rope_scaling
            as before transformers 5; rope_type may be "default", "linear", "llama3", "yarn", and "mrope", which is
            "default". Then head_dim, or hidden_size and num_attention_heads, and partial_rotary_factor; or, of models
            with MLA, qk_rope_head_dim.
        max_position: Rows: positions from 0 on. None means config's max_position_embeddings.
        layer_type: Which of config's rope_parameters, where there are several: "full_attention", "sliding_attention".
        dtype: float32, or float16 or bfloat16, which the query is then to have, too.

    Returns:
        `[max_position, rotary_dim]`, where rotary_dim is how many elements of a head are rotated.

    Raises:
        ValueError: config lacks something, or something in it is unknown or out of range.
        TypeError: something in config, or an argument, is of another type.

    Example:
        >>> config = {"head_dim": 4, "rope_theta": 100.0, "max_position_embeddings": 3}  # frequencies 1 and 0.1
        >>> cos_sin = jaxkv.rope_table(config)
        >>> cos_sin.shape
        (3, 4)
        >>> [round(x, 4) for x in cos_sin[2].tolist()]  # cos 2, cos 0.2, sin 2, sin 0.2
        [-0.4161, 0.9801, 0.9093, 0.1987]
    """
    kvcore.rope_table.check_table_dtype(dtype_name(dtype))
    return jnp.asarray(kvcore.rope_table.rope_table(config, max_position, layer_type), dtype)
