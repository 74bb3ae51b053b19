"""What FlashInfer's wrappers keep between plan and run, block tables, lengths and starts, and attention with them."""

from typing import Any

import torch
from torch import Tensor

from kvcore.formats import FLOATS
from torchkv import read
from torchkv._arguments import dtype_name
from torchkv.integrations.flashinfer.arguments import UnsupportedError, check_planned_dtype
from torchkv.integrations.flashinfer.merge import LOG2_E
from torchkv.integrations.flashinfer.page import block_tables

LARGEST_TABLES = 2**24
"""Entries of the tables that a CUDA graph keeps, beyond which a width must be given: 64 MiB."""


class Planned:
    """Block tables, lengths and starts of a batch, at fixed addresses and in fixed shapes where CUDA graphs need them.

    Args:
        device: Where they lie.
        buffers: FlashInfer's buffers for CUDA graphs, with their names: those of starts, which may be missing, of
            indptr, of indices, and of last_page_len or lengths. plan copies into them, and nothing reads them. None:
            without CUDA graphs.
        max_pages_per_seq: Columns of the tables with CUDA graphs; None: as many as buffers has indices.

    Raises:
        ValueError: a buffer is missing, has another size, or tables would be larger than 2²⁴ entries.
    """

    def __init__(
        self, device: torch.device, buffers: dict[str, Tensor | None] | None, max_pages_per_seq: int | None
    ) -> None:
        self.device = device
        self.buffers: list[Tensor] | None = None
        self.max_pages: int | None = None
        self.batch_size = 0
        self.tables: Tensor | None = None
        self.seq_lens: Tensor | None = None
        self.starts: Tensor | None = None
        self._kept_starts: Tensor | None = None
        self.rows = self.most_rows = -1
        if buffers is None:
            return
        given = []
        for name, buffer in buffers.items():
            if buffer is None:
                raise ValueError(f"{name} must be a tensor where use_cuda_graph is True, got None")
            given.append(buffer)
        self.buffers, self.batch_size = given, given[-1].shape[0]
        for name, buffer in zip(list(buffers)[:-2], given[:-2], strict=True):
            if len(buffer) != self.batch_size + 1:
                raise ValueError(f"{name} must have batch_size + 1 = {self.batch_size + 1} elements, got {len(buffer)}")
        self.max_pages = len(given[-2]) if max_pages_per_seq is None else max_pages_per_seq
        if max_pages_per_seq is None and self.batch_size * self.max_pages > LARGEST_TABLES:
            raise ValueError(
                f"max_pages_per_seq must be given for block tables of {self.batch_size} sequences and up to "
                f"{self.max_pages} pages each, got None"
            )

    def plan(
        self, starts: Tensor | None, indptr: Tensor, indices: Tensor, last: Tensor, lens: Tensor, rows: int
    ) -> None:
        """Takes a batch, whose tensors the caller may change afterwards.

        Args:
            starts: Where each sequence's rows of the query begin, or None for one row each.
            indptr: Where each sequence's pages begin in indices.
            indices: Numbers of pages.
            last: What goes to the last of the buffers.
            lens: Tokens of each sequence.
            rows: Of the query.

        Raises:
            ValueError: it does not fit what CUDA graphs were promised, or indptr names more pages than there are.
        """
        longest, total = torch.stack((indptr.diff().max(), indptr[-1])).tolist() if len(indptr) > 1 else (0, 0)
        if total > len(indices):
            raise ValueError(f"indices must have the {total} pages that indptr names, got {len(indices)}")
        if self.buffers is None:
            # A power of two: batches of many widths are few programs.
            width = 1 << max(longest - 1, 0).bit_length()
        else:
            assert self.max_pages is not None
            width = self.max_pages
            self._check_graph(indices, lens, longest, rows)
            for buffer, given in zip(self.buffers[-3:], (indptr, indices, last), strict=True):
                buffer[: len(given)].copy_(given)
            if len(self.buffers) == 4 and starts is not None:
                self.buffers[0].copy_(starts)
        tables = block_tables(indptr.to(self.device), indices.to(self.device), width)
        self.tables = tables if self.tables is None or self.buffers is None else self.tables.copy_(tables)
        self.seq_lens = self._kept(self.seq_lens, lens.to(self.device))
        if starts is not None:  # kept, too, where a plan between has none
            self._kept_starts = self._kept(self._kept_starts, starts.to(self.device))
        self.starts = None if starts is None else self._kept_starts
        self.rows, self.batch_size = rows, len(lens)
        if self.most_rows < 0:
            self.most_rows = rows

    def check(self) -> "Planned":
        """Itself, once there was a plan.

        Raises:
            ValueError: there was none.
        """
        if self.tables is None:
            raise ValueError("plan must be called before run")
        return self

    def _check_graph(self, indices: Tensor, lens: Tensor, longest: int, rows: int) -> None:
        assert self.buffers is not None
        assert self.max_pages is not None
        if len(lens) != self.batch_size:
            raise ValueError(f"the batch must have {self.batch_size} sequences with use_cuda_graph, got {len(lens)}")
        if len(indices) > len(self.buffers[-2]):
            raise ValueError(f"indices must fit a buffer of {len(self.buffers[-2])}, got {len(indices)}")
        if longest > self.max_pages:
            raise ValueError(f"sequences must have at most max_pages_per_seq = {self.max_pages} pages, got {longest}")
        if 0 <= self.most_rows < rows:
            raise ValueError(f"a batch must have at most the {self.most_rows} rows of the first one, got {rows}")

    def _kept(self, kept: Tensor | None, new: Tensor) -> Tensor:
        """A copy of the new tensor, which may be the caller's; with CUDA graphs where the one before was."""
        return new.clone() if kept is None or self.buffers is None else kept.copy_(new)

    def attend(
        self,
        q: Tensor,
        caches: tuple[Tensor, Tensor] | Tensor,
        scale: float,
        k_scale: Tensor | None,
        v_scale: Any,
        out: Tensor | None,
        lse: Tensor | None,
        return_lse: bool,
        base_e: bool = False,
        **options: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attention over the planned batch.

        Args:
            q: Rows of the query.
            caches: As `paged_attention` takes them.
            scale: What logits are multiplied by.
            k_scale: What keys are, in a tensor, or None.
            v_scale: What values are: a number, a tensor, or None.
            out: Written to, or None.
            lse: Written to, or None.
            return_lse: Whether the log-sum-exp is returned, too.
            base_e: Whether it is to base e; else to base 2.
            **options: More of `paged_attention`.

        Raises:
            ValueError: something does not fit.
        """
        assert self.tables is not None
        assert self.seq_lens is not None
        cache = caches if isinstance(caches, Tensor) else caches[0]
        if dtype_name(cache) == "uint8":
            raise UnsupportedError("paged_kv_cache must not be uint8: FlashInfer keeps nvfp4's scales elsewhere")
        kernel_scales = {}
        if dtype_name(cache) not in FLOATS:
            given = {"k_scale": k_scale, "v_scale": v_scale if isinstance(v_scale, Tensor) else None}
            kernel_scales = {name: each.float().reshape(-1) for name, each in given.items() if each is not None}
        if lse is not None and out is None:  # paged_attention takes both or neither
            size = options["head_size_v"] if isinstance(caches, Tensor) else caches[1].shape[-1]
            out = q.new_empty(*q.shape[:2], size)
        result, sums = read.paged_attention(
            q, caches, self.tables, self.seq_lens, query_start_loc=self.starts, scale=scale,
            out=out, lse=lse, return_lse=True, **kernel_scales, **options,
        )  # fmt: skip
        if v_scale is not None and "v_scale" not in kernel_scales and not _is_one(v_scale):
            result.mul_(v_scale)
        if not base_e and (return_lse or lse is not None):
            sums.mul_(LOG2_E)
        return (result, sums) if return_lse else result


def _is_one(scale: Any) -> bool:
    return not isinstance(scale, Tensor) and scale == 1


def check_rows(q: Tensor, rows: int, dtype: torch.dtype, cache: Tensor, cache_dtype: torch.dtype) -> None:
    """Checks query and cache against what was planned.

    Raises:
        ValueError: a number of rows or a dtype is another.
    """
    check_planned_dtype("q", q, "q_data_type", dtype)
    check_planned_dtype("paged_kv_cache", cache, "kv_data_type", cache_dtype)
    if q.shape[0] != rows:
        raise ValueError(f"q must have the {rows} rows that plan was told, got shape {tuple(q.shape)}")


def check_page_size(cache: Tensor, kv_layout: str, page_size: int) -> None:
    """Checks that pages have as many slots as plan was told, of which it made lengths.

    Raises:
        ValueError: they have others.
    """
    slots = cache.shape[1 if kv_layout == "NHD" else 2]
    if slots != page_size:
        raise ValueError(f"paged_kv_cache must have pages of plan's page_size, {page_size} slots, got {slots}")


def window_of(window_left: int) -> int | None:
    """How many positions a row sees, its own among them, of FlashInfer's window: those before its own."""
    return None if window_left < 0 else window_left + 1
