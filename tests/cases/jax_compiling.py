"""What jax traces, lowers and compiles, counted."""

from collections import Counter

import jax

COMPILING: Counter = Counter()
"""Events since it was cleared."""


def _count(event, seconds, **more):
    if event.startswith("/jax/core/compile/"):
        COMPILING[event] += 1


jax.monitoring.register_event_duration_secs_listener(_count)
