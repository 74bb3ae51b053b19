"""Compile and launch the kernel that rotates and writes on CUDA and ROCm tensors, and interpret it on CPU tensors."""

from collections.abc import Sequence
from itertools import combinations
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvcore.contract.rope import Rope
from kvcore.plan import rope as plan_rope
from kvcore.plan.kernel import INTERPRETER, Target
from torchkv._arguments import dtype_name, spec_of
from torchkv._call import layer_of
from torchkv._rotated import RopeCall
from torchkv._triton.launch import INTERPRETED, Empty, Runner, aligned_pointers, empty, load, pointees, target
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

    def run(self, runner: Runner, pointers: Sequence[Any], tensors: Sequence[Tensor]) -> Tensor:
        """Starts the kernel, unless there is no token. Returns the rotated query."""
        result, num_written = tensors[0], tensors[self.slots].shape[0]
        num_tokens = result.shape[0]
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

    any_length = {"query": 0, "key": 0, "value": 0, "out": 0, "positions": -1, "slot_mapping": 0}

    def __init__(self, gives: bool) -> None:
        # No error for tensors of other shapes.
        super().__init__(lambda tensors: tensors[0].shape[:1] >= (plan_rope.MANY_TOKENS,))
        self._section = 12 if gives else 13  # the place of mrope_section among the op's arguments

    def again(self, arguments: Sequence[Any]) -> Tensor | None:
        found = self._known.find(self.flat(arguments))
        if found is None:
            return None
        (launch, pointers, mark), tensors, addresses = found
        if not self.fits(launch.kernels, tensors) or launch.apart.unseen(tensors, addresses):
            return None
        result = launch.run(pointers(addresses), tensors)
        mark(tensors)
        return result

    def flat(self, arguments: Sequence[Any]) -> Sequence[Any]:
        section = arguments[self._section]
        if section is None:
            return arguments
        # Out of torch's dispatcher, mrope_section comes as a list.
        return (*arguments[: self._section], tuple(section), *arguments[self._section + 1 :])

    def tensors(self, call: RopeCall) -> list[Tensor]:
        return _tensors(call)

    def fits(self, kernels: RopeKernel, tensors: Sequence[Tensor]) -> bool:
        num_tokens = tensors[0].shape[0]
        return tensors[kernels.slots].shape[0] <= num_tokens == tensors[kernels.positions].shape[-1] and all(
            [tensor.shape[0] == num_tokens for tensor in tensors[1 : kernels.rows]]
        )

    def pointers(self, described: Rope, call: RopeCall) -> list[Any]:
        return _pointers(described, call)

    def prepare(self, call: RopeCall, described: Rope) -> Launch[RopeKernel]:
        names, values = plan_rope.POINTERS, _pointers(described, call)
        # Scales and layer count as unaligned, as those of a write do. New tensors are multiples of 16.
        aligned = aligned_pointers(names, values) - {"k_scale_ptr", "v_scale_ptr", "layer"}
        aligned |= {"out_ptr"} if call.out is None else aligned_pointers(["out_ptr"], [call.out])
        with torch.cuda.device(call.device):
            plan = _plan(described, call, target())
            kernel = load(plan.kernel, pointees(names, values) | {"out_ptr": dtype_name(call.query)}, aligned)
        kernels = _kernel(described, call, plan, kernel)
        rows, positions, slots = kernels.rows, kernels.positions, kernels.slots
        written, pairs, lengths = [*range(rows, positions)], [*combinations(range(rows, positions), 2)], []
        if call.out is not None:
            pairs += [(0, i) for i in range(1, len(_tensors(call)))]
            if _interleaved(call.out):  # then the number of tokens decides whether it overlaps itself
                pairs.append((0, 0))
            written, lengths = [0, *written], [0, slots]
        return Launch(
            kernels,
            call.device,
            described.write.cache.extents.num_layers,
            aligned=slots + 1 + (call.q_norm is not None) + (call.k_norm is not None),
            any_length=[*range(rows), slots] + [positions] * (call.positions.dim() == 1),
            written=written,
            apart=Apart(pairs, lengths),
        )


def interpret_rope(described: Rope, call: RopeCall) -> Tensor:
    """Runs the kernel in Triton's interpreter, on the tensors' own memory. Returns the rotated query."""
    plan = _plan(described, call, INTERPRETER)
    kernel = _kernel(described, call, plan, plan.kernel)
    return kernel.run(INTERPRETED, _pointers(described, call), _tensors(call))


def _plan(described: Rope, call: RopeCall, target: Target) -> plan_rope.RopePlan:
    out = None if call.out is None else spec_of(call.out)
    layer_is_pointer = call.write.layer_index is not None
    return plan_rope.plan_rope(described, target, layer_is_pointer, out, call.in_place)


def _kernel(described: Rope, call: RopeCall, plan: plan_rope.RopePlan, kernel: Any) -> RopeKernel:
    rows = 3 if call.out is None or call.in_place else 4
    positions = rows + len(call.write.written)
    return RopeKernel(
        described,
        plan,
        kernel,
        rows,
        positions,
        slots=positions + 2,
        new=empty(call.query.shape, dtype_name(call.query)) if call.out is None else None,
        scalars=plan_rope.scalars(described, 0, 0)[2:],
    )


def _tensors(call: RopeCall) -> list[Tensor]:
    """The tensors of a call, in the order of the op's arguments: out, if it is not query, then the `inputs`."""
    write, out = call.write, None if call.in_place else call.out
    tensors = (
        out, call.query, write.key, write.value, *write.written, call.positions, call.cos_sin, write.slot_mapping,
        call.q_norm, call.k_norm, write.k_scale, write.v_scale, write.layer_index,
    )  # fmt: skip
    return [tensor for tensor in tensors if tensor is not None]


def _interleaved(out: Tensor) -> bool:
    """Whether a row reaches beyond the next one's beginning."""
    return out.stride(0) <= sum((n - 1) * s for n, s in zip(out.shape[1:], out.stride()[1:], strict=True))


def _pointers(described: Rope, call: RopeCall) -> list[Any]:
    """The kernel's arguments before its scalars."""
    write = call.write
    v_scale = write.k_scale if described.latent else write.v_scale
    arguments = plan_rope.arguments(
        described, call.query, write.key, write.value, write.caches, write.scale_caches, call.positions, call.cos_sin,
        write.slot_mapping, call.q_norm, call.k_norm, write.k_scale, v_scale, layer_of(write), num_tokens=0,
        num_written=0,
    )  # fmt: skip
    return arguments[: len(plan_rope.POINTERS)]
