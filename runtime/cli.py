"""What a user did wrong, told in one line: what, where, and how to mend it."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn


class UserError(Exception):
    """A mistake in the input (a config, a file, a flag). Its message is one line for the user, not for a debugger."""


def reason(error: Exception) -> str:
    """An exception in one short line, for the message of a UserError."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def run_main(main: Callable[[], None]) -> None:
    """Run a script's `main`. A UserError, or a disk that refuses, becomes one line on stderr and exit status 2."""
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (UserError, OSError) as error:
        if isinstance(error, OSError):
            where = f"{error.filename}: " if error.filename else ""
            error = UserError(f"{where}{error.strerror or reason(error)}; mend that, what was written before is whole")
        if os.environ.get("RANK", "0") == "0":  # under torchrun all ranks find the same mistake; one tells it
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


class Parser(argparse.ArgumentParser):
    """argparse's, but its help keeps the description's lines and names defaults, and a complaint is a UserError."""

    def __init__(self, description: str | None = None, **options: Any) -> None:
        layout = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=layout, allow_abbrev=False, **options)

    def add_argument(self, *names: Any, **options: Any) -> argparse.Action:
        """argparse's; the help tells the default, where there is one and the text does not."""
        if options.get("default") not in (None, "", argparse.SUPPRESS) and "default" not in options.get("help", ""):
            options["help"] = f"{options.get('help', '')} (default: %(default)s)".strip()
        return super().add_argument(*names, **options)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def number(kind: type[int] | type[float], low: float, high: float = math.inf) -> Callable[[str], float]:
    """An argparse type: a number from `low` to `high`, refused outside with the bounds in the message."""

    def convert(text: str) -> float:
        value = kind(text)
        if not low <= value <= high:
            bounds = f"at least {low}" if high == math.inf else f"from {low} to {high}"
            raise argparse.ArgumentTypeError(f"{text} is not {bounds}")
        return value

    convert.__name__ = kind.__name__  # argparse names it where the text is no number at all
    return convert
