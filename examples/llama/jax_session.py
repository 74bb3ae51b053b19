"""One batch generated with JAX: compiles the two programs, holds the state, runs them."""

import time
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.stages import Compiled

from jaxkv import CacheLayout, PagedKVCache, kv_scales
from kvcore.choices import Granularity, ScaledDtype

from . import jax_model
from .gguf_model import LlamaModel
from .jax_parts import Devices
from .paging import Batch
from .session import Progress, Sampling, Scales, cache_arguments, piece_length


class JaxLlama:
    """A model on JAX's default device or on several, and the programs compiled for it so far.

    Args:
        model: The model.
        dtype: Of weights and activations: "float32", "bfloat16" or "float16".
        tp: Devices that share heads, MLPs and vocabulary.

    Raises:
        InputError: there are fewer devices, or they cannot divide the model.
    """

    framework = "jax"

    def __init__(self, model: LlamaModel, dtype: str = "float32", tp: int = 1):
        self.model, self.dtype, self.devices = model, dtype, Devices(tp)
        self.config = self.devices.config(model.config)
        self.weights = jax_model.load_weights(model, dtype, self.devices)
        self.device = ("" if tp == 1 else f"{tp} × ") + str(jax.devices()[0].device_kind)
        self._programs: dict[tuple[Any, ...], Compiled] = {}

    @staticmethod
    def on_host() -> bool:
        """Whether it runs in the host's memory."""
        return jax.default_backend() == "cpu"

    def session(
        self,
        batch: Batch,
        layout: str | CacheLayout = "NHD",
        kv_cache_dtype: str = "auto",
        scales: Scales | None = None,
        sampling: Sampling | None = None,
    ) -> "JaxSession":
        """Allocates a cache for a batch and compiles what is not compiled yet for such shapes.

        Args:
            batch: Prompts and blocks.
            layout: Of the cache.
            kv_cache_dtype: What the cache holds.
            scales: Static scales of all layers' keys and values, from `calibrate`. None: each token's head has a scale
                of its own, where the cache is quantised.
            sampling: How tokens are drawn. None: each is the likeliest.

        Raises:
            InputError: the format does not fit the layout or the model's heads.
        """
        return JaxSession(self, batch, layout, kv_cache_dtype, scales, sampling)

    def calibrate(self, batch: Batch, kv_cache_dtype: ScaledDtype, granularity: Granularity) -> Scales:
        """Static scales for keys and values like those of a batch's prompts, one or one a head for each layer.

        The prompts run over a cache that is not quantised, and what that holds is the sample.
        """
        session = self.session(replace(batch, max_new_tokens=1))
        session.prefill()
        cache, longest = session.state.cache, int(batch.lengths.max())
        scales = []
        for layer in range(self.config.num_layers):
            key, value = cache.gather(session.tables, session.prompts, longest, layer=jnp.int32(layer))
            key, value = (x.reshape(-1, *x.shape[2:]) for x in (key, value))  # with zeros past each prompt
            scales.append(kv_scales(key, value, kv_cache_dtype, granularity))
        k_scale, v_scale = (jnp.stack(each).reshape(len(scales), -1) for each in zip(*scales, strict=True))
        return k_scale, v_scale

    def program(self, function: Any, *arguments: Any) -> Compiled:
        """The program of `function(config, *arguments)`, in which the argument `state` is donated."""
        leaves, tree = jax.tree.flatten(arguments)  # the cache's layout is part of the tree
        key = (function, tree, *((leaf.shape, leaf.dtype) for leaf in leaves))
        if key not in self._programs:
            state = arguments[-2 if function is jax_model.decode else -3]
            # It leaves a program as it came into it: the next one is compiled for that.
            kept = None if self.devices.mesh is None else jax.tree.map(lambda array: array.sharding, state)
            jitted = jax.jit(partial(function, self.config), donate_argnames="state", out_shardings=kept)
            # float32 means float32: a GPU would round factors to TF32 otherwise.
            with jax.default_matmul_precision("highest" if self.dtype == "float32" else "default"):
                self._programs[key] = jitted.lower(*arguments).compile()
        return self._programs[key]


class JaxSession:
    """Implements `session.Session`."""

    def __init__(
        self,
        llama: JaxLlama,
        batch: Batch,
        layout: str | CacheLayout,
        kv_cache_dtype: str,
        scales: Scales | None,
        sampling: Sampling | None,
    ):
        # Copies of the scales: the state is donated.
        k_scale, v_scale = (None, None) if scales is None else map(jnp.array, scales)
        static, num_blocks = scales is not None, batch.num_blocks
        arguments = cache_arguments(llama.config, num_blocks, llama.dtype, layout, kv_cache_dtype, static)
        create = partial(PagedKVCache.create, **arguments, k_scale=k_scale, v_scale=v_scale)
        cache, put = llama.devices.cache(create), llama.devices.put
        self.batch, self.spec = batch, cache.spec
        self.weights = llama.weights | {
            "cos_sin": put(jnp.asarray(llama.model.rope_table(batch.context))),
            "sampling": sampling and (np.float32(sampling.temperature), np.uint32(sampling.seed)),
        }
        self.tables = put(jnp.asarray(batch.block_tables))
        self.prompts = put(jnp.asarray(batch.lengths))
        self.state = jax_model.State(
            tokens=put(jnp.asarray(batch.tokens)),
            lengths=put(jnp.asarray(batch.lengths)),
            finished=put(jnp.zeros(len(batch.lengths), bool)),
            step=put(jnp.int32(1)),
            cache=cache,
        )
        self.piece = piece_length(batch)
        started = time.perf_counter()
        self.prefill_program = llama.program(jax_model.prefill, *self._prefill_arguments(0))
        if batch.max_new_tokens > 1:  # prefill makes the first
            self.decode_program = llama.program(jax_model.decode, *self._decode_arguments(1))
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
        if self.batch.max_new_tokens > 1:
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
