"""Command lines and the errors of their users: one line that says what, where and how to fix it."""

from __future__ import annotations

import argparse
import errno
import math
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any, NoReturn


class UserError(Exception):
    """A mistake in the input: a config, a file, a flag. Its message is one line for the user."""


class SharedError(UserError):
    """A UserError that every rank raises, after rank 0 has printed it for all of them."""


def reason(error: BaseException) -> str:
    """Return an exception's message as one short line, for the message of a UserError."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def run_main(main: Callable[[], None]) -> None:
    """Run a script's `main` and turn expected errors into exit statuses.

    A UserError or OSError becomes one line on stderr and exit status 2. With DEBUG=1 in the
    environment the traceback is printed too.
    """
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output has closed it, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (UserError, OSError) as error:
        if os.environ.get("DEBUG") == "1":
            traceback.print_exc()
        if not isinstance(error, SharedError):
            rank = os.environ.get("RANK", "0")
            where = f"rank {rank}: " if rank != "0" else ""
            print(f"error: {where}{describe(error)}", file=sys.stderr)
        if os.environ.get("WORLD_SIZE", "1") != "1":  # as in distributed.exit_process
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(2)
        sys.exit(2)


def warn(message: str) -> None:
    """Print a warning. Of several ranks only rank 0 does."""
    if os.environ.get("RANK", "0") == "0":
        print(f"warning: {message}", file=sys.stderr)


def describe(error: UserError | OSError) -> str:
    """Return the message of an error that the user can mend, as one line."""
    if isinstance(error, UserError):
        return str(error)
    where = f"{error.filename}: " if error.filename else ""
    if error.errno == errno.ENOSPC:
        return (
            f"{where}the disk is full; free some space and run the same command again "
            f"(train.py with --resume)"
        )
    return f"{where}{error.strerror or reason(error)}; fix that and run the same command again"


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises UserError, shows defaults and keeps its help's line breaks."""

    def __init__(self, description: str | None = None, **options: Any) -> None:
        layout = argparse.RawDescriptionHelpFormatter
        super().__init__(
            description=description, formatter_class=layout, allow_abbrev=False, **options
        )

    def add_argument(self, *names: Any, **options: Any) -> argparse.Action:
        """Add an argument whose help names its default, unless the text already does."""
        text = options.get("help", "")
        if options.get("default") not in (None, "", argparse.SUPPRESS) and "default" not in text:
            options["help"] = f"{text} (default: %(default)s)".strip()
        return super().add_argument(*names, **options)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def number(
    kind: type[int] | type[float], low: float, high: float = math.inf
) -> Callable[[str], float]:
    """Return an argparse type that accepts numbers from `low` to `high`."""

    def convert(text: str) -> float:
        value = kind(text)
        if not low <= value <= high:
            bounds = f"at least {low}" if high == math.inf else f"from {low} to {high}"
            raise argparse.ArgumentTypeError(f"{text} is not {bounds}")
        return value

    convert.__name__ = kind.__name__  # argparse prints it when the text cannot be converted
    return convert
