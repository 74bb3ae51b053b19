"""DTensors: each rank runs an op on the heads that it has, in place, and has its part of the results.

Import this module where caches are DTensors: it tells torch how the ops are split.

    import torchkv.distributed
    mesh = torch.distributed.device_mesh.init_device_mesh("cuda", (2,), mesh_dim_names=("tp",))
    placements = torchkv.distributed.placements("NHD", mesh, heads="tp")

Caches are split over heads, or every rank has the whole. All else is made to fit: key, value and query, which are
best split over heads already, and what every rank needs, such as tables, which may be plain tensors that are the
same on all ranks. Caches and tensors for results never are: what was written to a copy would be lost, and so it is an
error if they are not split as they must be. Blocks of each rank's own are its own plain tensors, as in one process.
DTensors of one mesh are all on GPUs or all in the host's memory: between the two, each rank swaps blocks of its own
part, `to_local()`.
"""

from collections.abc import Sequence
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from kvcore.choices import Layout
from kvcore.contract import devices as contract
from kvcore.contract.blocks import Blocks
from kvcore.contract.relayout import Relayout
from kvcore.contract.rope import Rope
from kvcore.contract.slots import SlotMapping
from kvcore.contract.swap import Swap
from kvcore.layout import CacheLayout
from kvcore.pattern import Axis, MeshAxes
from kvcore.scales import heads_share_regions, scale_layout_of
from torchkv._library import read, rope, slots, write
from torchkv._library.base import CALLS, LIBRARY, call

Placements = tuple[Placement, ...]
"""What a tensor is split over: one for each dimension of a mesh."""

_HEAD_AXES = {"key": 1, "value": 1, "query": 1, "out": 1, "lse": 1, "sinks": 0}
"""The axis of heads, or of query heads, of arguments."""

_OF_QUERY = ("query", "out", "lse", "sinks")
"""Arguments with query heads."""


def placements(layout: Layout, mesh: DeviceMesh, *, heads: MeshAxes = None) -> tuple[Placements, ...]:
    """How each array of a cache is split, as `distribute_tensor` and `torch.distributed.tensor.zeros` take it.

    Args:
        layout: Pattern, constant's name or `CacheLayout`.
        mesh: With names of its dimensions.
        heads: The name of the dimension, or of those, over which heads are split; None: every rank has the whole. A
            latent row has no heads, and every rank has the whole.

    Raises:
        ValueError: the layout has no axis of heads, or has it joined with another that varies slower.

    Example:
        >>> torchkv.distributed.placements("NHD", mesh, heads="tp")  # doctest: +SKIP
        ((Shard(dim=2),), (Shard(dim=2),))
    """
    split = CacheLayout.of(layout).partition_spec(heads=heads)
    return tuple(tuple(_placement(spec, name) for name in mesh.mesh_dim_names or ()) for spec in split)


def _placement(spec: Sequence[MeshAxes], name: str) -> Placement:
    """What a partition spec has over one dimension of a mesh."""
    for axis, over in enumerate(spec):
        if over == name or (isinstance(over, tuple) and name in over):
            return Shard(axis)
    return Replicate()


# ---- the rules


