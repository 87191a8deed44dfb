"""Folders of sentence-transformers: an encoder, a pooling, and a scaling to length 1."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NotRequired, TypedDict

from jaxnets.models.transformer import SentenceEncoder, SentencePool
from jaxnets.storage import Document, read_optional_json

_REMEDY = "load its encoder alone by architecture="
_WHAT = "options of a sentence encoder that are supported"
_read = functools.partial(read_optional_json, what=_WHAT, remedy=_REMEDY)
#: Where the modules were up to version 5; later ones still find them there.
_TYPES = "sentence_transformers.models"
#: {pooling of sentence-transformers: pool of `SentenceEncoder`}.
_POOLS: Mapping[str, SentencePool] = MappingProxyType(
    {
        "mean": "mean",
        "cls": "first",
        "max": "max",
        "mean_sqrt_len_tokens": "mean_sqrt_length",
    }
)

#: {entry of older folders, which later versions still read: pooling}.
_FLAGS = MappingProxyType(
    {
        "pooling_mode_mean_tokens": "mean",
        "pooling_mode_cls_token": "cls",
        "pooling_mode_max_tokens": "max",
        "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
        "pooling_mode_weightedmean_tokens": "weightedmean",
        "pooling_mode_lasttoken": "lasttoken",
    }
)


class _Module(TypedDict):
    type: str
    path: str


class _Encoder(TypedDict):
    max_seq_length: NotRequired[int | None]
    do_lower_case: NotRequired[bool | None]


class _Model(TypedDict):
    default_prompt_name: NotRequired[str | None]


@dataclasses.dataclass(frozen=True)
class SentenceFolder:
    """What a folder of sentence-transformers says beside the encoder's own files.

    Attributes:
        encoder: folder of the encoder.
        fields: of the `SentenceEncoder`: pool and normalize.
        max_length: most tokens of a sentence; None is the encoder's.
    """

    encoder: Path
    fields: dict[str, Any]
    max_length: int | None


def read_sentence_folder(folder: Path) -> SentenceFolder | None:
    """Read the modules of a folder of sentence-transformers; None if it is none.

    Raises:
        ValueError: damaged, or a module or an option that is not supported; the message names the
            file.
    """
    if not (folder / "modules.json").is_file():
        return None
    document, modules = _modules(folder / "modules.json")
    kinds = [module["type"].rsplit(".", 1)[-1] for module in modules]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise document.error(
            f"the modules {', '.join(kinds)} are not supported; supported are Transformer, "
            "Pooling and, if present, Normalize",
        )
    for module in modules:
        if module["path"] != Path(module["path"]).name:
            raise document.error(f"the path {module['path']!r} is no folder in it")
    encoder, pooling = (folder / module["path"] for module in modules[:2])
    _check_prompt(folder)
    options = _read(encoder / "sentence_bert_config.json")
    content = options.check(_Encoder)
    if content.get("do_lower_case"):
        raise options.error("lower case of all texts is not supported", key="do_lower_case")
    length = content.get("max_seq_length")
    if length is not None and length < 1:
        raise options.error(f"max_seq_length is {length}, not 1 or more", key="max_seq_length")
    fields = {"pool": _pool(_read(pooling / "config.json")), "normalize": "Normalize" in kinds}
    return SentenceFolder(encoder, fields, length)


def write_sentence_modules(
    folder: Path, module: SentenceEncoder, *, max_length: int | None
) -> None:
    """Write what makes the folder of an encoder one of sentence-transformers.

    Args:
        folder: that has the encoder.
        module: the encoder.
        max_length: most tokens of a sentence; None is the encoder's.
    """
    kinds = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize"}
    modules = [
        {"idx": index, "name": str(index), "path": path, "type": f"{_TYPES}.{kind}"}
        for index, (kind, path) in enumerate(kinds.items())
        if kind != "Normalize" or module.normalize
    ]
    mode = {ours: theirs for theirs, ours in _POOLS.items()}[module.pool]
    pooling = {
        "word_embedding_dimension": module.config.features,
        **{flag: name == mode for flag, name in _FLAGS.items()},
    }
    limit = {} if max_length is None else {"max_seq_length": max_length}
    (folder / "1_Pooling").mkdir()
    for name, content in (
        ("modules.json", modules),
        ("1_Pooling/config.json", pooling),
        ("sentence_bert_config.json", {**limit, "do_lower_case": False}),
    ):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


def _modules(path: Path) -> tuple[Document, list[_Module]]:
    """Read modules.json, whose content is a list."""
    document = Document(path, "the modules of a sentence encoder", _REMEDY, {}, "")
    try:
        content = {"modules": json.loads(path.read_bytes())}
    except (ValueError, RecursionError) as error:
        raise document.error("it is no JSON") from error
    document = dataclasses.replace(document, content=content)
    return document, document.check(_Modules)["modules"]


class _Modules(TypedDict):
    modules: list[_Module]


def _check_prompt(folder: Path) -> None:
    document = _read(folder / "config_sentence_transformers.json")
    if document.check(_Model).get("default_prompt_name") is not None:
        raise document.error("a default prompt is not supported", key="default_prompt_name")


def _pool(document: Document) -> SentencePool:
    """Return the reduction over tokens that a pooling names: by name, or by one flag each."""
    modes = document.content.get("pooling_mode")
    if modes is None:
        flags = [name for name, on in document.content.items() if name in _FLAGS and on is True]
        modes = [_FLAGS[name] for name in flags]
    modes = modes if isinstance(modes, list) else [modes]
    pools = [_POOLS.get(str(mode)) for mode in modes]
    if len(pools) != 1 or pools[0] is None:
        raise document.error(
            f"the pooling {' and '.join(map(str, modes)) or 'without a mode'} is not supported; "
            f"supported is one of {', '.join(_POOLS)}"
        )
    return pools[0]
