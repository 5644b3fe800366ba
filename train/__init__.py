"""Training, evaluation and comparison; import this package as ``jattn.train``."""
