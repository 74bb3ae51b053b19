"""Models of the example's tests."""

import importlib.util
import sys

import gguf
import jax
import pytest

from examples.llama.gguf_model import ArrayReader, find_model, load_model
from tests.cases.examples import EXAMPLES, PROMPTS, TWINS, write_gguf


@pytest.fixture(scope="module", autouse=True)
def quick_reader():
    """transformers reads a GGUF file twice, 3 s each time; through our reader, 1 s."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf, "GGUFReader", ArrayReader)
        yield


@pytest.fixture(scope="module")
def smollm():
    return load_model(find_model())


@pytest.fixture(scope="module")
def prompt_ids(smollm):
    return [smollm.tokenizer.encode(prompt).ids for prompt in PROMPTS]


@pytest.fixture(scope="module")
def small_file(tmp_path_factory):
    return write_gguf(tmp_path_factory.mktemp("small") / "small.gguf")


@pytest.fixture(scope="module")
def small(small_file):
    return load_model(small_file)


@pytest.fixture(scope="module")
def small_twins(small):
    return {name: twin(small) for name, twin in TWINS.items()}


@pytest.fixture(scope="module")
def cli():
    """examples/generate.py as a module. It finds its own `llama` beside it."""
    sys.path.insert(0, str(EXAMPLES))
    spec = importlib.util.spec_from_file_location("generate_example", EXAMPLES / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(EXAMPLES))


@pytest.fixture
def quick_compiler():
    """XLA takes half the time to compile. Last bits differ, which tokens do not show."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
