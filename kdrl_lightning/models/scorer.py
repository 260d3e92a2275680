"""A causal language model as a function from completions to log-probabilities and entropy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from kdrl_lightning.common.layout import Layout, Rows
from kdrl_lightning.common.untyped import HFConfig, HFModel
from kdrl_lightning.losses.head.chunk_math import Divergence
from kdrl_lightning.losses.logprobs import (
    Head,
    Loss,
    Other,
    TokenScores,
    pays_ahead,
    token_scores,
)
from kdrl_lightning.models.architectures.hidden_states import decoder_of, states_at_head
from kdrl_lightning.models.architectures.implementations import keep_precision
from kdrl_lightning.models.architectures.rotary import (
    decide_per_row,
    lengths_of_rows,
    switch_lengths,
)
from kdrl_lightning.models.architectures.verification import close, verify
from kdrl_lightning.models.passes.shared_prompts import (
    MergedRows,
    Sharing,
    WidthClass,
    cuda_clock,
    length_classes,
    lengths_of,
    merge_rows,
    on_host,
    places_of,
    width_classes,
)
from kdrl_lightning.rollout_batch import RolloutBatch, upload

# `Any`: models and configurations of transformers share no typed base.

# Names that architectures give to the bound of ``bound * tanh(logits / bound)``.
SOFT_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


class Scorer(nn.Module):
    """Wraps a Hugging Face model so that its forward returns token scores, never logits.

    The head is applied inside this module's forward, to completion positions only, so a DDP or FSDP
    wrapper around the module sees every use of a weight. Rows are padded on the right, where a
    causal model needs no attention mask.

    Args:
        model: a transformers causal language model.
        vocab_size: number of the head's rows to use (a teacher may have padding rows); None: all.
        swap: two ids whose logits are exchanged (a teacher may have another end token), or None.
        chunk_size: tokens whose logits exist at once; None: see ``auto_chunk_size``.

    Attributes:
        sharded: whether parameters are sharded over ranks; a call is then a collective.
        computes: type that FSDP2 casts the weights to for a pass; None: they keep theirs.
        shares: whether equal rows run once, and equal prompts may; ``verify`` decides.
        sharing: decides by tokens or seconds whether a call runs equal prompts once.
        pads: whether rows of different lengths may be padded to one pass; ``verify`` decides.
        unreached: trainable parameters that get no gradient from short rows.
        at_head: whether to take the head's input instead of the decoder's output as hidden states;
            ``verify`` decides.
        refuse: raises for a batch's highest id if the model has no row for it; None: all have one.
    """

    def __init__(
        self,
        model: HFModel,
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
        self.computes: torch.dtype | None = None
        self.shares = False
        self.pads = True
        self.sharing = Sharing()
        self.unreached: list[str] = []
        self.at_head = decoder_of(model) is None
        self.refuse: Callable[[int], None] | None = None
        decide_per_row(model)
        keep_precision(model)
        self._switches = [length for length, _ in switch_lengths(model)]

    @property
    def scores_dtype(self) -> torch.dtype:
        """Dtype of the scores: float64 if the head's weights are float64, else float32."""
        double = self.model.get_output_embeddings().weight.dtype == torch.float64
        return torch.float64 if double else torch.float32

    def head(self) -> Head:
        """Return the head, with the scale and soft cap that the architecture applies to logits."""
        output = self.model.get_output_embeddings()
        config = self.model.config.get_text_config()
        caps = (getattr(config, name, None) for name in SOFT_CAPS)
        return Head(
            output.weight,
            getattr(output, "bias", None),
            _logit_scale(config),
            next((cap for cap in caps if cap is not None), None),
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
        loss: Loss | None = None,
        layout: Layout | None = None,
    ) -> TokenScores:
        """Score the completions.

        Args:
            input_ids: ``[B, S]``, padded on the right.
            prompt_lengths: ``[B]``, at least 1.
            completion_ids: ``[B, T]``.
            completion_mask: ``[B, T]`` bool, True on the completions' tokens.
            temperature: logits are divided by it.
            top_k: number of the model's most likely tokens to return.
            topk_ids: ``[B, T, K]``, further tokens whose log-probabilities to return.
            other: another model's states at the same tokens, see ``states``.
            divergence: computes the divergence from that model, over the full vocabulary.
            loss: the loss that you will compute from the scores, see ``token_scores``.
            layout: the same rows on the CPU; None: read them, for which the host waits for a GPU.

        Returns:
            Scores ``[B, T]``, 0 after each completion's end.
        """
        call, device = (input_ids, prompt_lengths, completion_mask), input_ids.device
        host = self._checked(on_host(*call) if layout is None else layout.rows)
        merged = self._merged(*host)
        # Only these two can give equal rows different scores.
        apart = topk_ids is not None or (other is not None and other.per_row)
        once = merged is not None and not apart
        rows, columns, states, among = places_of(host[2], merged, once, device)
        passes = lengths_of(host, merged), self._classes(host, merged)
        merged = None if merged is None else merged.to(device)
        hidden = self._hidden(*call[:2], merged, states, columns, *passes)
        of = merged.of if merged is not None and once else None
        if merged is not None and once:
            completion_ids = completion_ids[merged.first]
            other = None if other is None else other._replace(hidden=other.hidden[among])

        def spread(value: Tensor) -> Tensor:
            blank = value.new_zeros(*completion_ids.shape, *value.shape[1:])
            spread_out = blank.index_put((rows, columns), value)
            return spread_out if of is None else spread_out[of]

        head = self.head()
        pays = loss is not None and pays_ahead(hidden, head, self.chunk_size)
        scores = token_scores(
            hidden,
            head,
            completion_ids[rows, columns],
            temperature,
            self.chunk_size,
            top_k=top_k,
            topk_ids=None if topk_ids is None else topk_ids[rows, columns],
            other=other,
            divergence=divergence,
            loss=(lambda found: loss(found.map(spread))) if loss and pays else None,
        )
        return scores.map(spread)

    def _checked(self, host: Rows) -> Rows:
        """Return ids, prompt lengths and mask, which are on the CPU; refuse ids without a row."""
        if self.refuse is not None:
            self.refuse(int(host[0].max()))
        return host

    def _merged(self, ids: Tensor, prompt_lengths: Tensor, mask: Tensor) -> MergedRows | None:
        """Return the batch's distinct rows and prompts, or None if every row runs in full.

        Every row does if one may be long enough to change its rotary embedding: its prompt, run
        alone, would keep the plain one.
        """
        if not self.shares or (self._switches and ids.shape[1] > self._switches[0]):
            return None
        return merge_rows(ids, prompt_lengths, mask)

    def _hidden(
        self,
        input_ids: Tensor,
        prompt_lengths: Tensor,
        merged: MergedRows | None,
        rows: Tensor,
        columns: Tensor,
        lengths: Tensor,
        classes: Sequence[WidthClass],
    ) -> Tensor:
        """Return ``[N, H]``: the hidden states that predict completion tokens ``columns`` of rows.

        ``rows``, ``lengths`` (on the CPU) and the passes ``classes`` are of the rows of ``merged``,
        unless it is None.
        """
        if merged is not None:
            input_ids, prompt_lengths = merged.input_ids, merged.prompt_lengths
            from kdrl_lightning.models.prompt_cache import shared_states

            once = partial(shared_states, decoder_of(self.model), merged)
            each = partial(self._row_states, input_ids, lengths, classes)
            tokens = sum(c.tokens for c in classes) or input_ids.numel()
            if self._pays(merged, tokens, once, each):
                return once()[rows, columns]
        hidden = self._row_states(input_ids, lengths, classes)
        return hidden[rows, prompt_lengths[rows] - 1 + columns]

    def _classes(self, host: Rows, merged: MergedRows | None) -> list[WidthClass]:
        """Return the rows' passes; empty if all rows run in one."""
        # A sharded model gathers its weights in each pass, so all ranks must run the same number.
        if self.sharded and self.pads:
            return []
        lengths = lengths_of(host, merged).tolist()
        return width_classes(lengths) if self.pads else length_classes(lengths)

    def _row_states(
        self, input_ids: Tensor, lengths: Tensor, classes: Sequence[WidthClass] = ()
    ) -> Tensor:
        """Return the states ``[B, S, H]`` of rows that end at ``lengths``, which are on the CPU."""
        if len(input_ids) == 1 or (self.pads and len(classes) < 2):
            return self._pass(input_ids, lengths)
        groups = [upload(torch.tensor(c.rows), input_ids.device) for c in classes]
        states = [
            self._pass(input_ids[g, : c.width], lengths[c.rows])
            for g, c in zip(groups, classes, strict=True)
        ]
        whole = states[0].new_zeros(*input_ids.shape, states[0].shape[-1])
        for group, part in zip(groups, states, strict=True):
            column = torch.arange(part.shape[1], device=group.device)
            whole = whole.index_put((group[:, None], column), part)
        return whole

    def _pass(self, input_ids: Tensor, lengths: Tensor) -> Tensor:
        with lengths_of_rows(self.model, lengths if self._switches else None):
            if self.at_head:
                return states_at_head(self.model, input_ids=input_ids, use_cache=False)
            decoder: Any = decoder_of(self.model)
            hidden: Tensor = decoder(input_ids=input_ids, use_cache=False).last_hidden_state
            return self._as_the_head(hidden)

    def _pays(
        self,
        rows: MergedRows,
        tokens: int,
        once: Callable[[], Tensor],
        each: Callable[[], Tensor],
    ) -> bool:
        """Return whether two passes over fewer tokens cost less than those over ``tokens``."""
        shared = rows.prompts.numel() + rows.mask.numel() - len(rows.mask)
        # Fake tensors of planning and tests can claim to be on a GPU, but cannot be timed.
        if rows.input_ids.is_cuda and type(rows.input_ids) is Tensor:
            self.sharing.clock = cuda_clock
        return self.sharing.pays(shared, tokens, once, each)

    def states(self, batch: RolloutBatch) -> Other:
        """Return a batch's hidden states and the head, for a comparison with another model.

        The divergence's backward pass still needs the head. By then a sharded head is no longer
        gathered, so we copy it: ``V * H`` values on every rank for the length of a micro-batch,
        1.1 GB for 152k tokens of width 3584 in bfloat16.
        """
        call = batch.input_ids, batch.prompt_lengths
        host, device = self._checked(batch.layout.rows), batch.input_ids.device
        merged = self._merged(*host)
        places = places_of(host[2], merged, False, device)
        passes = lengths_of(host, merged), self._classes(host, merged)
        merged = None if merged is None else merged.to(device)
        hidden = self._hidden(*call, merged, places.states, places.columns, *passes)
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
        loss: Loss | None = None,
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
            loss,
            batch.layout,
        )
        return TokenScores(*scores)

    def _as_the_head(self, hidden: Tensor) -> Tensor:
        """Cast 32-bit states to the dtype of a 16-bit head, as Mamba does."""
        kind = self.model.get_output_embeddings().weight.dtype
        return hidden.to(kind) if kind.itemsize < hidden.dtype.itemsize else hidden

    def verify(self, name: str) -> None:
        """Compare scores with ``model(...).logits`` of single rows, and choose how rows run.

        Raises:
            ConfigurationError: no choice gives right scores for the architecture; says why.
        """
        if not self.head().weight.is_meta:
            verify(self, name)

    def alone(self, ids: Tensor) -> Tensor:
        """Return the model's logits ``[S, V]`` of one row of ids ``[S]``."""
        return self._alone(ids)

    # FSDP treats a call of ``alone`` as a forward and reshards the weights after it, so
    # ``head_gap``, which still needs them, calls this one.
    def _alone(self, ids: Tensor) -> Tensor:
        logits = self.model(input_ids=ids[None], use_cache=False).logits[0, :, : self.vocab_size]
        logits = self.head().order(logits)
        return logits if logits.dtype == torch.float64 else logits.float()

    def _shares(self, found: list[Tensor], wanted: list[Tensor], spread: float) -> bool:
        """Return whether log-probabilities with shared prompts equal those of single rows."""
        return close(found, wanted, self.head().weight.dtype, spread)

    @torch.no_grad()
    def chosen(self, rows: list[Tensor], prompts: list[int]) -> list[Tensor]:
        """Score rows of ids in one call; return each completion's log-probabilities."""
        width = max(map(len, rows))
        ids = torch.stack([functional.pad(row, (0, width - len(row))) for row in rows])
        lengths = ids.new_tensor([len(row) - p for row, p in zip(rows, prompts, strict=True)])
        mask = torch.arange(int(lengths.max()), device=ids.device) < lengths[:, None]
        first = ids.new_tensor(prompts)
        where = (first[:, None] + torch.arange(mask.shape[1], device=ids.device)).clamp(
            max=width - 1
        )
        # Not ``self(...)``: under FSDP this method is itself a forward.
        scores = self.forward(ids, first, ids.gather(1, where), mask)
        return [scores.logprobs[i, :n] for i, n in enumerate(lengths.tolist())]

    def head_gap(self, ids: Tensor, factor: float) -> float:
        """Return the largest difference of our head's log-probabilities from the model's, in nats.

        Both read the hidden states of the row ``ids [S]``, multiplied by ``factor``.
        """

        def widen(_: object, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            called.append(True)
            return (args[0] * factor, *args[1:])

        called: list[bool] = []
        handle = self.model.get_output_embeddings().register_forward_pre_hook(widen)
        try:
            exact = self._alone(ids).log_softmax(-1)[:-1].gather(-1, ids[1:, None]).squeeze(-1)
        finally:
            handle.remove()
        states = self._row_states(ids[None], torch.tensor([len(ids)]))[0, :-1]
        ours = token_scores(states * (factor if called else 1.0), self.head(), ids[1:])
        return float((ours.logprobs - exact).abs().max())


def _logit_scale(config: HFConfig) -> float:
    """Return the factor on logits, which architectures configure under different names."""

    def named(name: str) -> float:
        return float(getattr(config, name, None) or 1.0)

    scale = named("logit_scale") * named("lm_head_multiplier")
    scale /= named("logits_mup_width_multiplier")
    scaling = named("logits_scaling")
    return scale * scaling if config.model_type == "hyperclovax" else scale / scaling
