"""Arrays for tests: random bits, poison, and the same bits as NumPy, JAX and torch arrays; one way to call each op."""

from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np

from kvcore import reference
from kvcore.layout import _CONSTANTS, CacheLayout

DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
    "uint8": np.dtype(np.uint8),
}


LAYOUTS = [name for name in _CONSTANTS if not CacheLayout.of(name).latent]
"""Names of the layouts with a place for K and for V."""


@dataclass
class Case:
    """Arguments of a write, as NumPy arrays."""

    key: np.ndarray
    value: np.ndarray
    caches: list[np.ndarray]
    slot_mapping: np.ndarray
    kv_cache_dtype: str = "auto"
    k_scale: float | None = None
    v_scale: float | None = None
    layout: CacheLayout = CacheLayout.NHD
    layer: int | None = None

    def op(self, module):
        single = self.layout.single_array
        return module.reshape_and_cache_flash_diffkv if single else module.reshape_and_cache_flash


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
) -> Case:
    """A case with random slots, drawn without replacement, and poisoned caches.

    `bits`: whether inputs are random bit patterns (NaN, infinities and subnormal numbers among them) or normal draws.
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
        head_size=head_size,
        head_size_v=head_size_v,
        num_layers=num_layers,
        x=8 if "dim/x" in layout.pattern else None,
    )
    draw = random_bits if bits else random_normal
    if slots is None:
        slots = rng.permutation(num_blocks * block_size)[:num_tokens]
    quantised = kv_cache_dtype != "auto"
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
    )


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

    if array.dtype.name in ("bfloat16", "float8_e4m3fn", "float8_e5m2"):
        as_int = torch.from_numpy(array.view(f"int{8 * array.itemsize}"))
        return as_int.to(device).view(getattr(torch, array.dtype.name))
    return torch.from_numpy(array).to(device)


def from_torch(tensor):
    import torch

    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype in (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2):
        size = tensor.element_size()
        as_int = tensor.view(torch.int16 if size == 2 else torch.uint8)
        return as_int.numpy().view(DTYPES[str(tensor.dtype).removeprefix("torch.")])
    return tensor.numpy()


def run_oracle(case: Case) -> list[np.ndarray]:
    caches = [c.copy() for c in case.caches]
    case.op(reference)(
        case.key, case.value, *caches, case.slot_mapping, case.kv_cache_dtype, case.k_scale, case.v_scale,
        layout=case.layout, layer=case.layer,
    )  # fmt: skip
    return caches


def run_torch(case: Case, backend=None, device="cpu") -> list[np.ndarray]:
    import torchkv

    key, value, slots, *caches = (
        to_torch(a.copy(), device) for a in (case.key, case.value, case.slot_mapping, *case.caches)
    )
    none = case.op(torchkv)(
        key, value, *caches, slots, case.kv_cache_dtype, case.k_scale, case.v_scale,
        layout=case.layout, layer=case.layer, backend=backend,
    )  # fmt: skip
    assert none is None
    return [from_torch(c) for c in caches]


def run_jax(case: Case, backend=None) -> list[np.ndarray]:
    import jax.numpy as jnp

    import jaxkv

    new = case.op(jaxkv)(
        jnp.asarray(case.key), jnp.asarray(case.value), *map(jnp.asarray, case.caches), case.slot_mapping,
        case.kv_cache_dtype, case.k_scale, case.v_scale, layout=case.layout, layer=case.layer, backend=backend,
    )  # fmt: skip
    return [np.asarray(c) for c in (new if isinstance(new, tuple) else (new,))]


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
        for got, cache in zip(run(case), want, strict=True):
            different = np.flatnonzero(bits(got) != bits(cache))
            assert not different.size, f"{name}: {different.size} bytes differ from the oracle's, first {different[:4]}"


def with_case(case: Case, **changes) -> Case:
    return replace(case, **changes)
