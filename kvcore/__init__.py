"""The framework-free core of jaxkv and torchkv: layouts, contract, plans, kernels, oracle.

Imports neither jax nor torch. Triton is imported by `kvcore.kernels` and `kvcore.run` only.
"""

from typing import TYPE_CHECKING

from kvcore.installed import version_attribute

__version__: str

if not TYPE_CHECKING:  # for which every name would be an attribute
    __getattr__ = version_attribute(__name__)
