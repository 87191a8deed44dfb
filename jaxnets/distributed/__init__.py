"""Several processes that train one network together."""

from jaxnets.distributed.processes import (
    DistributedError,
    agree_to_stop,
    check_agreement,
    init_distributed,
    leave,
)

__all__ = [
    "DistributedError",
    "agree_to_stop",
    "check_agreement",
    "init_distributed",
    "leave",
]
