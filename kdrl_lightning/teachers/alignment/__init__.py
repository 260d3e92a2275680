"""Alignment of two tokenizers by the bytes of a text."""

from kdrl_lightning.teachers.alignment.aligner import Aligner, Chunked
from kdrl_lightning.teachers.alignment.text_encoder import TextEncoder
from kdrl_lightning.teachers.alignment.token_bytes import TokenBytes
from kdrl_lightning.teachers.alignment.worker import AlignmentWorker, Job

__all__ = ["Aligner", "AlignmentWorker", "Chunked", "Job", "TextEncoder", "TokenBytes"]
