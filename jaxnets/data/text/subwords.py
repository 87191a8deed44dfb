"""Subword tokenizer: byte-level byte-pair encoding (BPE), trained here."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterable
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from jaxnets.data.text.vocabulary import (
    SPECIAL,
    SavedTokenizer,
    check_ids,
    list_texts,
    sentence_ids,
)


@dataclasses.dataclass(frozen=True)
class SubwordTokenizer(SavedTokenizer):
    """Byte-level byte-pair encoding, by Hugging Face's `tokenizers`.

    Corresponds to `tokenizers.models.BPE` with the `ByteLevel` pre-tokenizer and decoder, as in
    GPT-2: merges never cross the boundary between a word with its leading space, a number and
    punctuation. All 256 bytes are in the vocabulary, so every text round-trips exactly and
    `UNKNOWN` is never produced. Differs from the library's default: special tokens in a text
    ("<pad>") are encoded as ordinary characters.

    Attributes:
        model: the trained tokenizer as the JSON of `tokenizers`, as `Tokenizer.to_str` gives it.

    Raises:
        ImportError: `tokenizers` is not installed.

    References:
        Sennrich, Haddow and Birch 2016, arXiv:1508.07909 (byte-pair encoding); Radford et al.
        2019, "Language Models are Unsupervised Multitask Learners", section 2.2 (over bytes).

    Example:
        >>> tokenizer = SubwordTokenizer.train(["ein Haus", "zwei Häuser"], vocabulary_size=280)
        >>> tokenizer.decode(tokenizer.encode("drei Häuser,  neu"))
        'drei Häuser,  neu'
    """

    model: str

    kind: ClassVar[str] = "subword"

    @classmethod
    def train(
        cls, texts: Iterable[str], *, vocabulary_size: int, min_count: int = 2
    ) -> SubwordTokenizer:
        """Learn the merges; the same texts in any order give the same tokenizer.

        Args:
            texts: the training sentences, of both languages for a shared vocabulary.
            vocabulary_size: at least 260: the special ids, the 256 bytes, then the merges;
                `vocab_size` of `BpeTrainer`.
            min_count: rarer pairs are not merged, so few texts may give fewer tokens than
                `vocabulary_size`; `min_frequency` of `BpeTrainer`.

        Returns:
            The tokenizer.

        Raises:
            ValueError: no text, `texts` is a single string, or the vocabulary is too small.
            ImportError: `tokenizers` is not installed.
        """
        smallest = len(SPECIAL) + 256
        if vocabulary_size < smallest:
            raise ValueError(
                f"vocabulary_size={vocabulary_size} has no room for the {len(SPECIAL)} special "
                f"ids and 256 bytes; give at least {smallest}"
            )
        texts = list_texts(texts)
        if not any(texts):
            raise ValueError(f"the {len(texts)} texts are empty; give texts to learn merges from")
        return cls(_train(texts, vocabulary_size, min_count))

    def __post_init__(self) -> None:
        fault = _fault(self.model)
        if fault:
            raise ValueError(
                f"model {str(self.model)[:40]!r} is not the JSON of a byte-level tokenizer: "
                f"{fault}; make the tokenizer with SubwordTokenizer.train"
            )

    @functools.cached_property
    def _tokenizer(self) -> Any:
        tokenizer = _library().Tokenizer.from_str(self.model)
        tokenizer.encode_special_tokens = True  # as characters; the JSON does not store this
        return tokenizer

    @property
    def vocabulary_size(self) -> int:
        """Number of tokens, special ids included."""
        return self._tokenizer.get_vocab_size()

    def encode(self, text: str, *, add_special: bool = False) -> np.ndarray:
        """Return the ids of the subwords, int32 [tokens].

        Args:
            text: any text.
            add_special: add `BEGIN` at the start and `END` at the end.
        """
        return sentence_ids(self._tokenizer.encode(text).ids, add_special=add_special)

    def decode(self, ids: npt.ArrayLike) -> str:
        """Return the text of integer ids [tokens], without the special ones.

        Bytes that are not UTF-8, as of a text cut within a character, become U+FFFD.

        Raises:
            ValueError: ids that are not integers or outside the vocabulary.
        """
        return self._tokenizer.decode(check_ids(ids, self.vocabulary_size).tolist())

    # Pickle only the model: the pickled library tokenizer loses `encode_special_tokens`.
    def __reduce__(self) -> tuple[type[SubwordTokenizer], tuple[str]]:
        return type(self), (self.model,)


def _train(texts: list[str], vocabulary_size: int, min_count: int) -> str:
    library = _library()
    tokenizer = library.Tokenizer(library.models.BPE())
    pieces = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pieces
    tokenizer.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        min_frequency=min_count,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pieces.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer.to_str()


def _without_merges() -> dict[str, Any]:
    """Return the JSON of a tokenizer that has learned nothing."""
    return json.loads(_train([], len(SPECIAL) + 256, 1))


def _fault(model: str) -> str | None:
    """Return why a model is not one of `SubwordTokenizer.train`; None if it may be.

    The library accepts much more, which it then encodes otherwise, or fails on in use.
    """
    expected = _without_merges()
    try:
        content = json.loads(model)
        parts = {**content, **{f"model.{key}": part for key, part in content["model"].items()}}
        vocabulary, merges = parts.pop("model.vocab"), parts.pop("model.merges")
        # Older versions of the library join the two with a space.
        pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
        made = {first + second for first, second in pairs}
        first_ids = expected["model"]["vocab"]
        if sorted(vocabulary.values()) != list(range(len(vocabulary))):
            return "its token ids are not 0, 1, 2, ..."
        if any(vocabulary.get(token) != index for token, index in first_ids.items()):
            return "special tokens or bytes are missing"
        if made != vocabulary.keys() - first_ids.keys():
            return "its merges are not those of its tokens"
        if not {part for pair in pairs for part in pair} <= vocabulary.keys():
            return "a merge of tokens that it does not have"
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        return f"{type(error).__name__}: {error}"
    right = {**expected, **{f"model.{key}": part for key, part in expected["model"].items()}}
    for name in ("pre_tokenizer", "decoder", "added_tokens", *sorted(parts.keys() - {"model"})):
        found = json.dumps(parts.get(name), sort_keys=True)
        if name not in right or found != json.dumps(right[name], sort_keys=True):
            return f"its {name} is {found[:40]}"
    return None


def _library() -> Any:
    """Import `tokenizers` when it is needed."""
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError(
            "subword tokenizers need Hugging Face's package; run `pip install tokenizers`"
        ) from error
    return tokenizers
