"""What surrounds training: configs, command line, ranks, checkpoints, logs."""
