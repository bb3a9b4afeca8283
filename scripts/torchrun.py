"""Run torchrun, but end as train.py does: with its exit status and without torchrun's traceback.

    python scripts/torchrun.py --standalone --nproc_per_node=8 -- train.py \\
        configs/gpt2_125m.toml --run=sophia-g

Takes torchrun's options. If a rank fails, the exit status is that rank's: 2 for a mistake that
train.py has reported in one line, 128 + the number of the signal that stopped it or killed it.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time

# A node that is started again can rejoin only if torchrun does not share its store with the ranks.
os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
# Silences what torch's C++ code prints when another node's agent has left. Read at the import.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousError

# What train.py has reported itself.
REPORTED = {2} | {128 + number for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}

# Ranks of several nodes that end for one reason do not end at the same moment. The node that keeps
# torchrun's store stays this many seconds, because without it the others report only its loss.
LEAVE_AFTER = 3


def main() -> None:
    if os.environ["TORCH_CPP_LOG_LEVEL"] == "ERROR":
        os.environ.pop("TORCH_CPP_LOG_LEVEL")  # the ranks report as usual
    logging.disable()  # torchrun's own lines about each failure
    arguments = run.parse_args(sys.argv[1:])
    try:
        run.run(arguments)
    except ChildFailedError as error:
        status = report(error)
        if not arguments.standalone:
            time.sleep(LEAVE_AFTER)
        sys.exit(status)
    except SignalException as error:
        sys.exit(128 + error.sigval)
    except RendezvousError as error:
        if isinstance(error.__context__, ChildFailedError):  # the other nodes have left before
            sys.exit(report(error.__context__))
        print(f"error: torchrun cannot reach the other nodes: {error}", file=sys.stderr)
        sys.exit(1)


def report(error: ChildFailedError) -> int:
    """Return the exit status of the rank that failed first, and name the rank if it has not."""
    rank, failure = error.get_first_failure()
    status = failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    if status not in REPORTED:
        print(f"error: rank {rank} failed with exit status {status}", file=sys.stderr)
    return status


if __name__ == "__main__":
    main()
