"""Kernels of a plan, compiled or interpreted: neither torch nor JAX is needed."""
