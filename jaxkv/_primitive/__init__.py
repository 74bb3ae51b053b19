"""The ops as JAX primitives."""
