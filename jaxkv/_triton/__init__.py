"""The ops as Triton kernels, through jax_triton, or interpreted."""
