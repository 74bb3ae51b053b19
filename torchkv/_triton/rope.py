"""The kernel of `rope_and_cache`: how it is prepared and run."""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from kvcore.contract.rope import Rope
from kvcore.plan import rope as plan_rope
from kvcore.plan.kernel import Target
from torchkv._arguments import dtype_name, spec_of
from torchkv._call import layer_of
from torchkv._rotated import RopeCall
from torchkv._triton.launch import Empty, Load, Runner, aligned_pointers, empty, pointees
from torchkv._triton.launches import Apart, Launch, Launches


class RopeKernel(NamedTuple):
    """The kernel of `rope_and_cache`, ready to be started.

    Attributes:
        described: What the contract says of the call.
        plan: How it is launched.
        kernel: What is launched.
        rows: How many of the call's tensors, from the first on, are out, query, key and value.
        positions: Which is positions.
        slots: Which is slot_mapping.
        new: The result where it is made, for any number of tokens; None where it is the first tensor.
        scalars: The kernel's scalars after the numbers of tokens.
    """

    described: Rope
    plan: plan_rope.RopePlan
    kernel: Any
    rows: int
    positions: int
    slots: int
    new: Empty | None
    scalars: tuple[int, ...]

    def run(self, runner: Runner, pointers: Sequence[Any], tensors: Sequence[Tensor]) -> Tensor | None:
        """Starts the kernel, unless there is no token. Returns the rotated query."""
        lengths = [tensor.shape[0] for tensor in tensors[: self.rows]]
        num_tokens, num_written = lengths[0], tensors[self.slots].shape[0]
        if not num_written <= num_tokens == tensors[self.positions].shape[-1] or lengths.count(num_tokens) < self.rows:
            return None
        result = tensors[0]
        if self.new is not None:
            shape, strides, dtype = self.new
            result = runner.empty((num_tokens, *shape[1:]), strides, dtype)
        if num_tokens:
            arguments = (*pointers, num_tokens, num_written, *self.scalars, runner.address(result))
            runner.start(self.kernel, self.plan.grid(num_tokens, num_written), arguments)
        return result


class Ropes(Launches[RopeKernel]):
    """Launches of an op whose first tensor is out or, without one, query.

    Args:
        gives: Whether the op's result is a new tensor.
    """

    any_length: ClassVar[Mapping[str, int]] = {
        "query": 0, "key": 0, "value": 0, "out": 0, "positions": -1, "slot_mapping": 0,
    }  # fmt: skip

    def __init__(self, gives: bool) -> None:
        self._section = 12 if gives else 13  # the place of mrope_section among the op's arguments
        super().__init__(self._section + 5, _batch_class)

    def flat(self, arguments: Sequence[Any]) -> Sequence[Any]:
        section = arguments[self._section]
        if section is not None:  # out of torch's dispatcher it comes as a list
            arguments = (*arguments[: self._section], tuple(section), *arguments[self._section + 1 :])
        return super().flat(arguments)

    def tensors(self, call: RopeCall) -> list[Tensor]:
        write, out = call.write, None if call.in_place else call.out
        v_scale = None if write.v_scale is write.k_scale else write.v_scale
        tensors = (
            out, call.query, write.key, write.value, *write.written, call.positions, call.cos_sin, write.slot_mapping,
            call.q_norm, call.k_norm, write.k_scale, v_scale, write.layer_index,
        )  # fmt: skip
        return [tensor for tensor in tensors if tensor is not None]

    def pointers(self, described: Rope, call: RopeCall) -> list[Any]:
        write = call.write
        v_scale = write.k_scale if described.latent else write.v_scale
        arguments = plan_rope.arguments(
            described, call.query, write.key, write.value, write.caches, write.scale_caches, call.positions,
            call.cos_sin, write.slot_mapping, call.q_norm, call.k_norm, write.k_scale, v_scale, layer_of(write),
            num_tokens=0, num_written=0,
        )  # fmt: skip
        return arguments[: len(plan_rope.POINTERS)]

    def prepare(self, call: RopeCall, described: Rope, target: Target, load: Load) -> Launch[RopeKernel]:
        out, in_place = None if call.out is None else spec_of(call.out), call.in_place
        plan = plan_rope.plan_rope(described, target, call.write.layer_index is not None, out, in_place)
        names, values = plan_rope.POINTERS, self.pointers(described, call)
        # Scales and layer count as unaligned, as those of a write do. New tensors are multiples of 16.
        aligned = aligned_pointers(names, values) - {"k_scale_ptr", "v_scale_ptr", "layer"}
        aligned |= {"out_ptr"} if call.out is None else aligned_pointers(["out_ptr"], [call.out])
        kernel = load(plan.kernel, pointees(names, values) | {"out_ptr": dtype_name(call.query)}, aligned)
        rows = 3 if call.out is None or in_place else 4
        positions = rows + len(call.write.written)
        slots = positions + 2
        written, pairs, lengths = [*range(rows, positions)], [*combinations(range(rows, positions), 2)], []
        any_length = [*range(rows), slots] + [positions] * (call.positions.dim() == 1)
        if call.out is not None:
            pairs += [(0, i) for i in range(1, len(self.tensors(call)))]
            if not call.out.numel() or _interleaved(call.out):  # other numbers of tokens may overlap themselves
                pairs.append((0, 0))
            written, lengths = [0, *written], any_length
        return Launch(
            RopeKernel(
                described,
                plan,
                kernel,
                rows,
                positions,
                slots,
                new=empty(call.query.shape, dtype_name(call.query)) if call.out is None else None,
                scalars=plan_rope.scalars(described, 0, 0)[2:],
            ),
            call.device,
            described.write.cache.extents.num_layers,
            aligned=slots + 1 + (call.q_norm is not None) + (call.k_norm is not None),
            any_length=any_length,
            written=written,
            apart=Apart(pairs, lengths) if pairs else None,
        )


def _interleaved(out: Tensor) -> bool:
    """Whether a row reaches beyond the next one's beginning."""
    return out.stride(0) <= sum((n - 1) * s for n, s in zip(out.shape[1:], out.stride()[1:], strict=True))


def _batch_class(tensors: Sequence[Tensor]) -> int:
    shape = tensors[0].shape
    return plan_rope.batch_class(shape[0]) if shape else 0  # a scalar is for the contract to refuse
