"""A scripted server with a teacher whose log-probabilities are known by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from helpers.with_vllm.scripted import Scripted

Edit = Callable[[dict[str, Any], dict[str, Any]], Any]


class Teaching(Scripted):
    """Gives every token the log-probability ``-(id + 1) / 10``; ``edit`` changes an answer."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__("Qwen2ForCausalLM", 16)
        self.root, self.edit = "teacher", None
        self.sizes: list[int] = []
        self.routes |= {
            "/v1/models": lambda _: {"data": [{"root": self.root, "max_model_len": 64}]},
            "/tokenize": lambda body: {"tokens": tokenizer(body["prompt"])["input_ids"]},
            "/v1/completions": self.teach,
        }
        self.edit: Edit | None

    def teach(self, body: dict[str, Any]) -> Any:
        self.sizes.append(len(body["prompt"]))
        choices = [self.choice(i, ids, body) for i, ids in enumerate(body["prompt"])]
        for choice in choices if self.edit is not None else []:
            self.edit(choice, body)  # type: ignore[misc]
        return {"choices": choices[::-1]}

    def choice(self, index: int, ids: list[int], body: dict[str, Any]) -> dict[str, Any]:
        made: dict[str, Any] = {"index": index, "prompt_token_ids": list(ids)}
        if "prompt_logprobs" in body:
            steps = [
                {str(i): {"logprob": -(i + 1) / 10, "rank": rank} for i, rank in ((t, 2), (0, 1))}
                for t in ids[1:]
            ]
            made["prompt_logprobs"] = [None, *steps]
        else:
            asked = {f"token_id:{i}": -(i + 1) / 10 for i in body["logprob_token_ids"]}
            made["logprobs"] = {"top_logprobs": [asked]}
        return made
