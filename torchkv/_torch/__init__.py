"""The ops in torch's own operations: for CPU tensors and wherever there is no Triton."""
