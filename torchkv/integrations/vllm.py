"""vLLM's cache and attention functions with vLLM 0.33's names, parameters, order and defaults, on torchkv's kernels.

    from torchkv.integrations import vllm
    with vllm.patch():  # or undo = vllm.patch(); …; undo.close()
        ...             # an imported vLLM calls them

What an argument asks for and torchkv lacks is an `UnsupportedError`, before anything is written; a patched vLLM calls
its own function then.
"""

import functools
import importlib
import inspect
import sys
from collections.abc import Callable
from contextlib import ExitStack
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from kvcore.contract.checks import either
from kvcore.formats import FLOATS, KV_CACHE_DTYPES
from torchkv import read as read_ops
from torchkv import write as ops
from torchkv._call import dtype_name
from torchkv.write import VLLM_FORMATS

__all__ = [
    "UnsupportedError",
    "concat_and_cache_mla",
    "merge_attn_states",
    "patch",
    "reshape_and_cache_flash",
    "triton_reshape_and_cache_flash",
    "triton_reshape_and_cache_flash_diffkv",
    "triton_reshape_and_cache_flash_per_token_head_quant",
    "unified_attention",
]

NONE, FP8_PER_TENSOR, INT8_PER_TOKEN_HEAD, FP8_PER_TOKEN_HEAD, INT4_PER_TOKEN_HEAD = range(5)
"""vLLM's KVQuantMode, an IntEnum, as far as it is used here."""


class UnsupportedError(ValueError):
    """An argument that vLLM's function has a use for and torchkv's has not."""


# ---- writing


def reshape_and_cache_flash(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    kv_cache_dtype: str,
    k_scale: Tensor,
    v_scale: Tensor,
) -> None:
    """`vllm._custom_ops.reshape_and_cache_flash`: `torchkv.reshape_and_cache_flash` with vLLM's names of formats.

    Raises:
        UnsupportedError: kv_cache_dtype is a format that torchkv lacks, or tensors are on another device than a CPU,
            CUDA or ROCm.
        ValueError: a shape or device does not fit.
        TypeError: a dtype does not fit.
    """
    name = _format(kv_cache_dtype, key_cache)
    ops.reshape_and_cache_flash(key, value, key_cache, value_cache, slot_mapping, name, k_scale, v_scale)


def triton_reshape_and_cache_flash(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    kv_cache_dtype: str,
    k_scale: Tensor,
    v_scale: Tensor,
    interleaved_v_pack_factor: int = 0,
) -> None:
    """The function of this name in vLLM, as `reshape_and_cache_flash`.

    Args:
        key: `[num_tokens, num_heads, head_size]`.
        value: `[num_tokens, num_heads, head_size_v]`.
        key_cache: `[num_blocks, block_size, num_heads, head_size]` in any order of memory, or head-major,
            `[num_blocks, num_heads, head_size / x, block_size, x]`.
        value_cache: Likewise, head-major `[num_blocks, num_heads, head_size, block_size]`.
        slot_mapping: `[n]` of int32 or int64, n ≤ num_tokens.
        kv_cache_dtype: A format's name, vLLM's or this package's. Where it is one of fp8, the caches' dtype says which,
            and a cache of uint8 holds e4m3, so that "fp8_e5m2" does not go with it.
        k_scale: float32 of one element, or `[num_heads]`.
        v_scale: Likewise.
        interleaved_v_pack_factor: 0; other value caches are vLLM's alone.

    Raises:
        UnsupportedError: as above, or interleaved_v_pack_factor is not 0.
        ValueError: a shape or device does not fit.
        TypeError: a dtype does not fit.
    """
    if interleaved_v_pack_factor:
        raise UnsupportedError(f"interleaved_v_pack_factor must be 0, got {interleaved_v_pack_factor}")
    name = _format_of_triton(kv_cache_dtype, key_cache)
    ops.reshape_and_cache_flash(key, value, key_cache, value_cache, slot_mapping, name, k_scale, v_scale)


