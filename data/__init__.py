"""Token files: written by the prepare scripts, read in batches by the trainer."""
