"""Objectives of sequences: language modeling, sequence to sequence, and CTC."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxnets.core import (
    Batch,
    ModelState,
    Objective,
    Params,
    apply_module,
    at_least_float32,
    at_least_int32,
    bound_data_axis,
)
from jaxnets.functional.lengths import clear_padding
from jaxnets.metrics.supervised import accuracy
from jaxnets.objectives.losses import label_losses
from jaxnets.objectives.supervised import Metric, supervised

# In `ctc_loss`, of which float32 can add many and still tell them from the loss of an alignment.
_LOG_OF_ZERO = -1e30


def language_modeling(
    module: Any,
    *,
    label_smoothing: float = 0.0,
    metrics: Mapping[str, Metric] | None = None,
    carry_across_batches: bool = False,
) -> Objective:
    """Build the objective of a network that predicts a label for every step of a sequence.

    Batches hold "inputs" [batch, time] and "labels" [batch, time], for a language model the inputs
    shifted by one step (teacher forcing). Optional are "lengths" [batch], which the module gets as
    a keyword, and "weights" [batch] or [batch, time]. The loss is in nats per token; tokens beyond
    the lengths are masked.

    With `carry_across_batches`, row i of each batch continues row i of the previous batch, and
    gradients stop between batches: truncated backpropagation through time. The carry lives in
    model_state["carry"], from `with_carry`, and so is part of checkpoints. Evaluation starts every
    batch from an empty history and does not change the carry.

    Args:
        module: tokens -> logits [batch, time, vocabulary]; with `carry_across_batches`,
            (tokens, carry=carry) -> (logits, carry).
        label_smoothing: as in `cross_entropy`, applied in training only.
        metrics: functions of (logits, labels, weights [batch, time]); by default the accuracy.
        carry_across_batches: pass the module's carry from batch to batch in training.

    Returns:
        An `Objective`. Lengths out of range raise ValueError if concrete; in a compiled program
        they give NaN.

    Example:
        >>> import flax.linen as nn
        >>> class Bigrams(nn.Module):
        ...     @nn.compact
        ...     def __call__(self, tokens, lengths=None, *, train=False):
        ...         return nn.Embed(4, 4, embedding_init=nn.initializers.zeros)(tokens)
        >>> tokens = jnp.array([[0, 1, 2, 3]])
        >>> batch = {"inputs": tokens[:, :-1], "labels": tokens[:, 1:]}
        >>> params = Bigrams().init(jax.random.key(0), tokens)["params"]
        >>> objective = language_modeling(Bigrams())
        >>> loss = objective(params, {}, batch, jax.random.key(0), train=False).loss
        >>> round(float(loss.compute()), 4), float(loss.count)  # log(4) nats per token
        (1.3863, 3.0)

    References:
        Williams and Peng 1990, Neural Computation 2(4) (truncated backpropagation through time).
    """
    return supervised(
        module,
        label_losses(label_smoothing),
        {"accuracy": accuracy} if metrics is None else metrics,
        weights_fn=lambda batch: _token_weights(batch, "lengths"),
        apply=_apply_with_carry if carry_across_batches else apply_module,
    )


def sequence_to_sequence(
    module: Any,
    *,
    label_smoothing: float = 0.0,
    metrics: Mapping[str, Metric] | None = None,
) -> Objective:
    """Build the objective of an encoder-decoder, trained with teacher forcing.

    Batches hold "inputs" [batch, source], "decoder_inputs" [batch, target], which begin with the
    start token, and "labels" [batch, target], the decoder inputs shifted by one step. Optional are
    "lengths" [batch] of the inputs, which the module gets as a keyword, "label_lengths" [batch] and
    "weights" [batch]. The loss is in nats per token of the labels.

    Args:
        module: (inputs, decoder_inputs) -> logits [batch, target, vocabulary].
        label_smoothing: as in `cross_entropy`, applied in training only.
        metrics: functions of (logits, labels, weights [batch, target]); by default the accuracy.

    Returns:
        An `Objective`; lengths out of range as in `language_modeling`.
    """
    return supervised(
        module,
        label_losses(label_smoothing),
        {"accuracy": accuracy} if metrics is None else metrics,
        inputs=("inputs", "decoder_inputs"),
        weights_fn=lambda batch: _token_weights(batch, "label_lengths"),
    )


def ctc(module: Any, *, blank: int = 0) -> Objective:
    """Build the objective of connectionist temporal classification (CTC).

    Batches hold "inputs" [batch, time, ...], "labels" int [batch, labels] and "label_lengths"
    [batch]. Optional are "lengths" [batch] of the inputs, which the module gets as a keyword, and
    "weights" [batch]. The loss is `ctc_loss`, in nats per utterance.

    Args:
        module: inputs -> (logits [batch, frames, classes], number of frames int [batch]).
        blank: the blank class.

    Returns:
        An `Objective`. Its loss is NaN where no alignment exists, which stops training;
        `check_ctc_batch` finds such utterances in the data beforehand.
    """

    def losses(predictions: tuple[jax.Array, jax.Array], batch: Batch, *, train: bool) -> jax.Array:
        logits, frames = predictions
        return ctc_loss(logits, frames, batch["labels"], batch["label_lengths"], blank=blank)

    return supervised(module, losses, {}, needs=("label_lengths",))


def ctc_loss(
    logits: jax.Array,
    frames: jax.Array,
    labels: jax.Array,
    label_lengths: jax.Array,
    *,
    blank: int = 0,
) -> jax.Array:
    """Return -log P(labels), summed over all alignments of the labels with the frames.

    `optax.ctc_loss` with lengths instead of paddings. Compared with
    `torch.nn.functional.ctc_loss(reduction="none")` it takes logits, and the batch axis comes
    first. Differs from both: NaN where no alignment exists.

    Args:
        logits: [batch, time, classes], or log-probabilities; -infinity excludes a class.
        frames: int [batch] in [0, time], number of valid frames of each utterance; those beyond
            them are ignored.
        labels: int [batch, labels], classes other than `blank`; those beyond the label lengths are
            ignored.
        label_lengths: int [batch].
        blank: the blank class.

    Returns:
        Nats per utterance, [batch], float32 or wider. Infinite where every alignment has
        probability 0. NaN for lengths out of range, for labels that are no class or the blank, and
        for more labels than fit into the frames: every label needs a frame, and a repeated one
        another frame for the blank before it.

    Raises:
        ValueError: shapes or types that do not fit, or a blank that is not a class.

    Example:
        >>> logits = jnp.log(jnp.array([[[0.6, 0.4], [0.6, 0.4]]]))
        >>> loss = ctc_loss(logits, jnp.array([2]), jnp.array([[1]]), jnp.array([1]))
        >>> round(float(jnp.exp(-loss[0])), 4)
        0.64

    References:
        Graves et al. 2006, ICML, "Connectionist Temporal Classification", section 4.
    """
    if logits.ndim != 3 or not logits.shape[1]:
        raise ValueError(f"logits of shape {logits.shape} are not [batch, time, classes]")
    batch, time, num_classes = logits.shape
    shapes = (labels.shape[:1], frames.shape, label_lengths.shape)
    if labels.ndim != 2 or any(shape != (batch,) for shape in shapes):
        raise ValueError(
            f"labels of shape {labels.shape}, label lengths of shape {label_lengths.shape} and "
            f"numbers of frames of shape {frames.shape} do not fit logits of shape {logits.shape}; "
            "give [batch, labels], [batch] and [batch]"
        )
    integers = {"labels": labels, "label lengths": label_lengths, "numbers of frames": frames}
    for name, array in integers.items():
        if not jnp.issubdtype(array.dtype, jnp.integer):
            raise ValueError(f"{name} have type {array.dtype}; give integers")
    _check_blank(blank, num_classes)
    labels, label_lengths, frames = map(at_least_int32, integers.values())
    valid = jnp.arange(labels.shape[1])[None] < label_lengths[:, None]
    labels = jnp.where(valid, labels, blank)
    is_padding = jnp.arange(time)[None] >= frames[:, None]
    log_probabilities = jax.nn.log_softmax(
        jnp.where(is_padding[..., None], 0, at_least_float32(logits))
    )
    # Optax multiplies log-probabilities by 0, so they have to be finite.
    losses = optax.ctc_loss(
        jnp.where(log_probabilities == -jnp.inf, _LOG_OF_ZERO, log_probabilities),
        is_padding.astype(jnp.float32),
        labels,
        (~valid).astype(jnp.float32),
        blank_id=blank,
        log_epsilon=_LOG_OF_ZERO,
    )
    losses = jnp.where(losses > -_LOG_OF_ZERO / 2, jnp.inf, losses)
    no_label = (labels < 0) | (labels >= num_classes) | (labels == blank)
    wrong = jnp.any(valid & no_label, axis=1) | (_frames_needed(labels, valid) > frames)
    wrong |= (label_lengths < 0) | (label_lengths > labels.shape[1])
    wrong |= (frames < 0) | (frames > time)
    return jnp.where(wrong, jnp.nan, losses)


def check_ctc_batch(batch: Batch, frames: Any, *, num_classes: int, blank: int = 0) -> None:
    """Refuse a batch with an utterance whose loss in `ctc` is NaN.

    Args:
        batch: with "labels" and "label_lengths"; utterances of weight 0 are not checked.
        frames: int [batch], number of frames that the network outputs for each utterance.
        num_classes: classes of the logits, `blank` included.
        blank: the blank class.

    Raises:
        ValueError: the first such utterance, and why; or a blank that is not a class.
    """
    _check_blank(blank, num_classes)
    labels, lengths = np.asarray(batch["labels"]), np.asarray(batch["label_lengths"])
    weights = np.asarray(batch.get("weights", np.ones(len(labels))))
    valid = np.arange(labels.shape[1])[None] < lengths[:, None]
    needed = np.asarray(_frames_needed(labels, valid))
    for index in np.flatnonzero(weights):
        if not 0 <= lengths[index] <= labels.shape[1]:
            raise ValueError(
                f"label length {lengths[index]} of utterance {index} is not in "
                f"[0, {labels.shape[1]}]; give the number of labels in its row"
            )
        row = labels[index, : lengths[index]]
        wrong = row[(row < 0) | (row >= num_classes) | (row == blank)]
        if wrong.size:
            raise ValueError(
                f"label {wrong[0]} of utterance {index} is not one of the {num_classes} classes "
                f"other than the blank, {blank}; number the labels around it"
            )
        if needed[index] > frames[index]:
            raise ValueError(
                f"utterance {index} has {frames[index]} frames and its {lengths[index]} labels "
                f"need {needed[index]}; drop it, or subsample the frames less"
            )


def with_carry(variables: Mapping[str, Any], module: Any, batch_size: int) -> dict[str, Any]:
    """Add the initial carry, for `language_modeling(carry_across_batches=True)`.

    Args:
        variables: what `module.init` returned.
        module: implements the decoding protocol, see `generation.generate`.
        batch_size: rows of the whole batch, over all devices.

    Returns:
        The variables with a collection "carry" whose leaves are [batch_size, ...].
    """
    return {**variables, "carry": module.apply(variables, batch_size, 1, method="start")}


def _token_weights(batch: Batch, name: str) -> jax.Array | None:
    """Return the weight of each token, [batch, time], 0 beyond the length of its example."""
    shape, lengths, weights = batch["labels"].shape[:2], batch.get(name), batch.get("weights")
    if lengths is None and weights is None:
        return None
    tokens, _ = clear_padding(jnp.ones(shape), lengths)
    if weights is None:
        return tokens
    weights = jnp.asarray(weights)
    if weights.shape not in (shape[:1], shape):
        raise ValueError(
            f"weights of shape {weights.shape} do not fit labels of shape {shape}; give one for "
            f"each example, shape {shape[:1]}, or one for each token"
        )
    return tokens * (weights[:, None] if weights.ndim == 1 else weights)


def _check_blank(blank: int, num_classes: int) -> None:
    if not 0 <= blank < num_classes:
        raise ValueError(f"blank is {blank}; give one of the {num_classes} classes")


def _frames_needed(labels: Any, valid: Any) -> jax.Array:
    """Return the number of frames of the shortest alignment: labels, and blanks between repeats."""
    repeats = valid[:, 1:] & (labels[:, 1:] == labels[:, :-1])
    return jnp.sum(valid, axis=1) + jnp.sum(repeats, axis=1)


def _apply_with_carry(
    module: Any,
    params: Params,
    model_state: ModelState,
    inputs: jax.Array,
    *,
    rngs: Mapping[str, jax.Array],
    train: bool,
    **keywords: Any,
) -> tuple[jax.Array, ModelState]:
    if "carry" not in model_state:
        raise ValueError(
            f"model_state has {sorted(model_state)} and no 'carry'; give create_train_state "
            "with_carry(variables, module, batch_size)"
        )
    others: ModelState = {name: tree for name, tree in model_state.items() if name != "carry"}
    if not train:
        logits, _ = apply_module(module, params, others, inputs, **keywords)
        return logits, model_state
    (logits, carry), others = apply_module(
        module,
        params,
        others,
        inputs,
        rngs=rngs,
        train=True,
        carry=_own_rows(model_state["carry"], len(inputs)),
        **keywords,
    )
    return logits, {**others, "carry": _all_rows(carry)}


def _own_rows(carry: Any, num_rows: int) -> Any:
    """Slice the rows of this device from the carry of the whole batch."""
    axis = bound_data_axis()
    num_devices = 1 if axis is None else jax.lax.axis_size(axis)
    first = 0 if axis is None else num_rows * jax.lax.axis_index(axis)

    def take(leaf: jax.Array) -> jax.Array:
        if leaf.shape[0] != num_rows * num_devices:
            raise ValueError(
                f"a carry of {leaf.shape[0]} rows does not fit a batch of "
                f"{num_rows * num_devices}; give batches of one size, with no microbatches, and "
                "that size to with_carry"
            )
        return jax.lax.dynamic_slice_in_dim(leaf, first, num_rows)

    return jax.lax.stop_gradient(jax.tree.map(take, carry))


def _all_rows(carry: Any) -> Any:
    """Gather the carries of all devices: model state is replicated."""
    axis, carry = bound_data_axis(), jax.lax.stop_gradient(carry)
    if axis is None:
        return carry
    return jax.tree.map(lambda leaf: jax.lax.all_gather(leaf, axis, tiled=True), carry)