def triton_reshape_and_cache_flash_diffkv(
    key: Tensor,
    value: Tensor,
    kv_cache: Tensor,
    slot_mapping: Tensor,
    kv_cache_dtype: str,
    k_scale: Tensor,
    v_scale: Tensor,
) -> None:
    """The function of this name in vLLM: as `triton_reshape_and_cache_flash`, into one tensor.

    Args:
        key: `[num_tokens, num_heads, head_size]`.
        value: `[num_tokens, num_heads, head_size_v]`.
        kv_cache: `[num_blocks, block_size, num_heads, head_size + head_size_v]`, in any order of memory.
        slot_mapping: `[n]` of int32 or int64, n ≤ num_tokens.
        kv_cache_dtype: As there.
        k_scale: float32 of one element, or `[num_heads]`.
        v_scale: Likewise.

    Raises:
        UnsupportedError: as `reshape_and_cache_flash`.
        ValueError: a shape or device does not fit.
        TypeError: a dtype does not fit.
    """
    name = _format_of_triton(kv_cache_dtype, kv_cache)
    ops.reshape_and_cache_flash_diffkv(key, value, kv_cache, slot_mapping, name, k_scale, v_scale)


def triton_reshape_and_cache_flash_per_token_head_quant(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    k_scale_cache: Tensor,
    v_scale_cache: Tensor,
    slot_mapping: Tensor,
    kv_quant_mode: Any,
) -> None:
    """The function of this name in vLLM: a scale for each token's head, into caches of int8 or fp8.

    vLLM reads what this writes, and torchkv what vLLM writes. The bytes are not the same: vLLM multiplies by the
    reciprocal of `max(absmax / m, 1e-6)` and rounds int8 halves away from zero; here elements are divided by
    `absmax / m`, rounded to nearest even.

    Args:
        key: `[num_tokens, num_heads, head_size]`.
        value: `[num_tokens, num_heads, head_size_v]`.
        key_cache: `[num_blocks, block_size, num_heads, head_size]`, or with padding after each head's elements, which
            is left as it is.
        value_cache: Likewise.
        k_scale_cache: `[num_blocks, block_size, num_heads]` of float32; it may lie in key_cache's padding.
        v_scale_cache: Likewise.
        slot_mapping: `[n]` of int32 or int64, n ≤ num_tokens.
        kv_quant_mode: vLLM's enum (INT8_PER_TOKEN_HEAD or FP8_PER_TOKEN_HEAD), its number, or the name of a format
            (`int8_per_token_head`); None: as key_cache's dtype says.

    Raises:
        UnsupportedError: kv_quant_mode is another, such as int4, or tensors are on another device.
        ValueError: a shape or device does not fit.
        TypeError: a dtype does not fit.
    """
    ops.reshape_and_cache_flash_per_token_head_quant(
        key,
        value,
        key_cache[..., : key.shape[-1]],
        value_cache[..., : value.shape[-1]],
        k_scale_cache,
        v_scale_cache,
        slot_mapping,
        _per_token_head(kv_quant_mode, key_cache),
    )


def concat_and_cache_mla(
    kv_c: Tensor,
    k_pe: Tensor,
    kv_cache: Tensor,
    slot_mapping: Tensor,
    kv_cache_dtype: str,
    scale: Tensor,
    skip_scale: bool = False,
) -> None:
    """`vllm._custom_ops.concat_and_cache_mla`: `torchkv.concat_and_cache_mla` with vLLM's names of formats.

    Args:
        kv_c: `[num_tokens, kv_lora_rank]`.
        k_pe: `[num_tokens, qk_rope_head_dim]`; without columns for rows without a rotary part.
        kv_cache: `[num_blocks, block_size, kv_lora_rank + qk_rope_head_dim]`, or rows of 656 bytes for "fp8_ds_mla".
        slot_mapping: `[n]` of int32 or int64, n ≤ num_tokens.
        kv_cache_dtype: A format's name, vLLM's or this package's.
        scale: float32 of one element; not read with "fp8_ds_mla".
        skip_scale: Whether scale is not read, and counts as 1.

    Raises:
        UnsupportedError: as `reshape_and_cache_flash`.
        ValueError: a shape or device does not fit.
        TypeError: a dtype does not fit.
    """
    name = _format(kv_cache_dtype, kv_cache)
    ops.concat_and_cache_mla(kv_c, k_pe, kv_cache, slot_mapping, name, scale, skip_scale)


