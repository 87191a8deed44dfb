"""Search and cluster the lines of a text file by a pretrained sentence encoder.

python -m experiments.embeddings --pretrained FOLDER --texts FILE --query "a funny film"
python -m experiments.embeddings --pretrained FOLDER --texts FILE --clusters 12
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

import jaxnets as jn
from experiments import probes
from experiments.harness.command_line import errors_without_traceback
from experiments.harness.run_folder import RunError
from jaxnets.models.transformer import SentenceEncoder

#: The shortest length that rows of a batch are padded to.
_SHORTEST = 16
_DEFAULT_CLUSTERS = 8
_MOST_NAMED = 40  # clusters that a legend lists; more would not fit on a screen


@dataclasses.dataclass(frozen=True)
class Config:
    """Sentence encoder, lines, and what to do with them."""

    pretrained: Path
    """Folder of sentence-transformers, such as that of all-MiniLM-L6-v2."""
    texts: Path
    """Text file in UTF-8, one sentence a line. Blank lines and repetitions are left out, lines
    that are too long for the network are cut."""
    query: str | None = None
    """Print the lines most similar to this sentence."""
    top: int = 5
    """Number of lines that --query prints."""
    clusters: int | None = None
    """Clusters of k-means, drawn and printed by their central lines; by default 8, or fewer if
    fewer lines differ."""
    batch_size: int = 32
    """Lines per batch."""
    seed: int = 0
    """Seed of k-means."""
    out: Path = Path("runs/embeddings")
    """Folder of clusters.png."""


@dataclasses.dataclass(frozen=True)
class Clusters:
    """Clusters of lines, the largest first.

    Attributes:
        labels: cluster of each line, integer [lines].
        central: the line closest to the center of each cluster, integer [clusters].
        sizes: lines of each cluster, integer [clusters].
    """

    labels: np.ndarray
    central: np.ndarray
    sizes: np.ndarray


def read_lines(path: Path) -> list[str]:
    """Return the different lines of a text file that are not blank.

    Raises:
        RunError: the file is not text in UTF-8, or has no line.
        OSError: the file cannot be read.
    """
    try:
        content = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise RunError(
            f"{path} is not UTF-8 at byte {error.start}; give a text file in UTF-8"
        ) from error
    if "\0" in content:  # valid UTF-8, but in no text
        place = len(content[: content.index("\0")].encode())
        raise RunError(
            f"{path} is not text in UTF-8: it has a byte 0 at {place}, as binary files and UTF-16 "
            "have; give a text file in UTF-8"
        )
    lines = list(dict.fromkeys(line.strip() for line in content.split("\n") if line.strip()))
    if not lines:
        raise RunError(f"{path} has no line of text; give a file with one sentence a line")
    return lines


def load_encoder(path: Path) -> jn.pretrained.PretrainedNetwork:
    """Load a sentence encoder with its tokenizer.

    Raises:
        RunError: the folder is another network, or has no tokenizer.
        OSError: the folder cannot be read.
        ValueError: the folder is damaged.
    """
    network = jn.pretrained.load(path)
    remedy = "give a folder of sentence-transformers, which has modules.json"
    if not isinstance(network.module, SentenceEncoder):
        raise RunError(
            f"{path} is a {type(network.module).__name__}, not a sentence encoder; {remedy}"
        )
    if network.processor is None:
        raise RunError(f"{path} has no tokenizer; {remedy} and tokenizer.json")
    return network


def embed(
    network: jn.pretrained.PretrainedNetwork, texts: Sequence[str], *, batch_size: int = 32
) -> np.ndarray:
    """Return a vector of length 1 for each text, so that their products are cosines.

    Texts of similar length share a batch. All batches of a length have the same number of rows, and
    every second length is the double (16, 24, 32, 48, ...), so that few programs compile and few
    tokens are padding.

    Args:
        network: a sentence encoder, see `load_encoder`.
        texts: what is too long for the network is cut.
        batch_size: rows of a batch, at most.

    Returns:
        float32 [texts, features].
    """
    processor, module = network.processor, network.module
    lengths = np.array([len(ids) for ids in processor.encode_batch(texts, truncate=True)])
    buckets = [_SHORTEST]
    while buckets[-1] < lengths.max():
        buckets += [buckets[-1] * 3 // 2, buckets[-1] * 2]
    if processor.max_length is not None:
        buckets = [min(bucket, processor.max_length) for bucket in buckets]
    vectors: np.ndarray | None = None
    choices = np.searchsorted(buckets, lengths)
    for choice in np.unique(choices):
        rows = np.flatnonzero(choices == choice)
        size = -(-len(rows) // -(-len(rows) // batch_size))  # equal parts, of few repeated rows
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            padded = np.resize(part, size)  # repeats rows to fill the last batch
            batch = processor(
                [texts[row] for row in padded], truncate=True, buckets=[buckets[choice]]
            )
            output = np.asarray(_apply(module, network.variables, batch), np.float32)[: len(part)]
            if vectors is None:
                vectors = np.zeros((len(texts), output.shape[1]), np.float32)
            vectors[part] = output
    assert vectors is not None
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.maximum(norms, np.finfo(np.float32).tiny)


@functools.partial(jax.jit, static_argnums=0)
def _apply(module: SentenceEncoder, variables: Any, batch: Mapping[str, Any]) -> jax.Array:
    return module.apply(variables, **batch)


def search(query: np.ndarray, vectors: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
    """Find the vectors most similar to a query.

    Args:
        query: [features], of length 1.
        vectors: [texts, features], of length 1.
        top: number of results, at most that of the vectors.

    Returns:
        Indices and cosines, [top], the most similar first.
    """
    cosines = vectors @ query
    best = np.argsort(-cosines, kind="stable")[:top]
    return best, cosines[best]


def cluster(vectors: np.ndarray, num_clusters: int | None = None, *, seed: int = 0) -> Clusters:
    """Group vectors by k-means, the best of ten runs.

    Args:
        vectors: [texts, features].
        num_clusters: at most the number of different vectors; by default 8, or that number.
        seed: of the first centers.

    Raises:
        RunError: more clusters than different vectors.
    """
    from sklearn.cluster import KMeans  # slow to import

    different = len(np.unique(vectors.round(5), axis=0))
    if num_clusters is None:
        num_clusters = min(_DEFAULT_CLUSTERS, different)
    if num_clusters > different:
        raise RunError(
            f"--clusters is {num_clusters}, but only {different} lines differ; give at most "
            f"{different}"
        )
    fitted = KMeans(num_clusters, n_init=10, random_state=seed).fit(vectors)
    distances = np.square(vectors - fitted.cluster_centers_[fitted.labels_]).sum(axis=1)
    sizes = np.bincount(fitted.labels_, minlength=num_clusters)
    order = np.argsort(-sizes, kind="stable")
    central = [
        int(np.argmin(np.where(fitted.labels_ == index, distances, np.inf))) for index in order
    ]
    rank = np.empty(num_clusters, int)
    rank[order] = np.arange(num_clusters)
    return Clusters(rank[fitted.labels_], np.array(central), sizes[order])


def draw(texts: Sequence[str], vectors: np.ndarray, clusters: Clusters, path: Path) -> None:
    """Draw lines as points, by their first two principal components, in the colors of clusters.

    The legend has the central lines of the largest clusters.

    Args:
        texts: the lines.
        vectors: [texts, features].
        clusters: of the vectors.
        path: PNG file.
    """
    import matplotlib
    from matplotlib.figure import Figure

    mean, directions = probes.principal_components(vectors, 2)
    centered = vectors - mean
    points = centered @ directions.T  # [texts, 2]
    total = max(float(np.square(centered).sum()), float(np.finfo(np.float32).tiny))
    shares = np.square(points).sum(axis=0) / total
    count = len(clusters.central)
    if count <= 10:
        colors = matplotlib.colormaps["tab10"](np.arange(count))
    else:
        colors = matplotlib.colormaps["turbo"](np.linspace(0, 1, count))
    named = min(count, _MOST_NAMED)
    figure = Figure(figsize=(12, max(5.0, 0.27 * named)), layout="constrained")
    axis = figure.subplots()
    for index, row in enumerate(clusters.central):
        label = None
        if index < named:
            label = f"{index + 1}: {_shorten(texts[row], 60)} ({clusters.sizes[index]})"
        chosen = points[clusters.labels == index]
        axis.scatter(*chosen.T, s=8, alpha=0.5, color=colors[index], label=label)
    for index, row in enumerate(clusters.central):
        axis.annotate(
            str(index + 1),
            points[row],
            ha="center",
            va="center",
            color="white",
            bbox={"boxstyle": "circle", "color": colors[index]},
        )
    axis.set_xlabel(f"first principal component ({shares[0]:.0%} of the variance)")
    axis.set_ylabel(f"second ({shares[1]:.0%})")
    title = "central lines (number of lines)"
    if named < count:
        title = f"central lines (number of lines), {named} of {count}"
    legend = figure.legend(loc="outside right upper", title=title, markerscale=2)
    for text in legend.get_texts():
        text.set_parse_math(False)  # a line may have dollars
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _shorten(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 3]}..."


def _check(config: Config) -> None:
    for name, least in {"top": 1, "clusters": 1, "batch_size": 1, "seed": 0}.items():
        value = getattr(config, name)
        if value is not None and value < least:
            raise RunError(f"--{name.replace('_', '-')} is {value}; give {least} or more")
    if config.seed >= 2**32:
        raise RunError(f"--seed is {config.seed}; give less than 2^32")
    if config.out.exists() and not config.out.is_dir():
        raise RunError(f"--out is {config.out}, a file; give a folder")
    if config.query is not None and not config.query.strip():
        raise RunError(f"--query is {config.query!r}; give a sentence, or leave it out")


def main(arguments: Sequence[str] | None = None) -> int:
    """Search and cluster the lines of a text file.

    Args:
        arguments: by default those of this process.

    Returns:
        Exit code: 0.
    """
    config = tyro.cli(
        Config,
        args=arguments,
        prog="python -m experiments.embeddings",
        description="Search and cluster the lines of a text file by a pretrained sentence encoder.",
    )
    with errors_without_traceback():
        _check(config)
        texts = read_lines(config.texts)
        if config.clusters is not None and config.clusters > len(texts):
            raise RunError(
                f"--clusters is {config.clusters}, but {config.texts} has {len(texts)} different "
                f"lines; give at most {len(texts)}"
            )
        network = load_encoder(config.pretrained)
        vectors = embed(network, texts, batch_size=config.batch_size)
        if config.query is not None:
            query = embed(network, [config.query], batch_size=1)[0]
            print(f"cosine  line most similar to {config.query!r}")
            for row, cosine in zip(*search(query, vectors, config.top), strict=True):
                print(f"{cosine:6.3f}  {texts[row]}")
            print()
        clusters = cluster(vectors, config.clusters, seed=config.seed)
        print("cluster  lines  central line")
        for index, row in enumerate(clusters.central):
            print(f"{index + 1:7}  {clusters.sizes[index]:5}  {texts[row]}")
        path = config.out / "clusters.png"
        draw(texts, vectors, clusters, path)
        print(f"wrote {path}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
