"""What tests of blocks share."""

from tests.cases.torch_compile import compiler  # noqa: F401
