"""Whole networks over the mixers of `jattn.nn`, and how to sample from them."""

from jattn.models.blocks import BlockStack
from jattn.models.decoder import DecoderLM
from jattn.models.feed_forward import MixtureOfExperts, SwiGLU
from jattn.models.generate import GenerationState, Sampling, decode, generate, prefill
from jattn.models.m2bert import M2Bert
from jattn.models.megabyte import Megabyte, strided_score

__all__ = [
    "BlockStack",
    "DecoderLM",
    "GenerationState",
    "M2Bert",
    "Megabyte",
    "MixtureOfExperts",
    "Sampling",
    "SwiGLU",
    "decode",
    "generate",
    "prefill",
    "strided_score",
]
