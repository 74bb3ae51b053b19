"""A small Llama over a paged KV cache, once in JAX and once in torch; `generate.py` is its command line."""
