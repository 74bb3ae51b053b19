"""What is installed: the distribution's version, and what to install where a package is missing."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

DISTRIBUTION = "jaxkv"

JAX = "jax is not installed, and jaxkv needs it: install jaxkv[jax], or jaxkv[cuda13] for an NVIDIA GPU"
TORCH = "torch is not installed, and torchkv needs it: install jaxkv[torch]"
_FOR_JAX = "jaxkv[cuda13] for JAX on an NVIDIA GPU, jaxkv[triton] beside a JAX of your own"
TRITON = (
    "Triton is not installed, and its kernels are what runs on CUDA and ROCm devices and with backend 'interpret': "
    f"install {_FOR_JAX}, jaxkv[torch] for torch"
)
JAX_TRITON = (
    f"jax-triton is not installed, and JAX starts Triton's kernels with it on CUDA and ROCm devices: install {_FOR_JAX}"
)


@contextmanager
def needed(package: str, message: str) -> Iterator[None]:
    """Explains an import that fails because a package is not installed. One that is broken keeps its own error.

    Args:
        package: The name that is imported.
        message: What to say.

    Raises:
        ModuleNotFoundError: the package is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise ModuleNotFoundError(message, name=package) from error


def version_attribute(module: str) -> Callable[[str], str]:
    """A module's `__getattr__` that knows `__version__`, looked up when it is asked for: reading it takes milliseconds.

    A copy that was not installed has no version.
    """

    def attribute(name: str) -> str:
        if name == "__version__":
            from importlib import metadata

            try:
                return metadata.version(DISTRIBUTION)
            except metadata.PackageNotFoundError:
                pass
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    return attribute
