"""Augmentation of recorded frames and their controls, for imitation learning.

`move_car` and `moved_controls` synthesize recovery examples: off-center, rotated views with the
expert's corrective controls. The others are a mirror image and photometric augmentation. All take
the frame rows that show the world (`NUM_WORLD_ROWS`), a bird's-eye view with the car pointing up.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxnets.data.driving.expert import FULL_LOCK, WHEELBASE, ExpertStyle

#: Center of the car in the frame: row, column.
CAR_PLACE = (72.0, 48.0)
#: Pixels per meter, vertical and horizontal; frames are downscaled from 1000 x 800.
PIXELS_PER_METER = (16.2 * 96 / 800, 16.2 * 96 / 1000)
#: Decisions at the start of a drive, of four frames each, while the camera zooms in.
ZOOMING_DECISIONS = 13

# Half the height and width of the car in the frame, with its blurred edge.
_CAR_EXTENT = (8, 4)


def move_car(frames: jax.Array, shift: jax.Array, turn: jax.Array) -> jax.Array:
    """Render the view of a car that is shifted and rotated to the left (recovery augmentation).

    The frame is transformed inversely around the car, which stays in place. Pixels from outside
    the frame are the nearest pixel of its border.

    Args:
        frames: [batch, height, width, channels], uint8 or floating.
        shift: meters to the left, [batch].
        turn: radians to the left, after the shift, [batch].

    Returns:
        Shape and dtype of `frames`.

    References:
        Bojarski et al. 2016, arXiv:1604.07316, section 5.2 (artificial shifts and rotations).
    """
    frames = jnp.asarray(frames)
    height, width = frames.shape[1:3]
    down, across = PIXELS_PER_METER
    rows = (CAR_PLACE[0] - jnp.arange(height)) / down  # meters ahead of the car
    columns = (jnp.arange(width) - CAR_PLACE[1]) / across  # meters to its right
    filled = _without_car(frames)

    def one(frame: jax.Array, filled: jax.Array, shift: jax.Array, turn: jax.Array) -> jax.Array:
        cosine, sine = jnp.cos(turn), jnp.sin(turn)
        forward, right = rows[:, None], columns[None, :]
        # Coordinates in the recorded frame of each pixel of the new view.
        source_forward = forward * cosine + right * sine
        source_right = right * cosine - forward * sine - shift
        row = jnp.clip(jnp.round(CAR_PLACE[0] - source_forward * down), 0, height - 1)
        column = jnp.clip(jnp.round(CAR_PLACE[1] + source_right * across), 0, width - 1)
        flat = filled.reshape(height * width, -1)  # [pixels, channels]
        moved = flat[(row * width + column).astype(jnp.int32)]  # [height, width, channels]
        return jnp.where(_car_mask(height, width)[..., None], frame, moved)

    return jax.vmap(one)(frames, filled, shift, turn)


def moved_controls(
    controls: jax.Array, speeds: jax.Array, shift: jax.Array, turn: jax.Array, style: ExpertStyle
) -> jax.Array:
    """Compute the expert's controls for the car of `move_car`.

    Pure pursuit is inverted to recover the lookahead point, and evaluated again from the new pose;
    the yaw damping in the steering is unchanged. Gas is eased for the new angle.

    Args:
        controls: steering, gas and brake of the expert, [batch, 3].
        speeds: in meters per second, [batch].
        shift: meters to the left, [batch].
        turn: radians to the left, [batch].
        style: of the expert.

    Returns:
        [batch, 3].
    """
    steering, gas, brake = jnp.moveaxis(controls, -1, 0)  # each [batch]
    lookahead = style.reach + style.reach_seconds * speeds
    sine = jnp.tan(-steering / style.steering) * lookahead / (2 * WHEELBASE)
    sine = jnp.clip(sine, -0.95, 0.95)
    left, ahead = lookahead * sine, lookahead * jnp.sqrt(1 - jnp.square(sine))
    shifted = left - shift
    left, ahead = (
        shifted * jnp.cos(turn) - ahead * jnp.sin(turn),
        shifted * jnp.sin(turn) + ahead * jnp.cos(turn),
    )
    square = jnp.maximum(jnp.square(left) + jnp.square(ahead), 1e-6)
    # sin(bearing) / distance, as in `pursuit_angle`
    angle = style.steering * jnp.arctan(2 * WHEELBASE * left / square)
    corrected = -jnp.clip(angle, -FULL_LOCK, FULL_LOCK)
    eased = 1 - style.ease * jnp.abs(steering) / FULL_LOCK
    gas = gas / jnp.maximum(eased, 0.1) * (1 - style.ease * jnp.abs(corrected) / FULL_LOCK)
    return jnp.stack([corrected, jnp.clip(gas, 0, 1), brake], axis=-1)


def random_mirror(
    key: jax.Array, frames: jax.Array, controls: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Mirror each example left to right with probability 1/2, with its steering.

    Args:
        key: random key.
        frames: [batch, ..., height, width, channels].
        controls: steering, gas and brake, [batch, ..., 3].

    Returns:
        Frames and controls of the given shapes and dtypes.
    """
    chosen = jax.random.bernoulli(key, 0.5, (len(frames),))
    flip = chosen.reshape((-1,) + (1,) * (frames.ndim - 1))  # [batch, 1, ..., 1]
    signs = jnp.array([-1, 1, 1], controls.dtype).reshape((1,) * (controls.ndim - 1) + (3,))
    flip_controls = chosen.reshape((-1,) + (1,) * (controls.ndim - 1))  # [batch, 1, ..., 1]
    return (
        jnp.where(flip, frames[..., ::-1, :], frames),
        jnp.where(flip_controls, controls * signs, controls),
    )


