"""Tokenizers of Hugging Face folders: tokenizer.json, or the vocabulary of an older folder."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NotRequired, TypeAlias, TypedDict

from jaxnets.storage import Document, read_optional_json

_REMEDY = "get the folder anew"
_read = functools.partial(read_optional_json, remedy=_REMEDY)
#: Names of the special tokens, in the files with the ending "_token".
_NAMES = ("pad", "cls", "sep", "bos", "eos", "mask", "unk")
_BERT = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
_ROBERTA = {
    "bos": "<s>",
    "pad": "<pad>",
    "eos": "</s>",
    "unk": "<unk>",
    "cls": "<s>",
    "sep": "</s>",
    "mask": "<mask>",
}
_GPT2 = {"bos": "<|endoftext|>", "eos": "<|endoftext|>", "unk": "<|endoftext|>"}
#: Classes of transformers that a folder without tokenizer.json may have.
_CLASSES = ("BertTokenizer", "DistilBertTokenizer", "GPT2Tokenizer", "RobertaTokenizer")
#: A limit that is larger stands for none.
_NO_LIMIT = 10**9
#: Ids of a tokenizer; to write one as JSON the library goes through all of them.
_MOST_IDS = 1 << 24


class _Added(TypedDict):
    content: str
    lstrip: NotRequired[bool]
    rstrip: NotRequired[bool]
    single_word: NotRequired[bool]
    normalized: NotRequired[bool]
    special: NotRequired[bool]


_Token: TypeAlias = str | _Added | None


class _Special(TypedDict):
    pad_token: NotRequired[_Token]
    cls_token: NotRequired[_Token]
    sep_token: NotRequired[_Token]
    bos_token: NotRequired[_Token]
    eos_token: NotRequired[_Token]
    mask_token: NotRequired[_Token]
    unk_token: NotRequired[_Token]


class _Config(_Special):
    tokenizer_class: NotRequired[str | None]
    model_max_length: NotRequired[float | None]
    model_input_names: NotRequired[list[str]]
    truncation_side: NotRequired[Literal["right", "left"]]
    split_special_tokens: NotRequired[bool]
    added_tokens_decoder: NotRequired[dict[str, _Added]]
    add_bos_token: NotRequired[bool | None]
    add_eos_token: NotRequired[bool | None]
    add_prefix_space: NotRequired[bool | None]
    do_lower_case: NotRequired[bool | None]
    strip_accents: NotRequired[bool | None]
    tokenize_chinese_chars: NotRequired[bool | None]


def tokenizer_from_json(text: str) -> Any:
    """Build a tokenizer of `tokenizers` from its JSON, without truncation and padding.

    Raises:
        ImportError: `tokenizers` is not installed.
        ValueError: it is none.
    """

    def build(text: str) -> Any:
        tokenizer = _library().Tokenizer.from_str(text)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode("a \N{REPLACEMENT CHARACTER}", "b")  # some parts fail only in use
        return tokenizer

    return _guarded(build, text, what="model")


def read_folder(folder: Path) -> dict[str, Any]:
    """Return the fields of the `TextProcessor` of a folder.

    Raises:
        FileNotFoundError: the folder has no tokenizer.
        ValueError: a damaged file, or a tokenizer that is not read; the message names the file.
        ImportError: `tokenizers` is not installed.
    """
    document = _read(folder / "tokenizer_config.json", what="options of a tokenizer")
    config = document.check(_Config)
    if config.get("split_special_tokens"):
        raise document.error(
            "special tokens in a text that are split are not supported",
            key="split_special_tokens",
        )
    tokens = _configured_tokens(folder, config)
    if (folder / "tokenizer.json").is_file():
        tokenizer = _read_tokenizer(folder / "tokenizer.json")
        _apply_options(tokenizer, config)
    else:
        tokenizer = _from_vocabulary(folder, config, tokens)
    if not tokens:
        tokens = _usual_tokens(tokenizer)
    _add_tokens(folder, tokenizer, tokens, config)
    _check_ids(folder, tokenizer)
    special = {name: token["content"] for name, token in tokens.items()}
    if config.keys() & {"add_bos_token", "add_eos_token"} and not _is_whisper(config):
        _begin_and_end(tokenizer, special, config, document)
    limit = config.get("model_max_length")
    if limit is not None and limit < 1:
        raise document.error(f"model_max_length is {limit}, not 1 or more", key="model_max_length")
    return {
        "model": tokenizer.to_str(),
        "special_tokens": special,
        "max_length": None if limit is None or limit > _NO_LIMIT else int(limit),
        "segments": _has_segments(tokenizer, config),
        "truncation_side": config.get("truncation_side", "right"),
    }


def _library() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError(
            "the text of pretrained networks needs Hugging Face's package; run "
            "`pip install tokenizers`"
        ) from error
    return tokenizers


def _guarded(build: Any, *arguments: Any, what: object) -> Any:
    """Call the library, whose errors are bare Exceptions and, of its Rust code, panics."""
    try:
        return build(*arguments)
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"{what} is no tokenizer: {error}; {_REMEDY}") from error


def _read_tokenizer(path: Path) -> Any:
    try:
        text = path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8; {_REMEDY}") from error
    return _guarded(_library().Tokenizer.from_str, text, what=path)


def _configured_tokens(folder: Path, config: _Config) -> dict[str, _Added]:
    """Return the special tokens by name, as the files give them."""
    entries: Mapping[str, Any] = config
    if "added_tokens_decoder" not in config:  # an older folder
        special = _read(folder / "special_tokens_map.json", what="special tokens of a tokenizer")
        entries = {**config, **special.check(_Special)}
    tokens = {}
    for name in _NAMES:
        token = entries.get(f"{name}_token")
        if token is not None:
            tokens[name] = _Added(content=token) if isinstance(token, str) else token
    return tokens


def _usual_tokens(tokenizer: Any) -> dict[str, _Added]:
    """Return the special tokens of a folder that names none, by its vocabulary."""
    for usual in (_BERT, _ROBERTA, _GPT2):
        if all(tokenizer.token_to_id(token) is not None for token in usual.values()):
            return {name: _Added(content=token) for name, token in usual.items()}
    return {}


def _apply_options(tokenizer: Any, config: _Config) -> None:
    """Set the options that tokenizer_config.json may change after tokenizer.json was written."""
    names = {
        "do_lower_case": "lowercase",
        "strip_accents": "strip_accents",
        "tokenize_chinese_chars": "handle_chinese_chars",
    }
    if type(tokenizer.normalizer).__name__ == "BertNormalizer":
        options = {ours: config[theirs] for theirs, ours in names.items() if theirs in config}  # type: ignore[literal-required]
        for name, value in options.items():
            setattr(tokenizer.normalizer, name, value)
    pieces, prefix = tokenizer.pre_tokenizer, config.get("add_prefix_space")
    if type(pieces).__name__ == "ByteLevel" and prefix is not None:
        pieces.add_prefix_space = prefix


def _from_vocabulary(folder: Path, config: _Config, tokens: dict[str, _Added]) -> Any:
    """Build the tokenizer of a folder without tokenizer.json."""
    kind = (config.get("tokenizer_class") or "").removesuffix("Fast")
    has = {name: (folder / name).is_file() for name in ("vocab.txt", "vocab.json", "merges.txt")}
    pieces = has["vocab.json"] and has["merges.txt"]
    unknown = kind and kind not in _CLASSES
    if unknown or not (has["vocab.txt"] or pieces):
        models = [path.name for path in sorted(folder.glob("*.model"))] if folder.is_dir() else []
        models += ["tekken.json"] if (folder / "tekken.json").is_file() else []
        if not (unknown or models):
            raise FileNotFoundError(
                f"{folder} has no tokenizer.json, nor vocab.txt, nor vocab.json and merges.txt; "
                "give a folder with a tokenizer"
            )
        source = f"the {kind} that it has" if unknown else f"{models[0]}, which"
        raise ValueError(
            f"{folder} has no tokenizer.json, and {source} is not read without it; let "
            "transformers write it: AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
        )
    if has["vocab.txt"]:
        return _word_pieces(folder / "vocab.txt", config, tokens)
    return _byte_pairs(folder, config, tokens)


def _word_pieces(path: Path, config: _Config, tokens: dict[str, _Added]) -> Any:
    """Build the tokenizer of BERT (Devlin et al. 2019, arXiv:1810.04805)."""
    library = _library()
    try:
        lines = path.read_bytes().decode().split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8; {_REMEDY}") from error
    lines = [line.removesuffix("\r") for line in lines]
    if lines and not lines[-1]:
        lines.pop()
    vocabulary = {line: index for index, line in enumerate(lines)}
    names = _fill(tokens, _BERT)
    ids = {name: vocabulary.get(names[name]) for name in ("unk", "cls", "sep")}
    if None in ids.values():
        missing = next(names[name] for name, index in ids.items() if index is None)
        raise ValueError(f"{path} has no token {missing!r}; {_REMEDY}")
    tokenizer = library.Tokenizer(library.models.WordPiece(vocabulary, unk_token=names["unk"]))
    lower, chinese = config.get("do_lower_case"), config.get("tokenize_chinese_chars")
    tokenizer.normalizer = library.normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=True if chinese is None else chinese,
        strip_accents=config.get("strip_accents"),
        lowercase=True if lower is None else lower,
    )
    tokenizer.pre_tokenizer = library.pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = library.decoders.WordPiece(prefix="##")
    first, last = names["cls"], names["sep"]
    tokenizer.post_processor = library.processors.TemplateProcessing(
        single=[f"{first}:0", "$A:0", f"{last}:0"],
        pair=[f"{first}:0", "$A:0", f"{last}:0", "$B:1", f"{last}:1"],
        special_tokens=[(first, ids["cls"]), (last, ids["sep"])],
    )
    return tokenizer


def _byte_pairs(folder: Path, config: _Config, tokens: dict[str, _Added]) -> Any:
    """Build the tokenizer of GPT-2 or RoBERTa, which differ in the special tokens."""
    library = _library()
    paths = folder / "vocab.json", folder / "merges.txt"
    model = _guarded(
        library.models.BPE.from_file, *map(str, paths), what=" and ".join(map(str, paths))
    )
    tokenizer = library.Tokenizer(model)
    prefix = bool(config.get("add_prefix_space"))
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    tokenizer.decoder = library.decoders.ByteLevel()
    names = _fill(tokens, _ROBERTA)
    first, last = (tokenizer.token_to_id(names[name]) for name in ("cls", "sep"))
    if first is not None and last is not None:
        tokenizer.post_processor = library.processors.RobertaProcessing(
            (names["sep"], last), (names["cls"], first), add_prefix_space=prefix
        )
        if "mask" not in tokens and tokenizer.token_to_id(names["mask"]) is not None:
            # It takes the space in front of it, as in training.
            mask = library.AddedToken(names["mask"], lstrip=True, normalized=False, special=True)
            tokenizer.add_special_tokens([mask])
    return tokenizer


def _fill(tokens: dict[str, _Added], usual: dict[str, str]) -> dict[str, str]:
    return usual | {name: token["content"] for name, token in tokens.items()}


def _add_tokens(folder: Path, tokenizer: Any, tokens: dict[str, _Added], config: _Config) -> None:
    """Add the tokens that the vocabulary lacks, and mark those that are special."""
    library = _library()
    present = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    for index, token in _extra_tokens(folder, config):
        if token["content"] not in present:
            options = {name: value for name, value in token.items() if name != "content"}
            tokenizer.add_tokens([library.AddedToken(token["content"], **options)])
            if tokenizer.token_to_id(token["content"]) != index:
                raise ValueError(
                    f"{folder}: the added token {token['content']!r} has the id {index}, but the "
                    f"next one is {tokenizer.token_to_id(token['content'])}; {_REMEDY}"
                )
            present.add(token["content"])
    for token in tokens.values():
        if token["content"] not in present:
            options = {"normalized": False, **token, "special": True}
            options.pop("content")
            tokenizer.add_special_tokens([library.AddedToken(token["content"], **options)])
            present.add(token["content"])


def _check_ids(folder: Path, tokenizer: Any) -> None:
    """Refuse ids so large that handling the vocabulary takes minutes and gigabytes."""
    token, index = max(tokenizer.get_vocab().items(), key=lambda item: item[1], default=("", 0))
    if index >= _MOST_IDS:
        raise ValueError(
            f"{folder}: the token {token!r} has the id {index}, which is more than any "
            f"vocabulary's; {_REMEDY}"
        )


def _extra_tokens(folder: Path, config: _Config) -> Iterator[tuple[int, _Added]]:
    """Yield id and token of tokenizer_config.json or added_tokens.json, in the order of ids."""
    if "added_tokens_decoder" in config:
        entries = config["added_tokens_decoder"]
        numbered = {int(key): token for key, token in entries.items() if key.isdecimal()}
    else:
        document = _read(folder / "added_tokens.json", what="added tokens of a tokenizer")
        ids = document.check(dict[str, int])
        numbered = {index: _Added(content=token) for token, index in ids.items()}
    yield from sorted(numbered.items())


def _begin_and_end(
    tokenizer: Any, special: dict[str, str], config: _Config, document: Document
) -> None:
    """Add the bos and eos tokens as the options of the folder say."""
    ends = []
    for name in ("bos", "eos"):
        wanted = bool(config.get(f"add_{name}_token"))
        if wanted and name not in special:
            raise document.error(f"it has no {name} token", key=f"add_{name}_token")
        ends.append(special[name] if wanted else None)
    first, last = ends

    def template(sequence: str, segment: int) -> list[str]:
        parts = [first, f"${sequence}", last]
        return [f"{part}:{segment}" for part in parts if part is not None]

    used = [token for token in ends if token is not None]
    tokenizer.post_processor = _library().processors.TemplateProcessing(
        single=template("A", 0),
        pair=template("A", 0) + template("B", 1),
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in dict.fromkeys(used)],
    )


def _is_whisper(config: _Config) -> bool:
    """Whether the start of a text is a task and a language, which no option turns off."""
    return (config.get("tokenizer_class") or "").startswith("Whisper")


def _has_segments(tokenizer: Any, config: _Config) -> bool:
    if "model_input_names" in config:
        return "token_type_ids" in config["model_input_names"]
    if (config.get("tokenizer_class") or "").startswith("DistilBert"):
        return False
    return json.loads(tokenizer.to_str())["model"]["type"] == "WordPiece"
