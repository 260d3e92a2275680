"""Prompts from reasoning-gym's generators."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from kdrl_lightning.common.untyped import Row, Tree
from kdrl_lightning.errors import ConfigurationError, load_library, require_count
from kdrl_lightning.prompts.base import PromptSource
from kdrl_lightning.prompts.messages import PromptForm

# `Any`: reasoning-gym's classes and arguments, and those of users' chat templates.

# reasoning-gym draws item i of a data set from seed + i, so the sets of neighbouring seeds would
# differ in one item only. We multiply our seeds by this stride.
SEED_STRIDE = 10_000_000


class ReasoningGymPrompts(PromptSource):
    """Generated items of one task; each row has ``prompt``, ``question``, ``answer``, ``metadata``.

    A row depends only on its index, the seed and the task's arguments. Two seeds never share an
    item's random state, but a task with few different items generates some of them again.

    Args:
        task: name of the data set, e.g. ``chain_sum``.
        size: number of rows.
        seed: seed of the generator.
        config: arguments of the task, e.g. its difficulty.
        chat: make chat messages, for the tokenizer's chat template.
        system: system message (needs ``chat``).
        template_args: arguments of the chat template (needs ``chat``).
        examples: solved questions before the question, each with ``prompt`` and ``answer``.
        suffix: text to add to every question.
        prefill: the beginning of every answer, which the model continues (needs ``chat``).
    """

    def __init__(
        self,
        task: str,
        size: int = 4096,
        seed: int = 0,
        config: Tree | None = None,
        chat: bool = False,
        system: str | None = None,
        template_args: Tree | None = None,
        examples: Sequence[dict[str, str]] = (),
        suffix: str = "",
        prefill: str | None = None,
    ) -> None:
        require_count("size", size, 1, SEED_STRIDE)
        require_count("seed", seed, 0, float("inf"))
        self.form = PromptForm(chat, system, template_args, examples, suffix, prefill)
        self.size = size
        self.items = create_task(task, {**(config or {}), "seed": seed * SEED_STRIDE, "size": size})

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Row:
        if not 0 <= index < self.size:
            raise IndexError(index)
        item = self.items[index]
        return self.form.row(item, item["question"])


def create_task(task: str, config: Mapping[str, Any]) -> Any:
    """Create a data set of reasoning-gym.

    Raises:
        ConfigurationError: reasoning-gym has no such task, or the task refuses its arguments.
    """
    gym = load_library("reasoning_gym")
    known = load_library("reasoning_gym.factory").DATASETS
    if task not in known:
        close = get_close_matches(task, known, n=1)
        hint = f"Did you mean {close[0]}?" if close else f"It has {len(known)}, e.g. chain_sum."
        raise ConfigurationError(f"`task` must be a task of reasoning-gym: got {task}. {hint}")
    try:
        items = gym.create_dataset(task, **config)
        items[0]
    except Exception as error:  # the generators raise assertions, TypeErrors and others
        given = {k: v for k, v in config.items() if k not in ("seed", "size")}
        raise ConfigurationError(
            f"`config` must be arguments that {task} accepts: got {given} ({error}). See the "
            "task's config class in reasoning-gym."
        ) from error
    return items
