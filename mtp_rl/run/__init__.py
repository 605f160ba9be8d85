"""A run on disk: workdir, checkpoints, metrics, signals."""
