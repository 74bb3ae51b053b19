"""Kernels and threads for tests of launches."""

import threading

from kvcore.plan.kernel import Target
from kvcore.plan.write import plan_write, pointers
from tests.cases.writes import describe

H100 = Target("cuda", 90)


def write_kernel(head_size=128):
    """A kernel of writing and what its pointers point to."""
    write = describe("NHD", head_size=head_size)
    pointees = dict.fromkeys(pointers(write), "bfloat16") | {"slot_mapping_ptr": "int32"}
    pointees |= dict.fromkeys(("k_scale_ptr", "v_scale_ptr", "layer"))
    return plan_write(write, H100).kernel, pointees, frozenset()


def in_threads(count, function):
    """Calls a function with 0, 1, … in as many threads at once; gives the results."""
    results, barrier = [None] * count, threading.Barrier(count)

    def call(i):
        barrier.wait()
        try:
            results[i] = function(i)
        except Exception as error:
            results[i] = error

    threads = [threading.Thread(target=call, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results