class _Split:
    """How a call is split.

    Args:
        op: The op.
        given: Its arguments by name.

    Raises:
        ValueError: a cache is split in a way that no rank can use, or tensors are on different meshes.
        TypeError: a cache is no DTensor, but something else is.
    """

    def __init__(self, op: Any, given: dict[str, Any]) -> None:
        self.op, self.given = op, given
        self.mesh = _mesh_of(given)
        described = CALLS[op](*given.values()).check()  # all shapes, dtypes and choices, of the whole tensors
        self.heads: tuple[bool, ...] = (False,) * self.mesh.ndim  # whether each dimension of the mesh splits them
        self.q_heads, self.num_heads, self.of_caches, self.scale_axes = self.heads, 0, {}, ()
        if isinstance(described, SlotMapping):
            return
        caches = {name: tensor for name, tensor in _caches(given).items() if tensor is not None}
        dims = next(iter(caches.values())).dim()
        cache = None
        if isinstance(described, (Blocks, Swap)):
            layout = described.layout
            if described.scale_layout is not None:
                self.scale_axes = described.scale_layout.arrays
        else:
            cache = _cache_of(described)
            layout = cache.layout
            if op is write.mla or (isinstance(described, Rope) and described.latent):
                layout = CacheLayout.MLA if dims == 3 else CacheLayout.MLA.with_layer()
            if cache.scales is not None and not cache.scales.inside:
                self.scale_axes = scale_layout_of(given.get("scale_layout"), layout.has_layer).arrays
        # Of a swap, two caches of one layout.
        self.of_caches = dict(zip(caches, layout.arrays * (len(caches) // len(layout.arrays)), strict=True))
        found = {name: self._heads_of(name, tensor, self.of_caches[name]) for name, tensor in caches.items()}
        if len(set(found.values())) > 1:
            raise contract.split_alike_error(*(caches[name].placements for name in found))
        self.heads = next(iter(found.values()))
        if isinstance(described, Relayout):
            self._take_source(described.source.layout)
        if cache is not None and any(self.heads):
            self._check_regions(layout)
            contract.check_divided("num_heads", cache.extents.num_heads, self._ranks(self.heads))
        if cache is not None:
            self.num_heads = cache.extents.num_heads
        self.q_heads = self._heads_of_query()

    def _take_source(self, layout: CacheLayout) -> None:
        """Has a source split as the destination is. Of one that every rank has whole, each takes its own heads.

        Raises:
            ValueError: it is split, but otherwise; or its heads cannot be.
        """
        axes = [*layout.arrays]
        if self.given["source_scale_layout"] is not None:
            axes += scale_layout_of(self.given["source_scale_layout"], layout.has_layer).arrays
        for i, (array, names) in enumerate(zip(self.given["source"], axes, strict=True)):
            got = self._heads_of(f"source[{i}]", array, names)
            if any(got) and got != self.heads:
                raise contract.source_split_error(self._names(self.heads) or None, self._names(got))
            self.of_caches[f"source[{i}]"] = names
        if any(self.heads):
            self._check_regions(layout, self.given["source_kv_cache_dtype"])

    def _check_regions(self, layout: CacheLayout, kv_cache_dtype: str | None = None) -> None:
        if (kv_cache_dtype or self.given.get("kv_cache_dtype")) == "nvfp4" and heads_share_regions(layout):
            raise contract.region_error(layout, self._names(self.heads))

    def _ranks(self, split: Sequence[bool]) -> int:
        """The ranks among which heads are divided."""
        return prod(self.mesh.size(dim) for dim in range(self.mesh.ndim) if split[dim])

    def _names(self, split: Sequence[bool]) -> str:
        names = self.mesh.mesh_dim_names or tuple(f"mesh dimension {dim}" for dim in range(self.mesh.ndim))
        return ", ".join(name for name, over in zip(names, split, strict=True) if over)

    def _heads_of(self, name: str, tensor: Any, axes: Sequence[Axis]) -> tuple[bool, ...]:
        """Over which dimensions of the mesh a cache's heads are split; an error if anything else is."""
        if not isinstance(tensor, DTensor):
            raise contract.no_dtensor_error(name)
        names = self.mesh.mesh_dim_names or tuple(f"mesh dimension {dim}" for dim in range(self.mesh.ndim))
        split = []
        for placement, over in zip(tensor.placements, names, strict=True):
            if type(placement) not in (Replicate, Shard):
                raise contract.placement_error(name, placement)
            axis = axes[placement.dim] if isinstance(placement, Shard) else ("head",)
            if axis[0] != "head":
                raise contract.split_axis_error(axis, over)
            split.append(isinstance(placement, Shard))
        return tuple(split)

    def _heads_of_query(self) -> tuple[bool, ...]:
        """Over which dimensions of the mesh query heads are split.

        Attention splits them as the heads of the cache. Ranks that have one KV head may have it in common, and take
        query heads of their own. A rotation needs no KV head for them.
        """
        query = next((self.given[n] for n in ("query", "out") if isinstance(self.given.get(n), DTensor)), None)
        if query is None or query.dim() != 3:
            return self.heads
        present = tuple(isinstance(p, Shard) and p.dim % 3 == 1 for p in query.placements)
        divided = query.shape[1] % self._ranks(present) == 0
        if self.op in (rope.rope_and_cache, rope.rope_and_cache_out):
            return present if divided else (False,) * self.mesh.ndim
        more = [dim for dim in range(self.mesh.ndim) if present[dim] and not self.heads[dim]]
        outer = max((dim for dim in range(self.mesh.ndim) if self.heads[dim]), default=-1)
        nested = (
            all(present[dim] or not self.heads[dim] for dim in range(self.mesh.ndim)) and min(more, default=0) > outer
        )
        alone = self.num_heads == self._ranks(self.heads)
        return present if more and nested and alone and divided else self.heads

    def placements(self, name: str, tensor: Tensor) -> Placements:
        """How an argument has to be split."""
        if name in self.of_caches:
            return self._over(self.heads, _head_axis(self.of_caches[name]))
        name = name.removeprefix("source_")
        if name in ("k_scale_cache", "v_scale_cache") or (name in ("k_scale", "v_scale") and tensor.dim() > 2):
            return self._over(self.heads, _head_axis(self.scale_axes[0 if name[0] == "k" else -1]))
        if name in ("k_scale", "v_scale"):  # of one element or one a head, maybe for each layer
            return self._over(self.heads, tensor.dim() - 1 if tensor.shape[-1:] > (1,) else None)
        if self.op is write.mla or (tensor.dim() == 2 and name in ("key", "value")):
            return self._over(self.heads, None)
        axis = _HEAD_AXES.get(name) if self.op is not slots.slot_mapping_out else None
        if self.op is read.gather_out and name in ("key", "value"):
            axis = tensor.dim() - 2  # of slots, there is no axis of sequences
        return self._over(self.q_heads if name in _OF_QUERY and axis is not None else self.heads, axis)

    def _over(self, split: Sequence[bool], axis: int | None) -> Placements:
        return tuple(Shard(axis) if over and axis is not None else Replicate() for over in split)

    def local(self, name: str, argument: Any, written: bool) -> Any:
        """This rank's part of an argument."""
        if isinstance(argument, (list, tuple)):
            return [self.local(f"{name}[{i}]", item, written) for i, item in enumerate(argument)]
        if not isinstance(argument, Tensor):
            return argument
        wanted = self.placements(name, argument)
        if not isinstance(argument, DTensor):
            if written:
                raise contract.no_dtensor_error(name)
            if not any(isinstance(placement, Shard) for placement in wanted):
                return argument
            whole = [Replicate()] * self.mesh.ndim
            argument = DTensor.from_local(argument, self.mesh, whole, run_check=False)
        if written and tuple(argument.placements) != wanted:
            raise contract.written_error(name, wanted, tuple(argument.placements))
        return argument.redistribute(self.mesh, wanted).to_local()

    def result(self, local: Tensor) -> DTensor:
        """A result of which this rank has that part."""
        split, axis = self.heads, None
        if self.op is read.gather:
            axis = local.dim() - 2
        elif self.op is not slots.slot_mapping:
            split, axis = self.q_heads, 1
        return DTensor.from_local(local, self.mesh, self._over(split, axis), run_check=False)


def _run(op: Any, cls: Any, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
    """What torch calls in place of an op that has a DTensor among its arguments."""
    del cls, func, types
    parameters = op._schema.arguments
    args = (*args, *((kwargs or {}).get(p.name, p.default_value) for p in parameters[len(args) :]))
    given = {parameter.name: argument for parameter, argument in zip(parameters, args, strict=True)}
    split = _Split(op, given)
    written = [p.alias_info is not None and p.alias_info.is_write for p in parameters]
    with torch.no_grad():
        local = [split.local(name, given[name], w) for name, w in zip(given, written, strict=True)]
        results = call(op, tuple(local))
    if not op._schema.returns:
        return None
    if isinstance(results, Tensor):
        return split.result(results)
    return tuple(map(split.result, results))


def _mesh_of(given: dict[str, Any]) -> DeviceMesh:
    """The one mesh of all DTensors."""
    flat = [t for argument in given.values() for t in (argument if isinstance(argument, (list, tuple)) else [argument])]
    meshes = [tensor.device_mesh for tensor in flat if isinstance(tensor, DTensor)]
    if any(mesh != meshes[0] for mesh in meshes):
        raise contract.meshes_error([str(mesh) for mesh in meshes])
    return meshes[0]


def _cache_of(described: Any) -> Any:
    """The cache that tells how heads are split: what is written, where there are two."""
    if isinstance(described, Relayout):
        return described.destination
    return (described.write if isinstance(described, Rope) else described).cache


def _caches(given: dict[str, Any]) -> dict[str, Any]:
    """The caches among arguments, by what errors call them."""
    if "caches" in given:
        return {f"caches[{i}]": cache for i, cache in enumerate(given["caches"])}
    names = ("source_key_cache", "source_value_cache", "key_cache", "value_cache", "kv_cache")
    return {name: given[name] for name in names if name in given}


def _head_axis(axes: Sequence[Axis]) -> int | None:
    return next((i for i, axis in enumerate(axes) if axis[0] == "head"), None)


for _op in CALLS:
    torch.library.register_torch_dispatch(_op, DTensor, partial(_run, _op), lib=LIBRARY)
