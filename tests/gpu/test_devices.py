"""Caches that two GPUs share: in JAX by one process, in torch by two under torchrun, with NCCL."""

import subprocess
import sys

import pytest

from tests.cases.processes import ROOT

pytestmark = pytest.mark.gpu


def needs_two_gpus():
    import torch

    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")


@pytest.mark.parametrize("command", [
    ["tests.cases.jax_processes", "0", "1", "0"],
    ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "tests.cases.torch_processes"],
], ids=["jax", "torch"])  # fmt: skip
def test_devices_of_one_host(command):
    needs_two_gpus()
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(" devices\n") + done.stdout.count(" ranks\n") in (3, 12)


def test_the_example_has_the_same_text_on_two(tmp_path):
    from examples.llama.gguf_model import load_model
    from examples.llama.jax_session import JaxLlama
    from tests.cases.examples import generate, some_prompts, write_gguf

    needs_two_gpus()
    model = load_model(write_gguf(tmp_path / "model.gguf"))
    texts = [generate(JaxLlama(model, tp=tp), some_prompts(5, 33), 24)[0] for tp in (1, 2)]
    assert texts[0] == texts[1]
