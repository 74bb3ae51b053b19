"""The write as vectorised torch: for devices without Triton, and to compare with. Bits as the oracle's."""

from torch import Tensor

from kvcore.contract.write import Write
from kvcore.formats import FLOATS
from kvcore.placement import Address
from torchkv._call import WriteCall
from torchkv._torch.access import layer_number, static_scale, view_of
from torchkv._torch.formats import bits_of, quantise


def write(described: Write, call: WriteCall) -> None:
    """Writes with advanced indexing."""
    extents, scales, placement = described.cache.extents, described.cache.scales, described.placement
    layer = layer_number(call)
    if not 0 <= layer < (extents.num_layers or 1):
        return
    slots = call.slot_mapping.long()
    token = ((slots >= 0) & (slots < extents.num_slots)).nonzero().squeeze(1)
    block, slot = slots[token] // extents.block_size, slots[token] % extents.block_size

    def store(array: Tensor, units: Tensor, address: Address) -> None:
        head_units, x = units.shape[-1], address.x
        view = view_of(array, units.dtype, address, extents, head_units)
        view[layer, block, slot] = units.unflatten(-1, (head_units // x, x))

    scale_arrays = call.scale_caches or call.caches  # scales without arrays of their own lie inside the caches
    for side, rows, stored, static, address in (
        (0, call.key, described.cache.format, call.k_scale, placement.key),
        (-1, call.value, described.format_v, call.v_scale, placement.value),
    ):
        x = rows[token].unsqueeze(-2) if call.latent else rows[token]
        if stored.name in (described.key.dtype, *FLOATS):
            store(call.caches[side], bits_of(x, stored), address)
            continue
        static = static_scale(static, described.cache, layer) if described.scaled else None
        units, computed = quantise(x, stored, scales, None if static is None else static.unsqueeze(1))
        store(call.caches[side], units, address)
        if scales is not None and computed is not None:
            store(scale_arrays[side], computed, scales.placement[1:][side])
