"""A decoder of Llama 3 8B's shape, decoding greedily in one jitted loop over a paged cache, against its limit.

`uv run python -m benchmarks decode [--devices 2] [--json FILE]`. Random bfloat16 weights. The limit is the time that a
plain device copy takes for the weights and for K and V of all sequences, each read once a step; `ratio` is the limit
over the step's time. Columns `no_…` are the same loop without that part. Several devices share heads, MLPs and
vocabulary.
"""

import argparse
import functools
import gc
import math
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxkv
from benchmarks import report
from benchmarks.common import BLOCK_SIZE, COPY_BYTES, bandwidth

PARTS = ("attention", "rope_and_cache", "head")
SECONDS = 0.35  # of a run: the start of a program, about half a millisecond, does not show

GROUP = 4  # query heads that share a KV head
SPLIT = {
    "qkv": (None, "tp", None, None), "attention_out": ("tp", None), "gate_up": (None, None, "tp"),
    "down": ("tp", None), "head": (None, "tp"),
}  # fmt: skip

Weights = dict[str, Any]
State = tuple[jaxkv.PagedKVCache, Array, Array, Array]
"""Cache, the last token of each sequence, tokens in the cache of each, and the last hidden state."""


@dataclass(frozen=True)
class Shape:
    """Sizes of the model; Llama 3 8B's, divided by a number for tests on a CPU."""

    layers: int
    divide: int = 1
    head_size: int = 128
    transposed: bool = True  # whether matrices are [out, in]
    devices: int = 1

    @property
    def kv_heads(self) -> int:
        return max(1, 8 // self.divide)

    @property
    def heads(self) -> int:
        return GROUP * self.kv_heads

    @property
    def hidden(self) -> int:
        return self.heads * self.head_size

    @property
    def vocabulary(self) -> int:
        return 128256 // self.divide

    @property
    def matrices(self) -> dict[str, tuple[int, ...]]:
        """Rows in and out of a layer's matrices: Q, K and V of a KV head are one, gate and up are one."""
        mlp = 14336 // self.divide
        return {
            "qkv": (self.hidden, self.kv_heads, GROUP + 2, self.head_size),
            "attention_out": (self.hidden, self.hidden),
            "gate_up": (self.hidden, 2, mlp),
            "down": (mlp, self.hidden),
        }

    @cached_property
    def mesh(self) -> Mesh | None:
        """Of several devices."""
        return jax.make_mesh((self.devices,), ("tp",), (AxisType.Auto,)) if self.devices > 1 else None

    def sharding(self, *spec: str | None) -> NamedSharding | None:
        """On the mesh; None without one."""
        return None if self.mesh is None else NamedSharding(self.mesh, P(*spec))

    def spec(self, name: str) -> tuple[str | None, ...]:
        """How a matrix is split: along what comes in, or along heads, columns or vocabulary of what comes out."""
        into, *out = SPLIT[name]
        return (*out, into) if self.transposed else (into, *out)

    def weight_bytes(self, batch: int) -> int:
        """Weights read in a step: all, but of the embedding only a row for each sequence."""
        layer = sum(math.prod(matrix) for matrix in self.matrices.values()) + 2 * self.hidden
        return 2 * (self.layers * layer + (self.vocabulary + 1 + batch) * self.hidden)

    def kv_bytes(self, batch: int, context: int) -> int:
        return 2 * 2 * self.layers * batch * context * self.kv_heads * self.head_size


def make_weights(shape: Shape, max_position: int) -> Weights:
    """On the device: a matrix of random numbers of variance 1 / in keeps activations near 1."""

    @functools.partial(jax.jit, static_argnums=(1, 2))
    def matrix(key: Array, name: str, sizes: tuple[int, ...]) -> Array:
        rows, *columns = sizes
        made = jax.random.normal(key, (*columns, rows) if shape.transposed else sizes, jnp.bfloat16)
        made *= jnp.bfloat16(rows**-0.5)
        sharding = shape.sharding(*shape.spec(name))
        return made if sharding is None else lax.with_sharding_constraint(made, sharding)

    keys = iter(jax.random.split(jax.random.key(0), 2 + shape.layers * len(shape.matrices)))
    ones = jnp.ones(shape.hidden, jnp.bfloat16)
    layers = [
        {name: matrix(next(keys), name, sizes) for name, sizes in shape.matrices.items()}
        | {"attention_norm": ones + 0, "mlp_norm": ones + 0}
        for _ in range(shape.layers)
    ]
    embedding = jax.jit(lambda key: jax.random.normal(key, (shape.vocabulary, shape.hidden), jnp.bfloat16))(next(keys))
    head = matrix(next(keys), "head", (shape.hidden, shape.vocabulary))
    cos_sin = jaxkv.rope_table({"head_dim": shape.head_size, "rope_theta": 500000.0}, max_position)
    weights = {"embedding": embedding, "layers": layers, "final_norm": ones, "head": head, "cos_sin": cos_sin}
    if shape.mesh is None:
        return weights
    return jax.tree.map(lambda x: x if x.committed else jax.device_put(x, shape.sharding()), weights)


def make_cache(shape: Shape, num_blocks: int) -> jaxkv.PagedKVCache:
    """Filled: every block has the same random rows, for zeros take less power to move."""
    cache = jaxkv.PagedKVCache.create(
        num_layers=shape.layers,
        num_blocks=num_blocks,
        block_size=BLOCK_SIZE,
        num_heads=shape.kv_heads,
        head_size=shape.head_size,
    )
    key = jax.random.key(1)
    return jax.tree.map(lambda x: jnp.broadcast_to(jax.random.normal(key, x.shape[2:], x.dtype), x.shape), cache)


def cache_maker(shape: Shape, num_blocks: int) -> Any:
    """What makes the cache where it is to be."""
    make, mesh = functools.partial(make_cache, shape, num_blocks), shape.mesh
    if mesh is None:
        return jax.jit(make)
    specs = jax.eval_shape(make).partition_spec(heads="tp")
    return jax.jit(make, out_shardings=jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs))


