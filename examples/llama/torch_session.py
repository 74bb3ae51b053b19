"""One batch generated with torch: a CUDA graph for each step, or an eager loop where there is no such device."""

import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from kvcore.choices import Granularity, ScaledDtype
from torchkv import CacheLayout, PagedKVCache, kv_scales

from . import torch_model
from .gguf_model import LlamaModel
from .paging import Batch
from .session import Progress, Sampling, Scales, cache_arguments, piece_length


class TorchLlama:
    """A model on torch's CUDA device, or on the CPU.

    Args:
        model: The model.
        dtype: Of weights and activations: "float32", "bfloat16" or "float16".
    """

    framework = "torch"

    def __init__(self, model: LlamaModel, dtype: str = "float32"):
        self.model, self.dtype = model, dtype
        self.torch_device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.device = torch.cuda.get_device_name() if self.torch_device.type == "cuda" else "cpu"
        self.weights = torch_model.load_weights(model, getattr(torch, dtype), self.torch_device)

    @staticmethod
    def on_host() -> bool:
        """Whether it runs in the host's memory."""
        return not torch.cuda.is_available()

    def session(
        self,
        batch: Batch,
        layout: str | CacheLayout = "NHD",
        kv_cache_dtype: str = "auto",
        scales: Scales | None = None,
        sampling: Sampling | None = None,
    ) -> "TorchSession":
        """Allocates a cache for a batch, lets Triton compile what it needs, and captures the decode step.

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
        return TorchSession(self, batch, layout, kv_cache_dtype, scales, sampling)

    @torch.inference_mode()
    def calibrate(self, batch: Batch, kv_cache_dtype: ScaledDtype, granularity: Granularity) -> Scales:
        """Static scales for keys and values like those of a batch's prompts, one or one a head for each layer.

        The prompts run over a cache that is not quantised, and what that holds is the sample.
        """
        session = self.session(replace(batch, max_new_tokens=1))
        session.prefill()
        longest = int(batch.lengths.max())
        scales = []
        for layer in range(self.model.config.num_layers):
            key, value = session.cache.gather(session.tables, session.prompts, longest, layer=layer)
            key, value = (x.flatten(0, 1) for x in (key, value))  # with zeros past each prompt
            scales.append(kv_scales(key, value, kv_cache_dtype, granularity))
        k_scale, v_scale = (torch.stack(each).reshape(len(scales), -1) for each in zip(*scales, strict=True))
        return k_scale, v_scale


class TorchSession:
    """Implements `session.Session`."""

    @torch.inference_mode()
    def __init__(
        self,
        llama: TorchLlama,
        batch: Batch,
        layout: str | CacheLayout,
        kv_cache_dtype: str,
        scales: Scales | None,
        sampling: Sampling | None,
    ):
        self.config, self.weights, self.sampling = llama.model.config, llama.weights, sampling
        k_scale, v_scale = scales or (None, None)
        static, num_blocks = scales is not None, batch.num_blocks
        arguments = cache_arguments(self.config, num_blocks, llama.dtype, layout, kv_cache_dtype, static)
        self.cache = PagedKVCache.create(**arguments, k_scale=k_scale, v_scale=v_scale, device=llama.torch_device)
        self.batch, self.spec = batch, self.cache.spec

        def put(array: np.ndarray) -> Tensor:
            return torch.from_numpy(array).to(llama.torch_device)

        self.cos_sin = put(llama.model.rope_table(batch.context))
        self.tables, self.prompts = put(batch.block_tables), put(batch.lengths).long()
        self.tokens, self.lengths = put(batch.tokens.copy()), self.prompts.clone()
        self.finished = torch.zeros_like(self.prompts, dtype=torch.bool)
        self.stops = torch.tensor(self.config.stop_ids, device=llama.torch_device)
        self.piece = piece_length(batch)
        self.made = 1
        started = time.perf_counter()
        self._take_step = self._warm_up()
        self.compile_seconds = time.perf_counter() - started

    @torch.inference_mode()
    def prefill(self) -> Progress:
        for start in range(0, int(self.batch.lengths.max()), self.piece):
            self._prefill(start, self.prompts)
        return self._progress()

    @torch.inference_mode()
    def decode(self, until: int) -> Progress:
        while self.made < until and not bool(self.finished.all()):
            self._take_step()
            self.made += 1
        return self._progress()

    def _warm_up(self) -> Callable[[], None]:
        """Runs both shapes once with nothing to write and nothing to append. Returns how to take a step."""
        self.finished.fill_(True)
        self._prefill(0, torch.zeros_like(self.prompts))
        step = capture(self._step) if self.tokens.is_cuda else self._step
        step()
        self.finished.fill_(False)
        return step

    def _prefill(self, start: int, prompts: Tensor) -> None:
        """Runs one piece of the prompts, and appends the first new token where a prompt ends in it."""
        tokens = self.tokens[:, start : start + self.piece]
        count = tokens.shape[1]
        positions = torch.arange(start, start + count, device=tokens.device).expand(len(prompts), -1)
        x = self._forward(tokens, positions, positions < prompts[:, None])
        last = prompts - 1 - start  # where in this piece the prompt ends, if it does
        x = x[torch.arange(len(prompts), device=x.device), last.clamp(0, count - 1)]
        self._append(x, (last >= 0) & (last < count))

    def _step(self) -> None:
        """One token for each sequence that is not finished. All that changes from step to step is on the device."""
        active = ~self.finished
        positions = (self.lengths - 1)[:, None]
        tokens = self.tokens.gather(1, positions)
        x = self._forward(tokens, positions, active[:, None])
        self._append(x[:, 0], active)

    def _forward(self, tokens: Tensor, positions: Tensor, written: Tensor) -> Tensor:
        return torch_model.forward(
            self.config, self.weights, self.cos_sin, self.cache, tokens, positions, written, self.tables
        )

    def _append(self, x: Tensor, active: Tensor) -> None:
        """Adds the next token to each sequence that is active [B]."""
        new = torch_model.next_tokens(self.config, self.weights, x, self.lengths, self.sampling)
        # A sequence that is not active rewrites its last token.
        columns = (self.lengths - (~active).long())[:, None]
        kept = torch.where(active[:, None], new[:, None].int(), self.tokens.gather(1, columns))
        self.tokens.scatter_(1, columns, kept)
        self.lengths += active
        self.finished |= active & (new[:, None] == self.stops).any(dim=1)

    def _progress(self) -> Progress:
        return Progress(self.tokens.cpu().numpy(), self.lengths.cpu().numpy(), bool(self.finished.all()))


def capture(step: Callable[[], None]) -> Callable[[], None]:
    """A CUDA graph of a step. The step runs once before: then Triton compiles, and cuBLAS takes its workspace."""
    stream = torch.cuda.Stream()  # another than the default one, as torch asks
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay
