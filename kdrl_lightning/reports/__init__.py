"""Samples that a person can read: tokens as text, what became of each, and an HTML page."""

from kdrl_lightning.samples.loggers import log_samples
from kdrl_lightning.samples.page import Section, render
from kdrl_lightning.samples.text import token_texts, visible
from kdrl_lightning.samples.views import SampleView, TokenView, choose, scored_views, text_view

__all__ = [
    "SampleView",
    "Section",
    "TokenView",
    "choose",
    "log_samples",
    "render",
    "scored_views",
    "text_view",
    "token_texts",
    "visible",
]
