"""FlashInfer's pages: from their indices to block tables and back, and the functions that write to them."""

import torch
from torch import Tensor

from torchkv import write
from torchkv.integrations.flashinfer.arguments import PagedCache, key_and_value


def get_seq_lens(kv_indptr: Tensor, kv_last_page_len: Tensor, page_size: int) -> Tensor:
    """`flashinfer.get_seq_lens`: tokens of each sequence.

    Args:
        kv_indptr: `[batch_size + 1]` of int32: where each sequence's pages begin in the indices.
        kv_last_page_len: `[batch_size]` of int32: slots of its last page that are used.
        page_size: Slots of a page.

    Returns:
        `[batch_size]`: `(pages - 1) * page_size + last_page_len`, and last_page_len where there is no page.
    """
    return (kv_indptr.diff() - 1).clamp(min=0) * page_size + kv_last_page_len


def block_tables(indptr: Tensor, indices: Tensor, max_pages: int | None = None) -> Tensor:
    """Block tables of FlashInfer's pages, on their device.

    Args:
        indptr: `[batch_size + 1]` of int32 or int64: sequence s has the pages `indices[indptr[s]:indptr[s + 1]]`.
        indices: `[n]` of the same device, n at least the last of indptr: numbers of pages.
        max_pages: Columns of the tables; pages beyond them are left out. None: what the longest sequence has, for which
            the host waits for the device.

    Returns:
        `[batch_size, max_pages]` of indices' dtype: the pages of each sequence, then -1.

    Example:
        >>> flashinfer.block_tables(torch.tensor([0, 2, 2, 3]), torch.tensor([7, 5, 6])).tolist()
        [[7, 5], [-1, -1], [6, -1]]
    """
    if max_pages is None:
        max_pages = int(indptr.diff().max()) if indptr.shape[0] > 1 else 0
    if not indices.shape[0] or not max_pages:
        return indices.new_full((indptr.shape[0] - 1, max_pages), -1)
    at = indptr[:-1, None] + torch.arange(max_pages, dtype=indptr.dtype, device=indptr.device)
    found = indices[at.clamp(0, indices.shape[0] - 1)]
    return torch.where(at < indptr[1:, None], found, -1)


