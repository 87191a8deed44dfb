"""The networks that drive: a picture and the speed, with or without a memory, to controls."""

from __future__ import annotations

import dataclasses
import functools
import time
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import jaxnets as jn
from jaxnets.data import driving

ModelName = Literal["pilotnet", "resnet", "lstm", "gru"]
EncoderName = Literal["pilotnet", "resnet"]
HeadName = Literal["gaussian", "discretized"]

#: What the outputs mean, in the order of the controls.
CONTROL_NAMES = ("steering", "gas", "brake")
_RANGES = ((-driving.FULL_LOCK, driving.FULL_LOCK), (0.0, 1.0), (0.0, 1.0))
# Speeds are given to the network in units of this, in meters per second.
_SPEED_UNIT = 50.0
_NUM_FEATURES = 50

#: A carry of the recurrent layers; None without any.
Memory = Any


class DrivingNetwork(nn.Module):
    """A convolutional network sees each frame, the speed joins in, a recurrent layer remembers.

    Attributes:
        encoder: images -> features, see `make_network`.
        num_outputs: size of the output.
        cell: of the recurrent layer, such as "gru"; None for no memory.
        hidden_size: of the recurrent layer, or of the dense layer in its place.
        speedometer: whether the speed is seen.
        precision: dtypes.
    """

    encoder: nn.Module
    num_outputs: int
    cell: str | None = None
    hidden_size: int = 64
    speedometer: bool = True
    precision: jn.Precision = jn.Precision()

    @nn.compact
    def __call__(
        self, frames: jax.Array, speeds: jax.Array, memory: Memory = None, *, train: bool = False
    ) -> tuple[jax.Array, Memory]:
        """Map frames and speeds to outputs and the memory behind the last frame.

        Args:
            frames: floating [batch, time, height, width, channels].
            speeds: in meters per second, [batch, time].
            memory: of an earlier call; by default nothing has been seen.
            train: training mode.

        Returns:
            [batch, time, num_outputs], and the memory.
        """
        batch, time = frames.shape[:2]
        seen = self.encoder(frames.reshape(batch * time, *frames.shape[2:]), train=train)
        x = nn.relu(seen).reshape(batch, time, -1)
        if self.speedometer:
            speeds = (speeds / _SPEED_UNIT).astype(x.dtype)[..., None]
            x = jnp.concatenate([x, speeds], axis=-1)
        if self.cell is None:
            x = nn.relu(
                jn.layers.Dense(self.hidden_size, precision=self.precision, name="hidden")(x)
            )
        else:
            x, memory = jn.Recurrent(
                self.hidden_size, cell=self.cell, precision=self.precision, name="recurrent"
            )(x, carry=memory, train=train)
        head = jn.layers.Dense(self.num_outputs, precision=self.precision, name="head")
        return head(x).astype(self.precision.output), memory

    def no_memory(self, num_cars: int) -> Memory:
        """Return the memory of drivers that have seen nothing."""
        if self.cell is None:
            return None
        return jn.Recurrent(self.hidden_size, cell=self.cell, parent=None).zero_carry(num_cars)


def make_network(
    model: ModelName,
    num_outputs: int,
    *,
    encoder: EncoderName,
    hidden_size: int,
    precision: str,
    speedometer: bool = True,
) -> DrivingNetwork:
    """Build a network.

    Args:
        model: "pilotnet" or "resnet" alone, or a recurrent layer behind an encoder.
        num_outputs: size of the output.
        encoder: what stands in front of a recurrent layer.
        hidden_size: of the last layer in front of the output.
        precision: compute dtype.
        speedometer: whether the network sees the speed.

    Returns:
        The network.
    """
    policy = jn.Precision(compute=jnp.dtype(precision))
    recurrent = model in ("lstm", "gru")
    sees = encoder if recurrent else model
    convolutions: nn.Module
    if sees == "pilotnet":  # the speed joins in where PilotNet has its layer of 50
        convolutions = jn.PilotNet(_NUM_FEATURES, hidden_features=(100,), precision=policy)
    else:
        convolutions = jn.ResNet((1, 1, 1), width=16, num_outputs=_NUM_FEATURES, precision=policy)
    return DrivingNetwork(
        convolutions,
        num_outputs,
        cell=model if recurrent else None,
        hidden_size=hidden_size,
        speedometer=speedometer,
        precision=policy,
    )


def make_head(name: HeadName) -> jn.GaussianHead | jn.DiscretizedHead:
    """Build the head that reads controls."""
    return jn.GaussianHead(3) if name == "gaussian" else jn.DiscretizedHead(_RANGES, num_bins=21)


def to_inputs(frames: jax.Array) -> jax.Array:
    """Cut the world out of uint8 frames [..., 96, 96, 3], and scale it to [-1, 1]."""
    return frames[..., : driving.NUM_WORLD_ROWS, :, :].astype(jnp.float32) / 127.5 - 1


@dataclasses.dataclass(frozen=True, eq=False)
class NetworkDriver:
    """A trained network as a driver of several cars, see `jaxnets.data.driving.Driver`.

    Attributes:
        network: the module.
        head: reads its outputs.
        variables: its parameters and state.
    """

    network: DrivingNetwork
    head: jn.GaussianHead | jn.DiscretizedHead
    variables: Any

    @property
    def policy(self) -> Any:
        """One compiled decision, see `make_policy`."""
        return make_policy(self.network, self.head)

    def start(self, num_cars: int) -> Memory:
        """Return the memory of drivers that have seen nothing."""
        return self.network.no_memory(num_cars)

    def decide(self, memory: Memory, observation: driving.Observation) -> tuple[Memory, np.ndarray]:
        """Look once, decide once."""
        memory, controls = self.policy(
            self.variables,
            memory,
            observation.frames,
            observation.speeds,
            observation.decisions == 0,
        )
        return memory, np.asarray(controls)


@functools.cache
def make_policy(network: DrivingNetwork, head: jn.GaussianHead | jn.DiscretizedHead) -> Any:
    """Compile one decision: (variables, memory, frames, speeds, begins) -> (memory, controls)."""

    @jax.jit
    def policy(
        variables: Any, memory: Memory, frames: jax.Array, speeds: jax.Array, begins: jax.Array
    ) -> tuple[Memory, jax.Array]:
        memory = jax.tree.map(lambda state: jnp.where(begins[:, None], 0, state), memory)
        outputs, memory = network.apply(
            variables, to_inputs(frames)[:, None], speeds[:, None], memory
        )
        return memory, head.mean(outputs[:, 0])

    return policy


def measure_latency(driver: NetworkDriver, *, num_decisions: int = 1000) -> dict[str, float]:
    """Time single decisions for one car: a frame on the host to controls on the host.

    Args:
        driver: a trained network.
        num_decisions: behind ten that are not counted.

    Returns:
        Milliseconds at the median and at the 99th percentile.
    """
    frames = np.random.default_rng(0).integers(0, 256, (8, 1, *driving.FRAME_SHAPE), np.uint8)
    speeds, begins = np.full(1, 50, np.float32), np.zeros(1, bool)
    memory, times = driver.start(1), []
    variables = jax.device_put(driver.variables)
    for index in range(num_decisions + 10):
        began = time.perf_counter()
        memory, controls = driver.policy(
            variables, memory, frames[index % len(frames)], speeds, begins
        )
        np.asarray(controls)
        times.append(1000 * (time.perf_counter() - began))
    median, last = np.percentile(times[10:], [50, 99])
    return {"latency_ms_median": round(median, 3), "latency_ms_p99": round(last, 3)}
