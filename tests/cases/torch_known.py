"""Launches of torch on the host, and what goes through torch's dispatcher."""

from tests.cases.launches import OnHost
from torchkv._library import base
from torchkv._library import blocks as _blocks_ops
from torchkv._library import read as _read_ops
from torchkv._library import rope as _rope_ops
from torchkv._library import slots as _slot_ops
from torchkv._library import swap as _swap_ops
from torchkv._library import write as _write_ops
from torchkv._slots import SlotCall
from torchkv._triton import attention as _attention
from torchkv._triton import blocks as _blocks
from torchkv._triton import gather as _gather
from torchkv._triton import rope as _rope
from torchkv._triton import slots as _slots
from torchkv._triton import swap as _swap
from torchkv._triton import write as _write


def ops():
    """Each op with what makes a call of its arguments, new launches, and its other backends."""
    write, read, rope = _write_ops, _read_ops, _rope_ops
    for op, call_of, k_scale in (
        (write.flash, write._flash_call, 6),
        (write.diffkv, write._diffkv_call, 5),
        (write.flash_quant, write._flash_quant_call, None),
        (write.mla, write._mla_call, None),
    ):
        yield op, call_of, _write.Writes(k_scale), write._BACKENDS
    yield read.attention, read._attention_call, _attention.Attentions(results=False), read._ATTENTION_BACKENDS
    yield read.attention_out, read._attention_out_call, _attention.Attentions(results=True), read._ATTENTION_BACKENDS
    yield read.gather, read._gather_call, _gather.Gathers(results=False), read._GATHER_BACKENDS
    yield read.gather_out, read._gather_out_call, _gather.Gathers(results=True), read._GATHER_BACKENDS
    yield rope.rope_and_cache, rope._call, _rope.Ropes(gives=True), rope._BACKENDS
    yield rope.rope_and_cache_out, rope._out_call, _rope.Ropes(gives=False), rope._BACKENDS
    yield _slot_ops.slot_mapping, SlotCall, _slots.Slots(), _slot_ops._BACKENDS
    yield _slot_ops.slot_mapping_out, _slot_ops._out_call, _slots.Slots(), _slot_ops._BACKENDS
    blocks = _blocks_ops
    yield blocks.copy_blocks, blocks._copy_call, _blocks.Moves(), blocks._BACKENDS
    yield blocks.zero_blocks, blocks._zero_call, _blocks.Moves(), blocks._BACKENDS
    yield _swap_ops.swap_blocks, _swap_ops._call_of, _swap.Swaps(), _swap_ops._BACKENDS


class Seen(OnHost):
    """Launches on the host, and the ops that torch's dispatcher called."""

    def __init__(self, monkeypatch, library):
        super().__init__(monkeypatch)
        self.dispatched = []
        for each in ops():
            self.register(monkeypatch, library, *each)

    def register(self, monkeypatch, library, op, call_of, launches, backends):
        """Makes the op's kernel for CPUs do what the one for GPUs does."""
        name, returns = op._schema.name.removeprefix("torchkv::"), bool(op._schema.returns)
        defaults = [parameter.default_value for parameter in op._schema.arguments]

        def on_host(*arguments):
            arguments = (*arguments, *defaults[len(arguments) :])
            self.dispatched.append(name)
            results = launches.again(arguments)
            if results is None:
                call = call_of(*arguments)
                other = call.backend == "torch"
                results = backends.torch(call.check(), call) if other else launches.first(call, arguments)
            return results if returns else None

        library.impl(name, on_host, "CPU", allow_override=True)
        monkeypatch.setitem(base._again, op, launches.again)

    def ways(self):
        """How often the dispatcher was asked since the last time, and how many kernels were started."""
        counts = len(self.dispatched), len(self.started)
        self.dispatched.clear()
        self.started.clear()
        return counts


def versions(tensors):
    return [tensor._version for tensor in tensors]