# ---- reading


def unified_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    cu_seqlens_q: Tensor,
    max_seqlen_q: int,
    seqused_k: Tensor,
    max_seqlen_k: int,
    softmax_scale: float,
    causal: Any,
    window_size: tuple[int, int] | None,
    block_table: Tensor,
    softcap: float | None,
    q_descale: Tensor | None,
    k_descale: Tensor | None,
    v_descale: Tensor | None,
    seq_threshold_3D: Any = None,  # noqa: N803
    num_par_softmax_segments: Any = None,
    softmax_segm_output: Any = None,
    softmax_segm_max: Any = None,
    softmax_segm_expsum: Any = None,
    alibi_slopes: Tensor | None = None,
    output_scale: Tensor | None = None,
    qq_bias: Tensor | None = None,
    sinks: Tensor | None = None,
    mm_prefix_range: Tensor | None = None,
    rswa_prefix_lens: Tensor | None = None,
    rswa_window: int | None = None,
    use_alibi_sqrt: bool = False,
    kv_quant_mode: Any = NONE,
    k_scale_cache: Tensor | None = None,
    v_scale_cache: Tensor | None = None,
    chunk_lookback: int = -1,
    use_td: bool = False,
    mm_prefix_clamp_sliding_window: bool = False,
) -> None:
    """The function of this name in vLLM (`triton_unified_attention`): `torchkv.paged_attention` into `out`.

    Arguments that say how vLLM's kernel is to be launched have no effect: max_seqlen_q, max_seqlen_k, seq_threshold_3D,
    num_par_softmax_segments, softmax_segm_output, softmax_segm_max, softmax_segm_expsum and use_td. Rows of out after
    the last sequence's become zeros.

    Args:
        q: `[num_tokens, num_q_heads, head_size]`, not quantised.
        k: `[num_blocks, block_size, num_heads, head_size]`, in any order of memory; with the scales of tokens and heads
            also with padding after each head's elements.
        v: Likewise.
        out: `[num_tokens, num_q_heads, head_size]`, not quantised, written to.
        cu_seqlens_q: `[num_seqs + 1]`: where each sequence's rows of q begin.
        max_seqlen_q: Not used.
        seqused_k: `[num_seqs]`: tokens of each sequence in the cache.
        max_seqlen_k: Not used.
        softmax_scale: What logits are multiplied by.
        causal: True or False.
        window_size: `(left, 0)`: a query sees left positions before its own; `(-1, -1)` or None: all.
        block_table: `[num_seqs, max_blocks]`.
        softcap: 0 for none.
        q_descale: None.
        k_descale: With the mode FP8_PER_TENSOR, by which keys are multiplied: float32 of one element, `[num_heads]`, or
            a row of either, expanded to `[num_seqs, num_heads]`. Without a mode not read, as in vLLM.
        v_descale: Likewise, for values.
        seq_threshold_3D: Not used.
        num_par_softmax_segments: Not used.
        softmax_segm_output: Not used.
        softmax_segm_max: Not used.
        softmax_segm_expsum: Not used.
        alibi_slopes: None.
        output_scale: None.
        qq_bias: None.
        sinks: `[num_q_heads]`, or None.
        mm_prefix_range: None.
        rswa_prefix_lens: None, or rswa_window is.
        rswa_window: None, or rswa_prefix_lens is.
        use_alibi_sqrt: Has no effect without alibi_slopes.
        kv_quant_mode: NONE, FP8_PER_TENSOR, INT8_PER_TOKEN_HEAD or FP8_PER_TOKEN_HEAD of vLLM's enum, its number, or,
            for the latter two, the format's name (`int8_per_token_head`).
        k_scale_cache: Needed with the latter two, `[num_blocks, block_size, num_heads]` of float32.
        v_scale_cache: Likewise.
        chunk_lookback: Below 0 where there is a window.
        use_td: Not used.
        mm_prefix_clamp_sliding_window: Has no effect without mm_prefix_range.

    Raises:
        UnsupportedError: an argument is another than described here.
        ValueError: a shape or device does not fit.
        TypeError: a dtype does not fit.
    """
    _check_device(k)
    _check_floats(q=q, out=out)
    absent = {
        "q_descale": q_descale, "alibi_slopes": alibi_slopes, "output_scale": output_scale, "qq_bias": qq_bias,
        "mm_prefix_range": mm_prefix_range,
    }  # fmt: skip
    for name, argument in absent.items():
        if argument is not None:
            raise UnsupportedError(f"{name} must be None, got {_say(argument)}")
    if rswa_window is not None and rswa_prefix_lens is not None:
        raise UnsupportedError(f"rswa_window must be None where rswa_prefix_lens is given, got {rswa_window}")
    if isinstance(causal, Tensor):
        raise UnsupportedError(f"causal must be True or False, got {_say(causal)}")
    causal, window = bool(causal), _window(window_size)
    if window is not None and (not causal or chunk_lookback > -1):
        wanted = "causal must be True" if not causal else "chunk_lookback must be -1"
        raise UnsupportedError(f"{wanted} with a window, got {chunk_lookback if causal else causal}")

    mode = _mode(kv_quant_mode)
    kv_cache_dtype, k_scale, v_scale = "auto", None, None
    if mode == FP8_PER_TENSOR:
        kv_cache_dtype = _fp8(k)
        k_scale, v_scale = _one_row("k_descale", k_descale), _one_row("v_descale", v_descale)
    elif mode != NONE:
        kv_cache_dtype, k_scale, v_scale = _per_token_head(mode, k), k_scale_cache, v_scale_cache
        for name, scale_cache in (("k_scale_cache", k_scale), ("v_scale_cache", v_scale)):
            if scale_cache is None:
                raise ValueError(f"{name} must be given with the scales of tokens and heads, got None")
        k, v = k[..., : q.shape[-1]], v[..., : out.shape[-1]]
    if block_table.shape[0] > seqused_k.shape[0]:
        block_table = block_table[: seqused_k.shape[0]]
    direct = out.dtype == q.dtype and out.is_contiguous()
    result = read_ops.paged_attention(
        q,
        (k, v),
        block_table,
        seqused_k,
        query_start_loc=cu_seqlens_q,
        scale=softmax_scale,
        causal=causal,
        sliding_window=window,
        soft_cap=softcap,
        sinks=sinks,
        kv_cache_dtype=kv_cache_dtype,  # type: ignore[arg-type]
        k_scale=k_scale,
        v_scale=v_scale,
        out=out if direct else None,
    )
    if not direct:
        assert isinstance(result, Tensor)
        out.copy_(result)


