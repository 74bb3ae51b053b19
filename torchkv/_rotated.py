"""A call of `rope_and_cache`: its arguments by name, and what the contract says of them, as in `torchkv._call`."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kvcore.contract.cache import check_cache_address
from kvcore.contract.checks import check_devices, check_result
from kvcore.contract.rope import Rope, check_rope, check_rope_options
from torchkv._arguments import maybe_spec, spec_of
from torchkv._call import WriteCall
from torchkv._memory import address_of, check_apart, check_distinct, check_results_apart


class RopeCall(NamedTuple):
    """Arguments of `rope_and_cache`.

    Attributes:
        write: What is written, and how. Of MLA, key and value are kv_c and k_pe, which have no axis for heads, and
            latent is not set: `check` finds it out.
        query: As it is passed to the op, like all that follow.
        positions: `[num_tokens]`, or `[3, num_tokens]`.
        cos_sin: `[max_position, rotary_dim]`.
        q_norm: None for no norm.
        k_norm: None for no norm.
        rope: "neox" or "gptj".
        rotary_dim: None for the whole head.
        mrope_section: None where positions have one row.
        eps: Of the norms.
        out: The tensor that the op writes its result to; it may be query. None for a new one.
    """

    write: WriteCall
    query: Tensor
    positions: Tensor
    cos_sin: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None
    rope: str
    rotary_dim: int | None
    mrope_section: Sequence[int] | None
    eps: float
    out: Tensor | None = None

    @property
    def device(self) -> torch.device:
        """Where the op runs."""
        return self.query.device

    @property
    def backend(self) -> str | None:
        """None, "triton", "torch" or "interpret"."""
        return self.write.backend

    @property
    def layer(self) -> int | None:
        """A static index."""
        return self.write.layer

    @property
    def inputs(self) -> dict[str, Tensor | None]:
        """All tensors but out, by the names of the arguments."""
        write = self.write
        return {
            "query": self.query, "key": write.key, "value": write.value,
            **dict(zip(write.written_names, write.written, strict=True)), "positions": self.positions,
            "cos_sin": self.cos_sin, "slot_mapping": write.slot_mapping, "q_norm": self.q_norm, "k_norm": self.k_norm,
            "k_scale": write.k_scale, "v_scale": write.v_scale, "layer": write.layer_index,
        }  # fmt: skip

    @property
    def in_place(self) -> bool:
        """Whether out is query. It looks at addresses."""
        out, query = self.out, self.query
        return out is query or (
            out is not None and address_of(out) == address_of(query) and out.stride() == query.stride()
        )

    def check(self) -> Rope:
        """What the contract says of the call.

        Raises:
            ValueError: a shape, layout, choice or device does not fit.
            TypeError: a dtype or a type does not fit.
        """
        write = self.write
        rope = check_rope(
            spec_of(self.query),
            spec_of(write.key),
            spec_of(write.value),
            spec_of(self.positions),
            spec_of(self.cos_sin),
            spec_of(write.slot_mapping),
            maybe_spec(self.q_norm),
            maybe_spec(self.k_norm),
            check_rope_options(self.rope, self.rotary_dim, self.mrope_section, self.eps),
            write.cache_arguments,
        )
        if self.out is not None:
            out = spec_of(self.out)
            check_result("out", out, rope.query.shape, rope.query.dtype, strided=True)
            check_devices([("out", out)], "query", rope.query)
        return rope

    def check_memory(self, rope: Rope) -> None:
        """Raises a ValueError unless the cache's address lets it be read, or where `check_apart` does."""
        check_cache_address(rope.write.cache.format, address_of(self.write.caches[0]))
        self.check_apart()

    def check_apart(self) -> None:
        """Raises a ValueError if tensors that are written to share memory, or out does with one that is read.

        Out may be query itself. No two of its elements may lie in one place.
        """
        check_apart(self.write.written_names, self.write.written)
        if self.out is not None:
            check_distinct("out", self.out)
            inputs = self.inputs | ({"query": None} if self.in_place else {})
            check_results_apart(["out"], [self.out], inputs)

    def result(self) -> Tensor:
        """The tensor for the rotated query: out, or a new one in C order."""
        return self.query.new_empty(self.query.shape) if self.out is None else self.out
