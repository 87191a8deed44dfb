"""Reproducible results: each experiment is one module, run as `python -m experiments.NAME`."""
