"""Readable reports of a run: samples as HTML and for loggers, and plots."""

from kdrl_lightning.callbacks.reports.loggers import log_samples
from kdrl_lightning.callbacks.reports.page import Section, render
from kdrl_lightning.callbacks.reports.text import token_texts, visible
from kdrl_lightning.callbacks.reports.views import (
    SampleView,
    TokenView,
    choose,
    cut_tokens,
    scored_views,
    text_view,
)

__all__ = [
    "SampleView",
    "Section",
    "TokenView",
    "choose",
    "cut_tokens",
    "log_samples",
    "render",
    "scored_views",
    "text_view",
    "token_texts",
    "visible",
]
