"""The benchmark: jaxnets and its peers side by side on one machine.

    pip install -e '.[experiments,benchmark]'
    python -m experiments.benchmark
    python -m experiments.benchmark mlp cnn --against flax torch-fused --rounds 7

Each competitor runs in a process of its own; they take turns, so that only one computes at a time
and a slow minute of the machine hits all of them alike. Nothing here is imported by the processes
that are measured but what they need: a peer's process does not load JAX for jaxnets' sake.
"""
