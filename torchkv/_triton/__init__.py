"""The ops as Triton kernels, launched on CUDA and ROCm tensors, or interpreted."""
