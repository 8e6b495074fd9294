"""Parts of error messages that several modules share."""

import difflib
from collections.abc import Iterable

import torch


def did_you_mean(value: object, known: Iterable[object]) -> str:
    """`` (did you mean 'x'?)`` for the closest known name; an empty text if no name is close, and for a number."""
    if isinstance(value, int):
        return ""
    near = difflib.get_close_matches(str(value), [str(name) for name in known], n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def check_choice(name: str, value: object, known: Iterable[object], error: type[Exception] = ValueError) -> None:
    """Raise ``error`` unless the setting ``name`` has one of its known values: text or integers."""
    known = tuple(known)
    if isinstance(value, bool) or not any(isinstance(value, type(one)) and value == one for one in known):
        choices = ", ".join(map(str, known))
        raise error(f"{name} must be one of {choices}, got {value!r}{did_you_mean(value, known)}")


def first_line(error: BaseException) -> str:
    """Type and first line of an error: ``ValueError: too small``."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def kind_of(value: object) -> str:
    """What a message says after "got": dtype and shape of a tensor, the name of the type of anything else."""
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
