"""The ops in XLA's own operations: for CPU, TPU, and wherever there is no Triton."""
