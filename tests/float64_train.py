"""train.py in float64, for torchrun: sums in another order then agree to 1e-12 instead of 1e-6.

STOP_AFTER in the environment ends it by a SIGTERM to itself in that step.
"""

import os
import signal

import torch

import train
from runtime.cli import run_main

make_step = train.make_step


def stop_after(run: train.Run, step: int) -> dict:
    if str(step + 1) == os.environ.get("STOP_AFTER"):
        os.kill(os.getpid(), signal.SIGTERM)
    return make_step(run, step)


train.make_step = stop_after
torch.set_default_dtype(torch.float64)
run_main(train.main)
