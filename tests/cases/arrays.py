"""Arrays for tests: random bits, poison, and the same bits as NumPy, JAX and torch arrays; one way to call each op."""

from dataclasses import dataclass, field, replace
from typing import Any

import ml_dtypes
import numpy as np

from kvcore.formats import KV_CACHE_DTYPES, stored_size
from kvcore.layout import CacheLayout
from kvcore.oracle import write as reference
from kvcore.pattern import CONSTANTS

DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
    "float8_e4m3fnuz": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "float8_e5m2fnuz": np.dtype(ml_dtypes.float8_e5m2fnuz),
    "int8": np.dtype(np.int8),
    "uint8": np.dtype(np.uint8),
}


LAYOUTS = [name for name in CONSTANTS if not CacheLayout.of(name).latent]
"""Names of the layouts with a place for K and for V."""


@dataclass
class Case:
    """Arguments of a write, as NumPy arrays."""

    key: np.ndarray
    value: np.ndarray
    caches: list[np.ndarray]
    slot_mapping: np.ndarray
    kv_cache_dtype: str = "auto"
    k_scale: Any = None
    v_scale: Any = None
    layout: CacheLayout = CacheLayout.NHD
    layer: int | None = None
    scale_caches: list[np.ndarray] = field(default_factory=list)
    scale_layout: str | None = None

    @property
    def memory(self) -> list[np.ndarray]:
        """All arrays that are written to, in the order of the op's arguments."""
        return [*self.caches, *self.scale_caches]

    def op(self, module):
        """The op of a module."""
        name = "reshape_and_cache_flash" + ("_diffkv" if self.layout.single_array else "")
        return getattr(module, name + ("_per_token_head_quant" if self.scale_caches else ""))

    def call(self, module, convert, memory, **more):
        """The op of a module, with arrays made by `convert`, on `memory`."""
        if self.scale_caches:
            more["scale_layout"] = self.scale_layout
            scales = ()
        else:
            scales = (convert(s) if isinstance(s, np.ndarray) else s for s in (self.k_scale, self.v_scale))
        return self.op(module)(
            convert(self.key), convert(self.value), *memory, convert(self.slot_mapping), self.kv_cache_dtype, *scales,
            layout=self.layout, layer=self.layer, **more,
        )  # fmt: skip


def make_case(
    rng,
    *,
    layout="NHD",
    num_tokens=7,
    num_heads=3,
    head_size=40,
    head_size_v=None,
    num_blocks=5,
    block_size=8,
    dtype="bfloat16",
    cache_dtype=None,
    kv_cache_dtype="auto",
    num_layers=None,
    layer=None,
    slots=None,
    bits=True,
    scales=(0.37, 1e-3),
    per_token_head=False,
    scale_layout=None,
) -> Case:
    """A case with random slots, drawn without replacement, and poisoned caches.

    Args:
        bits: Whether inputs are random bit patterns (NaN, infinities and subnormal numbers among them) or normal draws.
        scales: Numbers, or for arrays a name that `shape_of_scales` knows.
        per_token_head: Whether the op computes scales, into scale caches in `scale_layout`.
    """
    layout = CacheLayout.of(layout)
    if num_layers is not None:
        layout = layout.with_layer()
    if cache_dtype is None:
        cache_dtype = dtype if kv_cache_dtype == "auto" else "uint8"
    head_size_v = head_size if head_size_v is None else head_size_v
    shapes = layout.shapes(
        num_blocks=num_blocks,
        block_size=block_size,
        num_heads=num_heads,
        head_size=stored_size(KV_CACHE_DTYPES[kv_cache_dtype], head_size),
        head_size_v=stored_size(KV_CACHE_DTYPES[kv_cache_dtype], head_size_v),
        num_layers=num_layers,
        x=(8 if head_size % 16 == 0 else 4) if "dim/x" in layout.pattern else None,
    )
    if isinstance(scales, str):
        scales = tuple(
            rng.uniform(1e-3, 2, shape_of_scales(scales, num_layers, num_heads)).astype(np.float32) for _ in range(2)
        )
    scale_caches = []
    if per_token_head:
        sizes = {"layer": num_layers, "block": num_blocks, "slot": block_size, "head": num_heads}
        patterns = (scale_layout or ("layer " if num_layers else "") + "block slot head").split(",")
        for pattern in (patterns[0], patterns[-1]):
            scale_caches.append(random_bits(rng, tuple(sizes[a] for a in pattern.split()), "float32"))
    draw = random_bits if bits else random_normal
    if slots is None:
        slots = rng.permutation(num_blocks * block_size)[:num_tokens]
    quantised = kv_cache_dtype != "auto" and not per_token_head
    return Case(
        key=draw(rng, (num_tokens, num_heads, head_size), dtype),
        value=draw(rng, (num_tokens, num_heads, head_size_v), dtype),
        caches=[random_bits(rng, shape, cache_dtype) for shape in shapes],
        slot_mapping=np.asarray(slots, np.int64),
        kv_cache_dtype=kv_cache_dtype,
        k_scale=scales[0] if quantised else None,
        v_scale=scales[1] if quantised else None,
        layout=layout,
        layer=layer,
        scale_caches=scale_caches,
        scale_layout=scale_layout,
    )


