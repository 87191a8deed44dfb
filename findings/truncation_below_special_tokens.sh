#!/usr/bin/env bash
# Truncation to fewer tokens than the template adds.
#
# Guess: a limit below the number of special tokens is refused, or nothing but special tokens remains.
# Behavior (tokenizers 0.23.3): the limit is then ignored in silence, and the text comes whole. With two
# special tokens, six words have 3 tokens under a limit of 3, 2 under a limit of 2, and 8 under a limit
# of 1. A pair adds three, so a limit of 2 that holds for single texts does not hold for pairs.
# Output seen: "one text: {3: 3, 2: 2, 1: 8, 0: 8}; a pair: {4: 4, 3: 3, 2: 15}".
#
# Fails when that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -q "tokenizers==${TOKENIZERS_VERSION:-0.23.3}"
"$folder/venv/bin/python" - <<'PY'
import tokenizers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

vocabulary = {"[UNK]": 0, "[CLS]": 1, "[SEP]": 2, "word": 3}
tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer.post_processor = processors.TemplateProcessing(
    single="[CLS] $A [SEP]",
    pair="[CLS] $A [SEP] $B [SEP]",
    special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
)
text = "word " * 6


def lengths(limits, *texts):
    found = {}
    for limit in limits:
        tokenizer.enable_truncation(limit)
        found[limit] = len(tokenizer.encode(*texts).ids)
    return found


one, pair = lengths((3, 2, 1, 0), text), lengths((4, 3, 2), text, text)
print(f"tokenizers {tokenizers.__version__}; one text: {one}; a pair: {pair}")
assert one == {3: 3, 2: 2, 1: 8, 0: 8}, "this has changed"
assert pair == {4: 4, 3: 3, 2: 15}, "this has changed"
PY
