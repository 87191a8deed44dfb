#!/usr/bin/env bash
# The gradient of a convolution's kernel inside jax.lax.scan on CPU.
#
# Guess: a scan of steps costs per step what one compiled step costs.
# Behavior (jax 0.10.1 and 0.12.0.1, x86-64): the forward convolution does, within a factor of 3. The
# kernel gradient of the same convolution takes 20 to 200 times as long per iteration of the loop as
# the same operation compiled on its own, because XLA's CPU compiler calls its threaded convolution
# outside of loops and a scalar loop inside. Training many steps in one program is slow for that reason.
# Output seen (two cores, jax 0.10.1): "kernel gradient: 10 ms on its own, 1789 ms an iteration, ratio
# 184"; 0.12.0.1: 25 ms, 2407 ms, ratio 96.
#
# Fails when the ratio falls below 10. jaxnets avoids it by im2col products; see
# docs/performance/convolution.md.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -q "jax==${JAX_VERSION:-0.10.1}"
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PY'
import time

import jax
import jax.numpy as jnp
from jax import lax

NUM_STEPS = 2
keys = jax.random.split(jax.random.key(0), 3)
x, dy = (jax.random.normal(key, (32, 16, 16, 64)) for key in keys[:2])
kernel = jax.random.normal(keys[2], (3, 3, 64, 64))


def convolve(x, kernel):
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=numbers)


def kernel_gradient(x, kernel, dy):
    return jax.vjp(lambda kernel: convolve(x, kernel), kernel)[1](dy)[0]


@jax.jit
def scanned(x, kernel, dy):
    def step(kernel, scale):
        return kernel + 1e-6 * kernel_gradient(x, kernel, dy * scale), None

    return lax.scan(step, kernel, jnp.arange(1.0, NUM_STEPS + 1))[0]


def milliseconds(function):
    jax.block_until_ready(function(x, kernel, dy))  # compiles
    times = []
    for _ in range(3):
        began = time.perf_counter()
        jax.block_until_ready(function(x, kernel, dy))
        times.append(1000 * (time.perf_counter() - began))
    return min(times)


alone, iteration = milliseconds(jax.jit(kernel_gradient)), milliseconds(scanned) / NUM_STEPS
ratio = iteration / alone
print(f"jax {jax.__version__}")
print(f"kernel gradient: {alone:.0f} ms on its own, {iteration:.0f} ms an iteration, ratio {ratio:.0f}")
assert ratio > 10, "this has changed"
PY
