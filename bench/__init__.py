"""Load, backend and baselines of our own; ``python -m bench`` prints the figures of the README."""
