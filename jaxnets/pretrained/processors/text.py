"""Text to batches of tokens, by the tokenizer of a pretrained network."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from jaxnets.checks import check_sizes
from jaxnets.data.text.padding import pad_sequences
from jaxnets.data.text.vocabulary import check_ids, list_texts
from jaxnets.pretrained.processors.tokenizer_files import read_folder, tokenizer_from_json
from jaxnets.storage import atomic_file

# The library's tokenizer holds the truncation of the current call.
_LOCK = threading.Lock()


@dataclasses.dataclass(frozen=True)
class TextProcessor:
    """The tokenizer of a pretrained network, by Hugging Face's `tokenizers`.

    Corresponds to `transformers.AutoTokenizer`. Differs from it: padding comes last, batches have
    lengths in place of masks, and a text that is too long is an error unless `truncate` is given.
    Special tokens in a text ("[SEP]") are taken for the special tokens, as there.

    Attributes:
        model: the tokenizer as the JSON of `tokenizers` (tokenizer.json).
        special_tokens: {"pad": "[PAD]", "cls": "[CLS]", ...}, of the names that the tokenizer has
            of pad, cls, sep, bos, eos, mask and unk.
        max_length: most tokens of the network, special ones included; None is without a limit.
        segments: whether batches have "segments".
        truncation_side: where a text that is too long is cut.

    Raises:
        ImportError: `tokenizers` is not installed.
        ValueError: the model is not a tokenizer, or lacks a special token.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "good", "film", "##s"]
        >>> _ = (folder / "vocab.txt").write_text("\\n".join(words))
        >>> processor = TextProcessor.from_folder(folder)
        >>> {name: array.tolist() for name, array in processor(["Good films", "A"]).items()}
        {'tokens': [[2, 6, 7, 8, 3], [2, 5, 3, 0, 0]], 'lengths': [5, 3], \
'segments': [[0, 0, 0, 0, 0], [0, 0, 0, 0, 0]]}
        >>> processor.decode([2, 6, 7, 8, 3])
        'good films'
    """

    model: str = dataclasses.field(repr=False)
    special_tokens: Mapping[str, str] = dataclasses.field(default_factory=dict)
    max_length: int | None = None
    segments: bool = False
    truncation_side: Literal["right", "left"] = "right"

    def __post_init__(self) -> None:
        if self.max_length is not None:
            check_sizes(max_length=self.max_length)
        if self.truncation_side not in ("right", "left"):
            raise ValueError(
                f"truncation_side is {self.truncation_side!r}; choose 'right' or 'left'"
            )
        tokenizer = self._tokenizer
        for name, token in self.special_tokens.items():
            if tokenizer.token_to_id(token) is None:
                raise ValueError(
                    f"the {name} token {token!r} is not in the vocabulary of "
                    f"{self.vocabulary_size}; give one that is, or leave it out"
                )

    @classmethod
    def from_folder(cls, path: str | os.PathLike[str]) -> TextProcessor:
        """Read the tokenizer of a Hugging Face folder.

        Args:
            path: a folder with tokenizer.json; or with vocab.txt (BERT) or vocab.json and
                merges.txt (GPT-2, RoBERTa). Options are read from tokenizer_config.json,
                special_tokens_map.json and added_tokens.json where they exist.

        Returns:
            The processor.

        Raises:
            FileNotFoundError: the folder has no tokenizer.
            ValueError: a damaged file, or a tokenizer that is not read, such as a SentencePiece
                model without tokenizer.json; the message names the file.
            ImportError: `tokenizers` is not installed.
        """
        fields = read_folder(Path(path))
        try:
            return cls(**fields)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write tokenizer.json and tokenizer_config.json, which `transformers` reads too.

        Args:
            path: the folder; it is created if it is missing, existing files are replaced.
        """
        tokens = {f"{name}_token": token for name, token in self.special_tokens.items()}
        inputs = ["input_ids", *(["token_type_ids"] if self.segments else []), "attention_mask"]
        config = {
            # Any other class would build its own pipeline around the vocabulary.
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_input_names": inputs,
            "truncation_side": self.truncation_side,
            "clean_up_tokenization_spaces": False,
            **({} if self.max_length is None else {"model_max_length": self.max_length}),
            **tokens,
        }
        with atomic_file(Path(path) / "tokenizer.json") as stream:
            stream.write(self.model.encode())
        with atomic_file(Path(path) / "tokenizer_config.json") as stream:
            stream.write(json.dumps(config, indent=2, ensure_ascii=False).encode() + b"\n")

    @functools.cached_property
    def _tokenizer(self) -> Any:
        return tokenizer_from_json(self.model)

    @functools.cached_property
    def vocabulary_size(self) -> int:
        """Number of token ids, special and added ones included; 1 + the largest id."""
        return 1 + max(self._tokenizer.get_vocab().values())

    @functools.cached_property
    def special_ids(self) -> dict[str, int]:
        """The ids of the special tokens: {"pad": 0, "cls": 101, ...}."""
        return {
            name: self._tokenizer.token_to_id(token) for name, token in self.special_tokens.items()
        }

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        """The tokens that end a text, for `generate`: the eos token, if there is one."""
        return (self.special_ids["eos"],) if "eos" in self.special_ids else ()

    def __call__(
        self,
        texts: Sequence[str],
        pairs: Sequence[str] | None = None,
        *,
        max_length: int | None = None,
        truncate: bool = False,
        add_special: bool = True,
        multiple: int = 1,
        buckets: Sequence[int] | None = None,
    ) -> dict[str, np.ndarray]:
        """Encode texts, or pairs of texts, as one padded batch.

        Args:
            texts: one a row.
            pairs: the second text of each row.
            max_length: most tokens of a row, special ones included; by default that of the
                network.
            truncate: cut longer rows: a text at its end (`truncation_side`), of pairs the longer
                one first (`longest_first` of transformers).
            add_special: add the special tokens that the network was trained with.
            multiple: the length of the rows is rounded up to a multiple, so that fewer shapes
                compile.
            buckets: lengths to choose from in place of a multiple: the smallest that fits.

        Returns:
            {"tokens": int32 [batch, time], "lengths": int32 [batch]}, and with `segments` also
            "segments": int32 [batch, time], 1 for the tokens of the second text.

        Raises:
            ValueError: no texts, a text that is too long or has no token, unequal numbers of texts
                and pairs.
        """
        encodings = self._encode(texts, pairs, max_length, truncate, add_special)
        ids = [encoding.ids for encoding in encodings]
        length = None if buckets is None else _bucket(buckets, max(map(len, ids)))
        tokens, lengths = pad_sequences(
            ids, length=length, multiple=multiple, pad=self.special_ids.get("pad", 0)
        )
        batch = {"tokens": tokens, "lengths": lengths}
        if self.segments:
            segments = [encoding.type_ids for encoding in encodings]
            batch["segments"], _ = pad_sequences(segments, length=tokens.shape[1])
        return batch

    def encode(
        self,
        text: str,
        pair: str | None = None,
        *,
        max_length: int | None = None,
        truncate: bool = False,
        add_special: bool = True,
    ) -> np.ndarray:
        """Return the ids of a text, or of a pair of texts, int32 [tokens].

        The arguments are those of a call.
        """
        pairs = None if pair is None else [pair]
        return self.encode_batch(
            [text], pairs, max_length=max_length, truncate=truncate, add_special=add_special
        )[0]

    def encode_batch(
        self,
        texts: Sequence[str],
        pairs: Sequence[str] | None = None,
        *,
        max_length: int | None = None,
        truncate: bool = False,
        add_special: bool = True,
    ) -> list[np.ndarray]:
        """Return the ids of each text, int32 [tokens], for `bucketed_batches`.

        Faster than `encode` for each, as the texts are encoded in parallel. The arguments are
        those of a call.
        """
        encodings = self._encode(texts, pairs, max_length, truncate, add_special)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def decode(self, ids: npt.ArrayLike, *, keep_special: bool = False) -> str:
        """Return the text of integer ids [tokens].

        Args:
            ids: one row, without its padding.
            keep_special: write special tokens too.

        Raises:
            ValueError: ids that are not integers or outside the vocabulary.
        """
        checked = check_ids(ids, self.vocabulary_size).tolist()
        return self._tokenizer.decode(checked, skip_special_tokens=not keep_special)

    def _encode(
        self,
        texts: Sequence[str],
        pairs: Sequence[str] | None,
        max_length: int | None,
        truncate: bool,
        add_special: bool,
    ) -> list[Any]:
        """Return the encodings of `tokenizers`."""
        rows: list[Any] = list_texts(texts)
        if pairs is not None:
            pairs = list_texts(pairs)
            if len(pairs) != len(rows):
                raise ValueError(
                    f"{len(rows)} texts and {len(pairs)} pairs; give a second text for each"
                )
            rows = list(zip(rows, pairs, strict=True))
        for index, row in enumerate(rows):
            for text in (row,) if pairs is None else row:
                _check_text(text, index)
        limit = self.max_length if max_length is None else max_length
        if limit is not None:
            special = self._tokenizer.num_special_tokens_to_add(pairs is not None)
            least = 1 + (special if add_special else 0)
            if limit < least:  # the library would not truncate at all
                raise ValueError(
                    f"max_length is {limit}, which leaves no room for a token beside "
                    f"{least - 1} special ones; give at least {least}"
                )
        with _LOCK:
            if truncate and limit is not None:
                self._tokenizer.enable_truncation(limit, direction=self.truncation_side)
            try:
                encodings = self._tokenizer.encode_batch(rows, add_special_tokens=add_special)
            finally:
                self._tokenizer.no_truncation()
        for index, encoding in enumerate(encodings):
            if limit is not None and len(encoding.ids) > limit:
                raise ValueError(
                    f"text {index} has {len(encoding.ids)} tokens, more than max_length={limit}; "
                    "shorten it, or cut it with truncate=True"
                )
        return encodings

    # Compare and pickle the fields only: the library's tokenizer is made from them.
    def __reduce__(self) -> tuple[Any, ...]:
        values = (getattr(self, field.name) for field in dataclasses.fields(self))
        return type(self), tuple(values)


