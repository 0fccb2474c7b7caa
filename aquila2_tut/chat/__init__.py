"""Prompt formats, and the methods by which a model answers."""

from aquila2_tut.chat.generate import ChatError, PredictMixin
from aquila2_tut.chat.prefill import prefill
from aquila2_tut.chat.templates import (
    Template,
    TemplateError,
    get_template,
    template_for_model,
    template_names,
)

__all__ = [
    "ChatError",
    "PredictMixin",
    "Template",
    "TemplateError",
    "get_template",
    "prefill",
    "template_for_model",
    "template_names",
]
