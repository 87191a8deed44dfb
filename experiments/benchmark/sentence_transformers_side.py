"""sentence-transformers: `encode` of a list of sentences."""

from __future__ import annotations

from pathlib import Path

from sentence_transformers import SentenceTransformer

from experiments.benchmark.sides import Prepared, Settings, ready
from experiments.benchmark.torch_variants import begin

LIBRARIES = ("sentence-transformers", "transformers", "torch")


def prepare(settings: Settings) -> Prepared:
    """Embed the sentences, from text to vectors in NumPy."""
    device = begin(settings)
    model = SentenceTransformer(settings.pretrained, device=str(device))
    sentences = Path(settings.sentences).read_text(encoding="utf-8").split("\n")
    batch_size = settings.workload.batch_size

    def run(num_calls: int) -> None:
        for _ in range(num_calls):
            vectors = model.encode(sentences, batch_size=batch_size, normalize_embeddings=True)
            assert len(vectors) == len(sentences)

    num_parameters = sum(weight.numel() for weight in model.parameters())
    return ready(settings.workload, run, num_parameters)
