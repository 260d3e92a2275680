"""Alignment of two tokenizers by the bytes of a text."""

from kdrl_lightning.teachers.cross_tokenizer.aligner import Aligner, Chunked
from kdrl_lightning.teachers.cross_tokenizer.text_encoder import TextEncoder
from kdrl_lightning.teachers.cross_tokenizer.token_bytes import TokenBytes
from kdrl_lightning.teachers.cross_tokenizer.translation import Translator
from kdrl_lightning.teachers.cross_tokenizer.worker import AlignmentWorker, Job

__all__ = [
    "Aligner",
    "AlignmentWorker",
    "Chunked",
    "Job",
    "TextEncoder",
    "TokenBytes",
    "Translator",
]
