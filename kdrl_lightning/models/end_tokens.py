"""The tokens that end a completion; a model's files may name several."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from kdrl_lightning.common.chat_templates import render
from kdrl_lightning.common.untyped import HFConfig, HFTokenizer
from kdrl_lightning.models.architectures.generation import check_end_ids, read_generation
from kdrl_lightning.models.loading import load_config

# An answer that chat templates do not change, and a question for it.
PROBE, QUESTION = "zq7", "Why?"


@dataclass(frozen=True)
class EndTokens:
    """The end tokens of one model.

    Attributes:
        ids: all end tokens; the tokenizer's ``eos_token`` is the first.
        turn: the end token that closes the assistant's turn in the chat template; None if there is
            no template, or if the template closes a turn with none of ``ids``.

    >>> EndTokens((2, 7), 7).closing([{"role": "user", "content": "1+1"}])
    7
    >>> EndTokens((2, 7), 7).closing("1+1=")
    2
    """

    ids: tuple[int, ...]
    turn: int | None = None

    @property
    def main(self) -> int:
        """The token with which the model ends an answer: the template's, else the tokenizer's."""
        return self.ids[0] if self.turn is None else self.turn

    def closing(self, prompt: object) -> int:
        """Return the token that closes a completion of ``prompt``: plain text or a chat."""
        return self.ids[0] if isinstance(prompt, str) else self.main


def as_ids(eos_token_id: int | Sequence[int]) -> tuple[int, ...]:
    """Return one end token or several as a tuple; transformers accepts both.

    >>> as_ids(2), as_ids([2, 7])
    ((2,), (2, 7))
    """
    return (eos_token_id,) if isinstance(eos_token_id, int) else tuple(eos_token_id)


def first_end(ids: Sequence[int], ends: Sequence[int]) -> int:
    """Return a completion's length up to and including its first end token, or its whole length.

    >>> first_end([5, 2, 7], (2, 7)), first_end([5, 5], (2, 7))
    (2, 2)
    """
    return next((i for i, token in enumerate(ids, 1) if token in ends), len(ids))


def end_tokens(path: str, tokenizer: HFTokenizer) -> EndTokens:
    """Return a model's end tokens, from tokenizer, configuration and generation configuration.

    We leave out ids for which the model has no row, and ids that come only from the default of a
    configuration class (2 in ``LlamaConfig``) if they are ordinary text in the tokenizer.

    Args:
        path: the model's folder or hub name.
        tokenizer: the model's tokenizer, with an end token.

    Raises:
        ConfigurationError: a configuration names an end token that is not an id.
    """
    config = load_config(path)
    markers = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    ids = [int(tokenizer.eos_token_id)]
    for part in (config, config.get_text_config()):
        ids += _named(getattr(part, "eos_token_id", None), part, markers)
    ids += _named((read_generation(path) or {}).get("eos_token_id"), config, markers)
    rows = config.get_text_config().vocab_size
    kept = tuple(dict.fromkeys(i for i in ids if 0 <= i < rows))
    turn = turn_end(tokenizer)
    return EndTokens(kept, turn if turn in kept else None)


def turn_end(tokenizer: HFTokenizer) -> int | None:
    """Return the special or added token with which the chat template closes an assistant's turn.

    None if there is no template, if it refuses the probe, or if it closes a turn with plain text.
    """
    following = _ids(tokenizer, _after_answer(tokenizer))
    markers = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    return following[0] if following and following[0] in markers else None


def warn_of_turn_end(ends: EndTokens, tokenizer: HFTokenizer, path: str) -> None:
    """Warn if the chat template closes turns with a token or text that does not end completions."""
    turn, text = turn_end(tokenizer), _after_answer(tokenizer)
    if not text or turn in ends.ids or (turn is None and set(_ids(tokenizer, text)) & {*ends.ids}):
        return
    what = f"the text {text[:20]!r}, which holds no end token"
    cure = "Use the tokenizer and the template that the model was trained with."
    if turn is not None:
        name = tokenizer.convert_ids_to_tokens(turn)
        what = f"{name!r} ({turn}), which is not an end token"
        cure = (
            f"Add {turn} to `eos_token_id` in the model's generation_config.json if the model was "
            "trained with this template."
        )
    warnings.warn(
        f"the chat template of {path} closes a turn with {what}: completions end only with "
        f"{tokenizer.convert_ids_to_tokens(list(ends.ids))} and may run to `max_tokens`. {cure}",
        stacklevel=2,
    )


def space_before_answer(tokenizer: HFTokenizer) -> str:
    """Return the white space between the chat template's generation prompt and an answer.

    Llama 2's generation prompt ends with ``[/INST]``, and its template puts a space before answers.
    """
    opened = _rendered(tokenizer, answered=False)
    before, found, _ = _rendered(tokenizer, answered=True).partition(PROBE)
    space = before[len(opened) :] if opened and found and before.startswith(opened) else ""
    return "" if space.strip() else space


def _after_answer(tokenizer: HFTokenizer) -> str:
    """Return what the chat template writes after an answer; empty if it leaves the answer out."""
    _, found, rest = _rendered(tokenizer, answered=True).rpartition(PROBE)
    return rest.strip() if found else ""


def _rendered(tokenizer: HFTokenizer, answered: bool) -> str:
    """Return a question with an answer, or with a generation prompt; empty without a template."""
    if not getattr(tokenizer, "chat_template", None):
        return ""
    turns = [{"role": "user", "content": QUESTION}]
    turns += [{"role": "assistant", "content": PROBE}] if answered else []
    for system in ([], [{"role": "system", "content": QUESTION}]):  # some templates need one
        try:
            return render(tokenizer, [*system, *turns], add_generation_prompt=not answered)
        except Exception:  # templates raise errors of any kind
            continue
    return ""


def _ids(tokenizer: HFTokenizer, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []


def _named(value: object, config: HFConfig, markers: set[int]) -> Sequence[int]:
    """Return the ids of a setting; if it is its class's default, only the special tokens.

    transformers copies defaults of configuration classes into files.

    Raises:
        ConfigurationError: a value is not an id.
    """
    ids = check_end_ids(value, config.name_or_path or "the model")
    if value == getattr(type(config), "eos_token_id", None):
        return [i for i in ids if i in markers]
    return ids
