"""What a user did wrong, told in one line: what, where, and how to mend it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable


class UserError(Exception):
    """A mistake in the input (a config, a file, a flag). Its message is one line for the user, not for a debugger."""


def run_main(main: Callable[[], None]) -> None:
    """Run a script's `main`; a UserError becomes one line on stderr and exit status 2, every other error stays loud."""
    try:
        main()
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":  # under torchrun all ranks find the same mistake; one tells it
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
