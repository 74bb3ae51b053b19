"""Makes jax-triton 0.4.1 work with the versions of jax and Triton that it does not know."""

import inspect
import os
from typing import Any

import jax


def import_jax_triton() -> Any:
    """Imports jax_triton and mends what this environment needs mended. Each part names when it can go."""
    from triton.backends.nvidia import driver

    if not hasattr(driver, "TMA_TF32"):  # Triton 3.6; jax-triton asks for 3.7 and imports this for TMA only
        driver.TMA_TF32 = 11
    cache_dir = os.environ.get("TRITON_CACHE_DIR")
    import jax_triton

    if cache_dir is not None:  # importing jax_triton deletes the variable; torch's half of the process uses it
        os.environ["TRITON_CACHE_DIR"] = cache_dir

    # jax 0.12 calls dead-code rules with (used outputs, live inputs, equation), jax-triton's knows the outer two.
    from jax._src.interpreters import partial_eval
    from jax_triton import triton_lib

    primitive = triton_lib.triton_kernel_call_p
    rule: Any = partial_eval.dce_rules[primitive]
    if jax.__version_info__ >= (0, 12) and len(inspect.signature(rule).parameters) == 2:
        partial_eval.dce_rules[primitive] = lambda used, live, equation: rule(used, equation)
    return jax_triton