def shape_of_scales(granularity, num_layers, num_heads):
    """Of static scales: "head" for one a head, "layer" for one a layer, "layer and head" for one a head of each."""
    layers = () if granularity == "head" else (num_layers,)
    return (*layers, 1 if granularity == "layer" else num_heads)


def random_bits(rng, shape, dtype):
    """Every bit pattern of the dtype is as likely as any other. As a cache's content it is poison."""
    dtype = DTYPES[dtype]
    return rng.integers(0, 256, (*shape, dtype.itemsize), dtype=np.uint8).view(dtype).reshape(shape)


def random_normal(rng, shape, dtype):
    return rng.standard_normal(shape, dtype=np.float32).astype(DTYPES[dtype])


def bits(array):
    """The array's bytes: what equality is about."""
    return np.ascontiguousarray(array).view(np.uint8)


def to_torch(array, device="cpu"):
    import torch

    if array.dtype.name.startswith(("bfloat16", "float8")):
        as_int = torch.from_numpy(array.view(f"int{8 * array.itemsize}"))
        return as_int.to(device).view(getattr(torch, array.dtype.name))
    return torch.from_numpy(array).to(device)


def from_torch(tensor):
    import torch

    tensor = tensor.detach().cpu().contiguous()
    name = str(tensor.dtype).removeprefix("torch.")
    if name.startswith(("bfloat16", "float8")):
        as_int = tensor.view(torch.int16 if tensor.element_size() == 2 else torch.uint8)
        return as_int.numpy().view(DTYPES[name])
    return tensor.numpy()


def run_oracle(case: Case) -> list[np.ndarray]:
    memory = [c.copy() for c in case.memory]
    case.call(reference, lambda a: a, memory)
    return memory


def run_torch(case: Case, backend=None, device="cpu") -> list[np.ndarray]:
    import torchkv

    memory = [to_torch(a.copy(), device) for a in case.memory]
    none = case.call(torchkv, lambda a: to_torch(a.copy(), device), memory, backend=backend)
    assert none is None
    return [from_torch(c) for c in memory]


def run_jax(case: Case, backend=None) -> list[np.ndarray]:
    return [np.asarray(c) for c in write_jax(case, backend)]


def write_jax(case: Case, backend=None) -> tuple[Any, ...]:
    import jax.numpy as jnp

    import jaxkv

    def convert(array):  # int64 slots stay NumPy's: JAX would warn
        return array if array.dtype == np.int64 else jnp.asarray(array)

    new = case.call(jaxkv, convert, list(map(jnp.asarray, case.memory)), backend=backend)
    return new if isinstance(new, tuple) else (new,)


CPU_IMPLEMENTATIONS = {
    "jax xla": lambda case: run_jax(case, "xla"),
    "jax interpret": lambda case: run_jax(case, "interpret"),
    "torch": lambda case: run_torch(case, "torch"),
    "torch interpret": lambda case: run_torch(case, "interpret"),
}


def assert_equals_oracle(case: Case, implementations=CPU_IMPLEMENTATIONS) -> None:
    """Every implementation leaves the oracle's bits in every byte of the caches, written or not."""
    want = run_oracle(case)
    for name, run in implementations.items():
        for i, (got, cache) in enumerate(zip(run(case), want, strict=True)):
            different = np.flatnonzero(bits(got) != bits(cache))
            assert not different.size, (
                f"{name}: {different.size} bytes of array {i} differ from the oracle's, first {different[:4]}"
            )


def with_case(case: Case, **changes) -> Case:
    return replace(case, **changes)
