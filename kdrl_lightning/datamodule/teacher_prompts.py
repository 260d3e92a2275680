"""The prompts after which a teacher samples its completions, in the tokens that it reads."""

from __future__ import annotations

from kdrl_lightning.common.untyped import Row
from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.models.pretrained import context_length
from kdrl_lightning.prompts.encoding import encode_prompt
from kdrl_lightning.prompts.prompt_set import PromptSet
from kdrl_lightning.rollout.groups import GroupShare
from kdrl_lightning.rollout.policy import Policy

# Longer than any prompt.
ENDLESS = 1 << 30


class TeacherPrompts:
    """Checks that prompts leave room for the teacher's completions, and prepares its engine.

    The teacher's chat template, tokenizer or context can make a prompt longer or shorter than the
    student's, so we count the ids that the teacher's engine gets.

    Args:
        module: the module with student and teacher.
        share: the teacher's completions and their engine; there may be none.
    """

    def __init__(self, module: Policy, share: GroupShare) -> None:
        self.module, self.share = module, share
        self.teacher = module.teacher if share.count else None
        self.path: str | None = None  # of the model that samples; None if a server has it
        self.limits: list[tuple[range, str]] = []
        teacher, most = self.teacher, share.sampling.max_tokens
        self.context = ENDLESS
        if teacher is None:
            return
        # A self-teacher samples from the student's folder.
        self.path = teacher.model_name or (module.student_path if teacher.generates else None)
        known = teacher.context_length
        self.context = known or (ENDLESS if self.path is None else context_length(self.path))
        why = f"the teacher's context {self.context}, `max_tokens` {most}"
        self.limits = [(range(max(self.context - most, 0) + 1, ENDLESS), why)]
        if self.path is not None:
            self.limits += share.engine.refused_lengths(self.path, most)

    @property
    def of_student(self) -> list[tuple[range, str]]:
        """Prompt lengths to refuse; empty if the teacher does not read the student's prompts."""
        own = self.teacher is not None and self.teacher.has_own_prompt
        return [] if own else self.limits

    def prepare(self, prompts: PromptSet) -> None:
        """Check rows now and when they are drawn; prepare the engine for its longest sequence.

        Args:
            prompts: the training prompts.

        Raises:
            BadRow: the teacher cannot sample a whole completion after a row's prompt.
        """
        if self.teacher is None:
            return
        longest = prompts.bound + self.share.sampling.max_tokens
        if self.teacher.has_own_prompt:
            prompts.require(self.check)
            sample = (self.check(row) for row, _ in prompts.sample)
            longest = max(sample) + self.share.sampling.max_tokens
            longest = longest if prompts.whole else self.context
        if self.path is not None:
            self.share.engine.prepare(self.path, longest, self.module.device)

    def check(self, row: Row) -> int:
        """Return the number of tokens of a row's prompt as the teacher reads it.

        Raises:
            ConfigurationError: the teacher cannot sample a whole completion after it.
        """
        assert self.teacher is not None
        ids = encode_prompt(self.module.tokenizer, row, self.module.end_tokens.ids)
        tokens = len(self.teacher.generation_prompt(row, ids))
        for lengths, why in self.limits:
            if tokens in lengths:
                raise ConfigurationError(
                    "the prompt after which the teacher samples must have at most "
                    f"{lengths.start - 1} tokens ({why}): got {tokens}. Lower `max_tokens`, or "
                    "remove the row."
                )
        return tokens
