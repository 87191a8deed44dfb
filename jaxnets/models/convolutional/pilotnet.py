"""PilotNet of Bojarski et al. 2016: the steering command of a car from its camera's image."""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax

from jaxnets.checks import IMAGES, check_rank, check_sizes
from jaxnets.core import Precision, record
from jaxnets.functional.activations import Activation, activation
from jaxnets.layers import Convolution, Dense

#: Output channels, kernel size and stride of each convolution.
CONVOLUTIONS = ((24, 5, 2), (36, 5, 2), (48, 5, 2), (64, 3, 1), (64, 3, 1))


class PilotNet(nn.Module):
    """Five convolutions without padding and four dense layers: 252,219 parameters at 66x200x3.

    Differs from the paper: its first layer, a fixed normalization of the image, is left to the
    caller; `data.normalize` does it.

    Attributes:
        num_outputs: size of the output; in the paper 1, the inverse radius of the turn.
        hidden_features: widths of the hidden dense layers.
        activation: name or element-wise function; the paper does not say which.
        precision: dtypes.

    Raises:
        ValueError: a field is out of range, or the images are too small.

    References:
        Bojarski et al. 2016, arXiv:1604.07316, section 4 and figure 4.

    Example:
        >>> import jax.numpy as jnp
        >>> images = jnp.zeros((1, 66, 200, 3))
        >>> shapes = jax.eval_shape(PilotNet().init, jax.random.key(0), images)
        >>> shapes["params"]["hidden_0"]["kernel"].shape
        (1152, 100)
    """

    num_outputs: int = 1
    hidden_features: Sequence[int] = (100, 50, 10)
    activation: Activation = "relu"
    precision: Precision = Precision()

    def __post_init__(self) -> None:
        check_sizes(num_outputs=self.num_outputs, hidden_features=self.hidden_features)
        activation(self.activation)
        super().__post_init__()

    @nn.compact
    def __call__(self, inputs: jax.Array, *, train: bool = False) -> jax.Array:
        """Map images to [batch, num_outputs].

        Records "map_0" to "map_4", the feature maps after each activation, and "features".

        Args:
            inputs: [batch, height, width, channels].
            train: has no effect, as there is neither dropout nor a norm.

        Raises:
            ValueError: inputs of another rank, or too small for the convolutions.
        """
        check_rank(inputs, self, layouts=IMAGES)
        policy, act = self.precision, activation(self.activation)
        smallest = 1
        for _, size, strides in reversed(CONVOLUTIONS):
            smallest = (smallest - 1) * strides + size
        if min(inputs.shape[1:3]) < smallest:
            raise ValueError(
                f"PilotNet got images of {inputs.shape[1:3]}; its convolutions without padding "
                f"need {smallest} pixels a side"
            )
        x = inputs
        for index, (features, size, strides) in enumerate(CONVOLUTIONS):
            x = act(
                Convolution(
                    features,
                    size,
                    strides=strides,
                    padding="VALID",
                    kernel_init=nn.initializers.he_normal(),
                    precision=policy,
                    name=f"conv_{index}",
                )(x)
            )
            record(self, f"map_{index}", x)
        x = x.reshape(x.shape[0], -1)  # [batch, height * width * channels]
        for index, width in enumerate(self.hidden_features):
            x = act(Dense(width, precision=policy, name=f"hidden_{index}")(x))
        record(self, "features", x)
        return Dense(self.num_outputs, precision=policy, name="head")(x).astype(policy.output)


def pilotnet(num_outputs: int = 1) -> PilotNet:
    """Build PilotNet: 252,219 parameters for one output at 66x200x3.

    Args:
        num_outputs: size of the output.
    """
    return PilotNet(num_outputs=num_outputs)
