"""What a network is made of and calls when it runs: its modules, and activations that are no modules."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.overrides import TorchFunctionMode

from .relu import QuantizedReLU

WEIGHTED = (nn.Conv2d, nn.Linear)
RECTIFIERS = (nn.ReLU, nn.ReLU6)
_FUNCTIONS = {  # names under which torch offers activations that a network can call without a module
    "relu", "relu6", "hardtanh", "leaky_relu", "prelu", "rrelu", "elu", "selu", "celu", "gelu", "silu", "mish",
    "hardswish", "hardsigmoid", "sigmoid", "logsigmoid", "tanh", "softplus", "softsign",
    "threshold", "glu", "hardshrink", "softshrink", "tanhshrink",
}  # fmt: skip


class ActivationCalls(TorchFunctionMode):
    """While it is entered, counts what a network calls: its modules, and activations that are functions (``F.relu``).

    ``modules``: calls of each module; ``functions``: calls by (name of the module that calls, name of the function),
    but for those that the modules of activations make themselves.
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
    """Training or evaluation mode of every module as before, whatever happens inside."""
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def is_activation(module: nn.Module) -> bool:
    """Whether a module is an activation: one of torch's, one of theirs with another class, or a quantized one."""
    return isinstance(module, (*RECTIFIERS, QuantizedReLU)) or type(module).__module__ == nn.ReLU.__module__
