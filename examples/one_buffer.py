"""One cache in one memory: a torch model fills it with a prompt, a jitted JAX loop decodes from it.

    uv run python examples/one_buffer.py

The rules are in docs/one-buffer.md. The two "models" here are random keys and values.
"""

import functools

import jax
import jax.numpy as jnp
import torch

import jaxkv
import torchkv

BLOCK, PROMPT, STEPS = 16, 40, 8

cache = jaxkv.PagedKVCache.create(num_blocks=16, block_size=BLOCK, num_heads=2, head_size=64)  # JAX owns the memory
address = cache.caches[0].unsafe_buffer_pointer()
table = [7, 2, 11]

# torch writes the prompt
view = torchkv.from_dlpack(cache)
device = view.caches[0].device
key, value = torch.randn(2, PROMPT, 2, 64, device=device).bfloat16()
block_tables = torch.tensor([table], dtype=torch.int32, device=device)
starts, lengths = (torch.tensor(x, dtype=torch.int32, device=device) for x in ([0, PROMPT], [PROMPT]))
view.write(key, value, torchkv.slot_mapping(block_tables, starts, lengths, BLOCK, PROMPT))
if device.type == "cuda":
    torch.cuda.synchronize()  # JAX does not know of torch's streams
del view  # JAX donates the memory now


@functools.partial(jax.jit, donate_argnums=0)
def decode(cache, lengths):
    """Some tokens, each written in place and attended to."""

    def step(carry, number):
        cache, lengths = carry
        lengths = lengths + 1
        row = jax.random.normal(jax.random.key(number), (3, 1, 2, 64), jnp.bfloat16)
        slots = jaxkv.slot_mapping(jnp.array([table]), None, lengths, BLOCK)
        cache = cache.write(row[0], row[1], slots)
        return (cache, lengths), cache.attend(row[2], jnp.array([table]), lengths)

    (cache, _), out = jax.lax.scan(step, (cache, lengths), jnp.arange(STEPS))
    return cache, out


cache, out = decode(cache, jnp.array([PROMPT]))

# torch reads what both have written
view = torchkv.from_dlpack(jax.block_until_ready(cache))
lengths = torch.tensor([PROMPT + STEPS], dtype=torch.int32, device=device)
read, _ = view.gather(block_tables, lengths, max_len=PROMPT + STEPS)
assert torch.equal(read[0, :PROMPT], key)
assert cache.caches[0].unsafe_buffer_pointer() == address
print(f"{PROMPT} tokens written by torch, {len(out)} by JAX, in one memory")