def read_text_processor(
    folder: Path, *, max_length: int | None = None, segments: bool | None = None
) -> TextProcessor | None:
    """Return the processor of a network's folder; None if the folder has no tokenizer.

    Args:
        folder: as in `TextProcessor.from_folder`.
        max_length: most tokens of the network, if it has a limit; the tokenizer's may be lower.
        segments: whether the network takes segments; by default what the tokenizer says.

    Raises:
        ValueError: as in `TextProcessor.from_folder`.
    """
    try:
        processor = TextProcessor.from_folder(folder)
    except FileNotFoundError:
        return None
    limits = [limit for limit in (processor.max_length, max_length) if limit is not None]
    return dataclasses.replace(
        processor,
        max_length=min(limits, default=None),
        segments=processor.segments if segments is None else segments,
    )


def _check_text(text: Any, index: int) -> None:
    if not isinstance(text, str):
        raise ValueError(f"text {index} is {text!r:.60}, not a string")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"text {index} has half a surrogate pair at character {error.start}; read it as "
                "UTF-8, or replace it by text.encode(errors='replace').decode()"
            ) from error


def _bucket(buckets: Sequence[int], longest: int) -> int:
    """Return the smallest bucket that a row fits in."""
    fitting = [length for length in buckets if length >= longest]
    if not fitting:
        raise ValueError(
            f"a row of {longest} tokens is longer than the buckets {list(buckets)}; "
            "add a longer one, or cut it with max_length and truncate=True"
        )
    return min(fitting)
