"""The framework-free core of jaxkv and torchkv: layouts, contract, plans, kernels, oracle.

Imports neither jax nor torch. Triton is imported by `kvcore.kernels` and `kvcore.interpreter` only.
"""
