"""The tokenizer in the metadata of a GGUF file, as the JSON of `tokenizers`.

The keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md#tokenizer. Where they leave a
choice, a file is read as by llama.cpp; texts are split as for the training of the network.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from jaxnets.pretrained.config import Config
from jaxnets.pretrained.processors.text import TextProcessor

_KEYS = "tokenizer.ggml"
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
#: Most characters of a piece; all its splits are tried.
_LONGEST = 512
# Types of tokens.
_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = range(1, 7)
#: {name of a special token: (key of its id, the id of a model "llama" without the key)}.
_SPECIAL: Mapping[str, tuple[str, int | None]] = MappingProxyType(
    {
        "bos": ("bos_token_id", 1),
        "eos": ("eos_token_id", 2),
        "unk": ("unknown_token_id", 0),
        "pad": ("padding_token_id", None),
    }
)

_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SYMBOLS_AND_SPACES = r"| ?[^\s\p{L}\p{N}]+[\r\n%s]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s" + _SYMBOLS_AND_SPACES % ""
_UPPER, _LOWER = (rf"[{kind}\p{{Lm}}\p{{Lo}}\p{{M}}]" for kind in (r"\p{Lu}\p{Lt}", r"\p{Ll}"))
_CASED_WORDS = "|".join(
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}{upper}{_LOWER}{lower}"
    for upper, lower in (("*", "+"), ("+", "*"))
)


@dataclasses.dataclass(frozen=True)
class _Splitting:
    """How a text is cut before its bytes are merged.

    Attributes:
        pattern: of the pieces; None is GPT-2's.
        digits: whether each digit is a piece of its own, before anything else.
        whole: whether a piece that is a token is taken as it is, without merges.
        bos: whether a text begins with the bos token, where no key says so.
        compose: whether characters are composed first (NFC).
    """

    pattern: str | None = None
    digits: bool = False
    whole: bool = False
    bos: bool = False
    compose: bool = False


_GPT2, _DIGITS = _Splitting(), _Splitting(digits=True)
_LLAMA3 = _Splitting(_WORDS % "{1,3}", whole=True, bos=True)
_QWEN2 = _Splitting(_WORDS % "", compose=True)
_TEKKEN = _Splitting(_CASED_WORDS + r"|\p{N}" + _SYMBOLS_AND_SPACES % "/", whole=True, bos=True)
#: {tokenizer.ggml.pre: splitting}.
_SPLITTINGS: Mapping[str, _Splitting] = MappingProxyType(
    {
        **dict.fromkeys(("gpt-2", "phi-2", "olmo", "mpt"), _GPT2),
        **dict.fromkeys(("smollm", "starcoder", "refact", "command-r"), _DIGITS),
        **dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), _LLAMA3),
        **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), _QWEN2),
        "tekken": _TEKKEN,
    }
)


@dataclasses.dataclass(frozen=True)
class _Vocabulary:
    """The tokens of a file, by id, with their types and scores."""

    tokens: Sequence[str]
    types: Sequence[int]
    scores: Sequence[float]


def read_gguf_tokenizer(
    path: Path, metadata: Mapping[str, Any], *, max_length: int | None = None
) -> TextProcessor | None:
    """Return the tokenizer of a GGUF file; None if it has none.

    Args:
        path: of the file.
        metadata: all of it.
        max_length: most tokens of the network.

    Raises:
        ValueError: another model than "gpt2" (BPE of bytes) and "llama" (SentencePiece's BPE), a
            pre-tokenizer that is not known, or damaged; the message names the file and the key.
        ImportError: `tokenizers` is not installed.
    """
    if f"{_KEYS}.model" not in metadata:
        return None
    options = Config.of(
        path, {key: value for key, value in metadata.items() if not isinstance(value, list)}
    )
    is_pieces = options.choice(f"{_KEYS}.model", {"gpt2": False, "llama": True})
    vocabulary = _read_vocabulary(options, metadata)
    special = _special_tokens(options, vocabulary, defaults=is_pieces)
    if is_pieces:
        parts, bos = _sentence_pieces(options, vocabulary, special.get("unk")), True
    else:
        parts, bos = _byte_pairs(options, metadata, vocabulary)
    ends = {
        name: special.get(name)
        for name, default in (("bos", bos), ("eos", False))
        if options.flag(f"{_KEYS}.add_{name}_token", default)
    }
    for name, token in ends.items():
        if token is None:
            raise options.error(f"{_KEYS}.add_{name}_token", f"needs {_KEYS}.{name}_token_id")
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added(vocabulary, special),
        "post_processor": _ends(ends, vocabulary),
        **parts,
    }
    try:
        return TextProcessor(json.dumps(content), special, max_length)
    except ValueError as error:
        raise ValueError(f"{path}: its tokenizer is damaged: {error}") from error


def _read_vocabulary(options: Config, metadata: Mapping[str, Any]) -> _Vocabulary:
    tokens = _list(options, metadata, "tokens", str)
    types = _list(options, metadata, "token_type", int, len(tokens)) or [_NORMAL] * len(tokens)
    scores = _list(options, metadata, "scores", float, len(tokens)) or [0.0] * len(tokens)
    if not tokens:
        raise options.document.error(f"it has no {_KEYS}.tokens")
    for index, token in enumerate(tokens):
        if not token.isascii() and not _is_text(token):
            raise options.document.error(f"the token {index} of {_KEYS}.tokens is no UTF-8")
    if not all(map(math.isfinite, scores)):
        raise options.document.error(f"{_KEYS}.scores are not all finite")
    return _Vocabulary(tokens, types, scores)


def _list(
    options: Config, metadata: Mapping[str, Any], key: str, kind: type, length: int | None = None
) -> list[Any]:
    """Return a list of the metadata, which may be missing: []."""
    values = metadata.get(f"{_KEYS}.{key}", [])
    if not isinstance(values, list) or not all(type(value) is kind for value in values):
        raise options.document.error(f"{_KEYS}.{key} is no list of {kind.__name__}")
    if values and length is not None and len(values) != length:
        raise options.document.error(f"{_KEYS}.{key} has {len(values)} values for {length} tokens")
    return values


def _is_text(token: str) -> bool:
    try:
        token.encode()
    except UnicodeEncodeError:
        return False
    return True


def _special_tokens(options: Config, vocabulary: _Vocabulary, *, defaults: bool) -> dict[str, str]:
    special = {}
    for name, (key, default) in _SPECIAL.items():
        index = options.integer(f"{_KEYS}.{key}", default if defaults else None, least=0)
        if index is None:
            continue
        if index < len(vocabulary.tokens):
            special[name] = vocabulary.tokens[index]
        elif f"{_KEYS}.{key}" in options.content:
            raise options.error(f"{_KEYS}.{key}", f"is none of {len(vocabulary.tokens)} tokens")
    return special


def _byte_pairs(
    options: Config, metadata: Mapping[str, Any], vocabulary: _Vocabulary
) -> tuple[dict[str, Any], bool]:
    """Return the parts of a tokenizer that merges bytes, and whether a text begins with bos."""
    # Files of GPT-2 from before the key need none.
    usual = ("gpt-2",) if options.content.get("general.architecture") == "gpt2" else ()
    splitting = options.choice(f"{_KEYS}.pre", _SPLITTINGS, *usual)
    merges = _list(options, metadata, "merges", str)
    pairs = [merge.split(" ") for merge in merges]
    known = set(vocabulary.tokens)
    for merge, pair in zip(merges, pairs, strict=True):
        if len(pair) != 2 or not known.issuperset((*pair, "".join(pair))):
            raise options.document.error(f"{_KEYS}.merges has {merge!r:.60}, no pair of tokens")
    bytes_of = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    pieces: list[dict[str, Any]] = []
    if splitting.digits:
        pieces.append({"type": "Digits", "individual_digits": True})
    if splitting.pattern is not None:
        regex = {"Regex": splitting.pattern}
        pieces.append({"type": "Split", "pattern": regex, "behavior": "Isolated", "invert": False})
    pieces.append({**bytes_of, "use_regex": splitting.pattern is None})
    parts = {
        "normalizer": {"type": "NFC"} if splitting.compose else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": pieces},
        "decoder": {**bytes_of, "use_regex": True},
        "model": _merging(vocabulary, pairs, ignore_merges=splitting.whole),
    }
    return parts, splitting.bos


def _sentence_pieces(
    options: Config, vocabulary: _Vocabulary, unknown: str | None
) -> dict[str, Any]:
    """Return the parts of SentencePiece's BPE (Kudo and Richardson 2018).

    A file has no merges: any two pieces that join to a token merge, the highest score first.
    """
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    prefix = {"type": "Prepend", "prepend": _SPACE}
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    starts = options.flag(f"{_KEYS}.add_space_prefix", True)
    if starts:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    for index, token in enumerate(vocabulary.tokens):
        if len(token) > _LONGEST:
            raise options.document.error(
                f"the token {index} of {_KEYS}.tokens has {len(token)} characters, more than "
                f"{_LONGEST}"
            )
    return {
        "normalizer": {"type": "Sequence", "normalizers": [prefix, spaces] if starts else [spaces]},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": _merging(
            vocabulary,
            _merges_by_score(vocabulary),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=_BYTE in vocabulary.types,
        ),
    }


def _merges_by_score(vocabulary: _Vocabulary) -> list[tuple[str, str]]:
    """Return the pairs of tokens that join to a token, in the order in which they merge."""
    kinds = zip(vocabulary.tokens, vocabulary.types, vocabulary.scores, strict=True)
    joined = {token: score for token, kind, score in kinds if kind in (_NORMAL, _USER, _UNUSED)}
    return [
        (token[:index], token[index:])
        for token in sorted(joined, key=lambda token: -joined[token])
        for index in range(1, len(token))
        if token[:index] in joined and token[index:] in joined
    ]


def _merging(
    vocabulary: _Vocabulary, merges: Sequence[Sequence[str]], **options: Any
) -> dict[str, Any]:
    ids = {token: index for index, token in enumerate(vocabulary.tokens)}
    return {"type": "BPE", **options, "vocab": ids, "merges": merges}


def _added(vocabulary: _Vocabulary, special: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return the tokens that are taken out of a text before anything else."""
    named = set(special.values())
    return [
        {
            "id": index,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind != _USER or token in named,
        }
        for index, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True))
        if token and (kind in (_UNKNOWN, _CONTROL, _USER) or token in named)
    ]


def _ends(ends: Mapping[str, str | None], vocabulary: _Vocabulary) -> dict[str, Any] | None:
    """Return what adds bos and eos to each text."""
    if not ends:
        return None

    def template(sequence: str, segment: int) -> list[dict[str, Any]]:
        text = {"Sequence": {"id": sequence, "type_id": segment}}
        first, last = (
            [{"SpecialToken": {"id": ends[name], "type_id": segment}}] if name in ends else []
            for name in ("bos", "eos")
        )
        return [*first, text, *last]

    ids = {token: index for index, token in enumerate(vocabulary.tokens)}
    return {
        "type": "TemplateProcessing",
        "single": template("A", 0),
        "pair": template("A", 0) + template("B", 1),
        "special_tokens": {
            token: {"id": token, "ids": [ids[token]], "tokens": [token]}
            for token in ends.values()
            if token is not None
        },
    }