def rms_norm(x: Array, weight: Array) -> Array:
    wide = x.astype(jnp.float32)
    return (wide * lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + 1e-5)).astype(x.dtype) * weight[None]


def decode_step(shape: Shape, without: str | None, weights: Weights, tables: Array, state: State) -> State:
    """One token of each sequence. Layers are unrolled: a scan would copy each layer's weights out of a stack."""
    cache, tokens, lengths, _ = state
    batch = tokens.shape[0]
    blocks = jnp.take_along_axis(tables, lengths[:, None] // BLOCK_SIZE, axis=1)[:, 0]
    slots = blocks * BLOCK_SIZE + lengths % BLOCK_SIZE

    def times(x: Array, matrix: Array) -> Array:
        return lax.dot_general(x, matrix, (((1,), (matrix.ndim - 1 if shape.transposed else 0,)), ((), ())))

    x = weights["embedding"][tokens]
    for index, layer in enumerate(weights["layers"]):
        qkv = times(rms_norm(x, layer["attention_norm"]), layer["qkv"])
        # Without a part the program must still compute what that part is given.
        qkv = lax.optimization_barrier(qkv)
        query: Any = jaxkv.heads(qkv, 0, GROUP)
        if without != "rope_and_cache":
            key, value = jaxkv.heads(qkv, GROUP, GROUP + 1), jaxkv.heads(qkv, GROUP + 1, GROUP + 2)
            query, cache = cache.rope_and_cache(
                query, key, value, lengths, weights["cos_sin"], slots, rope="neox", layer=index
            )
        if without != "attention":
            query = cache.attend(query, tables, lengths + 1, layer=index)
        x = x + times(jnp.asarray(query).reshape(batch, shape.hidden), layer["attention_out"])
        gate_up = times(rms_norm(x, layer["mlp_norm"]), layer["gate_up"])
        x = x + times(jax.nn.silu(gate_up[:, 0]) * gate_up[:, 1], layer["down"])
    if without == "head":
        tokens = (jnp.abs(x[:, 0]) * 1000).astype(jnp.int32) % shape.vocabulary
    else:
        logits = times(rms_norm(x, weights["final_norm"]), weights["head"])
        tokens = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return cache, tokens, lengths + 1, x


class Program:
    """The decode loop as one compiled program, in two stages: tracing holds Python, compiling can run beside others."""

    def __init__(self, shape: Shape, without: str | None, steps: int, *arguments: Any) -> None:
        def run(weights: Weights, tables: Array, state: State) -> State:
            return lax.fori_loop(0, steps, lambda _, s: decode_step(shape, without, weights, tables, s), state)

        self.steps, self.sharding = steps, shape.sharding()
        kept = None if shape.mesh is None else jax.tree.map(lambda x: x.sharding, arguments[2])
        self.lowered = jax.jit(run, donate_argnums=2, out_shardings=kept).lower(*arguments)

    def compile(self) -> "Program":
        self.compiled = self.lowered.compile()
        return self

    def time(self, weights: Weights, tables: Array, cache: jaxkv.PagedKVCache, start: int) -> dict[str, Any]:
        """Seconds a step, median of 3, and whether the last hidden state is finite."""
        batch = tables.shape[0]
        times = []
        x = jnp.zeros((batch, weights["embedding"].shape[1]), jnp.bfloat16, device=self.sharding)
        for _ in range(4):
            tokens, lengths = np.arange(batch, dtype=np.int32), np.full(batch, start, np.int32)
            tokens, lengths = (jax.device_put(x, self.sharding) for x in (tokens, lengths))
            state = jax.block_until_ready((cache, tokens, lengths, x))
            started = time.perf_counter()
            cache, _, _, x = jax.block_until_ready(self.compiled(weights, tables, state))
            times.append((time.perf_counter() - started) / self.steps)
        analysis: Any = self.compiled.memory_analysis()
        return {
            "seconds": statistics.median(times[1:]),
            "finite": bool(jnp.isfinite(x).all()),
            # As large as the cache, this would tell of a copy of it.
            "temporary_bytes": getattr(analysis, "temp_size_in_bytes", None),
        }


def measure(shape: Shape, weights: Weights, batch: int, context: int, copied: float, parts: bool) -> dict[str, Any]:
    """A row: all that is known of a batch size. `copied` is the bandwidth of a copy, in bytes a second."""
    weight_bytes, kv_bytes = shape.weight_bytes(batch), shape.kv_bytes(batch, context)
    limit = (weight_bytes + kv_bytes) / copied / shape.devices
    steps = max(2, min(context // 2, 256, math.ceil(SECONDS / limit))) if shape.divide == 1 else 2
    start = context - steps // 2  # so that the context is the average length
    per_sequence = -(-(start + steps) // BLOCK_SIZE)
    order = jax.random.permutation(jax.random.key(2), batch * per_sequence)
    tables = jax.device_put(order.astype(jnp.int32).reshape(batch, per_sequence), shape.sharding())
    row: dict[str, Any] = {"batch": batch, "context": context, "layers": shape.layers, "steps": steps}
    row |= {"devices": shape.devices}
    row |= {"weight_bytes": weight_bytes, "kv_bytes": kv_bytes, "limit_ms": limit * 1e3, "failed": {}}
    row |= {"weights_ms": weight_bytes / copied * 1e3, "kv_ms": kv_bytes / copied * 1e3}

    def programs(names: Sequence[str | None]) -> list[Program]:
        """Compiled side by side, all of them before any is timed."""
        integers = jax.ShapeDtypeStruct((batch,), jnp.int32, sharding=shape.sharding())
        hidden = jax.ShapeDtypeStruct((batch, shape.hidden), jnp.bfloat16, sharding=shape.sharding())
        cache = jax.eval_shape(cache_maker(shape, batch * per_sequence))
        state = cache, integers, integers, hidden
        made = [Program(shape, name, steps, weights, tables, state) for name in names]
        with ThreadPoolExecutor() as pool:
            return list(pool.map(Program.compile, made))

    # The whole program first: its matrix products are tuned once, and the others find the results.
    groups: list[tuple[str | None, ...]] = [(None,), PARTS] if parts else [(None,)]
    for names in groups:
        started = time.perf_counter()
        try:
            compiled = programs(names)
            row.setdefault("compile_s", time.perf_counter() - started)
            for name, program in zip(names, compiled, strict=True):
                gc.collect()
                found = program.time(weights, tables, cache_maker(shape, batch * per_sequence)(), start)
                key = "step" if name is None else f"no_{name}"
                row[f"{key}_ms"] = found.pop("seconds") * 1e3
                if name is None:
                    row |= found | {"tokens_s": batch / row["step_ms"] * 1e3, "ratio": row["limit_ms"] / row["step_ms"]}
        except Exception as error:
            row["failed"][", ".join(name or "step" for name in names)] = f"{type(error).__name__}: {str(error)[:500]}"
    return row


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks decode", description=__doc__)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64], metavar="N")
    parser.add_argument("--context", type=int, default=2048, metavar="N", help="tokens in the cache of a sequence")
    parser.add_argument("--devices", type=int, default=1, metavar="N", help="that share the model's heads")
    parser.add_argument("--layers", type=int, default=32, metavar="N")
    parser.add_argument("--weights", choices=["out-in", "in-out"], default="out-in", help="order of matrices' axes")
    parser.add_argument(
        "--parts", action=argparse.BooleanOptionalAction, default=True, help="time the loop without each"
    )
    parser.add_argument("--divide", type=int, default=1, metavar="N", help="smaller sizes, for a CPU")
    parser.add_argument("--json", help="where to write the results")
    args = parser.parse_args(argv)
    started = time.perf_counter()
    copied = bandwidth(COPY_BYTES // args.divide)
    shape = Shape(args.layers, args.divide, transposed=args.weights == "out-in", devices=args.devices)
    weights = jax.block_until_ready(make_weights(shape, 2 * args.context))
    print(f"{time.perf_counter() - started:4.0f} s  copy: {copied / 1e12:.3f} TB/s; weights made", flush=True)
    rows: list[dict[str, Any]] = []
    for batch in args.batches:
        row = measure(shape, weights, batch, args.context, copied, args.parts)
        rows.append(row)
        times = ", ".join(f"{key[:-3]} {value:.3f}" for key, value in row.items() if key.endswith("_ms"))
        print(f"{time.perf_counter() - started:4.0f} s  batch {batch}, ms: {times}", flush=True)
        for name, what in row["failed"].items():
            print(f"        {name}: {what[:300]}", flush=True)
        more = {"block_size": BLOCK_SIZE, "copy_tb_s": copied / 1e12, "weights": args.weights}
        report.save(args.json, rows, benchmark="decode", model="random, shape of Llama 3 8B", **more)
    columns = {"batch": "d", "context": "d", "step_ms": ".3f", "tokens_s": ".1f", "limit_ms": ".3f", "ratio": ".3f"}
    columns |= {f"no_{part}_ms": ".3f" for part in PARTS} | {"compile_s": ".0f"}
    print(report.table(rows, columns))
