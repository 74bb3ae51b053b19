"""One batch generated with torch: an eager loop, on a CUDA device if there is one."""

import time

import numpy as np
import torch
from torch import Tensor

from . import torch_cache, torch_model
from .cache import CacheSpec
from .gguf_model import LlamaModel
from .paging import Batch
from .session import Progress, piece_length


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

    def session(self, batch: Batch, spec: CacheSpec) -> "TorchSession":
        """Allocates a cache for a batch, and lets Triton compile what it needs."""
        return TorchSession(self, batch, spec)


class TorchSession:
    """Implements `session.Session`."""

    @torch.inference_mode()
    def __init__(self, llama: TorchLlama, batch: Batch, spec: CacheSpec):
        self.batch, self.spec = batch, spec
        self.config, self.weights = llama.model.config, llama.weights

        def put(array: np.ndarray) -> Tensor:
            return torch.from_numpy(array).to(llama.torch_device)

        cosine, sine = llama.model.rotations(batch.context)
        self.rotations = put(cosine), put(sine)
        self.tables, self.prompts = put(batch.block_tables).long(), put(batch.lengths).long()
        self.tokens, self.lengths = put(batch.tokens.copy()), self.prompts.clone()
        self.finished = torch.zeros_like(self.prompts, dtype=torch.bool)
        self.stops = torch.tensor(self.config.stop_ids, device=llama.torch_device)
        self.cache = torch_cache.new_cache(spec, llama.torch_device)
        self.piece = piece_length(batch)
        self.made = 1
        started = time.perf_counter()
        self._warm_up()
        self.compile_seconds = time.perf_counter() - started

    @torch.inference_mode()
    def prefill(self) -> Progress:
        for start in range(0, int(self.batch.lengths.max()), self.piece):
            self._prefill(start, self.prompts)
        return self._progress()

    @torch.inference_mode()
    def decode(self, until: int) -> Progress:
        longest = int(self.batch.lengths.max())
        while self.made < until and not bool(self.finished.all()):
            self._step(~self.finished, longest + self.made)
            self.made += 1
        return self._progress()

    def _warm_up(self) -> None:
        """Runs both shapes once with nothing to write and nothing to append."""
        self._prefill(0, torch.zeros_like(self.prompts))
        self._step(torch.zeros_like(self.finished), 1)

    def _prefill(self, start: int, prompts: Tensor) -> None:
        """Runs one piece of the prompts, and appends the first new token where a prompt ends in it."""
        tokens = self.tokens[:, start : start + self.piece]
        count = tokens.shape[1]
        positions = torch.arange(start, start + count, device=tokens.device).expand(len(prompts), -1)
        x = self._forward(tokens, positions, positions < prompts[:, None], start + count)
        last = prompts - 1 - start  # where in this piece the prompt ends, if it does
        x = x[torch.arange(len(prompts), device=x.device), last.clamp(0, count - 1)]
        self._append(x, (last >= 0) & (last < count))

    def _step(self, active: Tensor, longest: int) -> None:
        """One token for each active sequence; none of them is longer than `longest`."""
        positions = (self.lengths - 1)[:, None]
        tokens = self.tokens.gather(1, positions)
        x = self._forward(tokens, positions, active[:, None], longest)
        self._append(x[:, 0], active)

    def _forward(self, tokens: Tensor, positions: Tensor, written: Tensor, longest: int) -> Tensor:
        blocks = -(-longest // self.spec.block_size)  # only what some sequence has reached is gathered
        return torch_model.forward(
            self.config,
            self.spec,
            self.weights,
            self.rotations,
            self.cache,
            tokens,
            positions,
            written,
            self.tables[:, :blocks],
        )

    def _append(self, x: Tensor, active: Tensor) -> None:
        """Adds the likeliest token to each sequence that is active [B]."""
        new = torch_model.next_tokens(self.config, self.weights, x)
        # A sequence that is not active rewrites its last token.
        columns = (self.lengths - (~active).long())[:, None]
        kept = torch.where(active[:, None], new[:, None].int(), self.tokens.gather(1, columns))
        self.tokens.scatter_(1, columns, kept)
        self.lengths += active
        self.finished |= active & torch.isin(new, self.stops)

    def _progress(self) -> Progress:
        return Progress(self.tokens.cpu().numpy(), self.lengths.cpu().numpy(), bool(self.finished.all()))
