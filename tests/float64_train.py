"""train.py in float64, for torchrun: sums in another order then agree to 1e-12 instead of 1e-6."""

import torch

import train
from errors import run_main

torch.set_default_dtype(torch.float64)
run_main(train.main)
