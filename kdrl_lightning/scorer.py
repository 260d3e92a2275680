"""A causal language model as a function from completions to log-probabilities and entropy."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.losses.logprobs import Divergence, Head, Other, TokenScores, token_scores
from kdrl_lightning.merging import MergedRows, merge_rows
from kdrl_lightning.rollout_batch import RolloutBatch

# Two passes must save at least this share of the tokens: each has costs of its own.
SHARED_BELOW = 0.85


class Scorer(nn.Module):
    """Wraps a Hugging Face model so that its forward returns token scores, never logits.

    The head is applied inside this module's forward, to completion positions only; a parameter
    sharding wrapper around it therefore sees every use of a weight. Rows are padded on the right,
    where a causal model needs no attention mask.

    Args:
        model: a transformers causal language model.
        vocab_size: use only the first rows of the head (a teacher with padding rows).
        swap: two ids whose logits change places (a teacher with another end token).
        chunk_size: tokens whose logits exist at once; None takes about 64 MiB.

    Attributes:
        sharded: parameters are split over ranks; a call is then a collective.
        shares: what completions of a call have in common is run once; ``verify`` decides.
    """

    def __init__(
        self,
        model: Any,
        vocab_size: int | None = None,
        swap: tuple[int, int] | None = None,
        chunk_size: int | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.vocab_size = vocab_size
        self.swap = swap
        self.chunk_size = chunk_size
        self.sharded = False
        self.shares = False

    @property
    def scores_dtype(self) -> torch.dtype:
        """Type of what it returns: float64 where the weights are, else float32."""
        double = self.model.get_output_embeddings().weight.dtype == torch.float64
        return torch.float64 if double else torch.float32

    def head(self) -> Head:
        """Return the language-model head with everything that the architecture does to logits."""
        output = self.model.get_output_embeddings()
        config = self.model.config.get_text_config()
        scale = float(getattr(config, "logit_scale", None) or 1.0)
        scale /= float(getattr(config, "logits_scaling", None) or 1.0)
        return Head(
            output.weight,
            getattr(output, "bias", None),
            scale,
            getattr(config, "final_logit_softcapping", None),
            self.vocab_size,
            self.swap,
        )

    def forward(
        self,
        input_ids: Tensor,
        prompt_lengths: Tensor,
        completion_ids: Tensor,
        completion_mask: Tensor,
        temperature: float = 1.0,
        top_k: int = 0,
        topk_ids: Tensor | None = None,
        other: Other | None = None,
        divergence: Divergence | None = None,
    ) -> TokenScores:
        """Score the completions.

        Args:
            input_ids: ``[B, S]``, padded on the right.
            prompt_lengths: ``[B]``, at least 1.
            completion_ids: ``[B, T]``.
            completion_mask: ``[B, T]`` bool.
            temperature: logits are divided by it.
            top_k: how many of its own most likely tokens to name.
            topk_ids: ``[B, T, K]``, tokens whose log-probabilities are wanted as well.
            other: another model's states at the same tokens, see ``states``.
            divergence: from that model, over the full vocabulary.

        Returns:
            Scores ``[B, T]``, 0 behind each completion's end.
        """
        merged, of = self._merged(input_ids, prompt_lengths, completion_mask), None
        if merged is not None and topk_ids is None:
            of = merged.of  # nothing else tells equal rows apart: they are scored once
            if other is not None:
                place = completion_mask.flatten().cumsum(0).view_as(completion_mask) - 1
                other = Other(other.hidden[place[merged.first][merged.mask]], other.head)
            completion_ids, completion_mask = completion_ids[merged.first], merged.mask
        rows, columns = completion_mask.nonzero(as_tuple=True)
        places = rows if merged is None or of is not None else merged.of[rows]
        hidden = self._hidden(input_ids, prompt_lengths, merged, places, columns)
        scores = token_scores(
            hidden,
            self.head(),
            completion_ids[rows, columns],
            temperature,
            self.chunk_size,
            top_k=top_k,
            topk_ids=None if topk_ids is None else topk_ids[rows, columns],
            other=other,
            divergence=divergence,
        )

        def spread(value: Tensor) -> Tensor:
            blank = value.new_zeros(*completion_ids.shape, *value.shape[1:])
            spread_out = blank.index_put((rows, columns), value)
            return spread_out if of is None else spread_out[of]

        return scores.map(spread)

    def _merged(self, *rows: Tensor) -> MergedRows | None:
        """What rows have in common, where that is to be run once."""
        return merge_rows(*rows) if self.shares else None

    def _hidden(
        self,
        input_ids: Tensor,
        prompt_lengths: Tensor,
        merged: MergedRows | None,
        rows: Tensor,
        columns: Tensor,
    ) -> Tensor:
        """``[N, H]``: the states that predict completion tokens ``columns`` of rows.

        The rows are those of ``merged`` where there is one.
        """
        decoder = self.model.get_decoder()
        if merged is not None:
            input_ids, prompt_lengths = merged.input_ids, merged.prompt_lengths
            if self._pays(merged):
                from kdrl_lightning.caches import shared_states

                return shared_states(decoder, merged)[rows, columns]
        hidden: Tensor = decoder(input_ids=input_ids, use_cache=False).last_hidden_state
        return hidden[rows, prompt_lengths[rows] - 1 + columns]

    def _pays(self, rows: MergedRows) -> bool:
        """Whether two passes over fewer tokens cost less than one over all."""
        shared = rows.prompts.numel() + rows.mask.numel() - len(rows.mask)
        return shared <= SHARED_BELOW * rows.input_ids.numel()

    def states(self, batch: RolloutBatch) -> Other:
        """Return hidden states of a batch's completions and the head, for another's divergence.

        The head outlives the call, until the divergence's backward pass. A sharded one is gone by
        then, so it is copied: ``V * H`` values on every rank for the length of a micro-batch,
        1.1 GB for 152k tokens of width 3584 in bfloat16.
        """
        call, mask = (batch.input_ids, batch.prompt_lengths), batch.completion_mask
        merged = self._merged(*call, mask)
        rows, columns = mask.nonzero(as_tuple=True)
        places = rows if merged is None else merged.of[rows]
        hidden = self._hidden(*call, merged, places, columns)
        head, bias = self.head(), self.head().bias
        kept = torch.clone if self.sharded else torch.Tensor.detach
        return Other(
            hidden,
            replace(head, weight=kept(head.weight), bias=None if bias is None else kept(bias)),
        )

    def score(
        self,
        batch: RolloutBatch,
        top_k: int = 0,
        topk_ids: Tensor | None = None,
        other: Other | None = None,
        divergence: Divergence | None = None,
    ) -> TokenScores:
        """Score a rollout batch at its sampling temperature."""
        scores = self(
            batch.input_ids,
            batch.prompt_lengths,
            batch.completion_ids,
            batch.completion_mask,
            batch.temperature,
            top_k,
            topk_ids,
            other,
            divergence,
        )
        return TokenScores(*scores)

    @torch.no_grad()
    def verify(self, name: str) -> None:
        """Compare with ``model(...).logits`` on a few tokens, and see whether prompts are shared.

        Raises:
            ConfigurationError: the architecture treats its logits in a way not known here.
        """
        weight = self.head().weight
        if weight.is_meta:
            return
        rows = min(weight.shape[0], self.vocab_size or weight.shape[0])
        worst, bound = self.largest_gap(torch.arange(8, device=weight.device)[None] % rows)
        if not worst <= bound:
            raise ConfigurationError(
                f"the language-model head of {name} must be one that is known here: got "
                f"log-probabilities {worst:.2g} away from the model's own. "
                "Please report the architecture."
            )
        # Ranks may differ in what they share, which the collectives of a sharded model would not
        # survive; and float64 is for comparisons to 1e-10, in which norms that compute in float32
        # would tell apart where gradients are added up.
        self.shares = (
            not self.sharded and weight.dtype != torch.float64 and self._shares(rows, bound)
        )

    def _shares(self, rows: int, bound: float) -> bool:
        """Whether sharing a prompt gives the same: not every architecture keeps keys and values."""
        ids = torch.arange(30, device=self.head().weight.device).view(2, 15) % rows
        ids[1, :11] = ids[0, :11]
        prompts, mask = ids.new_full((2,), 11), torch.ones_like(ids[:, 11:], dtype=torch.bool)
        call = (ids, prompts, ids[:, 11:], mask)
        plain = self.forward(*call).logprobs
        self.shares = True
        try:
            gap = (self.forward(*call).logprobs - plain).abs().max()
        except Exception:  # a cache that it does not take shows in as many ways as there are models
            return False
        return bool(gap <= bound)

    def largest_gap(self, ids: Tensor) -> tuple[float, float]:
        """Return the largest difference to ``model(ids [1, S]).logits`` and what is allowed."""
        mask = torch.ones_like(ids[:, 1:], dtype=torch.bool)
        # Not ``self(...)``: under a sharding wrapper this method is a forward of its own.
        ours = self.forward(ids, torch.ones_like(ids[:, 0]), ids[:, 1:], mask)
        logits = self.model(input_ids=ids, use_cache=False).logits[0, :-1, : self.vocab_size]
        logits = self.head().order(logits)
        bound = 1e-3 if logits.dtype in (torch.float32, torch.float64) else 0.1
        logits = logits if logits.dtype == torch.float64 else logits.float()
        theirs = logits.log_softmax(-1).gather(-1, ids[0, 1:, None]).squeeze(-1)
        return float((ours.logprobs[0] - theirs).abs().max()), bound
