"""Argument checks whose error messages name the value and the remedy."""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.export import is_symbolic_dim


def check_source(batches: Any) -> None:
    """Check that batches come from a source: a function of the first step.

    Raises:
        TypeError: they are something else; the message has the remedy for its type.
    """
    kind = type(batches).__name__
    if isinstance(batches, Mapping):
        raise TypeError(
            f"batches is a {kind} with {list(batches)}; make a source of its arrays, such as "
            "data.shuffled_batches(arrays, batch_size, seed=0)"
        )
    if isinstance(batches, Iterator):
        raise TypeError(
            f"batches is a {kind}, which cannot start again; give the function that makes it, "
            "with the first step as its argument"
        )
    if not callable(batches):
        raise TypeError(
            f"batches is a {kind}; give a source, a function of the first step, such as "
            "data.shuffled_batches(arrays, batch_size, seed=0), or for a list "
            "lambda first: itertools.islice(itertools.cycle(batches), first % len(batches), None)"
        )
    try:
        inspect.signature(batches).bind(0)
    except TypeError as error:
        name = getattr(batches, "__name__", kind)
        raise TypeError(
            f"the source {name} cannot be called with the first step ({error}); give it one "
            "argument, the step whose batch comes first"
        ) from error
    except ValueError:
        pass  # a builtin without a signature


def check_batch(batch: Any) -> None:
    """Check that a batch is a dict of arrays.

    Raises:
        TypeError: it is something else.
    """
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"a batch of the source is a {type(batch).__name__}; give a dict of arrays, such as "
            "{'inputs': images, 'labels': labels}"
        )


def check_key(rng: Any) -> None:
    """Check that `rng` is one random key.

    Raises:
        TypeError: it is a number, an array of several keys or anything else.
    """
    dtype = getattr(rng, "dtype", None)
    typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    if not (typed and rng.shape == ()) and not (dtype == jnp.uint32 and rng.ndim == 1):
        what = f"keys of shape {rng.shape}" if typed else repr(rng)
        raise TypeError(f"rng is {what}; give one key, such as jax.random.key(0)")


def check_first_step(first_step: int) -> None:
    """Check that a first step is not negative.

    Raises:
        ValueError: it is negative.
    """
    if first_step < 0:
        raise ValueError(f"first step {first_step} is negative; steps count from 0")


def check_same_shape(**arrays: Any) -> None:
    """Check that arrays have the same shape; shapes that broadcast do not pass.

    Args:
        arrays: {name: array}.

    Raises:
        ValueError: the shapes differ; the message has the names and shapes.

    Example:
        >>> import numpy as np
        >>> check_same_shape(predictions=np.ones((4, 1)), labels=np.ones(4))
        Traceback (most recent call last):
        ...
        ValueError: predictions (4, 1), labels (4,) differ in shape; give all the same shape, such \
as labels[..., None]
    """
    try:
        chex.assert_equal_shape(list(arrays.values()))
    except AssertionError:
        shapes = ", ".join(f"{name} {array.shape}" for name, array in arrays.items())
        longest = max((array.shape for array in arrays.values()), key=len)
        short = [name for name, array in arrays.items() if (*array.shape, 1) == longest]
        remedy = f", such as {short[0]}[..., None]" if short else ""
        raise ValueError(f"{shapes} differ in shape; give all the same shape{remedy}") from None


def check_rank(inputs: Any, caller: object, *, layouts: Sequence[str]) -> None:
    """Check that the inputs have as many axes as one of the layouts.

    Args:
        inputs: the array that the caller was given.
        caller: a model, whose class is named in the message, or the name of a function.
        layouts: such as "[batch, height, width, channels]"; the rank is the number of names.

    Raises:
        ValueError: the rank is different; the message has the shape, the layouts and the remedy.
    """
    ranks = [layout.count(",") + 1 for layout in layouts]
    if inputs.ndim not in ranks:
        name = caller if isinstance(caller, str) else type(caller).__name__
        remedy = ""
        if inputs.ndim + 1 in ranks:
            remedy = ". Add a missing batch axis with inputs[None]"
            if any("channels" in layout for layout in layouts):
                remedy += ", a missing channel axis with inputs[..., None]"
        raise ValueError(
            f"{name} got inputs of shape {inputs.shape}; give {' or '.join(layouts)}{remedy}"
        )


#: Layouts of a convolutional network, whose kernels get their rank from the input.
IMAGES_OR_AUDIO = ("[batch, height, width, channels]", "[batch, time, channels]")
IMAGES = IMAGES_OR_AUDIO[:1]


def check_rate(rate: float) -> None:
    """Check that a dropout rate is in [0, 1).

    Raises:
        ValueError: it is not.
    """
    if not 0 <= rate < 1:
        raise ValueError(f"dropout rate {rate} must be at least 0 and below 1")


def check_sizes(**sizes: int | Sequence[int]) -> None:
    """Check that sizes are positive integers.

    Args:
        sizes: {name: one size, or a sequence of sizes}; Python or NumPy integers.

    Raises:
        ValueError: one is not; the message has its name and value.

    Example:
        >>> check_sizes(strides=(2, np.int64(1)), batch_size=0)
        Traceback (most recent call last):
        ...
        ValueError: batch_size=0 must be a positive integer
    """
    for name, size in sizes.items():
        values = size if isinstance(size, Sequence) else (size,)
        if not all(_is_size(value) for value in values):
            kind = "made of positive integers" if values is size else "a positive integer"
            raise ValueError(f"{name}={size} must be {kind}")


def _is_size(value: Any) -> bool:
    # A symbolic size of `jax.export` stands for 1 or more.
    return value > 0 if _is_integer(value) else is_symbolic_dim(value)


def _is_integer(value: Any) -> bool:
    # True is an int in Python, and is a flag in the wrong place.
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def class_scope(num_classes: int) -> contextlib.AbstractContextManager[Any]:
    """Name the comparison of labels with classes in the program, so that errors can name both.

    Args:
        num_classes: number of outputs.

    Returns:
        Context for the comparison; `classes_in_scope` reads it.
    """
    return jax.named_scope(f"labels_of_{num_classes}_classes")


def classes_in_scope(scope: str) -> int | None:
    """Return the number of classes in a name of JAX's name stack, None without `class_scope`.

    Example:
        >>> classes_in_scope("jvp(labels_of_10_classes)"), classes_in_scope("attention")
        (10, None)
    """
    match = re.search(r"labels_of_(\d+)_classes", scope)
    return int(match[1]) if match else None