def random_shadow(key: jax.Array, frames: jax.Array, strength: float) -> jax.Array:
    """Darken each example by a random factor on one side of a random line.

    Args:
        key: random key.
        frames: floating [batch, ..., height, width, channels], black at 0.
        strength: maximum fraction of the light that is removed, in [0, 1].

    Returns:
        The shape of `frames`.

    Raises:
        ValueError: a strength out of range.
    """
    _check_share("strength", strength)
    batch, (height, width) = len(frames), frames.shape[-3:-1]
    angle_key, place_key, dark_key = jax.random.split(key, 3)
    angle = jax.random.uniform(angle_key, (batch, 1, 1), maxval=2 * jnp.pi)
    place = jax.random.uniform(place_key, (batch, 1, 1), minval=-0.5, maxval=0.5)
    rows = jnp.linspace(-0.5, 0.5, height)[None, :, None]
    columns = jnp.linspace(-0.5, 0.5, width)[None, None, :]
    shaded = rows * jnp.sin(angle) + columns * jnp.cos(angle) > place
    dark = jax.random.uniform(dark_key, (batch, 1, 1), maxval=strength)
    light = jnp.where(shaded, 1 - dark, 1.0).astype(frames.dtype)
    # [batch, 1, ..., height, width, 1]
    return frames * light.reshape(batch, *[1] * (frames.ndim - 4), height, width, 1)


def random_brightness(key: jax.Array, frames: jax.Array, strength: float) -> jax.Array:
    """Scale each example by a random factor in [1 - strength, 1 + strength].

    Corresponds to `torchvision.transforms.ColorJitter(brightness=strength)`, without clipping.

    Args:
        key: random key.
        frames: floating [batch, ...], black at 0.
        strength: in [0, 1].

    Returns:
        The shape of `frames`.

    Raises:
        ValueError: a strength out of range.
    """
    _check_share("strength", strength)
    shape = (len(frames), *[1] * (frames.ndim - 1))
    factor = jax.random.uniform(key, shape, minval=1 - strength, maxval=1 + strength)
    return frames * factor.astype(frames.dtype)


def _without_car(frames: jax.Array) -> jax.Array:
    """Replace the car by the pixels directly ahead of it."""
    height, width = frames.shape[1:3]
    row, column = (round(place) for place in CAR_PLACE)
    tall, wide = _CAR_EXTENT
    strip = frames[:, row - tall - 1 : row - tall, column - wide : column + wide + 1]
    rows = jnp.broadcast_to(strip, (len(frames), height, *strip.shape[2:]))
    # [batch, height, strip_width, channels]
    painted = frames.at[:, :, column - wide : column + wide + 1].set(rows)
    return jnp.where(_car_mask(height, width)[None, :, :, None], painted, frames)


def _car_mask(height: int, width: int) -> jax.Array:
    rows = jnp.abs(jnp.arange(height) - CAR_PLACE[0]) <= _CAR_EXTENT[0]
    columns = jnp.abs(jnp.arange(width) - CAR_PLACE[1]) <= _CAR_EXTENT[1]
    return rows[:, None] & columns[None, :]


def _check_share(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} is {value}; give a number in [0, 1]")
