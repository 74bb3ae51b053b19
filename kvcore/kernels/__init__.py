"""Triton kernels. Nothing else of kvcore is imported here: they can be loaded compiled and interpreted."""