def merge_attn_states(
    output: Tensor,
    prefix_output: Tensor,
    prefix_lse: Tensor,
    suffix_output: Tensor,
    suffix_lse: Tensor,
    output_lse: Tensor | None = None,
    prefill_tokens_with_context: int | None = None,
    output_scale: Tensor | None = None,
) -> None:
    """The function of this name in vLLM: `torchkv.merge_attention` of two parts, into `output`.

    Args:
        output: `[num_tokens, num_q_heads, head_size]`, written to; it may be prefix_output or suffix_output.
        prefix_output: As output.
        prefix_lse: `[num_q_heads, num_tokens]` of float32.
        suffix_output: As output.
        suffix_lse: As prefix_lse.
        output_lse: As prefix_lse, written to; or None.
        prefill_tokens_with_context: How many tokens have a prefix; those after them are copied from the suffix. None:
            all.
        output_scale: None.

    Raises:
        UnsupportedError: output_scale is given, or tensors are quantised or on another device.
        ValueError: a shape or device does not fit.
        TypeError: a dtype does not fit.
    """
    _check_device(output)
    _check_floats(output=output, prefix_output=prefix_output, suffix_output=suffix_output)
    if output_scale is not None:
        raise UnsupportedError(f"output_scale must be None, got {_say(output_scale)}")
    n = prefill_tokens_with_context
    if n is not None and n < output.shape[0]:
        output[n:] = suffix_output[n:]
        if output_lse is not None:
            output_lse[:, n:] = suffix_lse[:, n:]
            output_lse = output_lse[:, :n]
        output, prefix_output, suffix_output = output[:n], prefix_output[:n], suffix_output[:n]
        prefix_lse, suffix_lse = prefix_lse[:, :n], suffix_lse[:, :n]
    lse = None if output_lse is None else output_lse.T
    outs, lses = torch.stack((prefix_output, suffix_output)), torch.stack((prefix_lse.T, suffix_lse.T))
    direct = output.dtype == outs.dtype
    result, _ = read_ops.merge_attention(outs, lses, out=output if direct else None, lse=lse)
    if not direct:
        output.copy_(result)


