"""The driving networks: from a frame and the speed to controls, feedforward or recurrent."""

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

#: Names of the controls, in the order of the outputs.
CONTROL_NAMES = ("steering", "gas", "brake")
_RANGES = ((-driving.FULL_LOCK, driving.FULL_LOCK), (0.0, 1.0), (0.0, 1.0))
# Unit of the speeds that the network reads, in meters per second.
_SPEED_UNIT = 50.0
_NUM_FEATURES = 50

#: Carry of the recurrent layer; None without one.
Carry = Any


class DrivingNetwork(nn.Module):
    """A convolutional encoder of each frame, concatenated with the speed, and a recurrent layer.

    Attributes:
        encoder: images -> features, see `make_network`.
        num_outputs: size of the output.
        cell: of the recurrent layer, such as "gru"; None for a dense layer.
        hidden_size: of the recurrent or dense layer.
        speedometer: whether the speed is an input.
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
        self,
        frames: jax.Array,
        speeds: jax.Array,
        carry: Carry = None,
        *,
        train: bool = False,
        weights: jax.Array | None = None,
    ) -> tuple[jax.Array, Carry]:
        """Map frames and speeds to outputs and the carry after the last frame.

        Args:
            frames: floating [batch, time, height, width, channels].
            speeds: in meters per second, [batch, time].
            carry: of an earlier call; by default zeros.
            train: training mode.
            weights: [batch] or [batch, time], 0 = padding, for the batch norms in training.

        Returns:
            [batch, time, num_outputs], and the carry.
        """
        batch, time = frames.shape[:2]
        if weights is not None:
            weights = jnp.repeat(weights.ravel(), batch * time // weights.size)  # [batch * time]
        keywords = jn.weights_keyword(self.encoder, weights, self.encoder.variables)
        images = frames.reshape(batch * time, *frames.shape[2:])
        features = self.encoder(images, train=train, **keywords)  # [batch * time, features]
        x = nn.relu(features).reshape(batch, time, -1)  # [batch, time, features]
        if self.speedometer:
            speeds = (speeds / _SPEED_UNIT).astype(x.dtype)[..., None]
            x = jnp.concatenate([x, speeds], axis=-1)
        if self.cell is None:
            x = nn.relu(
                jn.layers.Dense(self.hidden_size, precision=self.precision, name="hidden")(x)
            )
        else:
            x, carry = jn.Recurrent(
                self.hidden_size, cell=self.cell, precision=self.precision, name="recurrent"
            )(x, carry=carry, train=train)
        head = jn.layers.Dense(self.num_outputs, precision=self.precision, name="head")
        return head(x).astype(self.precision.output), carry

    def zero_carry(self, num_cars: int) -> Carry:
        """Return the carry at the start of a drive."""
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
        model: "pilotnet" or "resnet", or the cell of a recurrent layer after `encoder`.
        num_outputs: size of the output.
        encoder: of a recurrent network.
        hidden_size: of the last layer before the output.
        precision: compute dtype.
        speedometer: whether the speed is an input.

    Returns:
        The network.
    """
    policy = jn.Precision(compute=jnp.dtype(precision))
    recurrent = model in ("lstm", "gru")
    convolutions: nn.Module
    if (encoder if recurrent else model) == "pilotnet":  # up to PilotNet's layer of 50
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
    """Build the output head of the controls."""
    return jn.GaussianHead(3) if name == "gaussian" else jn.DiscretizedHead(_RANGES, num_bins=21)


def to_inputs(frames: jax.Array) -> jax.Array:
    """Crop uint8 frames [..., 96, 96, 3] to the rows of the world and scale them to [-1, 1]."""
    return frames[..., : driving.NUM_WORLD_ROWS, :, :].astype(jnp.float32) / 127.5 - 1


@dataclasses.dataclass(frozen=True, eq=False)
class NetworkDriver:
    """A trained network as a driver of several cars, see `jaxnets.data.driving.Driver`.

    Attributes:
        network: the module.
        head: maps its outputs to controls.
        variables: its parameters and state.
    """

    network: DrivingNetwork
    head: jn.GaussianHead | jn.DiscretizedHead
    variables: Any

    @property
    def policy(self) -> Any:
        """One compiled decision, see `make_policy`."""
        return make_policy(self.network, self.head)

    def start(self, num_cars: int) -> Carry:
        """Return the carry at the start of a drive."""
        return self.network.zero_carry(num_cars)

    def decide(self, carry: Carry, observation: driving.Observation) -> tuple[Carry, np.ndarray]:
        """Map one observation of each car to the next carry and to controls."""
        carry, controls = self.policy(
            self.variables,
            carry,
            observation.frames,
            observation.speeds,
            observation.decisions == 0,
        )
        return carry, np.asarray(controls)


@functools.cache
def make_policy(network: DrivingNetwork, head: jn.GaussianHead | jn.DiscretizedHead) -> Any:
    """Compile one decision: (variables, carry, frames, speeds, begins) -> (carry, controls)."""

    @jax.jit
    def policy(
        variables: Any, carry: Carry, frames: jax.Array, speeds: jax.Array, begins: jax.Array
    ) -> tuple[Carry, jax.Array]:
        carry = jax.tree.map(lambda state: jnp.where(begins[:, None], 0, state), carry)
        outputs, carry = network.apply(
            variables, to_inputs(frames)[:, None], speeds[:, None], carry
        )
        return carry, head.mean(outputs[:, 0])

    return policy


def measure_latency(driver: NetworkDriver, *, num_decisions: int = 1000) -> dict[str, float]:
    """Time single decisions for one car, from a frame on the host to controls on the host.

    Args:
        driver: a trained network.
        num_decisions: timed decisions, after ten of warm-up.

    Returns:
        Milliseconds at the median and at the 99th percentile.
    """
    frames = np.random.default_rng(0).integers(0, 256, (8, 1, *driving.FRAME_SHAPE), np.uint8)
    speeds, begins = np.full(1, 50, np.float32), np.zeros(1, bool)
    carry, times = driver.start(1), []
    variables = jax.device_put(driver.variables)
    for index in range(num_decisions + 10):
        started = time.perf_counter()
        carry, controls = driver.policy(
            variables, carry, frames[index % len(frames)], speeds, begins
        )
        np.asarray(controls)
        times.append(1000 * (time.perf_counter() - started))
    median, last = np.percentile(times[10:], [50, 99])
    return {"latency_ms_median": round(median, 3), "latency_ms_p99": round(last, 3)}
