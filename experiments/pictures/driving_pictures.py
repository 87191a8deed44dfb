"""Figures of drives: scores, saliency, an animation of a lap."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import jax
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image, ImageDraw

import jaxnets as jn
from experiments.driving_networks import NetworkDriver, to_inputs
from jaxnets.data import driving
from jaxnets.models.convolutional.pilotnet import CONVOLUTIONS
from jaxnets.tools.pictures import grids

_ENLARGED = 4
_NUM_SHOWN = 8


def scores(
    networks: Sequence[Sequence[driving.Score]], expert: Sequence[driving.Score], path: Path
) -> None:
    """Draw the sorted scores of each network and of the expert.

    Args:
        networks: scores of each network, one per track.
        expert: scores on the same tracks.
        path: PNG file.
    """
    figure, axis = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
    for index, drives in enumerate(networks):
        label = "network" if index == 0 else None
        points = sorted(score.points for score in drives)
        axis.plot(points, marker=".", color="tab:blue", label=label)
    axis.plot(sorted(score.points for score in expert), color="tab:orange", label="expert")
    axis.set(xlabel="tracks, sorted by score", ylabel="points")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def gradient_maps(driver: NetworkDriver, drive: driving.Drive) -> np.ndarray:
    """Return the input gradient of the steering for each frame, [frames, height, width].

    A recurrent network reads each frame with a zero carry.
    """
    network, head = driver.network, driver.head

    @jax.jit
    def maps(frames: jax.Array, speeds: jax.Array) -> jax.Array:
        def steering(images: jax.Array) -> jax.Array:
            outputs, _ = network.apply(driver.variables, images[:, None], speeds[:, None])
            return head.mean(outputs[:, 0])[:, 0]

        return jn.input_gradient(steering, to_inputs(frames))

    return _map_batches(maps, drive.arrays["frames"], drive.arrays["speeds"])


def backprop_maps(driver: NetworkDriver, drive: driving.Drive) -> np.ndarray | None:
    """Return the VisualBackProp of PilotNet's convolutions; None for other encoders."""
    network = driver.network
    if not isinstance(network.encoder, jn.PilotNet):
        return None

    @jax.jit
    def maps(frames: jax.Array, speeds: jax.Array) -> jax.Array:
        images = to_inputs(frames)
        _, inside = jn.capture(network, driver.variables, images[:, None], speeds[:, None])
        activations = [inside["encoder"][f"map_{index}"] for index in range(len(CONVOLUTIONS))]
        kernels_and_strides = [(size, strides) for _, size, strides in CONVOLUTIONS]
        return jn.visual_backprop(activations, kernels_and_strides, images.shape[1:3])

    return _map_batches(maps, drive.arrays["frames"], drive.arrays["speeds"])


def saliency(driver: NetworkDriver, drive: driving.Drive, path: Path) -> None:
    """Draw frames of a drive, and below them their saliency maps.

    Args:
        driver: the network.
        drive: with frames.
        path: PNG file.
    """
    chosen = np.linspace(0, len(drive.arrays["speeds"]) - 1, _NUM_SHOWN + 2).astype(int)[1:-1]
    part = driving.Drive(
        drive.seed, drive.score, {name: array[chosen] for name, array in drive.arrays.items()}
    )
    frames = part.arrays["frames"][:, : driving.NUM_WORLD_ROWS]
    rows = [frames]
    for maps in (gradient_maps(driver, part), backprop_maps(driver, part)):
        if maps is not None:
            rows.append(_overlaid(frames, maps))
    sheet = np.stack(rows).repeat(2, axis=2).repeat(2, axis=3)
    grids.grid(sheet, path)


def film(driver: NetworkDriver, drive: driving.Drive, path: Path, *, seconds: float) -> None:
    """Draw a lap as an animation: the camera with its saliency map, and the controls.

    Args:
        driver: the network.
        drive: with frames.
        path: GIF file.
        seconds: between two decisions; every second one is drawn.
    """
    frames = drive.arrays["frames"][:, : driving.NUM_WORLD_ROWS]
    maps = backprop_maps(driver, drive)
    maps = gradient_maps(driver, drive) if maps is None else maps
    shown = _overlaid(frames, maps)
    panels = []
    for index in range(0, len(frames), 2):
        picture = shown[index].repeat(_ENLARGED, axis=0).repeat(_ENLARGED, axis=1)
        panels.append(
            _panel(picture, drive.arrays["controls"][index], drive.arrays["speeds"][index])
        )
    # One palette for all panels, so that colors do not flicker; six panels contain every color.
    chosen = [panels[i] for i in np.linspace(0, len(panels) - 1, 6).astype(int)]
    palette = Image.fromarray(np.concatenate(chosen)).quantize(128, Image.Quantize.MAXCOVERAGE)
    reduced = [panel.quantize(palette=palette, dither=Image.Dither.NONE) for panel in panels]
    reduced[0].save(
        path, save_all=True, append_images=reduced[1:], duration=round(2000 * seconds), loop=0
    )


def _panel(picture: np.ndarray, controls: np.ndarray, speed: float) -> Image.Image:
    """Draw bars of steering, gas and brake, and the speed, below an image."""
    height, width = picture.shape[:2]
    panel = Image.new("RGB", (width, height + 48), "black")
    panel.paste(Image.fromarray(picture))
    draw = ImageDraw.Draw(panel)
    middle, steering = width // 2, float(np.clip(controls[0] / driving.FULL_LOCK, -1, 1))
    ends = sorted((middle, middle + steering * (middle - 60)))
    draw.rectangle((ends[0], height + 6, ends[1], height + 18), fill="white")
    draw.line((middle, height + 2, middle, height + 22), fill="gray")
    bars = ((controls[1], "limegreen", 60), (controls[2], "red", middle + 10))
    for value, color, left in bars:
        length = float(np.clip(value, 0, 1)) * (middle - 70)
        if length >= 1:
            draw.rectangle((left, height + 28, left + length, height + 40), fill=color)
    draw.text((4, height + 5), "steering", fill="white")
    draw.text((4, height + 27), "gas, brake", fill="white")
    draw.text((width - 52, height + 5), f"{speed:.0f} m/s", fill="white")
    return panel


def _overlaid(frames: np.ndarray, maps: np.ndarray) -> np.ndarray:
    """Darken the frames and tint the salient pixels."""
    bright = np.quantile(maps, 0.995, axis=(1, 2), keepdims=True)
    shares = np.clip(maps / np.maximum(bright, 1e-12), 0, 1)[..., None]
    tint = np.array([255, 60, 220])
    mixed = 0.45 * frames * (1 - 0.6 * shares) + 0.85 * shares * tint
    return np.clip(mixed, 0, 255).astype(np.uint8)


def _map_batches(
    function: jax.stages.Wrapped, frames: np.ndarray, speeds: np.ndarray
) -> np.ndarray:
    """Map 32 frames per call, with the last batch padded, so that one program is compiled."""
    maps = []
    for start in range(0, len(frames), 32):
        part = frames[start : start + 32], speeds[start : start + 32]
        missing = 32 - len(part[1])
        padded = [np.pad(a, [(0, missing)] + [(0, 0)] * (a.ndim - 1)) for a in part]
        maps.append(np.asarray(function(*padded))[: len(part[1])])
    return np.concatenate(maps)