# ---- a patched vLLM

_HOMES = {
    "vllm._custom_ops": (reshape_and_cache_flash, concat_and_cache_mla),
    "vllm.v1.attention.ops.triton_reshape_and_cache_flash": (
        triton_reshape_and_cache_flash,
        triton_reshape_and_cache_flash_diffkv,
        triton_reshape_and_cache_flash_per_token_head_quant,
    ),
    "vllm.v1.attention.ops.triton_unified_attention": (unified_attention,),
    "vllm.v1.attention.ops.merge_attn_states": (merge_attn_states,),
}
"""Where vLLM defines its functions."""


def patch() -> ExitStack:
    """Puts this module's functions in the place of vLLM's, in all of vLLM's modules that are imported.

    Where a call has an argument that torchkv lacks, vLLM's own function is called, so nothing is ignored. So it is for
    attention over an fp8 cache on CUDA, where vLLM's layers quantise queries to fp8. What vLLM calls by other ways,
    such as `torch.ops._C_cache_ops`, stays as it is.

    Returns:
        What undoes it, also in modules that vLLM imported since: `close()`, or the end of a `with`.

    Raises:
        ImportError: there is no vLLM, or one without these modules.
        RuntimeError: a function has other parameters than in vLLM 0.33. Nothing is patched then.
    """
    found = []
    for home, functions in _HOMES.items():
        module = importlib.import_module(home)
        for ours in functions:
            theirs = getattr(module, ours.__name__)
            given, known = list(inspect.signature(theirs).parameters), list(inspect.signature(ours).parameters)
            if given != known:
                raise RuntimeError(
                    f"{home}.{ours.__name__} must have the parameters of vLLM 0.33, {', '.join(known)}; "
                    f"got {', '.join(given)}"
                )
            if not hasattr(theirs, "_torchkv"):  # patched before
                found.append((theirs, _or_theirs(ours, theirs)))
    undo = ExitStack()
    for theirs, patched in found:
        _replace(theirs, patched)
        undo.callback(_replace, patched, theirs)
    return undo


def _replace(old: Callable[..., Any], new: Callable[..., Any]) -> None:
    """Puts one function in the place of another, under all of its names in vLLM's modules."""
    for module in [m for name, m in list(sys.modules.items()) if m is not None and name.partition(".")[0] == "vllm"]:
        for name in [n for n, member in vars(module).items() if member is old]:
            setattr(module, name, new)


