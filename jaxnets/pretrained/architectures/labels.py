"""The number of classes in config.json, which has them as names."""

from __future__ import annotations

from typing import Any

from jaxnets.pretrained.config import Config


def num_labels(config: Config) -> int | None:
    """Return the number of outputs of a classifier, None for one without a head.

    config.json names the classes (`id2label`); without names there are `num_labels`, or 2.

    Raises:
        ValueError: `id2label` is no object, or `num_labels` no number.
    """
    named = config.inside("id2label")
    count = config.integer("num_labels", 2, least=0) if named is None else len(named.content)
    return count or None


def name_labels(content: dict[str, Any]) -> dict[str, Any]:
    """Return config.json entries with as many names of classes as `num_labels`, if it is there.

    Names of another number of classes are those of another head: "LABEL_0", ... take their place.
    """
    if "num_labels" not in content:
        return content
    content = dict(content)
    count = content.pop("num_labels")
    named = content.get("id2label")
    if named is None or len(named) != count:
        names = [f"LABEL_{index}" for index in range(count)]
        content["id2label"] = {str(index): name for index, name in enumerate(names)}
        content["label2id"] = {name: index for index, name in enumerate(names)}
    return content
