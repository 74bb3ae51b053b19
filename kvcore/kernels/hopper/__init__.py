"""Kernels for Hopper GPUs, in Gluon: imported only where Triton is new enough, and a plan chose one of them."""
