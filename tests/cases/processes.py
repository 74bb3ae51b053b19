"""Code in fresh processes: in one in which packages may be hidden, or in several that are joined."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import kvcore

ROOT = Path(kvcore.__file__).parents[1]


# Makes imports of some packages fail as if they were not installed.
HIDE = """
import sys

class Hidden:
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in {names!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}: hidden by a test", name=name)

sys.meta_path.insert(0, Hidden)
"""


# One token into slot 5, that is place 1 of block 1.
JAX_WRITE = """
import jax.numpy as jnp
row = jnp.full((1, 2, 8), 3.0)
key_cache, value_cache = jaxkv.reshape_and_cache_flash(
    row, -row, jnp.zeros((3, 4, 2, 8)), jnp.zeros((3, 4, 2, 8)), jnp.array([5]))
assert (key_cache[1, 1] == 3).all() and (key_cache == 0).sum() == 11 * 16
assert (value_cache[1, 1] == -3).all() and (value_cache == 0).sum() == 11 * 16
kv_cache = jaxkv.reshape_and_cache_flash_diffkv(
    row, -row, jnp.zeros((3, 4, 2, 16), jnp.uint8), jnp.array([5]), "fp8", 1.5, layout="PACKED_NHD")
assert (kv_cache[1, 1, :, :8] == 0x40).all() and (kv_cache[1, 1, :, 8:] == 0xC4).all()
"""


TORCH_WRITE = """
import torch
row = torch.full((1, 2, 8), 3.0)
key_cache, value_cache = torch.zeros(2, 3, 4, 2, 8)
torchkv.reshape_and_cache_flash(row, -row, key_cache, value_cache, torch.tensor([5]))
assert (key_cache[1, 1] == 3).all() and (key_cache == 0).sum() == 11 * 16
assert (value_cache[1, 1] == -3).all() and (value_cache == 0).sum() == 11 * 16
kv_cache = torch.zeros(3, 4, 2, 16, dtype=torch.uint8)
torchkv.reshape_and_cache_flash_diffkv(row, -row, kv_cache, torch.tensor([5]), "fp8", 1.5, layout="PACKED_NHD")
assert (kv_cache[1, 1, :, :8] == 0x40).all() and (kv_cache[1, 1, :, 8:] == 0xC4).all()
"""


def run(code, hidden=(), *, text=False):
    """Runs code without the hidden packages; gives what it printed, or the names of all modules that it imported."""
    code = f"{HIDE.format(names=set(hidden))}\n{code}\nprint('modules:', *sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout if text else set(done.stdout.rpartition("modules:")[2].split())


def packages(modules):
    return {name.partition(".")[0] for name in modules}


def run_joined(module, count, **environment):
    """What `python -m MODULE INDEX COUNT PORT` prints, line by line, in each of several processes at a time."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", module, str(index), str(count), str(port)],
            cwd=ROOT, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for index in range(count)
    ]  # fmt: skip
    try:
        results = [process.communicate(timeout=420) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, err) in zip(processes, results, strict=True):
        assert process.returncode == 0, err
    return [out.splitlines() for out, _ in results]
