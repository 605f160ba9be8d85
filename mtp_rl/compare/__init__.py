"""Many runs, seed by seed: which variants, the processes, the statistics."""
