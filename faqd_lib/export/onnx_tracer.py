"""Trace a network with torch.fx and compute real values beside it, so that sizes, types and flags are plain numbers.

Each traced value knows what it is for one image and for three. A number that is the same for both, such as a height,
is a plain number in the network's code, and may decide a branch or a loop. The number of images stays symbolic. A value
that depends on no image is computed at once and becomes a constant.
"""

import types
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn

_PLAIN = (int, str, type(None), torch.Size, torch.dtype, torch.device, torch.layout)
_FILLED = {"new_zeros", "new_ones", "new_full", "zeros", "ones", "full"}  # their values depend on sizes only
_READING = {"item", "tolist", "equal", "allclose", "is_nonzero"}  # plain values that depend on the pixels


class TracedValue(fx.Proxy):
    """A value of the traced network. ``pair`` is its value for one image and for three."""

    pair: tuple[Any, Any]
    of_images: bool  # False for parameters
    of_pixels: bool  # a plain number that depends on more than sizes

    def __getattr__(self, name: str) -> Any:
        if name in TracedValue.__annotations__ or name.startswith("__"):
            raise AttributeError(name)
        if callable(getattr(self.pair[0], name)):
            return fx.proxy.Attribute(self, name)
        return self.tracer.create_proxy("call_function", getattr, (self, name), {})

    def __len__(self) -> int:
        first, second = map(len, self.pair)
        return first if first == second else super().__len__()

    def __iter__(self) -> Iterator[Any]:
        return (self[index] for index in range(len(self)))

    def __bool__(self) -> bool:
        plain = all(isinstance(value, int) for value in self.pair) and not self.of_pixels
        if plain and bool(self.pair[0]) == bool(self.pair[1]):
            return bool(self.pair[0])
        return super().__bool__()


class Tracer(fx.Tracer):
    """Traces as one node each the modules for which ``is_leaf`` holds, and the functions named in ``known``.

    All other modules and functions are looked into.

    ``image_shape`` is (channels, height, width) of one image.
    """

    def __init__(
        self, is_leaf: Callable[[nn.Module], bool], known: Collection[str], image_shape: Sequence[int]
    ) -> None:
        super().__init__()
        self._is_leaf, self._known = is_leaf, known
        self._images: tuple[torch.Tensor, ...] | None = tuple(torch.zeros(count, *image_shape) for count in (1, 3))
        self._computing = False

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return self._is_leaf(module)

    def trace(self, root: nn.Module, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        graph = super().trace(root, concrete_args)
        for node in graph.nodes:  # else the code of the graph calls torch.fx.wrap for the results of wrapped functions
            node.meta.pop("is_wrapped", None)
        return graph

    def where(self, model: nn.Module) -> str:
        """The module that is being traced, also after an error."""
        name = next(reversed(self.module_stack), "").partition("@")[0]  # "@1" marks a module's second call
        return f"the module {name!r} ({type(model.get_submodule(name)).__name__})" if name else "the network"

    def proxy(self, node: fx.Node) -> TracedValue:
        return TracedValue(node, self)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        return attr_val if self._computing else super().getattr(attr, attr_val, parameter_proxy_cache)

    def call_module(self, m: nn.Module, forward: Callable, args: tuple, kwargs: dict) -> Any:
        return forward(*args, **kwargs) if self._computing else super().call_module(m, forward, args, kwargs)

    def create_proxy(self, kind: str, target: Any, args: tuple, kwargs: dict, *others: Any, **named: Any) -> Any:
        if kind == "placeholder":
            return self._argument(target, args)
        if kind == "get_attr":
            value = self._computed(kind, target, (), {})
            return self._value(
                super().create_proxy(kind, target, args, kwargs, *others, **named), (value, value), False
            )
        given: list[TracedValue] = []
        fx.node.map_aggregate((args, kwargs), lambda one: given.append(one) if isinstance(one, TracedValue) else None)
        wrapped = getattr(target, "__module__", "") == "math"  # torch.fx asks such functions' results for a node
        of_pixels = getattr(target, "__name__", target) in _READING or any(one.of_pixels for one in given)
        if kind == "call_function" and isinstance(target, types.FunctionType) and self._is_foreign(target):
            return self._as_value(target(*args, **kwargs))
        pair = tuple(self._computed(kind, target, *_at(index, (args, kwargs))) for index in (0, 1))
        if not wrapped and not any(one.of_images for one in given):
            return self._as_value(pair[0])
        if not wrapped and not of_pixels and _is_settled(target, pair):
            return pair[0]
        return self._value(super().create_proxy(kind, target, args, kwargs, *others, **named), pair, True, of_pixels)

    def _is_foreign(self, function: Callable) -> bool:
        """Whether a function that ``torch.fx.wrap`` keeps whole is to be looked into."""
        return not function.__module__.startswith("torch.") and function.__name__ not in self._known

    def _as_value(self, result: Any) -> Any:
        """A constant tensor as a traced value: its methods may be given the number of images."""
        if isinstance(result, fx.Proxy) or not isinstance(result, torch.Tensor):
            return result
        return self._value(self.proxy(self.create_arg(result)), (result, result), False)

    def _argument(self, target: str, default: tuple) -> Any:
        """The images for the first argument of ``forward``, the defaults for the others."""
        if self._images is None:
            if default:
                return default[0]
            if target.startswith("*"):
                return {} if target.startswith("**") else ()
            raise TypeError(f"its forward needs {target!r} beside the images")
        images, self._images = self._images, None
        proxy = self._value(super().create_proxy("placeholder", target.lstrip("*"), (), {}), images, True)
        return (proxy,) if target.startswith("*") else proxy

    def _value(
        self, proxy: TracedValue, pair: tuple[Any, Any], of_images: bool, of_pixels: bool = False
    ) -> TracedValue:
        proxy.pair, proxy.of_images, proxy.of_pixels = pair, of_images, of_pixels
        return proxy

    def _computed(self, kind: str, target: Any, args: tuple, kwargs: dict) -> Any:
        with self._plain_torch():
            if kind == "get_attr":
                owner, _, name = target.rpartition(".")
                return getattr(self.root.get_submodule(owner), name)
            if kind == "call_module":
                return self.root.get_submodule(target).forward(*args, **kwargs)
            if kind == "call_method":
                return getattr(args[0], target)(*args[1:], **kwargs)
            return target(*args, **kwargs)

    @contextmanager
    def _plain_torch(self) -> Iterator[None]:
        self._computing, before = True, self._computing
        try:
            yield
        finally:
            self._computing = before


def _at(index: int, arguments: Any) -> Any:
    """The arguments with each traced value replaced by its value for one image (index 0) or for three (1)."""
    return fx.node.map_aggregate(arguments, lambda one: one.pair[index] if isinstance(one, TracedValue) else one)


def _is_settled(target: Any, pair: tuple[Any, Any]) -> bool:
    """Whether a result is the same for any number of images: a plain number, or a tensor filled with a number."""
    first, second = pair
    if isinstance(first, torch.Tensor):
        return getattr(target, "__name__", target) in _FILLED and first.shape == second.shape
    if isinstance(first, tuple) and not isinstance(first, torch.Size):
        return False
    return isinstance(first, _PLAIN) and first == second
