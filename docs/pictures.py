"""Draws the pictures of the family pages: `python docs/pictures.py`, a minute on a CPU.

The pictures that this file does not draw come from runs of the experiments; their captions name
the command.
"""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import optax

import jaxnets as jn

FOLDER = Path(__file__).parent / "images"


def spirals(num_points: int) -> dict[str, np.ndarray]:
    """Two classes of points, wound around each other."""
    rng = np.random.default_rng(0)
    labels = np.arange(num_points) % 2
    distance = np.sqrt(rng.uniform(0.02, 1, num_points))
    angle = 3 * np.pi * distance + np.pi * labels
    points = np.stack([distance * np.cos(angle), distance * np.sin(angle)], axis=1)
    noise = rng.normal(0, 0.02, points.shape)
    return {"inputs": (points + noise).astype(np.float32), "labels": labels}


def feedforward() -> None:
    """What networks of three widths make of two spirals."""
    points = spirals(1000)
    grid = np.linspace(-1.15, 1.15, 200, dtype=np.float32)
    plane = np.stack(np.meshgrid(grid, grid), axis=-1).reshape(-1, 2)
    figure, axes = plt.subplots(1, 3, figsize=(8.4, 3.1), layout="constrained")
    titles = {(): "no hidden layer", (8,): "8 neurons", (64, 64): "two layers of 64"}
    for axis, (features, title) in zip(axes, titles.items(), strict=True):
        module = jn.MLP(features, num_outputs=2, activation="tanh")
        update = jn.Update(jn.classification(module), optax.adam(1e-2))
        key = jax.random.key(1)
        state = jn.create_train_state(
            jn.initialize(module, key, points["inputs"][:1]), update, rng=key
        )
        batches = jn.data.shuffled_batches(points, 100, seed=0)
        step = jn.jit_step(jn.make_train_step(update))
        state, history = jn.fit(step, state, batches, num_steps=2000, log_every=100)
        logits = module.apply(state.variables, plane)
        share = jax.nn.sigmoid(logits[:, 1] - logits[:, 0]).reshape(len(grid), len(grid))
        axis.contourf(grid, grid, share, np.linspace(0, 1, 11), cmap="RdBu_r", alpha=0.8)
        shown = slice(0, 300)
        colors = np.where(points["labels"][shown] == 1, "darkred", "navy")
        axis.scatter(*points["inputs"][shown].T, s=4, c=colors)
        accuracy = history.rows[-1]["accuracy"]
        axis.set(title=f"{title}: {accuracy:.0%} right", xticks=[], yticks=[], aspect="equal")
    save(figure, "feedforward")


def convolutional() -> None:
    """The kernels of a first layer, and what they and the second layer see in a digit."""
    digits = jn.data.digits()

    def scaled(batch, rng, train):
        return {**batch, "inputs": batch["inputs"] / 255}

    module = jn.ConvNet(features=(8, 16), kernel_size=3, pool=1, hidden_features=(), num_outputs=10)
    objective = jn.with_batch_transform(jn.classification(module), scaled)
    update = jn.Update(objective, optax.adamw(3e-3, weight_decay=0.05))
    key = jax.random.key(0)
    state = jn.create_train_state(
        jn.initialize(module, key, jnp.zeros((1, 8, 8, 1))), update, rng=key
    )
    batches = jn.data.shuffled_batches(digits.train, 64, seed=0)
    state, _ = jn.fit(jn.jit_step(jn.make_train_step(update)), state, batches, num_steps=600)
    image = digits.test["inputs"][:1] / 255
    _, inside = jn.capture(module, state.variables, image, capture_intermediates=True)
    maps = [jax.nn.relu(inside[f"conv_{layer}"]["__call__"][0])[0] for layer in (0, 1)]
    kernels = state.params["conv_0"]["kernel"][:, :, 0]
    limit = float(jnp.abs(kernels).max())
    figure, axes = plt.subplots(3, 9, figsize=(8.4, 2.9), layout="constrained")
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.set_frame_on(False)
    axes[1, 0].imshow(image[0, :, :, 0], cmap="gray")
    for axis, text in zip(axes[:, 0], ("kernels", "first layer", "second layer"), strict=True):
        axis.set_ylabel(text, fontsize=8)
    for index in range(8):
        axes[0, index + 1].imshow(kernels[:, :, index], cmap="RdBu_r", vmin=-limit, vmax=limit)
        axes[1, index + 1].imshow(maps[0][:, :, index], cmap="viridis")
        axes[2, index + 1].imshow(maps[1][:, :, index], cmap="viridis")
    save(figure, "convolutional")


def recurrent() -> None:
    """How far back in time the gradient of the last output reaches, before any training."""
    num_steps, key = 100, jax.random.key(0)
    inputs = jax.random.normal(key, (32, num_steps, 16))
    figure, axis = plt.subplots(figsize=(6.4, 3.2), layout="constrained")
    cells = {
        "Elman": "rnn",
        "LSTM, forget bias 1": "lstm",
        "LSTM, forget bias 3": jn.recurrent.LSTMCell(forget_bias=3.0),
        "GRU": "gru",
        "minGRU": "mingru",
    }
    for name, cell in cells.items():
        module = jn.Recurrent(hidden_size=64, cell=cell)
        variables = jn.initialize(module, key, inputs)

        def last(inputs, module=module, variables=variables):
            direction = jax.random.normal(key, (64,))
            return jnp.sum(module.apply(variables, inputs)[0][:, -1] @ direction)

        slopes = jnp.linalg.norm(jax.grad(last)(inputs), axis=-1).mean(axis=0)[::-1]
        axis.semilogy(np.arange(num_steps), slopes / slopes[0], label=name)
    axis.set(xlabel="steps back in time", ylabel="share of the gradient", ylim=(1e-8, 3))
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    save(figure, "recurrent")


def save(figure: plt.Figure, name: str) -> None:
    """Write docs/images/NAME.png."""
    figure.savefig(FOLDER / f"{name}.png", dpi=100)
    plt.close(figure)


if __name__ == "__main__":
    for draw in (feedforward, convolutional, recurrent):
        draw()
