"""Network families, one package or file each; a family is loaded when it is first used."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    ["autoencoder", "convolutional", "feedforward", "gan", "recurrent", "transformer"],
)
