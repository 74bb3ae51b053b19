"""The attention benchmarks' inputs in JAX, and calls on them."""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks import peers
from benchmarks.attention_inputs import Inputs
from benchmarks.timing import JAX_REPEATS, Timer, jax_timer, median

SECONDS = 150e-3
"""How long a loop takes, beside which the host's half a millisecond does not show."""


class JaxInputs:
    """The same arrays in JAX, without a copy."""

    def __init__(self, inputs: Inputs) -> None:
        import jax.numpy as jnp

        def convert(tensor: torch.Tensor | None) -> Any:
            return None if tensor is None else jnp.from_dlpack(tensor)

        if inputs.device == "cuda":
            torch.cuda.synchronize()
        self.inputs = inputs
        self.caches = [convert(c) for c in inputs.caches]
        self.tables = [convert(t) for t in inputs.tables]
        self.query, self.seq_lens = convert(inputs.queries[0]), convert(inputs.seq_lens)
        self.more = {"query_start_loc": convert(inputs.query_starts)}
        self.more |= dict(zip(("k_scale", "v_scale"), map(convert, inputs.scales), strict=True))

    def ours(self) -> Iterator[peers.JaxPeer]:
        """The op of jaxkv."""
        import jaxkv

        def attend(query: Any, tables: Any, seq_lens: Any, arrays: Any) -> Any:
            caches, more = arrays
            caches = caches[0] if self.inputs.layout.single_array else caches
            return jaxkv.paged_attention(query, caches, tables, seq_lens, **self.inputs.options, **more)

        yield "", attend, (self.caches, self.more)

    def results(self, settings: Iterator[peers.JaxPeer], estimate: float) -> dict[str, Any]:
        """Time and error of the best setting; `estimate` is about what a call takes, in seconds."""
        found: list[tuple[float, str, Callable[..., Any], Any]] = []
        failed = None
        for setting, attend, arrays in settings:
            try:
                timer = self.timer(attend, arrays, estimate, SECONDS)
                found.append((median(timer.measure, JAX_REPEATS), setting, attend, arrays))
            except Exception as error:
                failed = error
        if not found:
            raise failed or ValueError("no setting")
        seconds, setting, attend, arrays = min(found, key=lambda each: each[0])
        named = {"setting": setting} if setting else {}
        return {"us": seconds * 1e6, "error": self._check(attend, arrays)} | named

    def _check(self, attend: Callable[..., Any], arrays: Any) -> float:
        return self.inputs.error(self.run(attend, arrays)[0])

    def run(self, attend: Callable[..., Any], arrays: Any) -> tuple[torch.Tensor, str]:
        """The result of a call on the first set, in float32 on the host, and its program's text."""
        import jax
        import numpy as np

        given = (self.query, self.tables[0], self.seq_lens, arrays)
        program = jax.jit(attend).lower(*given).compile()
        out = np.array(program(*given).astype("float32"))
        return torch.from_numpy(out), program.as_text() or ""

    def timer(self, attend: Callable[..., Any], arrays: Any, estimate: float, seconds: float) -> Timer:
        """A loop in which each call's query is the result of the one before, so that none is left out or moved."""
        import jax.numpy as jnp

        gpu = self.inputs.device == "cuda"
        # A round of the loop starts a CUDA graph: what that takes must not show. And 32 calls take long to compile.
        sets = len(self.tables)
        again = max(1, min(32 // sets, round(3e-3 / estimate / sets))) if gpu else 1

        def step(carry: Any, arguments: Any) -> Any:
            query, seq_lens = carry
            tables, arrays = arguments
            for table in tables * again:
                out = attend(query, table, seq_lens, arrays)
                if out.shape == query.shape:
                    query = out
                else:  # never true, but who knows
                    seq_lens = seq_lens + jnp.isnan(out[0, 0, 0]).astype(seq_lens.dtype)
            return query, seq_lens

        carry = jnp.copy(self.query), jnp.copy(self.seq_lens)
        return jax_timer(step, carry, (self.tables, arrays), again * sets, estimate, seconds)
