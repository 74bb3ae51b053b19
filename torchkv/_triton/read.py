"""What launches of `paged_attention` and of `gather_kv` have in common, on CUDA and ROCm tensors."""

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from torchkv._call import AttentionCall, GatherCall, Results
from torchkv._triton.launches import Apart, Kernels, Launch, Launches

Call = AttentionCall | GatherCall


class Reads[K: Kernels](Launches[K]):
    """Launches of an op whose arguments are those of its calls, after tensors for the results or none.

    Args:
        results: Whether there are tensors for the results.
    """

    fields: ClassVar[tuple[str, ...]]
    """Those of the op's calls."""

    def __init__(self, results: bool) -> None:
        self._results, first = results, 2 * results
        places = [first + self.fields.index(name) for name in ("caches", "k_scale", "layer_index")]
        self._caches, k_scale, self._layer_index = places
        last = first + self.fields.index("block_tables")  # without caches, it comes after query or first
        super().__init__(k_scale, lambda tensors: tuple([tensor.shape for tensor in tensors[first:last]]))

    def again(self, arguments: Sequence[Any]) -> Results | None:
        """As for other ops, but all lengths are known, and new tensors for results are apart from others."""
        found = self._known.find(self.flat(arguments))
        if found is None:
            return None
        (launch, pointers, mark), tensors, addresses = found
        if self._results and launch.apart.unseen(tensors, addresses):
            return None
        results = launch.run(pointers(addresses), tensors)
        if self._results:
            mark(tensors)
        return results

    def flat(self, arguments: Sequence[Any]) -> Sequence[Any]:
        i, j = self._caches, self._layer_index
        arguments = super().flat(arguments)
        # The caches come late: query and block_tables have the same places however many there are.
        return (*arguments[:i], *arguments[i + 1 : j], *arguments[i], *arguments[j:])

    def tensors(self, call: Call) -> list[Tensor]:
        arguments = self.flat([*(call.results or ()), *call[: len(self.fields)]])
        return [argument for argument in arguments if isinstance(argument, Tensor)]

    def launch_of(self, kernels: K, call: Call) -> Launch[K]:
        """What is launched for a call."""
        count = len(self.tensors(call))
        pairs = [] if call.results is None else [(0, 1), *[(i, j) for i in range(2) for j in range(2, count)]]
        return Launch(
            kernels,
            call.device,
            kernels.described.cache.extents.num_layers,
            aligned=count - (call.layer_index is not None),
            any_length=(),
            written=range(2) if self._results else (),
            apart=Apart(pairs),
        )
