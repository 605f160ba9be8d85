"""Programs compiled ahead of time for a target that is not at hand."""
