"""Write the files of torch in this folder, and the values of their tensors: `python make.py`.

Needs torch 2.13 or later; reading them needs none.
"""

import json
import pathlib
import warnings
import zipfile

HERE = pathlib.Path(__file__).parent
DTYPES = (
    *("float32", "float64", "float16", "bfloat16", "uint8", "uint16", "uint32", "uint64"),
    *("int8", "int16", "int32", "int64", "bool", "complex64", "complex128"),
    *("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"),
)


def random_tensor(name, shape):
    """Return a tensor of random bits."""
    dtype = getattr(torch, name)
    if name == "bool":
        return torch.randint(0, 2, shape).bool()
    size = torch.empty(0, dtype=dtype).element_size()
    return torch.randint(0, 256, (*shape[:-1], shape[-1] * size), dtype=torch.uint8).view(dtype)


def make_tree():
    """Return what a checkpoint may hold."""
    torch.manual_seed(0)
    shared = torch.arange(24.0).reshape(4, 6)
    layer = torch.nn.Linear(2, 3)
    return {
        "types": {name: random_tensor(name, (2, 3)) for name in DTYPES},
        "views": {
            "whole": shared,
            "transposed": shared.t(),
            "part": shared[1:, 2:4],
            "expanded": torch.full((1,), 2.5).expand(5, 3),
            "empty": torch.zeros(0, 3),
            "scalar": torch.tensor(3.5),
            "conjugate": torch.randn(3, dtype=torch.complex64).conj(),
            "negative": torch.randn(3, dtype=torch.complex64).conj().imag,
        },
        "model": layer.state_dict(),
        "list": [torch.ones(2), (torch.nn.Parameter(torch.zeros(2)),)],
        "lr": 0.1,
        "epoch": 3,
        "name": "run",
        "dtype": torch.bfloat16,
        "size": torch.Size([2, 3]),
        "nothing": None,
        "large": -(2**70),
    }


def flatten(name, value):
    if isinstance(value, torch.Tensor):
        value = value.detach().resolve_conj().resolve_neg().contiguous()
        raw = value.reshape(-1).view(torch.uint8).tolist() if value.numel() else []
        dtype = str(value.dtype).removeprefix("torch.")
        yield name, {"shape": list(value.shape), "dtype": dtype, "bytes": bytes(raw).hex()}
    elif isinstance(value, dict | list | tuple):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        for key, one in pairs:
            yield from flatten(f"{name}.{key}" if name else str(key), one)


def swapped(path, target):
    """Write a copy of a zip file as a big-endian machine would have written it."""
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(target, "w") as archive:
        for info in source.infolist():
            content = source.read(info)
            if info.filename.endswith("/byteorder"):
                content = b"big"
            if "/data/" in info.filename:  # int32
                content = b"".join(content[i : i + 4][::-1] for i in range(0, len(content), 4))
            archive.writestr(info.filename, content)


if __name__ == "__main__":
    import torch  # not where the tests import this file

    warnings.simplefilter("ignore")
    tree = make_tree()
    torch.save(tree, HERE / "zip.pt")
    torch.save(tree, HERE / "legacy.pt", _use_new_zipfile_serialization=False)
    torch.save({"a": torch.arange(6, dtype=torch.int32).reshape(2, 3)}, HERE / "little.pt")
    swapped(HERE / "little.pt", HERE / "big.pt")
    (HERE / "little.pt").unlink()
    values = dict(flatten("", tree))
    (HERE / "values.json").write_text(json.dumps(values, indent=0, sort_keys=True) + "\n")
