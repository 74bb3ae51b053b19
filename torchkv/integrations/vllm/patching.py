"""`patch`: an imported vLLM that calls torchkv's functions."""

import functools
import importlib
import inspect
import sys
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from torchkv.integrations.vllm.arguments import UnsupportedError
from torchkv.integrations.vllm.attention import merge_attn_states, unified_attention
from torchkv.integrations.vllm.write import (
    concat_and_cache_mla,
    reshape_and_cache_flash,
    triton_reshape_and_cache_flash,
    triton_reshape_and_cache_flash_diffkv,
    triton_reshape_and_cache_flash_per_token_head_quant,
)

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
    """Puts torchkv's functions in the place of vLLM's, in all of vLLM's modules that are imported.

    Where a call has an argument that torchkv lacks, vLLM's own function is called, so nothing is ignored. So it is for
    attention over an fp8 cache on CUDA, where vLLM's layers quantise queries to fp8. What vLLM calls by other ways,
    such as `torch.ops._C_cache_ops`, stays as it is.

    Returns:
        What undoes it, also in modules that vLLM imported since: `close()`, or the end of a `with`.

    Raises:
        ImportError: there is no vLLM, or one without these modules.
        RuntimeError: a function has other parameters than in vLLM 0.33. Nothing is patched then.
    """
    replacements = []
    for home, functions in _HOMES.items():
        module = importlib.import_module(home)
        for ours in functions:
            theirs = getattr(module, ours.__name__)
            _check_parameters(f"{home}.{ours.__name__}", theirs, ours)
            if not hasattr(theirs, "_torchkv"):  # else an earlier call has patched it
                replacements.append((theirs, _or_theirs(ours, theirs)))
    undo = ExitStack()
    for theirs, patched in replacements:
        _replace(theirs, patched)
        undo.callback(_replace, patched, theirs)
    return undo


def _replace(old: Callable[..., Any], new: Callable[..., Any]) -> None:
    """Puts one function in the place of another, under all of its names in vLLM's modules."""
    modules = [m for name, m in list(sys.modules.items()) if m is not None and name.partition(".")[0] == "vllm"]
    for module in modules:
        for name in [n for n, member in vars(module).items() if member is old]:
            setattr(module, name, new)


def _check_parameters(name: str, theirs: Callable[..., Any], ours: Callable[..., None]) -> None:
    """Raises a RuntimeError unless vLLM's function has the parameters that torchkv's has."""
    got, known = list(inspect.signature(theirs).parameters), list(inspect.signature(ours).parameters)
    if got != known:
        raise RuntimeError(f"{name} must have the parameters of vLLM 0.33, {', '.join(known)}; got {', '.join(got)}")


def _or_theirs(ours: Callable[..., None], theirs: Callable[..., Any]) -> Callable[..., Any]:
    """A function that calls ours, or theirs where ours lacks something."""

    @functools.wraps(theirs)
    def patched(*args: Any, **kwargs: Any) -> Any:
        try:
            return ours(*args, **kwargs)
        except UnsupportedError:
            return theirs(*args, **kwargs)

    patched.__dict__["_torchkv"] = True
    return patched