def _or_theirs(ours: Callable[..., None], theirs: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(theirs)
    def patched(*args: Any, **kwargs: Any) -> Any:
        try:
            return ours(*args, **kwargs)
        except UnsupportedError:
            return theirs(*args, **kwargs)

    patched.__dict__["_torchkv"] = True
    return patched


# ---- arguments


_FP8 = {
    torch.float8_e4m3fn: "fp8_e4m3",
    torch.float8_e5m2: "fp8_e5m2",
    torch.float8_e4m3fnuz: "fp8_e4m3fnuz",
    torch.float8_e5m2fnuz: "fp8_e5m2fnuz",
}


def _format(kv_cache_dtype: str, cache: Tensor) -> Any:
    """The name here of a format; `ops` understand vLLM's."""
    _check_device(cache)
    if kv_cache_dtype in ("fp8", "fp8_e4m3", "fp8_inc"):
        name = _fp8(cache)
        return name if "e4m3" in name else "fp8_e4m3"
    if kv_cache_dtype not in KV_CACHE_DTYPES and kv_cache_dtype not in VLLM_FORMATS:
        raise UnsupportedError(f"kv_cache_dtype must be a format of torchkv, got {kv_cache_dtype!r}")
    return kv_cache_dtype


def _format_of_triton(kv_cache_dtype: str, cache: Tensor) -> Any:
    """Likewise, for vLLM's Triton kernels, which store what the cache's dtype says, and in uint8 e4m3."""
    if kv_cache_dtype.startswith("fp8") and cache.dtype in _FP8:
        _check_device(cache)
        return _FP8[cache.dtype]
    if kv_cache_dtype == "fp8_e5m2":
        raise UnsupportedError(
            "kv_cache_dtype must not be 'fp8_e5m2' for caches of uint8, where vLLM's kernel stores e4m3; "
            f"got a cache of {dtype_name(cache)}"
        )
    return _format(kv_cache_dtype, cache)


def _fp8(cache: Tensor) -> str:
    """The format of an fp8 cache: that of its dtype, or for bytes vLLM's "fp8", which depends on the platform."""
    return _FP8.get(cache.dtype) or ("fp8_e4m3fnuz" if _has_fnuz(cache.device) else "fp8_e4m3")


@functools.cache
def _has_fnuz(device: torch.device) -> bool:
    """Whether it is an AMD MI300, whose fp8 has one zero."""
    if torch.version.hip is None or device.type != "cuda":
        return False
    return "gfx94" in torch.cuda.get_device_properties(device).gcnArchName


def _per_token_head(kv_quant_mode: Any, cache: Tensor) -> Any:
    _check_device(cache)
    kv_quant_mode = _mode(kv_quant_mode)
    if kv_quant_mode is None:
        kv_quant_mode = INT8_PER_TOKEN_HEAD if cache.dtype == torch.int8 else FP8_PER_TOKEN_HEAD
    if kv_quant_mode == INT8_PER_TOKEN_HEAD:
        return "int8"
    if kv_quant_mode == FP8_PER_TOKEN_HEAD:
        return _fp8(cache)
    said = kv_quant_mode.name if isinstance(kv_quant_mode, Enum) else kv_quant_mode
    why = ""
    if kv_quant_mode in (INT4_PER_TOKEN_HEAD, "int4_per_token_head"):
        why = ": vLLM's int4 is rotated and has zero points, which torchkv's has not"
    raise UnsupportedError(f"kv_quant_mode must be INT8_PER_TOKEN_HEAD or FP8_PER_TOKEN_HEAD, got {said}{why}")


def _mode(kv_quant_mode: Any) -> Any:
    """The mode of a format's name; others stay as they are."""
    if isinstance(kv_quant_mode, str):
        known = {"int8_per_token_head": INT8_PER_TOKEN_HEAD, "fp8_per_token_head": FP8_PER_TOKEN_HEAD}
        return known.get(kv_quant_mode, kv_quant_mode)
    return kv_quant_mode


def _window(window_size: tuple[int, int] | None) -> int | None:
    """How many positions a query sees, its own among them."""
    if window_size is None or tuple(window_size) == (-1, -1):
        return None
    left, right = window_size
    if left < 0 or right != 0:
        raise UnsupportedError(f"window_size must be (left, 0) or (-1, -1), got {tuple(window_size)}")
    return left + 1


def _one_row(name: str, scale: Tensor | None) -> Tensor | None:
    """A scale for all sequences: one element, or one a head."""
    if scale is None or scale.dim() < 2:
        return scale
    if scale.shape[0] > 1 and scale.stride(0) != 0:
        raise UnsupportedError(f"{name} must be one row, expanded to all sequences, got strides {scale.stride()}")
    if 0 in scale.shape:
        return None
    return scale[0, 0] if scale.stride(1) == 0 else scale[0]


def _check_device(tensor: Tensor) -> None:
    if tensor.device.type not in ("cpu", "cuda"):
        raise UnsupportedError(f"tensors must be on a CPU, CUDA or ROCm device, got {tensor.device}")


def _check_floats(**tensors: Tensor) -> None:
    """Not quantised: on CUDA, vLLM hands over queries in fp8 where the cache is fp8."""
    for name, tensor in tensors.items():
        if dtype_name(tensor) not in FLOATS:
            raise UnsupportedError(f"{name} must have dtype {either(FLOATS)}, got {dtype_name(tensor)}")


def _say(argument: Any) -> str:
    return f"a tensor of shape {tuple(argument.shape)}" if isinstance(argument, Tensor) else repr(argument)
