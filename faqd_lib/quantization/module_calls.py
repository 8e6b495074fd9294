"""Which modules a network calls when it runs, and which activations that are no modules."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.overrides import TorchFunctionMode

from .relu import QuantizedReLU

WEIGHTED = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
RECTIFIERS = (nn.ReLU, nn.ReLU6)
_FUNCTIONS = {  # torch's names of activations that can be called as functions
    "relu", "relu6", "hardtanh", "leaky_relu", "prelu", "rrelu", "elu", "selu", "celu", "gelu", "silu", "mish",
    "hardswish", "hardsigmoid", "sigmoid", "logsigmoid", "tanh", "softplus", "softsign",
    "threshold", "glu", "hardshrink", "softshrink", "tanhshrink",
}  # fmt: skip


class ActivationCalls(TorchFunctionMode):
    """Counts a network's calls of its modules, and of activations that are functions (``F.relu``), while entered.

    ``modules``: number of calls of each module. ``functions``: number of calls by names of the calling module and
    of the function. Calls from inside an activation module are left out.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.modules: Counter[nn.Module] = Counter()
        self.functions: Counter[tuple[str, str]] = Counter()
        self._names = {module: name for name, module in model.named_modules()}
        self._running: list[nn.Module] = []

    def __enter__(self):
        def enter(module: nn.Module, *_: object) -> None:
            self.modules[module] += 1
            self._running.append(module)

        def leave(*_: object) -> None:
            self._running.pop()

        self._handles = [module.register_forward_pre_hook(enter, prepend=True) for module in self._names]
        self._handles += [module.register_forward_hook(leave, always_call=True) for module in self._names]
        return super().__enter__()

    def __exit__(self, *error):
        for handle in self._handles:
            handle.remove()
        return super().__exit__(*error)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name.rstrip("_") in _FUNCTIONS and self._running and not is_activation(self._running[-1]):
            self.functions[self._names[self._running[-1]], name] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def kept_modes(model: nn.Module) -> Iterator[None]:
    """Restore the training or evaluation mode of every module at the end, even after an error."""
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def is_activation(module: nn.Module) -> bool:
    """Whether a module is an activation: torch's, a subclass of a ReLU, quantized, or another library's.

    The last has no modules or parameters of its own, and the name of an activation of torch, as timm's ``GELU`` has.
    """
    kind = type(module)
    named = kind.__name__.lower() in _FUNCTIONS | {"swish"} and not module._modules and not module._parameters
    return isinstance(module, (*RECTIFIERS, QuantizedReLU)) or kind.__module__ == nn.ReLU.__module__ or named
