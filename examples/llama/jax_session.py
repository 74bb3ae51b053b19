"""One batch generated with JAX: compiles the two programs, holds the state, runs them."""

import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.stages import Compiled

from . import jax_cache, jax_model
from .cache import CacheSpec
from .gguf_model import LlamaModel
from .paging import Batch
from .session import Progress, piece_length


class JaxLlama:
    """A model on JAX's default device, and the programs compiled for it so far.

    Args:
        model: The model.
        dtype: Of weights and activations: "float32", "bfloat16" or "float16".
    """

    framework = "jax"

    def __init__(self, model: LlamaModel, dtype: str = "float32"):
        self.model, self.dtype = model, dtype
        self.weights = jax_model.load_weights(model, dtype)
        self.device = str(jax.devices()[0].device_kind)
        self._programs: dict[tuple[Any, ...], Compiled] = {}

    def session(self, batch: Batch, spec: CacheSpec) -> "JaxSession":
        """Allocates a cache for a batch and compiles what is not compiled yet for such shapes."""
        return JaxSession(self, batch, spec)

    def program(self, function: Any, spec: CacheSpec, *arguments: Any) -> Compiled:
        """The program of `function(config, spec, *arguments)`, in which the argument `state` is donated."""
        shapes = tuple((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(arguments))
        key = (function, spec, shapes)
        if key not in self._programs:
            jitted = jax.jit(partial(function, self.model.config, spec), donate_argnames="state")
            # float32 means float32: a GPU would round factors to TF32 otherwise.
            with jax.default_matmul_precision("highest" if self.dtype == "float32" else "default"):
                self._programs[key] = jitted.lower(*arguments).compile()
        return self._programs[key]


class JaxSession:
    """Implements `session.Session`."""

    def __init__(self, llama: JaxLlama, batch: Batch, spec: CacheSpec):
        self.batch, self.spec = batch, spec
        self.weights = llama.weights | {"rotations": jax.device_put(llama.model.rotations(batch.context))}
        self.tables = jnp.asarray(batch.block_tables)
        self.prompts = jnp.asarray(batch.lengths)
        self.state = jax_model.State(
            tokens=jnp.asarray(batch.tokens),
            lengths=jnp.asarray(batch.lengths),
            finished=jnp.zeros(len(batch.lengths), bool),
            step=jnp.int32(1),
            cache=jax_cache.new_cache(spec),
        )
        self.piece = piece_length(batch)
        started = time.perf_counter()
        self.prefill_program = llama.program(jax_model.prefill, spec, *self._prefill_arguments(0))
        self.decode_program = llama.program(jax_model.decode, spec, *self._decode_arguments(1))
        self._warm_up()
        self.compile_seconds = time.perf_counter() - started

    def prefill(self) -> Progress:
        for start in range(0, int(self.batch.lengths.max()), self.piece):
            self.state = self.prefill_program(*self._prefill_arguments(start))
        return self._progress()

    def decode(self, until: int) -> Progress:
        self.state = self.decode_program(*self._decode_arguments(until))
        return self._progress()

    def _warm_up(self) -> None:
        """Runs both programs once with nothing to write or append: prompts of length 0, no step."""
        prompts, self.prompts = self.prompts, jnp.zeros_like(self.prompts)
        self.state = self.prefill_program(*self._prefill_arguments(0))
        self.prompts = prompts
        self.decode(0)

    def _prefill_arguments(self, start: int) -> tuple[Any, ...]:
        piece = np.zeros((len(self.batch.lengths), self.piece), np.int32)
        part = self.batch.tokens[:, start : start + self.piece]
        piece[:, : part.shape[1]] = part
        return self.weights, self.tables, self.prompts, self.state, piece, np.int32(start)

    def _decode_arguments(self, until: int) -> tuple[Any, ...]:
        return self.weights, self.tables, self.state, np.int32(until)

    def _progress(self) -> Progress:
        tokens, lengths, finished = jax.device_get((self.state.tokens, self.state.lengths, self.state.finished))
        return Progress(tokens, lengths, bool(finished.all()))
