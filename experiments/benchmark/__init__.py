"""The benchmark: jaxnets against other libraries on one machine.

    pip install -e '.[experiments,benchmark]'
    python -m experiments.benchmark
    python -m experiments.benchmark mlp cnn --against flax torch-fused --rounds 7

Each competitor runs in its own process. They take turns, so that only one computes at a time and a
slow minute of the machine affects all of them. A measured process imports only what it needs: the
process of torch does not load JAX.
"""