def page_indices(block_tables: Tensor, seq_lens: Tensor, page_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """FlashInfer's pages of block tables, on their device, of shapes that are known without it.

    Args:
        block_tables: `[batch_size, max_pages]` of int32 or int64.
        seq_lens: `[batch_size]` of int32 or int64: tokens of each sequence.
        page_size: Slots of a page.

    Returns:
        indptr `[batch_size + 1]` and last_page_len `[batch_size]` of int32, and between them indices
        `[batch_size * max_pages]` of block_tables' dtype, of which the first `indptr[-1]` are pages and the rest -1.
        Where seq_lens is 0, there is no page, and last_page_len is 0. Positions beyond the tables are left out.

    Example:
        >>> tables = torch.tensor([[7, 5], [-1, -1], [6, -1]])
        >>> [x.tolist() for x in flashinfer.page_indices(tables, torch.tensor([20, 0, 16]), 16)]
        [[0, 2, 2, 3], [7, 5, 6, -1, -1, -1], [4, 0, 16]]
    """
    batch_size, max_pages = block_tables.shape
    pages = ((seq_lens + page_size - 1) // page_size).clamp(0, max_pages)
    indptr = torch.zeros(batch_size + 1, dtype=torch.int32, device=block_tables.device)
    indptr[1:] = pages.cumsum(0)
    last_page_len = (seq_lens - (pages - 1) * page_size).clamp(0, page_size).where(pages > 0, 0).to(torch.int32)
    column = torch.arange(max_pages, device=block_tables.device)
    at = torch.where(column < pages[:, None], indptr[:-1, None] + column, batch_size * max_pages)
    indices = block_tables.new_full((batch_size * max_pages + 1,), -1)  # the last place is for what is no page
    indices.scatter_(0, at.flatten().long(), block_tables.flatten())
    return indptr, indices[:-1], last_page_len


def get_batch_indices_positions(
    append_indptr: Tensor,
    seq_lens: Tensor,
    nnz: int,
    batch_indices: Tensor | None = None,
    positions: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`flashinfer.get_batch_indices_positions`: whose each new token is, and where it stands.

    Args:
        append_indptr: `[batch_size + 1]` of int32: where each sequence's new tokens begin.
        seq_lens: `[batch_size]`: tokens of each sequence, the new ones among them.
        nnz: How many results there are. Those past the last new token have batch index -1, and position 0.
        batch_indices: `[nnz]` of int32 to write to; None: a new tensor.
        positions: `[nnz]` of int32 to write to; None: a new tensor.

    Returns:
        batch_indices and positions.

    Raises:
        ValueError: a tensor to write to has another shape or dtype.

    Example:
        >>> indices, positions = flashinfer.get_batch_indices_positions(
        ...     torch.tensor([0, 1, 3]), torch.tensor([5, 5]), 4
        ... )
        >>> indices.tolist(), positions.tolist()
        ([0, 1, 1, -1], [4, 3, 4, 0])
    """
    for name, given in (("batch_indices", batch_indices), ("positions", positions)):
        if given is not None and (tuple(given.shape) != (nnz,) or given.dtype != torch.int32):
            raise ValueError(f"{name} must be int32 of shape ({nnz},), got {given.dtype} of {tuple(given.shape)}")
    token = torch.arange(nnz, device=append_indptr.device, dtype=append_indptr.dtype)
    whose = torch.searchsorted(append_indptr[1:].contiguous(), token, right=True)
    new = whose < seq_lens.shape[0]
    safe = whose.clamp(max=max(seq_lens.shape[0] - 1, 0))
    at = torch.zeros_like(token)
    if seq_lens.shape[0]:
        at = torch.where(new, seq_lens[safe] - (append_indptr[1:][safe] - token), 0)
    results = []
    for given, found in ((batch_indices, torch.where(new, whose, -1)), (positions, at)):
        found = found.to(torch.int32)
        results.append(found if given is None else given.copy_(found))
    return results[0], results[1]


def slot_mapping(
    batch_indices: Tensor, positions: Tensor, kv_indices: Tensor, kv_indptr: Tensor, page_size: int
) -> Tensor:
    """Slots of tokens at positions of sequences.

    Args:
        batch_indices: `[n]`: whose each token is; below 0: nobody's.
        positions: `[n]`: where it stands.
        kv_indices: Numbers of pages.
        kv_indptr: `[batch_size + 1]`: where each sequence's pages begin in kv_indices.
        page_size: Slots of a page.

    Returns:
        `[n]` of int64: `page * page_size + place`, and -1, which is skipped in writing, for nobody's tokens and for
        positions beyond a sequence's pages.

    Example:
        >>> indices, indptr = torch.tensor([7, 5, 6]), torch.tensor([0, 2, 3])
        >>> flashinfer.slot_mapping(torch.tensor([0, 1, -1]), torch.tensor([17, 2, 0]), indices, indptr, 16).tolist()
        [81, 98, -1]
    """
    batch_size = kv_indptr.shape[0] - 1
    if not batch_size or not kv_indices.shape[0]:
        return torch.full_like(positions, -1, dtype=torch.int64)
    whose = batch_indices.long()
    named = (whose >= 0) & (whose < batch_size) & (positions >= 0)
    whose = whose.clamp(0, batch_size - 1)
    at = kv_indptr[whose].long() + positions.long() // page_size
    named &= at < kv_indptr[whose + 1]
    page = kv_indices[at.clamp(0, kv_indices.shape[0] - 1)].long()
    return torch.where(named & (page >= 0), page * page_size + positions.long() % page_size, -1)


def append_paged_kv_cache(
    append_key: Tensor,
    append_value: Tensor,
    batch_indices: Tensor,
    positions: Tensor,
    paged_kv_cache: PagedCache,
    kv_indices: Tensor,
    kv_indptr: Tensor,
    kv_last_page_len: Tensor,
    kv_layout: str = "NHD",
) -> None:
    """`flashinfer.append_paged_kv_cache`: `torchkv.reshape_and_cache_flash` of tokens at positions of sequences.

    Tokens with a batch index below 0, and positions beyond a sequence's pages, are skipped.

    Args:
        append_key: `[n, num_kv_heads, head_dim]`.
        append_value: `[n, num_kv_heads, head_dim]`.
        batch_indices: `[n]`: whose each token is.
        positions: `[n]`: where it stands.
        paged_kv_cache: `(k_cache, v_cache)` of `[num_pages, page_size, num_kv_heads, head_dim]` with NHD, `[num_pages,
            num_kv_heads, page_size, head_dim]` with HND, or one tensor with an axis of 2 after the first; changed in
            place. The axis of slots may be missing from pages of one slot.
        kv_indices: `[kv_indptr[-1]]`: numbers of pages.
        kv_indptr: `[batch_size + 1]`: where each sequence's pages begin in kv_indices.
        kv_last_page_len: Not used: positions say where tokens go.
        kv_layout: "NHD" or "HND".

    Raises:
        ValueError: a shape, layout or device does not fit.
        TypeError: a dtype does not fit.
    """
    key_cache, value_cache = key_and_value(paged_kv_cache, kv_layout)
    slots = slot_mapping(batch_indices, positions, kv_indices, kv_indptr, key_cache.shape[1 + (kv_layout == "HND")])
    write.reshape_and_cache_flash(append_key, append_value, key_cache, value_cache, slots, layout=kv_layout)


def append_paged_mla_kv_cache(
    append_ckv: Tensor,
    append_kpe: Tensor,
    batch_indices: Tensor,
    positions: Tensor,
    ckv_cache: Tensor,
    kpe_cache: Tensor,
    kv_indices: Tensor,
    kv_indptr: Tensor,
    kv_last_page_len: Tensor,
) -> None:
    """`flashinfer.append_paged_mla_kv_cache`: the same for latent caches.

    Args:
        append_ckv: `[n, ckv_dim]`.
        append_kpe: `[n, kpe_dim]`.
        batch_indices: `[n]`: whose each token is.
        positions: `[n]`: where it stands.
        ckv_cache: `[num_pages, page_size, ckv_dim]`, changed in place. It and kpe_cache may be parts of one tensor's
            rows, `kv_cache[..., :512]` and `kv_cache[..., 512:]`, as `BatchMLAPagedAttentionWrapper` wants them.
        kpe_cache: `[num_pages, page_size, kpe_dim]`, changed in place.
        kv_indices: `[kv_indptr[-1]]`: numbers of pages.
        kv_indptr: `[batch_size + 1]`: where each sequence's pages begin in kv_indices.
        kv_last_page_len: Not used.

    Raises:
        ValueError: a shape or device does not fit.
        TypeError: a dtype does not fit.
    """
    slots = slot_mapping(batch_indices, positions, kv_indices, kv_indptr, ckv_cache.shape[1])
    write.reshape_and_cache_flash(
        append_ckv.unsqueeze(1), append_kpe.unsqueeze(1), ckv_cache.unsqueeze(2), kpe_cache.unsqueeze(2), slots
    )
