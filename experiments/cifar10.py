"""CIFAR-10: photographs of ten classes, 32 x 32 pixels, 50,000 training and 10,000 test images.

    python -m experiments.cifar10 --model convnet

If only the JPEG re-encoding of the data set is available, the result is labeled "CIFAR-10 (JPEG
q75)": its accuracies are not comparable with published ones.
"""

import dataclasses

from experiments.classification import Config, main
from jaxnets.data import cifar10

# The usual recipe of residual networks, shortened.
RESIDUAL = Config(
    model="resnet18_cifar",
    epochs=30,
    optimizer="nesterov",
    learning_rate=0.1,
    weight_decay=5e-4,
    flip="random",
    crop=4,
)
RECIPES = {
    "convnet": Config(
        model="convnet", epochs=10, learning_rate=5e-3, flip="random", crop=2, average_decay=0.999
    ),
    "mlp": Config(model="mlp", epochs=15, learning_rate=2e-3, flip="random"),
    "resnet9": Config(
        model="resnet9",
        epochs=15,
        learning_rate=5e-3,
        flip="random",
        crop=2,
        cutout=8,
        label_smoothing=0.1,
        average_decay=0.999,
    ),
    "resnet18_cifar": RESIDUAL,
    # Jordan 2024, arXiv:2404.00498, and its later Muon, for 40 minutes on two cores.
    "speedrun": Config(
        model="whitened_convnet",
        steps=1000,  # 10.3 epochs, in whole dispatches
        batch_size=512,
        optimizer="relative_muon",
        learning_rate=0.12,
        adam_share=1 / 6,
        beta2=0.99,
        schedule="linear",
        warmup=0.0,
        weight_decay=0.0,
        flip="alternating",
        crop=2,
        crop_border="reflect",
        label_smoothing=0.2,
        flip_test=True,
        shift_test=True,
        small_side=24,
        eval_every=10_000,  # never: an evaluation takes as long as a dozen steps
    ),
    "wide_resnet16_4": dataclasses.replace(RESIDUAL, model="wide_resnet16_4"),
}

if __name__ == "__main__":
    main("cifar10", lambda config: cifar10(config.data), RECIPES)
