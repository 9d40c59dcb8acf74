"""ZeRO-3 releases a gathered parameter after its module has run; here autograd is kept from holding on to it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from torch.autograd.graph import saved_tensors_hooks

if TYPE_CHECKING:
    from torch import Tensor, nn


class _View(NamedTuple):
    """Stands in the graph for a view of a parameter."""

    parameter: Any
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def let_go_of_gathered(module: nn.Module) -> None:
    """Have the graph of a module that ZeRO-3 has sharded refer to its parameters instead of keeping their memory.

    `F.linear` saves a transposed view of its weight, which keeps what was gathered for the forward pass until the
    backward pass, whole models of it. DeepSpeed's answer, `memory_efficient_linear`, replaces `F.linear` in the whole
    process and changes last digits. A parameter is gathered again before its module's backward pass anyway: the view is
    made anew then, and the arithmetic is the same.
    """
    by_elements: dict[int, list[Any]] = {}
    for parameter in module.parameters():
        by_elements.setdefault(int(parameter.ds_numel), []).append(parameter)  # pyright: ignore[reportAttributeAccessIssue]

    def pack(tensor: Tensor) -> Tensor | _View:
        for parameter in by_elements.get(tensor.numel(), ()):
            if parameter.data_ptr() == tensor.data_ptr() and parameter.dtype == tensor.dtype:
                return _View(parameter, tuple(tensor.shape), tensor.stride())
        return tensor

    def unpack(packed: Tensor | _View) -> Tensor:
        if not isinstance(packed, _View):
            return packed
        whole = packed.parameter.data
        assert whole.numel(), "DeepSpeed gathers a module's parameters before its backward pass"
        return whole.as_strided(packed.shape, packed.stride, whole.storage_offset())

    forward = module.forward

    def forward_and_let_go(*args: Any, **kwargs: Any) -> Any:
        with saved_tensors_hooks(pack, unpack):
            return forward(*args, **kwargs)

    module.forward = forward_and_let_go
