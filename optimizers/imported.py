"""Optimizers that are imported by name: PyTorch's, a library's, or one in a file of the user's."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer

from runtime.cli import UserError, reason
from runtime.config import ImportedConfig


def find_class(config: ImportedConfig) -> type[Optimizer]:
    """Return the class that optimizer.name = "package.module:Class" names.

    Raises:
        UserError: if it cannot be imported or is not an optimizer.
    """
    where = f'optimizer.name = "{config.name}"'
    module_name, _, class_name = config.name.partition(":")
    if "" not in sys.path:
        sys.path.append("")  # the user's file may be in the current folder
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # importing a file of the user's can fail in any way
        raise UserError(
            f"{where}: {module_name} cannot be imported ({reason(error)}); install it, or start "
            f"train.py in the folder of your file"
        ) from error

    found = getattr(module, class_name, None)
    if not isinstance(found, type) or not issubclass(found, Optimizer):
        raise UserError(f"{where}: {module_name} has no torch.optim.Optimizer of this name")
    return found


def constructor_arguments(config: ImportedConfig) -> dict[str, Any]:
    """Return the arguments of the constructor, besides the parameter groups.

    Raises:
        UserError: if the constructor does not name one of them.
    """
    names = argument_names(find_class(config))
    for key in ("lr", "weight_decay", "params"):
        if key in config.options:
            raise UserError(
                f"optimizer.options: {key} is not an option; use optimizer.lr and "
                f"optimizer.weight_decay"
            )

    arguments: dict[str, Any] = {"lr": config.lr} | config.options
    if config.weight_decay:
        arguments["weight_decay"] = config.weight_decay
    for key, value in arguments.items():
        if key not in names:
            raise UserError(
                f"{config.name} has no argument {key}; it has {', '.join(names)}. "
                f"Arguments besides lr and weight_decay belong in [optimizer.options]"
            )
        if isinstance(value, list):  # TOML has no tuples
            arguments[key] = tuple(value)
    return arguments


def argument_names(optimizer_class: type[Optimizer]) -> list[str]:
    """Return what a constructor takes by name.

    If it passes on any other argument (`**kwargs`), its base class's names count too.
    """
    names: dict[str, None] = {}
    for base in optimizer_class.__mro__:
        if base is Optimizer:
            break
        if "__init__" not in vars(base):
            continue
        parameters = inspect.signature(vars(base)["__init__"]).parameters.values()
        names |= dict.fromkeys(
            p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
        )
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return [name for name in names if name not in ("self", "params")]


def skipping(optimizer_class: Any) -> Any:
    """Return a subclass whose step changes nothing if `found_inf` is 1.

    Most optimizers cannot decide that on the device, so the step waits for it. Those that can, such
    as torch's fused ones, decide by themselves.
    """

    class Skipping(optimizer_class):
        def step(self, closure: Callable[[], float] | None = None) -> Any:
            if not can_skip(self):
                found_inf = self.__dict__.pop("found_inf", None)  # torch's refuse to see it
                if found_inf is not None and found_inf.item():
                    return None
            return super().step() if closure is None else super().step(closure)

    Skipping.__name__ = optimizer_class.__name__
    return Skipping


def can_skip(optimizer: Optimizer) -> bool:
    """Return whether an optimizer skips a step on the device if `found_inf` is set."""
    return getattr(optimizer, "_step_supports_amp_scaling", False)
