"""Generation: sampling, beam search, CTC decoding."""

from jaxnets.generation.beam_search import Beams, beam_search
from jaxnets.generation.ctc import ctc_beam_search, ctc_greedy
from jaxnets.generation.generate import Generated, generate
from jaxnets.generation.sampling import Sampling, sample_tokens, transform_logits

__all__ = [
    "Beams",
    "Generated",
    "Sampling",
    "beam_search",
    "ctc_beam_search",
    "ctc_greedy",
    "generate",
    "sample_tokens",
    "transform_logits",
]
