"""Pretrained networks of other libraries, read and written; the tensors of their files by name."""

import lazy_loader

# The stub `__init__.pyi` lists the names. Reading tensors alone imports no networks.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
