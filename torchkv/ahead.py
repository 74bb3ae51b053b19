"""The public function that compiles ahead of time."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager
from torch.nn import Parameter
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from kvcore.contract.checks import check_callable
from torchkv._library.base import PREPARED


def precompile(function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> int:
    """Compiles all that a call would need, without running or changing anything: a server's warm-up.

    The call is `function(*args, **kwargs)`. It is made with fake tensors, which have no memory, in place of all others,
    also of those that function finds elsewhere: a model's weights, a cache. torchkv's ops are checked as always, and
    their kernels are compiled for the tensors' device, and loaded; calls like this one then find them. Several threads
    may each compile something.

    What kernels depend on are dtypes, shapes, strides, options, and which tensors begin at multiples of 16 bytes. All
    memory counts as beginning at such a multiple, as torch's allocator has it; slices of it begin where they do.

    function is Python that runs, once: it cannot ask for values of tensors, and what it does beside torch's operations
    is done. A function that `torch.compile` made runs as the one that it was made of: kernels that torch itself
    compiles are not compiled here.

    Args:
        function: An op, a method of `PagedKVCache`, a `functools.partial`, or a whole step of a model.
        args: Its arguments. In place of tensors, whether alone or in another pytree, there may be tensors on the device
            "meta", which stand for ones on the current GPU, or on the CPU where there is none; or `FakeTensor`s, whose
            mode is then used: one that allows what is not fake, if function finds real tensors elsewhere.
        kwargs: Its arguments by name.

    Returns:
        How many different kernels of torchkv the call launches. 0 on a CPU, where there is nothing to compile.

    Raises:
        TypeError: function is not callable, or the call raises it.
        ValueError: the call raises it.

    Example:
        >>> key = torch.empty((1, 1, 2), device="meta")  # 1 token, 1 head of 2 elements
        >>> key_cache, value_cache = torch.empty((2, 3, 4, 1, 2), device="meta")  # each of 3 blocks of 4 slots
        >>> slot_mapping = torch.empty(1, dtype=torch.int32, device="meta")
        >>> kernels = torchkv.precompile(
        ...     torchkv.reshape_and_cache_flash, key, key, key_cache, value_cache, slot_mapping
        ... )
        >>> kernels == (1 if torch.cuda.is_available() else 0)
        True
    """
    check_callable("function", function)
    while isinstance(function, functools.partial):
        function, args, kwargs = function.func, (*function.args, *args), function.keywords | kwargs
    leaves, tree = pytree.tree_flatten((args, kwargs))
    mode = detect_fake_mode(leaves) or FakeTensorMode(allow_non_fake_inputs=True)
    with mode, _MetaOnGpu(mode) as on_gpu:
        fakes = [on_gpu(mode.from_tensor(leaf)) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        args, kwargs = pytree.tree_unflatten(fakes, tree)
        kernels: dict[int, Any] = {}
        token = PREPARED.set(kernels)
        try:
            function(*args, **kwargs)
        finally:
            PREPARED.reset(token)
    return len(kernels)


def _usual_device() -> torch.device:
    """The current GPU; where there is none, the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


class _MetaOnGpu(TorchDispatchMode):
    """Has torch's operations take tensors on the device "meta" for fake tensors on the current GPU, or on the CPU.

    While a mode like this one is active, functions of torch.compile run as what they were made of.
    """

    def __init__(self, mode: FakeTensorMode) -> None:
        super().__init__()
        self._mode, self._device = mode, _usual_device()
        self._moved: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, tensor: Tensor) -> Tensor:
        """The tensor itself, or the fake one for a tensor on "meta", whose views' fake ones share its memory."""
        if tensor.device.type != "meta":
            return tensor
        fake = self._mode.from_tensor(tensor)  # the same each time
        if id(fake) not in self._moved:
            with in_kernel_invocation_manager(self._mode):
                plain = fake.detach().requires_grad_(fake.requires_grad)
            self._moved[id(fake)] = fake, FakeTensor(self._mode, plain, self._device)
        return self._moved[id(fake)][1]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # A fake mode runs what has no fake tensor among its arguments but a number: `counter.add_(1)`, too.
        convert = self._fake if func._schema.is_mutable else self
        args, kwargs = pytree.tree_map_only(Tensor, convert, (args, kwargs or {}))
        return func(*args, **kwargs)

    def _fake(self, tensor: Tensor) -> Tensor:
        """The fake tensor for one that has memory."""
        return self(self._mode.from_tensor(tensor) if type(tensor) in (Tensor, Parameter) else tensor)
