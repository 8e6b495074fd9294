"""Modules that take long to import, imported when they are first used."""

from importlib import import_module


class LazyModule:
    """Stands for a module: ``plt = LazyModule("matplotlib.pyplot")`` imports it at ``plt.subplots``, not before.

    Attributes can be read, not set. The first use raises ImportError if there is no such module.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> object:
        return getattr(import_module(self._name), attribute)
