"""Run train.py in float64, in which sums in a different order agree to 1e-12 instead of 1e-6.

A separate script, so that torchrun can start it. With STOP_AFTER=n in the environment it sends
itself a SIGTERM in step n.
"""

import os
import signal

import torch

import train
from runtime.cli import run_main

train_step = train.train_step


def stop_after(run: train.Run, step: int) -> dict:
    """Make one step, after a SIGTERM to this process if it is step STOP_AFTER."""
    if str(step + 1) == os.environ.get("STOP_AFTER"):
        os.kill(os.getpid(), signal.SIGTERM)
    return train_step(run, step)


train.train_step = stop_after
torch.set_default_dtype(torch.float64)
run_main(train.main)
