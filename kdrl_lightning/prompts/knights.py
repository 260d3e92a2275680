"""Knights and Knaves puzzles with 2 to 8 people: the papers' PPL2 to PPL8."""

from __future__ import annotations

from collections.abc import Sequence

from kdrl_lightning.common.untyped import Tree
from kdrl_lightning.errors import require_count
from kdrl_lightning.prompts.reasoning_gym import ReasoningGymPrompts


class KnightsAndKnavesPrompts(ReasoningGymPrompts):
    """Generated Knights and Knaves puzzles, each with exactly one solution.

    The puzzles come from reasoning-gym's generator (after arXiv 2410.23123), which draws statements
    until exactly one assignment of roles fits them: about 1 ms a puzzle with 2 people, 16 ms with
    8. The names of the two roles differ from puzzle to puzzle. With 2 people and depth 2 there are
    only some hundred pairs of statements, so another seed gives other names, but often the same
    pairs.

    Args:
        people: number of inhabitants, from 2 to 8.
        size: number of puzzles.
        seed: seed of the generator.
        depth: maximum nesting of a statement, at least 2.
        width: maximum number of branches of a statement, at least 2.
        chat: make chat messages, for the tokenizer's chat template.
        system: system message (needs ``chat``).
        template_args: arguments of the chat template (needs ``chat``).
        examples: solved questions before the question, each with ``prompt`` and ``answer``.
        suffix: text to add to every question.
        prefill: the beginning of every answer, which the model continues (needs ``chat``).
    """

    def __init__(
        self,
        people: int = 3,
        size: int = 4096,
        seed: int = 0,
        depth: int = 2,
        width: int = 2,
        chat: bool = False,
        system: str | None = None,
        template_args: Tree | None = None,
        examples: Sequence[dict[str, str]] = (),
        suffix: str = "",
        prefill: str | None = None,
    ) -> None:
        require_count("people", people, 2, 8)
        require_count("depth", depth, 2, float("inf"))
        require_count("width", width, 2, float("inf"))
        config = {"n_people": people, "depth_constraint": depth, "width_constraint": width}
        super().__init__(
            "knights_knaves",
            size,
            seed,
            config,
            chat,
            system,
            template_args,
            examples,
            suffix,
            prefill,
        )
