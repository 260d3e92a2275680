"""Alignment of two tokenizers by the bytes of a text."""

from kdrl_lightning.alignment.aligner import Aligner, Chunked
from kdrl_lightning.alignment.text_encoder import TextEncoder
from kdrl_lightning.alignment.token_bytes import TokenBytes
from kdrl_lightning.alignment.worker import AlignmentWorker, Job

__all__ = ["Aligner", "AlignmentWorker", "Chunked", "Job", "TextEncoder", "TokenBytes"]
