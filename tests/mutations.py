"""Breaks the maths of a copy of the package on purpose, and checks that the tests notice.

Run it as ``python tests/mutations.py``; with words, only mutations whose name contains one of them.
With ``--markdown`` it writes ``docs/mutations.md``; with ``--new`` it tries only those that the
page does not name yet, and adds them. The rest of the tree is never touched. Needs ``fork``, so
that each run starts with torch loaded.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "mutations.md"
SECONDS = 120

DIVERGENCES = "losses/divergences.py", "losses/test_divergences.py"
EXPECTED = "losses/divergences.py", "losses/test_enumeration.py"
JSD = "losses/divergences.py", "losses/test_jsd.py"
POLICY = "losses/ratios.py", "losses/test_ratios.py"
ADAPTIVE_ENTROPY = "callbacks/schedules/adaptive_entropy.py", "callbacks/test_adaptive_entropy.py"
RESTRICTION = "engines/restriction.py", "engines/test_restriction.py"
TRRD_PUBLISHED = "losses/ratios.py", "losses/test_trrd_as_published.py"
RLAD_PUBLISHED = "objectives/ratios.py", "objectives/test_rlad_as_published.py"
POLICY_FAMILY = "losses/ratios.py", "losses/test_ratios_family.py"
REDUCTION = "losses/reduction.py", "losses/test_reduction.py"
LOGPROBS = "losses/logprobs.py", "losses/test_logprobs.py"
SCORES = "losses/logprobs.py", "losses/test_token_scores.py"
CHUNK = "losses/head/chunk_math.py", "losses/test_chunked_logprobs.py"
SCORED_CHUNK = "losses/head/chunk_math.py", "losses/test_token_scores.py"
PRODUCTS = "losses/head/head_products.py", "losses/test_chunked_logprobs.py"
KNOWN_LOSS = "losses/head/chunked_logprobs.py", "losses/test_known_loss.py"
IMPORTANCE = "losses/corrections.py", "losses/test_selection.py"
SELECTION = "losses/selection.py", "losses/test_selection.py"
ADVANTAGES = "losses/advantages.py", "losses/test_advantages.py"
SHAPED = "losses/advantages.py", "losses/test_selection.py"
BASE = "objectives/base.py", "objectives/test_objectives.py"
BASE_LAWS = "objectives/base.py", "objectives/test_laws.py"
COEFFICIENTS = "objectives/base.py", "objectives/test_coefficients.py"
RULES = "objectives/advantages.py", "objectives/test_family.py"
TERMS = "objectives/divergences.py", "objectives/test_family.py"
TERMS_SELECTIONS = "objectives/divergences.py", "objectives/test_selections.py"
FRAME = "objectives/policy.py", "objectives/test_family.py"
FRAME_PARTS = "objectives/policy.py", "objectives/test_parts.py"
FRAME_SELECTIONS = "objectives/policy.py", "objectives/test_selections.py"
FRAME_TEACHERS = "objectives/policy.py", "objectives/test_teacher_completions.py"
RATIOS = "objectives/ratios.py", "objectives/test_family.py"
RATIOS_PARTS = "objectives/ratios.py", "objectives/test_parts.py"
RATIOS_LAWS = "objectives/ratios.py", "objectives/test_laws.py"
RATIOS_SELECTIONS = "objectives/ratios.py", "objectives/test_selections.py"
CORRECTIONS = "objectives/corrections.py", "objectives/test_family.py"
SELECTIONS = "objectives/selections.py", "objectives/test_selections.py"
GRPO = "objectives/grpo.py", "objectives/test_family.py"
KDRL = "objectives/kdrl.py", "objectives/test_family.py"
RLAD = "objectives/rlad.py", "objectives/test_objectives.py"
MIXTURES = "objectives/methods/mixtures.py", "objectives/test_family.py"
OPSD = "losses/divergences.py", "objectives/methods/test_opsd.py"
WEIGHTS_OF_TOKENS = "losses/weights.py", "objectives/methods/test_sdpo.py"
SDAR = "objectives/methods/sdar.py", "objectives/methods/test_sdar.py"
G_OPD = "losses/advantages.py", "objectives/methods/test_g_opd.py"
EOPD = "objectives/methods/eopd.py", "objectives/methods/test_eopd.py"
SDPO = "objectives/methods/sdpo.py", "objectives/methods/test_sdpo.py"
SRPO = "objectives/methods/srpo_published.py", "objectives/methods/test_srpo_published.py"
SCOPE = "objectives/methods/scope.py", "objectives/methods/test_scope.py"
HDPO = "objectives/methods/hdpo_published.py", "objectives/methods/test_hdpo_published.py"
STEP_WEIGHTS = "rollout/updates/plan.py", "objectives/methods/test_srpo_published.py"
OWN_TOP_K = "teachers/own_top_k.py", "teachers/test_own_top_k.py"
TERMS_PARTS = "objectives/divergences.py", "objectives/test_parts.py"
SFT = "objectives/sft.py", "objectives/test_family.py"
METER = "hardware/planning/rehearsal/meter.py", "hardware/planning/test_meter.py"
TRUNK = "models/architectures/trunk.py", "models/architectures/test_trunk.py"
PLANNED = "hardware/planning/planner.py", "hardware/planning/test_plan.py"
TAUGHT = "hardware/planning/test_planned_teachers.py"
REHEARSED = "hardware/planning/rehearsal/steps.py", "hardware/planning/test_plan.py"
TOTALS = "rollout_batch.py", "objectives/test_objectives.py"
FRAME_STATS = "objectives/policy.py", "callbacks/test_imitation_stats.py"
STATS = "callbacks/reports/token_stats.py", "callbacks/test_imitation_stats.py"
ANNEALING = "callbacks/schedules/curves.py", "callbacks/test_kl_annealing.py"
STORE = "rollout/saved.py", "rollout/test_saved.py"
ENCODING = "prompts/encoding.py", "prompts/test_encoding.py"
TURNS = "prompts/turns.py", "prompts/test_encoding.py"
PROMPT_SET = "prompts/prompt_set.py", "prompts/test_prompt_set.py"
DRAWS = "rollout/draws.py", "rollout/test_draws.py"
COLLECTOR = "rollout/groups.py", "rollout/test_draws.py"
FAILED_GROUPS = "rollout/groups.py", "rollout/test_groups.py"
DRIFTING = "rollout/rollouts.py", "runs/test_privileged_completions.py"
FEEDBACK = "rewards/answers/feedback.py", "rewards/test_feedback.py"
ADDITION_FEEDBACK = "tiny/feedback.py", "rewards/test_feedback.py"
WITHOUT_CONTEXT = "objectives/advantages.py", "objectives/test_rows_without_context.py"
WRITER = "checkpoints/writer.py", "checkpoints/test_checkpoint_files.py"
READER = "checkpoints/reader.py", "checkpoints/test_checkpoint_files.py"
FULL_DISK = "checkpoints/writer.py", "checkpoints/test_integrity.py"
CHECKSUMS = "checkpoints/reader.py", "checkpoints/test_integrity.py"
INTEGRITY = "checkpoints/integrity.py", "checkpoints/test_integrity.py"
WORKERS = "rewards/processes/workers.py", "rewards/processes/test_workers.py"
EXPORT = "cli/export.py", "cli/test_export.py"
LOADED = "models/architectures/loaded.py", "models/test_loading.py"
GENERATION = "models/architectures/generation.py", "models/test_loading.py"
DOUBLE = "models/architectures/implementations.py", "models/test_loading.py"
REACHED = "models/architectures/reached.py", "models/architectures/test_reached.py"
SIGNALS = "kdrl_lightning/trainer/stop_signals.py", "checkpoints/test_ctrl_c.py"
BUILD = "models/loading.py", "cli/test_export.py"
MERGING = "models/passes/shared_prompts.py", "models/passes/test_shared_prompts.py"
SHARED = "models/prompt_cache.py", "models/passes/test_shared_prompts.py"
CACHES = "models/prompt_cache.py", "models/test_prompt_cache.py"
PLAN = "rollout/updates/plan.py", "rollout/test_updates.py"
ON_A_CARD = "runs/test_waits_for_a_card.py"
PLAN_SCORES = "rollout/updates/scoring.py", "rollout/test_updates.py"
SCORING = "models/scorer.py", "models/passes/test_shared_prompts.py"
ROTARY = "models/architectures/rotary.py", "models/architectures/test_rotary.py"
CHANGES = "models/architectures/switches.py", "models/architectures/test_length_changes.py"
VERIFIED = "models/architectures/verification.py", "models/architectures/test_verification.py"
SCORED = "models/scorer.py", "models/architectures/test_verification.py"
PREFIXES = "engines/prefixes.py", "engines/test_prefixes.py"
WAYS = "engines/transformers_engine.py", "engines/test_prefixes.py"
SHARED_HEADS = "engines/grouped_query_attention.py", "engines/test_grouped_query_attention.py"
ROUTED = "teachers/routed.py", "teachers/test_routed_teacher.py"
STEP_LOG = "metrics/step_log.py", "metrics/test_step_log.py"
FRAME_PENDING = "objectives/policy.py", "runs/test_old_scores.py"
WEIGHTS = "models/weights.py", "models/lora/test_adapters.py"
ADAPTERS = "models/lora/adapters.py", "models/lora/test_adapters.py"
EXPERTS = "models/lora/targets.py", "models/lora/test_lora_experts.py"
WATCHED = "metrics/update_stats.py", "runs/test_trace.py"
FROZEN_MODELS = "teachers/frozen.py", "runs/test_frozen_models.py"
RATIOS_STATS = "objectives/ratios.py", "callbacks/test_imitation_stats.py"
VIEWS = "callbacks/reports/views.py", "callbacks/reports/test_views.py"
ERRING = "tiny/verifier.py", "tiny/test_verifier.py"
CALLBACK_STATS = "callbacks/imitation_stats.py", "callbacks/test_imitation_stats.py"
HUB_NAMES = "engines/vllm/hub_names.py", "engines/vllm/test_hub_names.py"
KEPT_CLASSES = "engines/vllm/transformers_classes.py", "engines/vllm/test_transformers_classes.py"
RELOAD = "engines/vllm/worker.py", "engines/vllm/test_worker.py"
OPTIONS = "engines/vllm/options.py", "engines/vllm/test_options.py"
RESUMED_LOG = "module.py", "checkpoints/test_resumed_log.py"
AGREEMENT = "engines/agreement.py", "engines/test_agreement.py"
COMPARED = "rollout/live.py", "engines/test_agreement.py"
VLLM_ERRORS = "engines/vllm/errors.py", "engines/vllm/test_vllm_errors.py"
PASS = "evaluation/pass_at_k.py", "evaluation/test_metrics_of_sets.py"
MAJORITY = "evaluation/majority.py", "evaluation/test_metrics_of_sets.py"
COMPOSED = "rewards/composed.py", "rewards/test_rewards.py"
REFERENCES = "rewards/answers/references.py", "rewards/answers/test_references.py"
NUMBERS = "rewards/answers/numbers.py", "rewards/answers/test_numbers.py"
UNITS = "rewards/answers/units.py", "rewards/answers/test_numbers.py"
EQUATIONS = "rewards/answers/equations.py", "rewards/answers/test_numbers.py"
CONTEXTS = "teachers/own_prompt/contexts.py", "teachers/own_prompt/test_contexts.py"
AS_READ = "teachers/own_prompt/groups.py", "teachers/own_prompt/test_own_prompt.py"
PROMPTED = "teachers/own_prompt/teacher.py", "teachers/own_prompt/test_own_prompt.py"
OWN_KEYS = "teachers/cached.py", "teachers/own_prompt/test_own_prompt.py"
OWN_STATES = "models/scorer.py", "teachers/own_prompt/test_own_prompt.py"
OWN_TEMPLATE = "teachers/own_prompt/prompt.py", "teachers/own_prompt/test_teacher_prompts.py"
FRAME_CONTEXTS = "objectives/policy.py", "objectives/test_rows_without_context.py"
RULES_CONTEXTS = "objectives/advantages.py", "objectives/test_rows_without_context.py"

CHUNKS = "losses/teacher_chunks.py", "losses/test_teacher_chunks.py"
CHUNKED_KL = "objectives/divergences.py", "objectives/test_objectives_of_chunks.py"
CHUNKED_FRAME = "objectives/policy.py", "objectives/test_objectives_of_chunks.py"
CHUNKED_RATIO = "objectives/ratios.py", "objectives/test_objectives_of_chunks.py"
CUT = "teachers/cross_tokenizer/chunks.py", "teachers/cross_tokenizer/test_aligner.py"
ALIGNER = "teachers/cross_tokenizer/aligner.py", "teachers/cross_tokenizer/test_aligner.py"
ENCODER = "teachers/cross_tokenizer/text_encoder.py", "teachers/cross_tokenizer/test_aligner.py"
TOKEN_BYTES = "teachers/cross_tokenizer/token_bytes.py", "teachers/cross_tokenizer/test_aligner.py"
PARTS = "teachers/cross_tokenizer/parts.py", "teachers/cross_tokenizer/test_aligner.py"
SEGMENTS = "teachers/cross_tokenizer/segments.py", "teachers/cross_tokenizer/test_aligner.py"
WORDS = "teachers/cross_tokenizer/words.py", "teachers/cross_tokenizer/test_aligner.py"
WORKER_ORDER = "teachers/cross_tokenizer/worker.py", "teachers/cross_tokenizer/test_worker.py"
WORKER = "teachers/cross_tokenizer/worker.py", "teachers/cross_tokenizer/test_cross_tokenizer.py"
PASSES = "rollout/updates/partition.py", "rollout/test_teacher_passes.py"
TRANSLATION = (
    "teachers/cross_tokenizer/translation.py",
    "teachers/cross_tokenizer/test_translated_completions.py",
)
ROUTED_TRANSLATION = "teachers/routed.py", "teachers/cross_tokenizer/test_translated_completions.py"
SERVED_TRANSLATION = (
    "engines/vllm/teacher.py",
    "teachers/cross_tokenizer/test_translated_completions.py",
)
HARD_TEXTS = "teachers/cross_tokenizer/test_hard_texts.py"
TEACHER_PROMPTS = "datamodule/teacher_prompts.py", "datamodule/test_room_for_teachers.py"
CROSS = "teachers/cross_tokenizer/teacher.py", "teachers/cross_tokenizer/test_cross_tokenizer.py"


class Mutation(NamedTuple):
    """One wrong edit: ``old`` occurs once in the file and becomes ``new``."""

    name: str
    where: tuple[str, str]
    old: str
    new: str


VLLM_PROCESS = "engines/vllm/process.py", "engines/vllm/test_process.py"
VLLM_PUSH = "models/weights.py", "engines/vllm/test_prepare.py"
FAST_PATH = "models/architectures/fast_path.py", "models/architectures/test_fast_path.py"
VLLM_ROOM = "engines/vllm/room.py", "engines/vllm/test_prepare.py"
FAILING_RANK = "common/distributed.py", "engines/test_failing_rank.py"
FAILING_PUSH = "engines/weight_transport.py", "engines/test_failing_rank.py"
NARROW_ENGINE = "engines/transformers_engine.py", "engines/test_compute_type.py"
BUDGET = "engines/cache_budget.py", "engines/test_compute_type.py"
OFFLOAD = "teachers/offload.py", "teachers/test_offload.py"
SELF_RULES = "teachers/self_teachers/rules.py", "teachers/self_teachers/test_self_teachers.py"
SELF_WEIGHTS = (
    "teachers/self_teachers/other_weights.py",
    "teachers/self_teachers/test_self_teachers.py",
)
SELF_MIX = "teachers/self_teachers/mixed_logits.py", "teachers/self_teachers/test_self_teachers.py"
SELF_FOUND = "teachers/self_teachers/found.py", "teachers/self_teachers/test_self_teachers.py"
SELF_STEPS = "teachers/self_teachers/steps.py", "checkpoints/test_resumed_self_teachers.py"
SELF_KINDS = "checkpoints/resume.py", "checkpoints/test_resumed_self_teachers.py"
HEALTH = "metrics/health_signs.py", "callbacks/test_teacher_health.py"
LOADING_DEVICE = "models/sharding.py", "models/test_loading_devices.py"
CLIPPING = "trainer/optimizers.py", "trainer/test_clipping.py"
GRADIENT_SYNC = "trainer/strategies.py", "trainer/test_gradient_sync.py"
DEVICES = "trainer/checks/devices.py", "trainer/test_devices.py"
SHAPES = "cli/settings/shapes.py", "cli/settings/test_values.py"
REPLACED = "cli/settings/layers/replaced.py", "cli/settings/test_values.py"
YAML_TEXT = "cli/settings/text.py", "cli/settings/test_values.py"
NOTES = "cli/settings/unused.py", "cli/settings/test_values.py"
PRIVATE = "cli/settings/private.py", "cli/settings/test_values.py"
PARSER = "cli/parser.py", "cli/settings/test_values.py"
END_TOKENS = "models/end_tokens.py", "models/test_end_tokens.py"
END_TOKENS_IN_RUNS = "rollout/generation.py", "models/test_end_tokens.py"

MUTATIONS = [
    Mutation(
        "chunk: a token's own score taken twice",
        CHUNKS,
        "(chunk_totals(student, places) - student)",
        "chunk_totals(student, places)",
    ),
    Mutation(
        "chunk: gradient shared out",
        CHUNKS,
        "values.detach() * share + (values - values.detach())",
        "values * share",
    ),
    Mutation(
        "chunk: tokens without a score imitated",
        CHUNKS,
        "== 0) & (places >= 0)",
        "== 0)",
    ),
    Mutation(
        "chunk: no end before a gap", CHUNKS, "(places <= 0).flatten()", "(places == 0).flatten()"
    ),
    Mutation(
        "chunk: KL counted for each token",
        CHUNKED_KL,
        "teacher_logprobs(batch, scores.logprobs), batch.chunk_places",
        "teacher_logprobs(batch, scores.logprobs), None",
    ),
    Mutation(
        "chunk: cut by a selection",
        CHUNKED_FRAME,
        "mask = whole_chunks(mask, rollout.chunk_places)\n        rollout = rollout.replace("
        "imitation_mask=mask)\n        if self.advantage is not None and self.selection",
        "rollout = rollout.replace("
        "imitation_mask=mask)\n        if self.advantage is not None and self.selection",
    ),
    Mutation(
        "chunk: sum as a token's anchor",
        CHUNKED_RATIO,
        "teacher = teacher_logprobs(batch, old)",
        'teacher = known(batch.teacher_logprobs, "teacher_logprobs")',
    ),
    Mutation(
        "align: a token without bytes opens a chunk",
        CUT,
        "closing[:-1] &= ends[:-1] != ends[1:]",
        "closing[:-1] &= ends[:-1] == ends[:-1]",
    ),
    Mutation(
        "align: the student's end kept",
        ALIGNER,
        "_closed(row, end if closes",
        "_closed(row, max(self.ends) if closes",
    ),
    Mutation(
        "align: limit of chunks",
        PARTS,
        "theirs_in) <= max_chunk_tokens",
        "theirs_in) < max_chunk_tokens",
    ),
    Mutation(
        "align: first column of each row",
        ALIGNER,
        "their_ends[:-1] - their_ends[firsts][row]",
        "their_ends[:-1] - 0 * their_ends[firsts][row]",
    ),
    Mutation(
        "align: text after a special token that the teacher lacks",
        ALIGNER,
        "known = before[:-1] == before[firsts][row]",
        "known = before[:-1] >= before[firsts][row]",
    ),
    Mutation(
        "align: segments with one hash are one", SEGMENTS, "if not same.all():  #", "if False:  #"
    ),
    Mutation(
        "align: words that depend on their neighbours",
        WORDS,
        "    return all(",
        "    return True or all(",
    ),
    Mutation(
        "align: tokens over a space",
        WORDS,
        "    if any(piece and ACROSS.search(piece) for piece in tokens.pieces):",
        "    if False:",
    ),
    Mutation(
        "align: words are cut before every space",
        SEGMENTS,
        "(self._space[ids] & text)[1:] & self._ends[ids[:-1]]",
        "self._space[ids][1:]",
    ),
    Mutation(
        "align: a cut chunk of a full context is scored",
        ALIGNER,
        "(stops <= limit)",
        "(columns < limit)",
    ),
    Mutation(
        "align: the whole rollout is waited for",
        WORKER_ORDER,
        "self._found[job].result()[job] for",
        "[b.result() for b in self._found.values()] and self._found[job].result()[job] for",
    ),
    Mutation(
        "align: longest completions first",
        WORKER_ORDER,
        "key=lambda job: len",
        "key=lambda job: -len",
    ),
    Mutation(
        "align: spelled names are special",
        ENCODER,
        "encode_special_tokens = True",
        "encode_special_tokens = False",
    ),
    Mutation("align: characters composed", ENCODER, '"Prepend", "NFC"', '"Prepend"'),
    Mutation(
        "align: space in front", ENCODER, '"prepend_scheme": "never"', '"prepend_scheme": "first"'
    ),
    Mutation(
        "align: fallback as text", TOKEN_BYTES, "bytes([int(match[1], 16)])", "token.encode()"
    ),
    Mutation(
        "align: more tokens of the teacher ignored",
        CROSS,
        "return more <= set(teacher.added_tokens_decoder)",
        "return True",
    ),
    Mutation(
        "align: other merges ignored",
        CROSS,
        "    if not same_rules(student, teacher):\n        return False\n",
        "",
    ),
    Mutation(
        "align: the name of a special token is one",
        ("teachers/cross_tokenizer/text_encoder.py", HARD_TEXTS),
        "        spec |= _without_special(spec, tokens.special)\n",
        "",
    ),
    Mutation(
        "stats: tokens without a score of the teacher's completions count",
        ("metrics/update_stats.py", "metrics/test_update_stats.py"),
        '"kd/unaligned_frac", places < 0, tokens',
        '"kd/unaligned_frac", places < 0, real',
    ),
    Mutation(
        "rollouts: a metric that is not measured keeps its value",
        ("rollout/rollouts.py", "runs/test_privileged_completions.py"),
        "self.watch.with_gaps(self._measure(plan, groups, replaced, seconds))",
        "self._measure(plan, groups, replaced, seconds)",
    ),
    Mutation(
        "settings: 1.5 is a count",
        ("errors.py", "test_errors.py"),
        "    if not isinstance(value, int):\n",
        "    if False:\n",
    ),
    Mutation(
        "settings: a self-teacher's weights may be a word",
        ("teachers/self_teachers/teacher.py", "teachers/self_teachers/test_self_teachers.py"),
        'require_kind("weights", weights, WeightRule, "Give one',
        'require_kind("weights", weights, object, "Give one',
    ),
    Mutation(
        "align: tokens beyond the context scored",
        WORKER,
        "[job.most for job in jobs]",
        "[1 << 30 for job in jobs]",
    ),
    Mutation(
        "passes: counted in the student's tokens",
        PASSES,
        "teacher.lengths(batch.select(rows))",
        "batch.select(rows).lengths",
    ),
    Mutation("passes: ranks have their own number", PASSES, "(most - len(passes))", "0"),
    Mutation(
        "translation: what is lost counts as whole",
        TRANSLATION,
        "truncated=c.truncated or not survives",
        "truncated=c.truncated",
    ),
    Mutation(
        "translation: a chunk's sum at each token",
        TRANSLATION,
        "totals[opens] / np.bincount(opens, minlength=len(opens))[opens]",
        "totals[opens]",
    ),
    Mutation(
        "translation: room counted in the student's tokens",
        TEACHER_PROMPTS,
        "longest = max(sample) + self",
        "longest = longest + 0 * max(sample) + 0 * self",
    ),
    Mutation(
        "translation: the teacher's prompt may fill its context",
        TEACHER_PROMPTS,
        "            prompts.require(self.check)\n",
        "",
    ),
    Mutation(
        "translation: a routed teacher samples after the student's prompt",
        ROUTED_TRANSLATION,
        "return self._of(row).generation_prompt(row, prompt_ids)",
        "return prompt_ids",
    ),
    Mutation(
        "translation: a server's ids limited by the student's vocabulary",
        SERVED_TRANSLATION,
        "weights.vocab_size or of_student",
        "of_student",
    ),
    Mutation("k1: sign", DIVERGENCES, "return logprobs - teacher", "return -logprobs + teacher"),
    Mutation("k2: half forgotten", DIVERGENCES, "return 0.5 * (teacher", "return (teacher"),
    Mutation(
        "k2: teacher attached",
        DIVERGENCES,
        "0.5 * (teacher_logprobs.detach() - logprobs)",
        "0.5 * (teacher_logprobs - logprobs)",
    ),
    Mutation(
        "k3: student and teacher swapped",
        DIVERGENCES,
        "gap = teacher_logprobs.detach() - logprobs",
        "gap = logprobs - teacher_logprobs.detach()",
    ),
    Mutation("k3: cancels near zero", DIVERGENCES, "gap.expm1() - gap", "gap.exp() - 1 - gap"),
    Mutation(
        "reverse KL: is forward KL",
        DIVERGENCES,
        "_kl(student_logits.log_softmax(-1), teacher_logits.detach().log_softmax(-1))",
        "_kl(teacher_logits.detach().log_softmax(-1), student_logits.log_softmax(-1))",
    ),
    Mutation(
        "forward KL: is a cross-entropy",
        DIVERGENCES,
        "_kl(teacher_logits.detach().log_softmax(-1), student_logits.log_softmax(-1))",
        "-(teacher_logits.detach().softmax(-1) * student_logits.log_softmax(-1)).sum(-1)",
    ),
    Mutation(
        "KL: 0 times inf",
        DIVERGENCES,
        "torch.where(log_p > -torch.inf, log_p - log_q, 0.0)",
        "log_p - log_q",
    ),
    Mutation(
        "surrogate: ratio upside down",
        POLICY,
        "log_ratio = logprobs - old_logprobs.detach()",
        "log_ratio = old_logprobs.detach() - logprobs",
    ),
    Mutation("surrogate: sign", POLICY, "return -advantages *", "return advantages *"),
    Mutation(
        "surrogate: old attached",
        POLICY,
        "log_ratio = logprobs - old_logprobs.detach()",
        "log_ratio = logprobs - old_logprobs",
    ),
    Mutation(
        "surrogate: advantages attached",
        POLICY,
        "advantages = advantages.detach()",
        "advantages = advantages * 1",
    ),
    Mutation(
        "surrogate: clip sides swapped",
        POLICY,
        "    clip_low: float,\n    clip_high: float,\n    dual_clip: float | None = None,\n",
        "    clip_high: float,\n    clip_low: float,\n    dual_clip: float | None = None,\n",
    ),
    Mutation(
        "surrogate: fence in float32",
        POLICY,
        "torch.where(advantages < 0, low, high)",
        "torch.where(advantages < 0, low, high).float().to(log_ratio)",
    ),
    Mutation(
        "surrogate: max for min",
        POLICY,
        "dead = torch.where(advantages < 0, log_ratio < fence, log_ratio > fence)",
        "dead = torch.where(advantages < 0, log_ratio > fence, log_ratio < fence)",
    ),
    Mutation(
        "surrogate: both fences act",
        POLICY,
        "dead = torch.where(advantages < 0, log_ratio < fence, log_ratio > fence)",
        "dead = (log_ratio < low) | (log_ratio > high)",
    ),
    Mutation(
        "surrogate: the fence is lifted", POLICY, "torch.where(dead, fence, log_ratio)", "log_ratio"
    ),
    Mutation(
        "TRRD: ends of alpha swapped", POLICY, "(1.0 - trrd_alpha) * offset", "trrd_alpha * offset"
    ),
    Mutation(
        "TRRD: offset upside down",
        POLICY,
        "(old_logprobs - teacher_logprobs).detach()",
        "(teacher_logprobs - old_logprobs).detach()",
    ),
    Mutation(
        "TRRD: student in the detached offset",
        POLICY,
        "(old_logprobs - teacher_logprobs).detach()",
        "(logprobs - teacher_logprobs).detach()",
    ),
    Mutation(
        "TRRD: student in the clamped offset",
        POLICY,
        "return log_rho + (1.0 - trrd_alpha) * offset",
        "gap = logprobs - teacher_logprobs.detach()\n"
        "    gap = gap if offset_clamp is None else gap.clamp(-offset_clamp, offset_clamp)\n"
        "    return trrd_alpha * log_rho + (1.0 - trrd_alpha) * gap",
    ),
    Mutation(
        "TRRD: teacher attached",
        POLICY,
        "(old_logprobs - teacher_logprobs).detach()",
        "old_logprobs.detach() - teacher_logprobs",
    ),
    Mutation(
        "TRRD: clamp one-sided", POLICY, ".clamp(-offset_clamp, offset_clamp)", ".clamp(max=1.0)"
    ),
    Mutation(
        "TRRD as published: the clamp keeps the gradient",
        TRRD_PUBLISHED,
        "(logprobs - teacher_logprobs.detach()).clamp(-log_ratio_clamp, log_ratio_clamp)",
        "logprobs - logprobs.detach() + (logprobs - teacher_logprobs).detach().clamp("
        "-log_ratio_clamp, log_ratio_clamp)",
    ),
    Mutation(
        "TRRD as published: the old student is clamped",
        TRRD_PUBLISHED,
        "(logprobs - teacher_logprobs.detach()).clamp(",
        "(old_logprobs - teacher_logprobs.detach()).clamp(",
    ),
    Mutation(
        "TRRD as published: clamped where nothing is imitated",
        RLAD_PUBLISHED,
        "return teacher, torch.where(imitated, alpha, 1.0)",
        "return teacher, alpha",
    ),
    Mutation(
        "advantages: ddof 0",
        ADVANTAGES,
        "rewards.std(1, keepdim=True)",
        "rewards.std(1, correction=0, keepdim=True)",
    ),
    Mutation(
        "advantages: std of the whole batch",
        ADVANTAGES,
        "rewards.std(1, keepdim=True)",
        "rewards.std()",
    ),
    Mutation(
        "advantages: residue of equal rewards",
        ADVANTAGES,
        "return advantages.masked_fill(constant, 0.0)",
        "return advantages",
    ),
    Mutation("reduction: mask by product", REDUCTION, ".masked_fill(mask == 0, 0.0)", " * mask"),
    Mutation(
        "token mean: own tokens",
        REDUCTION,
        "_masked(per_token, mask).sum() / _at_least_one(num_loss_tokens)",
        "_masked(per_token, mask).sum() / _at_least_one((mask != 0).sum())",
    ),
    Mutation(
        "sequence mean: padded length",
        REDUCTION,
        "lengths = (mask != 0).sum(1).clamp(min=1)",
        "lengths = mask.shape[1]",
    ),
    Mutation(
        "sequence mean: own completions",
        REDUCTION,
        "/ lengths).sum() / _at_least_one(num_completions)",
        "/ lengths).sum() / mask.shape[0]",
    ),
    Mutation(
        "constant length: left out", REDUCTION, "(num_completions) * length)", "(num_completions))"
    ),
    Mutation(
        "group mean: completion's own tokens",
        REDUCTION,
        "/ group_tokens.clamp(min=1)",
        "/ (mask != 0).sum(1).clamp(min=1)",
    ),
    Mutation(
        "log-probs: temperature multiplies",
        SCORED_CHUNK,
        "factor = self.scale / self.temperature\n            return logits",
        "factor = self.scale * self.temperature\n            return logits",
    ),
    Mutation(
        "log-probs: temperature before the soft cap",
        SCORED_CHUNK,
        "self.softcap).tanh_()\n        return capped.mul_(self.softcap / self.temperature)",
        "self.softcap / self.temperature).tanh_()\n        return capped.mul_(self.softcap)",
    ),
    Mutation(
        "log-probs: padding rows count", SCORES, "slice(None, self.vocab_size)", "slice(None)"
    ),
    Mutation("log-probs: bias forgotten", SCORES, "else self.bias[rows]", "else None"),
    Mutation(
        "log-probs: entropy's sign",
        SCORED_CHUNK,
        "total.log() - shares.mul_",
        "total.log() + shares.mul_",
    ),
    Mutation("log-probs: one chunk", LOGPROBS, "size = chunk_size or", "size = len(ids) + 1 or"),
    Mutation(
        "log-probs: chunks kept for backward",
        ("losses/head/chunked_logprobs.py", SCORES[1]),
        "run.log_norm, values.entropy, values.tail)",
        "run.log_norm, values.entropy, hidden.new_zeros(len(ids), len(weight)))",
    ),
    Mutation("term: mask replaces the loss mask", BASE, "batch.loss_mask & term.mask", "term.mask"),
    Mutation("term: mask ignored", BASE, "batch.loss_mask & term.mask", "batch.loss_mask"),
    Mutation(
        "term: divided by its own tokens",
        BASE,
        "term.per_token * mask.sum(1, keepdim=True) / weights",
        "term.per_token",
    ),
    Mutation("term: coefficient forgotten", BASE, "term.coef * shares[", "shares["),
    Mutation("entropy: punished", BASE, '"entropy", -known', '"entropy", known'),
    Mutation(
        "values outside the loss stay",
        BASE,
        "out = ~batch.loss_mask",
        "out = batch.loss_mask & False",
    ),
    Mutation(
        "KD: ratio attached",
        TERMS,
        '(scores.logprobs - known(batch.old_logprobs, "old_logprobs")).detach()',
        '(scores.logprobs - known(batch.old_logprobs, "old_logprobs"))',
    ),
    Mutation(
        "KD: ratio upside down",
        TERMS,
        "torch.where(mask, log_ratio, 0.0), places).exp()",
        "torch.where(mask, -log_ratio, 0.0), places).exp()",
    ),
    Mutation(
        "KD: teacher read where nothing is imitated",
        (TERMS[0], "objectives/test_laws.py"),
        "torch.where(mask, teacher, scores.logprobs.detach())",
        "teacher",
    ),
    Mutation(
        "GRPO: division by std forced",
        RULES,
        "group_relative(r, self.scale_by_std)",
        "group_relative(r)",
    ),
    Mutation(
        "GRPO: groups out of order",
        (RULES[0], "objectives/test_objectives.py"),
        "out[order] = function",
        "out[:] = function",
    ),
    Mutation(
        "KDRL: KL subtracted",
        FRAME,
        "                self.distill.coef,\n",
        "                -self.distill.coef,\n",
    ),
    Mutation(
        "RLAD: clip sides swapped",
        RLAD,
        "trrd_alpha, offset_clamp, clip_low, clip_high",
        "trrd_alpha, offset_clamp, clip_high, clip_low",
    ),
    Mutation(
        "RLAD: the paper's clamp stays beside an offset clamp",
        RLAD_PUBLISHED,
        "log_ratio_clamp = 1.0 if offset_clamp is None else None",
        "log_ratio_clamp = 1.0",
    ),
    Mutation(
        "RLAD: no clamp by default",
        RLAD_PUBLISHED,
        "log_ratio_clamp = 1.0 if offset_clamp is None else None",
        "log_ratio_clamp = None",
    ),
    Mutation(
        "RLAD: a NaN teacher reaches tokens that are not imitated",
        RATIOS_LAWS,
        "teacher = torch.where(imitated, teacher, logprobs.detach())",
        "teacher = teacher.detach()",
    ),
    Mutation(
        "RLAD: clamp ignored",
        RATIOS,
        "            self.offset_clamp,\n            self.dual_clip,\n",
        "            None,\n            self.dual_clip,\n",
    ),
    Mutation(
        "statistics: a fenced token counts",
        FRAME_STATS,
        "alive = ~self.ratio.dead(batch, logprobs, advantages)",
        "alive = batch.loss_mask",
    ),
    Mutation(
        "statistics: clip sides swapped",
        STATS,
        "below, above = outside",
        "above, below = outside",
    ),
    Mutation(
        "statistics: agreement for conflict",
        STATS,
        "against, used = gap * wanted < 0",
        "against, used = gap * wanted > 0",
    ),
    Mutation("statistics: correct for wrong", STATS, "mask & ~correct", "mask & correct"),
    Mutation(
        "statistics: protected among the punished",
        STATS,
        '"punished": down & ~dead',
        '"punished": down',
    ),
    Mutation("samples: the clip acts last", VIEWS, "key=lambda i: -cut[i]", "key=lambda i: cut[i]"),
    Mutation("verifier: rejects wrong", ERRING, "if verdict.correct else", "if False else"),
    Mutation("verifier: the prompt is ignored", ERRING, 'sample.row["prompt"], ', ""),
    Mutation(
        "totals: empty completions count",
        TOTALS,
        "used = self.loss_mask.any(1)",
        "used = self.completion_mask.any(1)",
    ),
    Mutation(
        "totals: left-out tokens count for the group",
        TOTALS,
        "index_add_(0, groups, loss_mask",
        "index_add_(0, groups, mask",
    ),
    Mutation(
        "annealing: rises",
        ANNEALING,
        "self.start - self.decrement * step",
        "self.start + self.decrement * step",
    ),
    Mutation(
        "annealing: no floor", ANNEALING, "return max(self.start - ", "return min(self.start - "
    ),
    # The losses of the family.
    Mutation(
        "policy gradient KL: sign",
        EXPECTED,
        "-(teacher_logprobs - logprobs)",
        "(teacher_logprobs - logprobs)",
    ),
    Mutation(
        "policy gradient KL: gap attached",
        EXPECTED,
        "(teacher_logprobs - logprobs).detach() * logprobs",
        "(teacher_logprobs - logprobs) * logprobs",
    ),
    Mutation(
        "JSD: ends swapped",
        JSD,
        "if jsd_beta == 0.0:\n        return forward_kl",
        "if jsd_beta == 0.0:\n        return reverse_kl",
    ),
    Mutation(
        "JSD: mixture's weights swapped",
        JSD,
        "    student = student_logits.log_softmax(-1)\n",
        "    student = student_logits.log_softmax(-1)\n    jsd_beta = 1.0 - jsd_beta\n",
    ),
    Mutation(
        "JSD: sides swapped",
        JSD,
        "jsd_beta * _kl(teacher, mixture) + (1.0 - jsd_beta) * _kl(student, mixture)",
        "jsd_beta * _kl(student, mixture) + (1.0 - jsd_beta) * _kl(teacher, mixture)",
    ),
    Mutation(
        "JSD: mixture detached", JSD, "_kl(student, mixture)", "_kl(student, mixture.detach())"
    ),
    Mutation(
        "JSD: teacher attached",
        JSD,
        "    teacher = teacher_logits.detach().log_softmax(-1)\n",
        "    teacher = teacher_logits.log_softmax(-1)\n",
    ),
    Mutation(
        "JSD: both excluded",
        JSD,
        "student.clamp(min=-1e4) + math.log1p(-jsd_beta)\n"
        "    mixture = torch.logaddexp(student_part, teacher.clamp(min=-1e4)",
        "student + math.log1p(-jsd_beta)\n    mixture = torch.logaddexp(student_part, teacher",
    ),
    Mutation(
        "top-k: tail dropped",
        JSD,
        "torch.cat([topk_logprobs, (1.0 - mass).clamp(min=tiny).log()], -1)",
        "topk_logprobs",
    ),
    Mutation(
        "top-k: tail detached",
        JSD,
        "(1.0 - mass).clamp(min=tiny)",
        "(1.0 - mass.detach()).clamp(min=tiny)",
    ),
    Mutation("top-k: tail may be empty", JSD, ".clamp(min=tiny)", ""),
    Mutation(
        "dual clip: for rewarded tokens",
        POLICY_FAMILY,
        "far = (advantages < 0) & (log_ratio",
        "far = (advantages > 0) & (log_ratio",
    ),
    Mutation(
        "dual clip: not in logs",
        POLICY_FAMILY,
        "torch.where(far, math.log(dual_clip), fence)",
        "torch.where(far, dual_clip, fence)",
    ),
    Mutation("dual clip: gradient stays", POLICY_FAMILY, "dead | far", "dead"),
    Mutation(
        "dual clip: forgotten by TRRD",
        POLICY_FAMILY,
        "*anchors, trrd_alpha, offset_clamp, log_ratio_clamp)\n",
        "*anchors, trrd_alpha, offset_clamp, log_ratio_clamp)\n    dual_clip = None\n",
    ),
    Mutation(
        "sequence ratio: sum for mean",
        POLICY_FAMILY,
        "log_rho.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)",
        "log_rho.sum(1, keepdim=True)",
    ),
    Mutation(
        "sequence ratio: mean over the padding",
        POLICY_FAMILY,
        "/ mask.sum(1, keepdim=True).clamp(min=1)",
        "/ mask.shape[1]",
    ),
    Mutation(
        "sequence ratio: padding counts",
        POLICY_FAMILY,
        ".masked_fill(~mask, 0.0)\n    mean",
        "\n    mean",
    ),
    Mutation(
        "sequence ratio: old attached",
        POLICY_FAMILY,
        "(logprobs - old_logprobs.detach()).masked_fill",
        "(logprobs - old_logprobs).masked_fill",
    ),
    Mutation(
        "GSPO: clip sides swapped",
        POLICY_FAMILY,
        "logprobs.detach(), advantages, clip_low, clip_high)",
        "logprobs.detach(), advantages, clip_high, clip_low)",
    ),
    Mutation(
        "CISPO: weight attached",
        POLICY_FAMILY,
        "log_ratio = (logprobs - old_logprobs).detach()",
        "log_ratio = logprobs - old_logprobs",
    ),
    Mutation(
        "CISPO: clipped below",
        POLICY_FAMILY,
        "log_ratio.clamp(max=math.log1p(clip_high))",
        "log_ratio.clamp(min=math.log1p(clip_high))",
    ),
    Mutation(
        "CISPO: bound not in logs",
        POLICY_FAMILY,
        "clamp(max=math.log1p(clip_high))",
        "clamp(max=clip_high)",
    ),
    Mutation("CISPO: sign", POLICY_FAMILY, "return -weight *", "return weight *"),
    Mutation("LUFFY: gamma upside down", POLICY_FAMILY, "- math.log(gamma)", "+ math.log(gamma)"),
    Mutation(
        "LUFFY: log of the shaping",
        POLICY_FAMILY,
        "(logprobs - math.log(gamma)).sigmoid()",
        "torch.nn.functional.logsigmoid(logprobs - math.log(gamma))",
    ),
    Mutation(
        "importance: upside down",
        IMPORTANCE,
        "(old_logprobs - rollout_logprobs).detach().clamp",
        "(rollout_logprobs - old_logprobs).detach().clamp",
    ),
    Mutation("importance: not truncated", IMPORTANCE, ".clamp(max=math.log(cap))", ""),
    Mutation("importance: attached", IMPORTANCE, ".detach().clamp(max", ".clamp(max"),
    Mutation(
        "importance mask: one-sided",
        IMPORTANCE,
        "(log_ratio >= math.log(low)) & (log_ratio <= math.log(high))",
        "log_ratio <= math.log(high)",
    ),
    Mutation("wrong completions: the correct ones", SELECTION, "return ~correct", "return correct"),
    Mutation(
        "wrong groups: any wrong",
        SELECTION,
        "index_add_(0, group_ids, correct.long())\n    return (solved == 0)",
        "index_add_(0, group_ids, (~correct).long())\n    return (solved > 0)",
    ),
    Mutation(
        "alignment: signed gap",
        SELECTION,
        "(teacher_logprobs - old_logprobs).abs()",
        "(teacher_logprobs - old_logprobs)",
    ),
    Mutation(
        "alignment: mean over the padding",
        SELECTION,
        "mask.sum(1).clamp(min=1))[:, None]",
        "mask.shape[1])[:, None]",
    ),
    Mutation(
        "benefit: other side", SELECTION, "advantages >= threshold", "advantages <= threshold"
    ),
    Mutation(
        "certainty: other side", SELECTION, "old_entropy <= threshold", "old_entropy >= threshold"
    ),
    Mutation(
        "shaped: std of the shaped rewards",
        SHAPED,
        "std = rewards.to(plain.dtype).std(1, keepdim=True) + eps",
        "std = (rewards + teacher_kl_coef * mean_gaps).std(1, keepdim=True) + eps",
    ),
    Mutation(
        "shaped: gap subtracted",
        SHAPED,
        "plain + teacher_kl_coef * gaps",
        "plain - teacher_kl_coef * gaps",
    ),
    Mutation(
        "shaped: gap not centred",
        SHAPED,
        "gaps = mean_gaps - mean_gaps.mean(1, keepdim=True)",
        "gaps = mean_gaps",
    ),
    Mutation(
        "shaped: compared with completions without a gap",
        SHAPED,
        "has_gap.sum(1, keepdim=True).clamp(min=1)",
        "has_gap.shape[1]",
    ),
    Mutation(
        "shaped: what nobody says is added",
        SHAPED,
        "(mean_gaps - centre).masked_fill(~has_gap, 0.0)",
        "mean_gaps - centre",
    ),
    Mutation(
        "reward shaping: rows without context count as changed",
        WITHOUT_CONTEXT,
        "rows = rows & batch.has_context",
        "rows = rows | batch.has_context",
    ),
    Mutation(
        "HDPO: the teacher answers solved prompts",
        FAILED_GROUPS,
        "if not self._waits(share) or failed(g)]",
        "]",
    ),
    Mutation(
        "HDPO: a prompt with one correct answer counts as failed",
        FAILED_GROUPS,
        "return not any(one.verdict.correct for one in group)",
        "return not all(one.verdict.correct for one in group)",
    ),
    Mutation(
        "HDPO: another prompt's noise",
        FAILED_GROUPS,
        "noise = [seeds[i] for i in places]",
        "noise = seeds[: len(places)]",
    ),
    Mutation(
        "HDPO: asked before the student has failed",
        FAILED_GROUPS,
        "if share.engine.supports_async and not self._waits(share)",
        "if share.engine.supports_async",
    ),
    Mutation(
        "self-teacher: samples with the first weights",
        DRIFTING,
        "if share.count and (moved or share.engine.version is None):",
        "if share.count and share.engine.version is None:",
    ),
    Mutation(
        "feedback: the form alone tells a wrong answer",
        FEEDBACK,
        'if given and self.shows != "form":',
        "if given:",
    ),
    Mutation(
        "feedback: the reference is always told",
        FEEDBACK,
        'if self.shows == "reference":\n            right',
        "if True:\n            right",
    ),
    Mutation(
        "feedback: a correct completion gets some",
        FEEDBACK,
        "or result.correct or result.feedback",
        "or result.feedback",
    ),
    Mutation(
        "feedback on an addition: columns from 0",
        ADDITION_FEEDBACK,
        "same.index(False) + 1 if False in same",
        "same.index(False) if False in same",
    ),
    Mutation("shaped: equal groups blown up", SHAPED, "torch.where(constant, 1.0, std)", "std"),
    Mutation("reweighted: sign forgotten", SHAPED, "advantages.sign() * gap)", "gap)"),
    Mutation(
        "reweighted: mix and width swapped",
        SHAPED,
        "clamp(1.0 - width, 1.0 + width)\n    return advantages * (1.0 - mix + mix * weight)",
        "clamp(1.0 - mix, 1.0 + mix)\n    return advantages * (1.0 - width + width * weight)",
    ),
    Mutation(
        "reweighted: mix upside down",
        SHAPED,
        "(1.0 - mix + mix * weight)",
        "(mix + (1.0 - mix) * weight)",
    ),
    Mutation(
        "scores: others' gradient reaches the asked tokens",
        SCORED_CHUNK,
        "masked_fill_(named(asked, vocab), 0.0)",
        "masked_fill_(~named(asked, vocab), 0.0)",
    ),
    Mutation(
        "scores: logits for log-probs",
        SCORED_CHUNK,
        "asked.clamp(max=vocab - 1)) - log_norm[:, None]",
        "asked.clamp(max=vocab - 1))",
    ),
    Mutation(
        "scores: a gradient for tokens that the model lacks",
        SCORED_CHUNK,
        "slopes.asked.masked_fill(~known, 0.0)",
        "slopes.asked",
    ),
    Mutation(
        "scores: the other at temperature one",
        SCORES,
        "return logits if temperature == 1.0 else logits.div_(temperature)",
        "return logits",
    ),
    Mutation(
        "scores: student and other swapped",
        SCORES,
        "divergence(ours if ours.shape[-1] == width else ours[:, :width], theirs)",
        "divergence(theirs, ours if ours.shape[-1] == width else ours[:, :width])",
    ),
    Mutation(
        "scores: first rows asked again",
        ("losses/head/chunked_logprobs.py", SCORES[1]),
        "else self.work.asked[rows]\n        for",
        "else self.work.asked[: len(ids)]\n        for",
    ),
    # The parts of an objective.
    Mutation(
        "gap advantage: sign",
        RULES,
        '"""Return d."""\n        return gap',
        '"""Return d."""\n        return -gap',
    ),
    Mutation(
        "sum advantage: coefficients swapped",
        RULES,
        "self.reward_coef * super().__call__(batch, gap) + self.teacher_kl_coef * gap",
        "self.teacher_kl_coef * super().__call__(batch, gap) + self.reward_coef * gap",
    ),
    Mutation(
        "SRPO: verdict swapped",
        RULES,
        "torch.where(rewarded[:, None], super().__call__(batch, gap), gap)",
        "torch.where(rewarded[:, None], gap, super().__call__(batch, gap))",
    ),
    Mutation(
        "RLSD: mix and width swapped",
        RULES,
        "gap, self.mix, self.width)",
        "gap, self.width, self.mix)",
    ),
    Mutation(
        "reward shaping: student's gap reversed",
        RULES,
        "teacher_logprobs(rollout, old) - old",
        "old - teacher_logprobs(rollout, old)",
    ),
    Mutation(
        "reward shaping: teacher's rows shaped",
        (RULES[0], "objectives/test_teacher_completions.py"),
        '"imitation_mask") & rollout.student_mask',
        '"imitation_mask")',
    ),
    Mutation(
        "reward shaping: divided by the selected",
        (RULES[0], "objectives/test_selections.py"),
        "tokens = rollout.loss_mask.sum(1)",
        "tokens = mask.sum(1)",
    ),
    Mutation(
        "sampled KD: on the teacher's rows",
        (TERMS[0], "objectives/test_teacher_completions.py"),
        "super().where(batch) & batch.student_mask",
        "super().where(batch)",
    ),
    Mutation(
        "KD: selection ignored",
        TERMS_SELECTIONS,
        'known(batch.imitation_mask, "imitation_mask") & batch.loss_mask',
        "batch.loss_mask",
    ),
    Mutation(
        "top-k KL: student and teacher swapped",
        TERMS,
        "generalized_jsd(student, teacher, self.jsd_beta)",
        "generalized_jsd(teacher, student, self.jsd_beta)",
    ),
    Mutation(
        "teacher's floor forgotten",
        (TERMS[0], "losses/test_jsd.py"),
        "teacher_logits.log_softmax(-1).clamp(min=LOGPROB_FLOOR)",
        "teacher_logits.log_softmax(-1)",
    ),
    Mutation(
        "engine correction: on the teacher's rows",
        FRAME,
        "torch.where(rollout.student_mask, weights, 1.0)",
        "weights",
    ),
    Mutation("engine correction: not on the policy", FRAME, "policy = policy * weights", "pass"),
    Mutation("engine correction: not on KD", FRAME, "loss * weights if", "loss if"),
    Mutation(
        "engine correction: on whole distributions",
        FRAME_TEACHERS,
        "loss * weights if self.distill.corrected else loss",
        "loss * weights",
    ),
    Mutation(
        "reference KL: on the teacher's rows",
        FRAME,
        'Term("ref_kl", reference, self.ref_kl_coef, batch.student_mask)',
        'Term("ref_kl", reference, self.ref_kl_coef)',
    ),
    Mutation(
        "reference KL: swapped", FRAME, "k3(scores.logprobs, ref)", "k3(ref, scores.logprobs)"
    ),
    Mutation(
        "rl_coef ignored", FRAME, 'Term("policy", policy, self.rl_coef)', 'Term("policy", policy)'
    ),
    Mutation(
        "teacher's rule for the student",
        FRAME,
        "torch.where(rows, theirs, ours)",
        "torch.where(rows, ours, theirs)",
    ),
    Mutation(
        "gap: on the teacher's rows",
        FRAME_TEACHERS,
        '"imitation_mask") & batch.student_mask\n            gap',
        '"imitation_mask")\n            gap',
    ),
    Mutation(
        "gap: sign",
        FRAME,
        "teacher - logprobs.detach(), 0.0",
        "logprobs.detach() - teacher, 0.0",
    ),
    Mutation(
        "selections: the last one only",
        FRAME_SELECTIONS,
        "mask = mask & (chosen",
        "mask = rollout.student_mask & (chosen",
    ),
    Mutation(
        "selections: shaped before selected",
        FRAME_SELECTIONS,
        "if self.advantage is not None and self.selection:",
        "if False:",
    ),
    Mutation(
        "imitation: on what the teacher sampled",
        FRAME_SELECTIONS,
        "mask = mask & rollout.student_mask",
        "mask = rollout.loss_mask",
    ),
    Mutation(
        "outside: by the student's rule only",
        FRAME_PARTS,
        "if self.teacher_tokens is None:\n            return below, above",
        "if True:\n            return below, above",
    ),
    Mutation(
        "wrong groups: the teacher's answers count",
        SELECTIONS,
        "rollout.correct & (rollout.source == STUDENT)",
        "rollout.correct",
    ),
    Mutation(
        "imitated: dead tokens count", FRAME_PARTS, "(changed & alive & kept", "(changed & kept"
    ),
    Mutation(
        "imitated: teacher's rows count",
        FRAME_PARTS,
        "alive & kept & batch.student_mask)",
        "alive & kept)",
    ),
    Mutation("imitated: without an advantage", FRAME_PARTS, "(mask & (advantages != 0))", "mask"),
    Mutation(
        "imitated: outside the selection",
        FRAME_PARTS,
        "(mask & (advantages != 0))",
        "(advantages != 0)",
    ),
    Mutation(
        "dead: by the student's rule only",
        FRAME_PARTS,
        "return torch.where(_theirs(batch), theirs, ours)",
        "return ours",
    ),
    Mutation("dead: dual clip unknown", RATIOS_PARTS, "below | far, above", "below, above"),
    Mutation(
        "dead: sides swapped",
        RATIOS_PARTS,
        "torch.where(advantages < 0, below | far, above & (advantages > 0))",
        "torch.where(advantages > 0, below | far, above & (advantages < 0))",
    ),
    Mutation(
        "CISPO: counted as dead",
        RATIOS_PARTS,
        'removes no gradient."""\n',
        'removes no gradient."""\n        return super().dead(batch, logprobs, advantages)\n',
    ),
    Mutation(
        "anchor: teacher everywhere",
        RATIOS_SELECTIONS,
        "torch.where(self._imitated(batch), teacher, old)",
        "teacher",
    ),
    Mutation(
        "anchor: on the teacher's rows",
        (RATIOS[0], "objectives/test_teacher_completions.py"),
        "return batch.imitation_mask & batch.student_mask",
        "return batch.imitation_mask",
    ),
    Mutation(
        "GSPO: over the padding",
        RATIOS_LAWS,
        "logprobs, old, advantages, batch.loss_mask, self.clip_low",
        "logprobs, old, advantages, batch.loss_mask | True, self.clip_low",
    ),
    Mutation(
        "behavior: the old student's ratio",
        RATIOS,
        "        behavior = known(batch.rollout_logprobs",
        "        behavior = known(batch.old_logprobs",
    ),
    Mutation(
        "behavior: statistics of rho",
        RATIOS_PARTS,
        "return logprobs - known(batch.rollout_logprobs",
        "return logprobs - known(batch.old_logprobs",
    ),
    Mutation(
        "LUFFY: gamma ignored",
        (RATIOS[0], "objectives/test_teacher_completions.py"),
        "advantages, self.gamma)",
        "advantages)",
    ),
    Mutation(
        "masked importance: bounds swapped",
        CORRECTIONS,
        "zeros_like(log_ratio), self.low, self.high)",
        "zeros_like(log_ratio), 1 / self.high, 1 / self.low)",
    ),
    Mutation(
        "truncated importance: cap ignored",
        CORRECTIONS,
        "zeros_like(log_ratio), self.cap)",
        "zeros_like(log_ratio))",
    ),
    Mutation(
        "end token: of cut completions",
        SELECTIONS,
        "~(last & ~rollout.truncated[:, None])",
        "~last",
    ),
    Mutation(
        "end token: one too early",
        SELECTIONS,
        "(rollout.completion_lengths - 1)",
        "(rollout.completion_lengths - 2)",
    ),
    Mutation(
        "gates: completion for token",
        SELECTIONS,
        'self.alignment_per == "completion"',
        'self.alignment_per == "token"',
    ),
    Mutation(
        "gates: the last one only",
        SELECTIONS,
        "kept = kept & certain(",
        "kept = rollout.loss_mask & certain(",
    ),
    Mutation(
        "GRPO: dual clip forgotten",
        GRPO,
        "TokenRatio(clip_low, clip_high, dual_clip)",
        "TokenRatio(clip_low, clip_high)",
    ),
    Mutation(
        "GSPO: clip sides swapped by name",
        GRPO,
        "SequenceRatio(clip_low, clip_high)",
        "SequenceRatio(clip_high, clip_low)",
    ),
    Mutation(
        "KDRL: another term is ignored",
        KDRL,
        "distill=distill or kl",
        "distill=kl",
    ),
    Mutation(
        "KDRL: whole distributions by forward KL",
        KDRL,
        "VocabularyKL(teacher_kl_coef, 1.0, k, per_imitated_token)",
        "VocabularyKL(teacher_kl_coef, 0.0, k, per_imitated_token)",
    ),
    Mutation(
        "RLSD: mix and width swapped by name",
        MIXTURES,
        "ReweightedAdvantage(mix, width",
        "ReweightedAdvantage(width, mix",
    ),
    Mutation(
        "two losses: the second without its weight",
        TERMS,
        "return self.distill_coef",
        "return 1.0",
    ),
    Mutation(
        "two losses: the second one's sign",
        TERMS,
        "self.ratio.loss(batch, scores.logprobs, self._advantages(batch))",
        "self.ratio.loss(batch, scores.logprobs, -self._advantages(batch))",
    ),
    Mutation(
        "two losses: dead tokens imitate",
        TERMS_PARTS,
        "used & ~self.ratio.dead(batch, logprobs, advantages)",
        "used",
    ),
    Mutation(
        "two losses: imitated without an advantage",
        TERMS_PARTS,
        "super().where(batch) & (advantages != 0)",
        "super().where(batch)",
    ),
    Mutation(
        "two losses: imitated without a weight",
        FRAME_PARTS,
        "self.distill is not None and self.distill.coef:",
        "self.distill is not None:",
    ),
    Mutation(
        "two losses: the statistics are the first one's",
        FRAME_PARTS,
        "second or self.ratio",
        "self.ratio",
    ),
    Mutation(
        "SFT: wrong completions stay",
        SFT,
        "rollout.loss_mask & rollout.correct[:, None]",
        "rollout.loss_mask",
    ),
    Mutation(
        "SFT: groups count what is left out",
        SFT,
        "kept.sum(1).float())",
        "rollout.loss_mask.sum(1).float())",
    ),
    Mutation(
        "KD per imitated token: all tokens",
        (BASE[0], "objectives/test_family.py"),
        "mask, totals.num_imitated_tokens)",
        "mask, totals.num_loss_tokens)",
    ),
    Mutation("blank: the student's scores stay", BASE_LAWS, ", scores.map(zero)", ", scores"),
    Mutation(
        "blank: the reference's scores stay",
        BASE_LAWS,
        '        "ref_logprobs",\n        "importance_weights",',
        '        "importance_weights",',
    ),
    Mutation(
        "coefficient: of the first of two parts",
        COEFFICIENTS,
        "if len(owners) == 1:",
        "if owners:",
    ),
    Mutation(
        "coefficient: out of range is set",
        COEFFICIENTS,
        "check_coefficient(name, value))",
        "value)",
    ),
    Mutation(
        "store: groups keep the numbers of their rank",
        STORE,
        "group_ids = torch.tensor(slots)[batch.group_ids.cpu()]",
        "group_ids = batch.group_ids.cpu()",
    ),
    Mutation(
        "store: rows stay in the order of ranks",
        STORE,
        'torch.argsort(whole["group_ids"], stable=True)',
        'torch.arange(len(whole["group_ids"]))',
    ),
    Mutation("store: the teacher's prompts end with token 0", STORE, "return -1", "return 0"),
    Mutation(
        "own prompt: a completion sees itself", CONTEXTS, "if other != place)", "if other >= 0)"
    ),
    Mutation(
        "own prompt: a success is above the threshold",
        CONTEXTS,
        "verdict.reward >= self.threshold",
        "verdict.reward > self.threshold",
    ),
    Mutation(
        "own prompt: the first token of the completion is lost",
        AS_READ,
        "prompts.shape[1] + place - lengths[:, None])",
        "prompts.shape[1] + 1 + place - lengths[:, None])",
    ),
    Mutation(
        "own prompt: the student's length",
        AS_READ,
        "made = batch.replace(input_ids=ids, prompt_lengths=lengths,",
        "made = batch.replace(input_ids=ids,",
    ),
    Mutation(
        "own prompt: too long, and a context all the same",
        PROMPTED,
        "if ids is None or len(ids) > min(",
        "if ids is None or 0 * len(ids) > min(",
    ),
    Mutation(
        "own prompt: a cache does not tell contexts apart",
        OWN_KEYS,
        "if prompts is not None:",
        "if False:",
    ),
    Mutation(
        "own prompt: duplicates get the teacher of the first",
        OWN_STATES,
        "apart = topk_ids is not None or (other is not None and other.per_row)",
        "apart = topk_ids is not None",
    ),
    Mutation(
        "own prompt: a filled place is read again",
        OWN_TEMPLATE,
        "return PLACES.sub(lambda place: texts[place[1]], template)",
        'return template.replace("{prompt}", prompt).replace("{context}", context)',
    ),
    Mutation(
        "own prompt: a row without context is imitated",
        FRAME_CONTEXTS,
        "mask = rollout.taught_mask",
        "mask = rollout.loss_mask",
    ),
    Mutation(
        "own prompt: SRPO loses the advantage without a context",
        RULES_CONTEXTS,
        "rewarded = batch.correct | without",
        "rewarded = batch.correct",
    ),
    Mutation("store: 0 behind the end", STORE, "return pad_id if", "return 0 if"),
    Mutation(
        "store: the temperature is lost",
        STORE,
        '"temperature": batch.temp',
        '"temperature": 1.0 or batch.temp',
    ),
    Mutation(
        "store: a rank finds all rows",
        STORE,
        "return everything.select(rows).replace(",
        "return everything.replace(",
    ),
    Mutation(
        "store: a group keeps its slot's number", STORE, "groups += [group] *", "groups += [slot] *"
    ),
    Mutation(
        "save: in place",
        WRITER,
        'with half.open("wb") as file:\n            torch.save',
        'half.touch()\n        with path.open("wb") as file:\n            torch.save',
    ),
    Mutation(
        "save: the bytes are not forced to the disk",
        WRITER,
        "        os.fsync(file.fileno())\n",
        "",
    ),
    Mutation(
        "save: the name is not forced to the disk",
        WRITER,
        "        raise\n    sync(path.parent)\n",
        "        raise\n",
    ),
    Mutation(
        "save: shards in place",
        WRITER,
        "self._half = half = unfinished(path)",
        "self._half = half = path",
    ),
    Mutation(
        "save: a full disk under shards is a traceback",
        WRITER,
        "except (Exception, CheckpointException) as",
        "except Exception as",
    ),
    Mutation(
        "read: pickles run",
        READER,
        'map_location="cpu", mmap=True, weights_only=True',
        'map_location="cpu", mmap=True, weights_only=False',
    ),
    Mutation(
        "read: an index may name what torch has imported",
        READER,
        "if not kind and name not in INDEX_NAMES.get(module, ()):",
        'if not kind and module.split(".")[0] not in ("torch", "pathlib"):',
    ),
    Mutation(
        "read: what is no tensor in a shard runs",
        READER,
        "view.read()), weights_only=True)",
        "view.read()), weights_only=False)",
    ),
    Mutation(
        "read: shards may be cut",
        READER,
        "if size < part.offset + part.length:",
        "if size < 0:",
    ),
    Mutation(
        "read: a missing part is not missed",
        READER,
        "for name in (SHARDS, META):",
        "for name in (META,):",
    ),
    Mutation(
        "read: checksums of a file are not compared",
        CHECKSUMS,
        "check_archive(file, place.name)",
        "pass",
    ),
    Mutation(
        "read: checksums of shards are not compared",
        CHECKSUMS,
        "check_archive(view, part.relative_path)",
        "pass",
    ),
    Mutation(
        "read: the index's checksum is not compared", CHECKSUMS, "check_seal(raw, SHARDS)", "pass"
    ),
    Mutation(
        "save: half a file stays on a full disk",
        FULL_DISK,
        "half.unlink(missing_ok=True)",
        "pass",
    ),
    Mutation(
        "save: half a folder stays on a full disk",
        FULL_DISK,
        "shutil.rmtree(self._half, ignore_errors=True)",
        "pass",
    ),
    Mutation(
        "last: the oldest whole one",
        CHECKSUMS,
        "key=lambda p: p.stat().st_mtime_ns, reverse=True",
        "key=lambda p: p.stat().st_mtime_ns",
    ),
    Mutation("checksum: of an empty text", INTEGRITY, "zlib.crc32(body)", 'zlib.crc32(b"")'),
    Mutation(
        "model: the earlier one goes first",
        INTEGRITY,
        "        yield half\n",
        "        if inside:\n            _move(half, path)\n            half.mkdir()\n"
        "        yield half\n",
    ),
    Mutation(
        "model: the configuration first",
        INTEGRITY,
        "key=lambda f: f.name in CONFIGS)",
        "key=lambda f: f.name not in CONFIGS)",
    ),
    Mutation("model: old parts stay", INTEGRITY, "        file.unlink()\n", "        pass\n"),
    Mutation(
        "model: not forced to the disk", INTEGRITY, "            sync(file)\n", "            pass\n"
    ),
    Mutation(
        "worker: a killed call is forgotten",
        WORKERS,
        "self.waiting.appendleft(call)",
        "pass",
    ),
    Mutation(
        "worker: an answer to another try counts",
        WORKERS,
        "if self.call is None or ticket != self.ticket:",
        "if self.call is None:",
    ),
    Mutation(
        "worker: a killed call fails at once",
        WORKERS,
        "if call in self._died:",
        "if True:",
    ),
    Mutation(
        "worker: every death is a failed start",
        WORKERS,
        "self._failed_starts += ended.child is None",
        "self._failed_starts += 1",
    ),
    Mutation(
        "export: over a model",
        EXPORT,
        "if any((folder / name).exists() for name in",
        "if any((folder / name).is_symlink() for name in",
    ),
    Mutation("export: the dtype is left", EXPORT, "tensor.to(wanted)", "tensor"),
    Mutation("export: no generation settings", BUILD, "if generation is not None:", "if False:"),
    # The backward pass of chosen tokens, written by hand.
    Mutation(
        "chosen: temperature multiplies",
        CHUNK,
        "factor = self.scale / self.temperature\n            return logits if",
        "factor = self.scale * self.temperature\n            return logits if",
    ),
    Mutation(
        "chosen: temperature inside the soft cap",
        CHUNK,
        "capped = logits.mul_(self.scale / self.softcap)",
        "capped = logits.mul_(self.scale / self.softcap / self.temperature)",
    ),
    Mutation(
        "chosen: soft cap's slope at temperature one",
        CHUNK,
        "logits * (self.temperature / self.softcap)",
        "logits * (1.0 / self.softcap)",
    ),
    Mutation(
        "chosen: slope forgotten",
        CHUNK,
        "table.mul_(slope) if isinstance(slope, Tensor) or slope != 1.0 else table",
        "table",
    ),
    Mutation(
        "chosen: slope of the shifted logits",
        CHUNK,
        "slope = transform.slope(logits)",
        "slope = transform.slope(logits - log_norm[:, None])",
    ),
    Mutation("chosen: peak forgotten", CHUNK, "total.log() + peak.squeeze(-1)", "total.log()"),
    Mutation(
        "chosen: entropy's sign",
        CHUNK,
        "total.log() - shares.mul_(shifted).sum(-1) / total",
        "shares.mul_(shifted).sum(-1) / total - total.log()",
    ),
    Mutation(
        "chosen: entropy of sums", CHUNK, "mul_(shifted).sum(-1) / total", "mul_(shifted).sum(-1)"
    ),
    Mutation("chosen: 0 times inf", CHUNK, "(logits - peak).clamp_(min=FLOOR)", "logits - peak"),
    Mutation(
        "chosen: 0 times inf backwards",
        CHUNK,
        "(logits - log_norm[:, None]).clamp_(min=FLOOR)",
        "(logits - log_norm[:, None])",
    ),
    Mutation(
        "chosen: entropy's gradient not centred",
        CHUNK,
        "table.add_(entropy[:, None]).mul_",
        "table.mul_",
    ),
    Mutation("chosen: entropy's gradient upside down", CHUNK, "(shares).neg_()", "(shares)"),
    Mutation("chosen: log-prob forgotten beside entropy", CHUNK, "table.add_(d_logprobs)", "pass"),
    Mutation("chosen: shares' sign", CHUNK, "exp_().mul_(-d_logprobs", "exp_().mul_(d_logprobs"),
    Mutation(
        "chosen: the chosen token's own one",
        CHUNK,
        "table.scatter_add_(1, ids[:, None], d_logprobs)",
        "pass",
    ),
    Mutation("chosen: bias of the last chunk", PRODUCTS, "self.of_bias += ", "self.of_bias[:] = "),
    Mutation(
        "chosen: weight of the last chunk",
        PRODUCTS,
        "total += left @ right",
        "total[:] = left @ right",
    ),
    Mutation(
        "chosen: weight of the last chunk in one type",
        PRODUCTS,
        "total.addmm_(left, right)",
        "total[:] = left @ right",
    ),
    Mutation(
        "chosen: the least likely",
        ("losses/head/chunked_logprobs.py", "losses/test_token_scores.py"),
        "part.topk(top_k, -1)",
        "part.topk(top_k, -1, largest=False)",
    ),
    Mutation(
        "chosen: the least likely one",
        ("losses/head/chunked_logprobs.py", "losses/test_token_scores.py"),
        "torch.argmax(part,",
        "torch.argmin(part,",
    ),
    Mutation(
        "chosen: a gradient from none",
        ("losses/head/chunk_math.py", "losses/test_token_scores.py"),
        "table = torch.zeros_like(logits)",
        "table = logits.clone()",
    ),
    Mutation(
        "chosen: padding rows count",
        ("losses/logprobs.py", "losses/test_chunked_logprobs.py"),
        "head.weight[:vocab], bias,",
        "head.weight, head.bias,",
    ),
    Mutation(
        "chosen: first rows of a chunk",
        ("losses/head/chunked_logprobs.py", "losses/test_chunked_logprobs.py"),
        "found = self.work.math.score(part, ids[tile])",
        "found = self.work.math.score(part, ids[: len(part)])",
    ),
    # The loss is known before the backward pass.
    Mutation(
        "known loss: any guess is right",
        KNOWN_LOSS,
        "return factor if type(same) is not Tensor or bool(same) else None",
        "return factor",
    ),
    Mutation(
        "known loss: the factor is forgotten",
        KNOWN_LOSS,
        "gradients.all(factor)",
        "gradients.all()",
    ),
    Mutation(
        "known loss: a chunk at its own place",
        KNOWN_LOSS,
        "x.slice_scatter(leaves[i], 0, rows.start, rows.stop)",
        "x.slice_scatter(leaves[i], 0, 0, len(leaves[i]))",
    ),
    Mutation(
        "known loss: infinite is the same",
        KNOWN_LOSS,
        "(apart <= rounding) & apart.isfinite()",
        "(apart <= rounding)",
    ),
    Mutation(
        "known loss: GSPO's tokens stand alone",
        ("objectives/ratios.py", "objectives/test_coupling.py"),
        "couples_tokens = True",
        "couples_tokens = False",
    ),
    Mutation(
        "head: 16-bit sums on CUDA",
        ("losses/head/head_products.py", "losses/test_head_on_cuda.py"),
        "    if sums_wide(hidden):",
        "    if False:",
    ),
    Mutation(
        "head: a compiler's error ends the run",
        ("losses/head/compiled.py", "losses/test_compiled_head.py"),
        "except Exception as error:",
        "except ImportError as error:",
    ),
    # What completions have in common is run once.
    Mutation(
        "merging: the prompt's length is no difference",
        MERGING,
        "torch.cat([prompt_lengths[:, None], whole], 1)",
        "whole",
    ),
    Mutation(
        "merging: the completion's length is no difference",
        MERGING,
        "prompt_lengths + mask.sum(1)",
        "prompt_lengths + mask.shape[1]",
    ),
    Mutation(
        "merging: another row's length",
        MERGING,
        "lengths = prompt_lengths[first]",
        "lengths = prompt_lengths[: len(first)]",
    ),
    Mutation(
        "merging: completions in the prompts",
        MERGING,
        "whole[first].masked_fill(place >= lengths[:, None], -1)",
        "whole[first]",
    ),
    Mutation(
        "shared prompts: padding is attended to",
        SHARED,
        "real.long() if rows.unequal else None",
        "None",
    ),
    Mutation(
        "shared prompts: completions one place late",
        SHARED,
        "position = rows.prompt_lengths[:, None] + ",
        "position = 1 + rows.prompt_lengths[:, None] + ",
    ),
    Mutation(
        "shared prompts: the first prompt for all",
        SHARED,
        "Prefixed(x, of)",
        "Prefixed(x, of * 0)",
    ),
    Mutation(
        "growing cache: old tokens lost", CACHES, "            if start:", "            if not end:"
    ),
    Mutation(
        "growing cache: rows stay",
        CACHES,
        "(self.room[0][indices], self.room[1][indices])",
        "(self.room[0][: len(indices)], self.room[1][: len(indices)])",
    ),
    Mutation("growing cache: always anew", CACHES, "self.room[0].shape[-2] < end:", "start:"),
    Mutation(
        "plan: frozen models without a limit",
        PLAN_SCORES,
        "shared <= max_tokens and",
        "",
    ),
    Mutation(
        "plan: frozen models pad at will",
        PLAN_SCORES,
        "shared <= tokens(out[-1])[0] + tokens(rows)[0]",
        "shared",
    ),
    Mutation(
        "plan: a prompt repeated at will", PLAN_SCORES, " and whole <= REPEATED * max_tokens", ""
    ),
    Mutation("plan: a prompt per row", PLAN_SCORES, "len({groups[r] for r in rows})", "len(rows)"),
    Mutation(
        "plan: a teacher that waits is run",
        PLAN_SCORES,
        "if waits.teacher:\n        return batch",
        "if False:\n        return batch",
    ),
    Mutation(
        "plan: the first update's scores lost",
        PLAN,
        "later if waits.student else [*first, *later]",
        "later",
    ),
    Mutation(
        "layout: kept although the tokens changed",
        ("rollout_batch.py", ON_A_CARD),
        "if LAYOUT_FIELDS & changes.keys():",
        "if False:",
    ),
    Mutation(
        "layout: lengths of other rows",
        ("common/layout.py", ON_A_CARD),
        "self.prompt_lengths[rows],",
        "self.prompt_lengths[: len(rows)],",
    ),
    Mutation(
        "layout: parts read the card again",
        ("rollout_batch.py", ON_A_CARD),
        ".with_layout(layout)  # type",
        "  # type",
    ),
    Mutation(
        "scorer: any id has a row",
        ("models/scorer.py", "teachers/test_tokenizers.py"),
        "if self.refuse is not None:",
        "if False:",
    ),
    Mutation(
        "clock: a pass on a GPU is read at once",
        ("common/clock.py", "common/test_clock.py"),
        "self._marks.append((began, ended))",
        "self._marks.append((began, ended)); _ = self.seconds",
    ),
    Mutation(
        "plan: scores of other rows",
        PLAN_SCORES,
        "torch.tensor(rows)",
        "torch.tensor(sorted(rows))",
    ),
    Mutation("step log: a step late", STEP_LOG, "trainer.global_step - 1", "trainer.global_step"),
    Mutation("step log: each step", STEP_LOG, "trainer.global_step % every == 0", "True"),
    Mutation("step log: not where it stops", STEP_LOG, "trainer.should_stop or ", ""),
    Mutation(
        "step log: not seen by callbacks",
        STEP_LOG,
        "trainer.callback_metrics.update(shown)",
        "pass",
    ),
    Mutation("growing cache: for windows too", CACHES, "if type(x) is DynamicLayer else x", ""),
    # Old scores that the update's own pass gives; adapters.
    Mutation(
        "pending: unless all parts read",
        FRAME_PENDING,
        "return any(part.reads_old_scores",
        "return all(part.reads_old_scores",
    ),
    Mutation(
        "pending: own preparation", FRAME_PENDING, "is not PolicyObjective.prepare", "is None"
    ),
    Mutation(
        "pending: the correction is not asked", FRAME_PENDING, " or correction.reads_old_scores", ""
    ),
    Mutation("correction: of whole distributions", FRAME_PENDING, " or not sampled", ""),
    Mutation(
        "correction: none beside a reference",
        FRAME_PENDING,
        "self.needs_reference or (self.d",
        "(self.d",
    ),
    Mutation(
        "shared prompts: whatever they save",
        MERGING,
        "return shared <= self.below * whole",
        "return 0 <= whole",
    ),
    Mutation(
        "equal rows: those of another row",
        SCORING,
        "completion_ids[merged.first]",
        "completion_ids[: len(merged.first)]",
    ),
    Mutation(
        "equal rows: whatever is asked of them",
        SCORING,
        "apart = topk_ids is not None or (other",
        "apart = False or (other",
    ),
    Mutation(
        "equal rows: another row's states",
        MERGING,
        "merged.mask, number[merged.first]",
        "merged.mask, number[: len(merged.first)]",
    ),
    Mutation(
        "equal rows: scores in their order", SCORING, "spread_out[of]", "spread_out[of.sort()[0]]"
    ),
    Mutation(
        "rotary: decided by the longest row",
        ROTARY,
        "torch.where(ends > limit,",
        "torch.where(ends.max() > limit,",
    ),
    Mutation(
        "changes: the last prompt that fits is refused",
        CHANGES,
        "self.limit - max_tokens + 1)",
        "self.limit - max_tokens)",
    ),
    Mutation("changes: longer prompts refused", CHANGES, "if self.always else self.limit", ""),
    Mutation(
        "changes: the teacher's unseen",
        ("datamodule/rollouts.py", CHANGES[1]),
        "refused=[*rules.refused, *of_teacher.of_student]",
        "refused=rules.refused",
    ),
    Mutation("rotary: padding counts", ROTARY, "if dynamic or not each:", "if False:"),
    Mutation(
        "rotary: what came before counts", ROTARY, "        if dynamic:  #", "        if False:  #"
    ),
    Mutation("rotary: dynamic rows are alike", ROTARY, "ends if dynamic else torch", "torch"),
    Mutation(
        "rotary: prompts are shared past it",
        ("models/scorer.py", ROTARY[1]),
        "self._switches[0]",
        "10**9",
    ),
    Mutation(
        "loading: later tokens do not matter",
        VERIFIED,
        "first.isfinite().all()",
        "first.isnan().any()",
    ),
    Mutation("loading: logits are not stretched", VERIFIED, "max(1.0, WIDE / largest)", "1.0"),
    Mutation(
        "loading: padding is not tried",
        VERIFIED,
        "if close(found, wanted, _kind(scorer), spread):",
        "if True:",
    ),
    Mutation(
        "loading: a little of later tokens is nothing",
        VERIFIED,
        "max(ROUNDING, past * MOST_OF_PAST)",
        "BOUND",
    ),
    Mutation(
        "loading: attention is not compared", VERIFIED, "if keep_soft_caps(model):", "if False:"
    ),
    Mutation("head: HyperCLOVA X divides", SCORED, "scale * scaling if", "scale / scaling if"),
    Mutation("head: Falcon-H1 is not scaled", SCORED, ' * named("lm_head_multiplier")', ""),
    Mutation("head: a soft-cap by one name", SCORED, ', "logits_soft_cap"', ""),
    Mutation(
        "rows by length: one length for all",
        SCORED,
        "self._pass(input_ids[g, : c",
        "self._pass(input_ids[g, 1: c",
    ),
    Mutation(
        "sampling: recurrent states stay",
        ("models/prompt_cache.py", PREFIXES[1]),
        "layer.reorder_cache(rows)",
        "pass",
    ),
    Mutation(
        "sampling: own caches keep their rows",
        PREFIXES,
        "self.memory = select_rows(self.memory, before)",
        "pass",
    ),
    Mutation("sampling: lengths mix in any cache", WAYS, "way.mixed or ", "True or "),
    Mutation("sampling: the first way is taken", WAYS, "return gap <= BOUND\n", "return True\n"),
    Mutation("sampling: a small gap is none", WAYS, "gap <= BOUND / 10", "gap <= BOUND"),
    Mutation(
        "shared heads: padding is seen",
        SHARED_HEADS,
        "value, attention_mask, dropout, scale",
        "value, None, dropout, scale",
    ),
    Mutation("shared heads: the scaling forgotten", SHARED_HEADS, "scale=scaling", "scale=None"),
    Mutation(
        "shared heads: a bias forgotten",
        SHARED_HEADS,
        ' or settings.keys() & {"position_bias", "cache"}',
        "",
    ),
    Mutation(
        "shared heads: no masks are made",
        SHARED_HEADS,
        "AttentionMaskInterface.register(NAME, sdpa_mask)",
        "pass",
    ),
    Mutation(
        "shared heads: the name stays",
        SHARED_HEADS,
        "model.set_attn_implementation(REPLACED)",
        "pass",
    ),
    Mutation(
        "shared heads: sparse attention loses its name",
        SHARED_HEADS,
        "        and is_ordinary(model)\n",
        "",
    ),
    Mutation("step log: nothing is forgotten", STEP_LOG, "self._values.clear()", "pass"),
    Mutation(
        "statistics: those of a stopped run stay",
        ("callbacks/imitation_stats.py", "runs/test_components.py"),
        "self._stats, self._hist = StepStats(), Histograms(RANGES)",
        "pass",
    ),
    Mutation(
        "step sums: those of a stopped run stay",
        ("module.py", "runs/test_components.py"),
        "        self._stats = UpdateStats()\n        self._step_log.reset",
        "        self._step_log.reset",
    ),
    Mutation(
        "full vocabulary: another type in the backward pass",
        LOGPROBS,
        "torch.autocast(device, dtype, autocast)",
        "torch.autocast(device, enabled=autocast)",
    ),
    Mutation(
        "a teacher's NaN in the update: not looked at",
        ("metrics/update_stats.py", "runs/test_frozen_models.py"),
        "        if broken:",
        "        if broken < 0:",
    ),
    Mutation(
        "self-teacher: synced in every step but the Nth",
        SELF_RULES,
        "steps % self.every_n_steps == 0",
        "steps % self.every_n_steps != 0",
    ),
    Mutation(
        "self-teacher: the rate is the old weights' share",
        SELF_WEIGHTS,
        "part.lerp_(target.to(part.dtype), student_share)",
        "part.lerp_(target.to(part.dtype), 1.0 - student_share)",
    ),
    Mutation(
        "self-teacher: the student keeps the lent adapters",
        SELF_WEIGHTS,
        "            blend(self._ours, students, 1.0)",
        "            pass",
    ),
    Mutation(
        "trust region: shares exchanged",
        SELF_MIX,
        "[states * (1.0 - second_share), others * second_share]",
        "[states * second_share, others * (1.0 - second_share)]",
    ),
    Mutation(
        "trust region: LoRA's initial student alone",
        SELF_MIX,
        "torch.lerp(first.hidden, second.hidden, second_share)",
        "first.hidden",
    ),
    Mutation(
        "live self-teacher: its own prompt is not seen through a wrapper",
        SELF_FOUND,
        "        yield from walk(inner, prompted)",
        "        yield from walk(inner)",
    ),
    Mutation(
        "self-teacher: a skipped step moves it",
        SELF_STEPS,
        "        if module.nonfinite.skipped == skipped:\n",
        "        if module.nonfinite.skipped >= skipped:\n",
    ),
    Mutation(
        "self-teacher: no state of the module",
        SELF_STEPS,
        "        if kept:\n",
        "        if False:\n",
    ),
    Mutation(
        "self-teacher: another initial student goes on",
        SELF_KINDS,
        'if here and here != saved["initial"]:',
        'if here and not saved["initial"]:',
    ),
    Mutation(
        "self-teacher: in shards computed in the type of its weights",
        ("models/sharding.py", "checkpoints/test_resumed_self_teachers.py"),
        "frozen_dtype=self.param_dtype",
        "frozen_dtype=None",
    ),
    Mutation(
        "health: one of lengths and hedging words is enough",
        HEALTH,
        "if words[1] > LOST * words[0] or tokens[1] > LOST * tokens[0]:",
        "if words[1] > LOST * words[0] and tokens[1] > LOST * tokens[0]:",
    ),
    Mutation(
        "health: a falling pass@k with a falling reward",
        HEALTH,
        'if not below or now["reward"] <= best["reward"]:',
        "if not below:",
    ),
    Mutation(
        "routed teachers: an entropy for some rows",
        ROUTED,
        "whole if self.knows_entropy else",
        "whole if whole else",
    ),
    Mutation(
        "routed teachers: one without rows stays away",
        ROUTED,
        "self.teachers[name].take_part(batch)",
        "pass",
    ),
    Mutation(
        "failures: those of evaluations too",
        ("rewards/processes/runner.py", "rollout/test_statistics.py"),
        "len(errors) if training else 0",
        "len(errors)",
    ),
    Mutation(
        "store: what a teacher has yet to say is taken for said",
        STORE,
        "known |= dict.fromkeys(TEACHER_FIELDS)",
        "pass",
    ),
    Mutation("adapters: scaling forgotten", ADAPTERS, "layer.scaling[ADAPTER]", "1.0"),
    Mutation(
        "adapters: added under autocast",
        ADAPTERS,
        "torch.autocast(weight.device.type, enabled=False)",
        'torch.autocast("cpu", enabled=torch.is_autocast_enabled("cpu"))',
    ),
    Mutation(
        "adapters: in the base too",
        WEIGHTS,
        "layers.get(name) if self.merged else None",
        "layers.get(name)",
    ),
    Mutation("adapters: left out", WEIGHTS, "if layer is None:", "if True:"),
    # How prompts are encoded and drawn.
    Mutation(
        "prompts: two BOS before a text",
        ENCODING,
        "return [] if text_ids[0] in front else front",
        "return front",
    ),
    Mutation(
        "prompts: an end token that the tokenizer adds",
        ENCODING,
        "        ids = ids[:-1]\n",
        "        ids = ids[:]\n",
    ),
    Mutation(
        "prompts: the answer shown",
        ENCODING,
        "if before and before[-1] in answering:",
        'if before[-2:] == ["assistant"]:',
    ),
    Mutation(
        "prompts: keys of Parquet",
        TURNS,
        "for key, one in value.items() if one is not None}",
        "for key, one in value.items()}",
    ),
    Mutation(
        "prompts: an id at the last row", PROMPT_SET, "if highest >= rows:", "if highest > rows:"
    ),
    Mutation(
        "prompts: later rows unchecked",
        PROMPT_SET,
        "checks=(*self.rules.checks, check))",
        "checks=self.rules.checks)",
    ),
    Mutation(
        "draws: the neighbour's row instead",
        COLLECTOR,
        "self.slots.position(first + k, slot, attempt)",
        "self.slots.position(first, slot + k, attempt)",
    ),
    Mutation(
        "draws: overfit prompts go on",
        COLLECTOR,
        "rollout % self.repeat if self.repeat else rollout",
        "rollout",
    ),
    Mutation(
        "draws: one rollout counts",
        DRAWS,
        "self._last.append((drawn, bad))",
        "self._last = deque([(drawn, bad)])",
    ),
    Mutation(
        "draws: rows left out by wish are bad",
        DRAWS,
        "bad = [error for error in skipped if not error.wished]",
        "bad = list(skipped)",
    ),
    Mutation(
        "experts: the base's order lost",
        (WEIGHTS[0], EXPERTS[1]),
        "order.get(plain_name(item[0]), 0)",
        "0",
    ),
    Mutation(
        "experts: their layout ignored",
        (ADAPTERS[0], EXPERTS[1]),
        "update if layer._did_swap_in_out_features else update.T",
        "update",
    ),
    Mutation(
        "experts: ranks and experts swapped",
        (ADAPTERS[0], EXPERTS[1]),
        "b = b.view(b.shape[0], -1, experts)  # [out, rank, E]",
        "b = b.view(b.shape[0], experts, -1).transpose(1, 2)",
    ),
    Mutation(
        "experts: added in place",
        (ADAPTERS[0], EXPERTS[1]),
        "torch.add(expert.to(wide), update, alpha=scale)",
        "expert.to(wide).add_(update, alpha=scale)",
    ),
    Mutation(
        "experts: left to all-linear's linear layers",
        EXPERTS,
        "{p for p in (*known.linear, *known.experts) if not is_router(p)}",
        "{p for p in known.linear if not is_router(p)}",
    ),
    Mutation("experts: routers adapted", EXPERTS, " if not is_router(p)}", "}"),
    Mutation(
        "experts: layers beside them taken for older names",
        EXPERTS,
        'old = [p for p in linear if p.rpartition(".")[2] in OLD_EXPERT_NAMES]',
        "old: list[str] = []",
    ),
    Mutation("experts: a half alone", EXPERTS, "not set(halves) <= set(names)", "False"),
    Mutation(
        "adapters: on the vision tower",
        EXPERTS,
        "decoder, head = model.get_decoder(), model.get_output_embeddings()\n    if",
        "decoder, head = model, model.get_output_embeddings()\n    if",
    ),
    Mutation(
        "adapters: on a tower in the decoder",
        EXPERTS,
        "not in (None, kind)]",
        "is not None and False]",
    ),
    Mutation("adapters: on tied weights", EXPERTS, "and id(module.weight) not in tied", ""),
    Mutation(
        "adapters: on layers that map groups",
        (EXPERTS[0], "models/lora/test_targets.py"),
        "and _maps(module) and",
        "and",
    ),
    Mutation("adapters: on what is bypassed", EXPERTS, "if not _bypassed(model, p)}", "}"),
    Mutation("adapters: of any rank", EXPERTS, "if rank > widest:", "if False:"),
    Mutation("adapters: the rest unsaid", EXPERTS, "if share > WARN_ABOVE:", "if False:"),
    # Small tails, gaps, and breaks that had passed.
    Mutation(
        "tail: what the asked ones leave of 1",
        SCORED_CHUNK,
        "torch.where(rest > lowest / 2, rest - log_norm, -torch.inf)",
        "torch.log1p(-(logits.softmax(-1) * named(asked, vocab)).sum(-1))",
    ),
    Mutation(
        "tail: not normalised", SCORED_CHUNK, "rest - log_norm, -torch.inf", "rest, -torch.inf"
    ),
    Mutation("tail: the last token lost", SCORED_CHUNK, "True)[:, :vocab]", "True)[:, 1:]"),
    Mutation(
        "tail: the teacher's forgotten", TERMS, "            batch.teacher_tail_logprobs,\n", ""
    ),
    Mutation(
        "tail: the teacher's not kept",
        FROZEN_MODELS,
        "            teacher_tail_logprobs=scores.tail_logprobs,\n",
        "",
    ),
    Mutation("tail: a floor without tokens", TERMS, ".masked_fill(empty, -torch.inf)", ""),
    Mutation("top-k: teacher not floored", TERMS, "teacher.clamp(min=LOGPROB_FLOOR)", "teacher"),
    Mutation(
        "two losses: the second is not corrected",
        (TERMS[0], "objectives/test_engine_correction.py"),
        "needs_advantages = True\n    sampled = True",
        "needs_advantages = True\n    sampled = False",
    ),
    Mutation(
        "mismatch: arguments swapped",
        ("metrics/update_stats.py", "metrics/test_update_stats.py"),
        "k3(batch.rollout_logprobs.double(), batch.old_logprobs.double())",
        "k3(batch.old_logprobs.double(), batch.rollout_logprobs.double())",
    ),
    Mutation(
        "entropy: of all tokens",
        WATCHED,
        "entropy, batch.loss_mask",
        "entropy, batch.completion_mask",
    ),
    Mutation(
        "not finite: the loss not watched",
        ("metrics/nonfinite.py", WATCHED[1]),
        " and math.isfinite(loss)",
        "",
    ),
    Mutation(
        "reference: always float32",
        FROZEN_MODELS,
        '"float64" if double else "float32"',
        '"float32"',
    ),
    Mutation("pending: one of the top k", FRAME_PENDING, "self.top_k > 0 or", "self.top_k > 1 or"),
    Mutation(
        "clamp of 0: anchored",
        RATIOS_STATS,
        " and 0.0 not in (self.offset_clamp, self.log_ratio_clamp)",
        "",
    ),
    Mutation(
        "top-p: keeps too few",
        RESTRICTION,
        "<= 1.0 - sampling.top_p",
        "<= sampling.top_p",
    ),
    Mutation(
        "adaptive entropy: the wrong way",
        ADAPTIVE_ENTROPY,
        "self.step if entropy < self.target else -self.step",
        "-self.step if entropy < self.target else self.step",
    ),
    Mutation(
        "adaptive entropy: the unfinished rollout is forgotten",
        ADAPTIVE_ENTROPY,
        "        self._sums = entropy, tokens\n",
        "",
    ),
    Mutation(
        "flat groups: only they train",
        ("rollout_batch.py", "rollout/test_masked_groups.py"),
        "self.loss_mask & ~flat[:, None]",
        "self.loss_mask & flat[:, None]",
    ),
    Mutation(
        "end token: a selection cures whole distributions",
        ("objectives/policy.py", "teachers/test_tokenizers.py"),
        "except_end and not exact",
        "except_end",
    ),
    Mutation(
        "interval: certain of nothing",
        ("evaluation/bootstrap.py", "evaluation/test_metrics_of_sets.py"),
        "return (0.0, far) if certain == 0.0",
        "return (0.0, 0.0) if certain == 0.0",
    ),
    Mutation("min-p: of the smallest", RESTRICTION, "logits.amax(-1", "logits.amin(-1"),
    Mutation(
        "evaluation: the average weighs the intervals",
        ("evaluation/metrics.py", "evaluation/test_sets.py"),
        "if name not in intervals",
        "if name",
    ),
    Mutation("fence: below", RATIOS_STATS, "log_ratio < low", "log_ratio <= low"),
    Mutation(
        "fence: above",
        RATIOS_STATS,
        "log_ratio > math.log1p(self.clip_high)",
        "log_ratio >= math.log1p(self.clip_high)",
    ),
    Mutation("gap: the last value stays", WATCHED, "self._stats.with_gaps(values)", "values"),
    Mutation(
        "gap: of the callback",
        CALLBACK_STATS,
        "self._stats.with_gaps(values)",
        "values",
    ),
    Mutation("gap: in callbacks alone", STEP_LOG, "(self._values, trainer", "(trainer"),
    Mutation(
        "gap: of a rollout's number",
        ("metrics/step_stats.py", "metrics/test_step_stats.py"),
        ' if not name.startswith("rollout/")',
        "",
    ),
    Mutation(
        "agreement: at rollout time",
        ("module.py", "runs/test_frozen_models.py"),
        "top_k, divergence = int(self.teacher is not None), ",
        "top_k, divergence = int(batch.topk_ids is None and self.teacher is not None), ",
    ),
    Mutation(
        "vLLM: tied weights go twice",
        HUB_NAMES,
        "self._stored[alias][0] is self._stored[source][0]",
        "alias is source",
    ),
    Mutation(
        "vLLM: heads that only could be tied are left out",
        HUB_NAMES,
        "self._stored[alias][0] is self._stored[source][0]",
        "alias is not source",
    ),
    Mutation(
        "vLLM: all layers' experts are read at once",
        HUB_NAMES,
        'f"{layer[1]} converted"',
        '"converted"',
    ),
    Mutation(
        "vLLM: the student keeps changed attributes",
        KEPT_CLASSES,
        "setattr(kind, name, attributes[name])",
        "_ = attributes[name]",
    ),
    Mutation(
        "vLLM: its model loses the changes",
        KEPT_CLASSES,
        "module.__class__ = copies[kind]",
        "_ = copies[kind]",
    ),
    Mutation(
        "vLLM: a tied head is not packed again",
        RELOAD,
        "if shared[id(module.weight)] > 1",
        "if shared[id(module.weight)] > 2",
    ),
    Mutation(
        "vLLM: experts are laid into the old kernel",
        RELOAD,
        "method.moe_kernel = None",
        "_ = method.moe_kernel",
    ),
    Mutation(
        "vLLM: a CPU's router of experts leaves its bias out",
        RELOAD,
        "router.use_grouped_topk, router.num_expert_group, router.topk_group = True, 1, 1",
        "router.num_expert_group, router.topk_group = 1, 1",
    ),
    Mutation(
        "vLLM: a window is one token longer than the student's",
        OPTIONS,
        "config.sliding_window - 1}",
        "config.sliding_window}",
    ),
    Mutation(
        "vLLM: a CPU's kernel turns the first tokens only",
        OPTIONS,
        'options["compilation_config"] = ROTARY_IN_TORCH',
        "pass",
    ),
    Mutation(
        "vLLM: serve lets GPT-OSS lose updates",
        OPTIONS,
        "    if reloads:",
        "    if not reloads:",
    ),
    Mutation(
        "vLLM: wrong numbers are not seen before sampling",
        COMPARED,
        "compares = first and engine.compared and",
        "compares = not first and engine.compared and",
    ),
    Mutation(
        "vLLM: the callback's bound is not used before sampling",
        COMPARED,
        "bound = self.max_mean_diff",
        "bound = None",
    ),
    Mutation(
        "vLLM: what training would uncover is not looked for",
        COMPARED,
        "if compares and self.trainer.optimizers:",
        "if False:",
    ),
    Mutation(
        "vLLM: the student keeps moved weights", AGREEMENT, "part.copy_(value)", "part.copy_(part)"
    ),
    Mutation(
        "vLLM: weights without gradient are moved", AGREEMENT, "if p.requires_grad)", "if True)"
    ),
    Mutation(
        "vLLM: prompts of images are possible, which need a processor",
        OPTIONS,
        '{"language_model_only": True}',
        "{}",
    ),
    Mutation(
        "vLLM: a CPU refuses routers of sigmoids",
        RELOAD,
        'or router.scoring_func == "sigmoid")',
        "or False)",
    ),
    Mutation(
        "vLLM: an engine that never sampled asks for a checkpoint",
        VLLM_ERRORS,
        "    if sampled:",
        "    if True:",
    ),
    Mutation(
        "vLLM: NaN agrees with the student", AGREEMENT, "if not mean <= bound:", "if mean > bound:"
    ),
    Mutation(
        "vLLM: a comparison beyond the context",
        AGREEMENT,
        "known = known[: max(context - tokens, 1)]",
        "known = known[:context]",
    ),
    Mutation(
        "vLLM: the engine is on the GPU of another index",
        VLLM_PROCESS,
        '"LOCAL_RANK": str(local)}',
        '"LOCAL_RANK": str(rank)}',
    ),
    Mutation(
        "vLLM: the end of an engine ends the trainer's group",
        VLLM_PROCESS,
        "(group is not None or owned)",
        "(group is not None or not owned)",
    ),
    Mutation(
        "vLLM: the matmul precision stays vLLM's",
        VLLM_PROCESS,
        "precision()\n            random",
        "random",
    ),
    Mutation("push: small tensors are rounded, too", VLLM_PUSH, "tensor.numel() < LARGE or ", ""),
    Mutation(
        "push: the weights travel in the trainer's type",
        ("engines/vllm/engine.py", "engines/test_engines_on_a_card.py"),
        "HubWeights(weights, self.dtype)",
        "HubWeights(weights)",
    ),
    Mutation(
        "push: every matrix stays wide",
        VLLM_PUSH,
        "    return tensor.to(dtype)\n",
        "    return tensor\n",
    ),
    Mutation(
        "vLLM: the model's whole context is reserved",
        ("engines/vllm/engine.py", "engines/vllm/test_prepare.py"),
        "longest if longest < UNKNOWN else None",
        "None",
    ),
    Mutation(
        "vLLM: a GPU decodes as few rows as a CPU",
        ("engines/vllm/engine.py", "engines/vllm/test_prepare.py"),
        "        if not on_gpu:\n            cache, most",
        "        if True:\n            cache, most",
    ),
    Mutation(
        "vLLM: a share without room is taken",
        VLLM_ROOM,
        "if needed <= share * total:",
        "if needed <= total:",
    ),
    Mutation(
        "transformers engine: a rounded copy is called exact",
        NARROW_ENGINE,
        "self.exact = type(self).exact and not weights.narrower",
        "self.exact = True",
    ),
    Mutation(
        "transformers engine: autocast acts on the copy",
        NARROW_ENGINE,
        " and self._replica is None\n",
        "\n",
    ),
    Mutation(
        "transformers engine: the budget is one row short",
        BUDGET,
        "self.max_tokens // length for",
        "(self.max_tokens - 1) // length for",
    ),
    Mutation("teacher: offloaded weights travel again", OFFLOAD, "self._lent = True", "pass"),
    Mutation(
        "loading: on the default device",
        LOADING_DEVICE,
        'torch.device("cpu"):\n        scorer = N',
        "torch.no_grad():\n        scorer = N",
    ),
    Mutation(
        "clipping: the algorithm is forgotten",
        CLIPPING,
        "GradClipAlgorithmType(algorithm or GradClipAlgorithmType.NORM)",
        "GradClipAlgorithmType.NORM",
    ),
    Mutation(
        "fsdp2: gradients are reduced in every micro-batch",
        GRADIENT_SYNC,
        "set_requires_gradient_sync(False,",
        "set_requires_gradient_sync(True,",
    ),
    Mutation(
        "devices: the first index after the last is taken",
        DEVICES,
        "highest >= found",
        "highest > found",
    ),
    Mutation(
        "vLLM: an installed package is called missing",
        VLLM_ERRORS,
        "import_failed and package and find_spec(package) is None",
        "import_failed and package",
    ),
    # What an audit of the GPU paths found, undone (docs/gpu.md has the table).
    Mutation(
        "audit 2: LOCAL_RANK is the launcher's",
        VLLM_PROCESS,
        "local = device.index if device.index is not None else int(",
        "local = int(",
    ),
    Mutation(
        "audit 3: chunks on CUDA are a CPU's",
        ("losses/logprobs.py", "losses/test_head_on_cuda.py"),
        '    if device == "cuda":\n        return max(1, CUDA',
        "    if False:\n        return max(1, CUDA",
    ),
    Mutation(
        "audit 4: a teacher travels for every part",
        OFFLOAD,
        "        if self._lent:\n            return\n",
        "",
    ),
    Mutation(
        "audit 5: the copy is as wide as the student",
        ("engines/replica.py", "engines/test_compute_type.py"),
        "weights.compute_dtype if weights.narrower else None",
        "None",
    ),
    Mutation(
        "audit 5: sampled from the student's own weights",
        NARROW_ENGINE,
        "copied = weights.sharded or weights.narrower",
        "copied = weights.sharded",
    ),
    Mutation(
        "audit 6: an engine starts in inference mode",
        ("rollout/live.py", "rollout/test_live.py"),
        "with torch.inference_mode(False):",
        "with torch.inference_mode(torch.is_inference_mode_enabled()):",
    ),
    Mutation(
        "audit 7: a second engine leaves the first one running",
        VLLM_PROCESS,
        "    if RunningEngine.current is not None:\n        RunningEngine.current.close()",
        "    pass",
    ),
    Mutation(
        "audit 7: a dropped engine is not closed",
        VLLM_PROCESS,
        "weakref.finalize(owner, self.close)",
        "pass",
    ),
    Mutation(
        "audit 8: Lightning clips a fused optimizer",
        CLIPPING,
        "Precision.clip_gradients(plugin, optimizer, value or 0.0, kind)",
        "plugin.clip_gradients(optimizer, value or 0.0, kind)",
    ),
    Mutation(
        "audit 9: the other ranks get no reason",
        ("common/distributed.py", "engines/test_failing_rank.py"),
        "here = None if failure is None else str(failure) or type(failure).__name__",
        "here = None",
    ),
    Mutation(
        "audit 15: the shell decides where vLLM runs",
        VLLM_PROCESS,
        'os.environ[IN_PROCESS] = "0"',
        'os.environ.setdefault(IN_PROCESS, "0")',
    ),
    Mutation(
        "audit 15: the random state drawn is vLLM's",
        VLLM_PROCESS,
        "torch.random.fork_rng(devices=gpus),",
        "nullcontext(),",
    ),
    Mutation(
        "audit 15: the random state restored is vLLM's",
        VLLM_PROCESS,
        "random.setstate(states[0])",
        "pass",
    ),
    Mutation(
        "audit 15: numpy's random state is vLLM's",
        VLLM_PROCESS,
        "np.random.set_state(states[1])",
        "pass",
    ),
    Mutation(
        "card: a clip's bound is copied from the host",
        ("losses/ratios.py", "objectives/test_objectives_on_a_card.py"),
        "log_ratio.new_full((), clip_high if clip_high <= most else math.inf)",
        "log_ratio.new_tensor(clip_high)",
    ),
    Mutation(
        "card: a group's weights of two groups are alive at once",
        ("engines/vllm/hub_names.py", "models/test_sharded_on_a_card.py"),
        "yield from self._converted({name: self._stored[name][1]() for name in names}).items()",
        "whole = {n: self._stored[n][1]() for n in names}\n"
        "            yield from self._converted(whole).items()",
    ),
    Mutation(
        "passes: a cut need not save anything",
        ("models/passes/shared_prompts.py", "models/passes/test_width_classes.py"),
        "(1 - LEAST_SAVING) * n * width",
        "n * width",
    ),
    Mutation(
        "passes: ranks of a sharded model differ in their number",
        ("models/scorer.py", "models/passes/test_width_classes.py"),
        "if self.sharded and self.pads:",
        "if False:",
    ),
    Mutation(
        "fast path: NaN is near",
        FAST_PATH,
        "if not gap <= bound:",
        "if gap > bound:",
    ),
    Mutation(
        "fast path: the kernel is compared with itself",
        FAST_PATH,
        "use_kernel(model, PLAIN)",
        "pass",
    ),
    Mutation(
        "fast path: rounding in 16 bits is a fault",
        FAST_PATH,
        "scorer.sharded or torch.is_autocast_enabled(weight.device.type)",
        "False",
    ),
    # What completions are worth.
    Mutation(
        "pass@k: drawn with replacement",
        PASS,
        "1.0 - comb(n - c, k) / comb(n, k)",
        "1.0 - ((n - c) / n) ** k",
    ),
    Mutation(
        "majority@k: silence wins",
        MAJORITY,
        "range(min(silent, k - j) + 1)",
        "range(min(silent, k - j, j) + 1)",
    ),
    Mutation("majority@k: a tie is won", MAJORITY, "/ subsets / (tied + 1)", "/ subsets"),
    Mutation(
        "majority@k: others have more",
        MAJORITY,
        "min(votes, most, room - drawn)",
        "min(votes, room - drawn)",
    ),
    Mutation("majority@k: right once is right", MAJORITY, "hits / votes[answer] *", "1.0 *"),
    Mutation(
        "rewards: weights forgotten",
        COMPOSED,
        "self.weights[name] * result.reward",
        "result.reward",
    ),
    Mutation(
        "rewards: parts weighted",
        COMPOSED,
        "parts[name] = result.reward",
        "parts[name] = self.weights[name] * result.reward",
    ),
    Mutation(
        "rewards: the last one decides",
        COMPOSED,
        "result.correct if name == self.correct else correct",
        "result.correct",
    ),
    Mutation("answers: a missing one is a text", REFERENCES, "if missing(value):", "if False:"),
    Mutation("answers: a whole float as it is", REFERENCES, "[short, plain, text", "[text"),
    Mutation("answers: a list is a text", REFERENCES, "    if _many(value):", "    if False:"),
    Mutation(
        "numbers: a percentage is its number",
        NUMBERS,
        "shift = 2 if percent else 0",
        "shift = 0",
    ),
    Mutation("numbers: rounded as one likes", NUMBERS, "FEWEST_PLACES = 6", "FEWEST_PLACES = 2"),
    Mutation("numbers: exponents forgotten", NUMBERS, "Fraction(10) ** exponent", "1"),
    Mutation("units: any is as good", UNITS, "if a.dimension != b.dimension:", "if False:"),
    Mutation(
        "equations: the last side counts", EQUATIONS, "sides[0], side) is False", "side, side)"
    ),
    Mutation(
        "mathematics: six places are enough",
        ("rewards/math.py", "rewards/answers/test_numbers.py"),
        " and alike(gold, answer)",
        "",
    ),
    Mutation(
        "rewards: they may change the row",
        ("rewards/base.py", "rewards/test_reward_runner.py"),
        "samples = [own_copy(sample) for sample in samples]",
        "samples = list(samples)",
    ),
    Mutation(
        "texts: without special tokens",
        ("rollout/generation.py", "rollout/test_texts.py"),
        "skip_special_tokens=False",
        "skip_special_tokens=True",
    ),
    Mutation(
        "texts: with the end",
        ("rollout/generation.py", "rollout/test_texts.py"),
        "c.ids if c.truncated else c.ids[:-1]",
        "c.ids",
    ),
    Mutation(
        "groups: flat on Python's floats",
        ("rollout/refills.py", "rollout/test_flat_groups.py"),
        "dtype=reward_dtype())",
        "dtype=torch.float64)",
    ),
    Mutation(
        "rewards: always float32",
        ("rollout_batch.py", "rollout/test_flat_groups.py"),
        "torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32",
        "torch.float32",
    ),
    Mutation(
        "reasoning-gym: a constant on one row is enough",
        ("rewards/reasoning_gym.py", "rewards/test_rewards.py"),
        " and always_right(task, answer)",
        "",
    ),
    Mutation(
        "workers: orphans stay",
        ("rewards/processes/worker.py", "rewards/processes/test_workers.py"),
        "        _end_rest(child)\n",
        "",
    ),
    Mutation(
        "predictions: ours over theirs",
        ("evaluation/batch.py", "evaluation/test_predictions.py"),
        "{ROW: hidden} if hidden else {}",
        "{}",
    ),
    # What ends a completion.
    Mutation(
        "ends: the generation configuration unread",
        END_TOKENS,
        'ids += _named((read_generation(path) or {}).get("eos_token_id"), config, markers)',
        "ids += []",
    ),
    Mutation(
        "ends: of the outer configuration alone",
        END_TOKENS,
        "for part in (config, config.get_text_config()):",
        "for part in (config,):",
    ),
    Mutation(
        "ends: a class's default",
        END_TOKENS,
        "return [i for i in ids if i in markers]",
        "return ids",
    ),
    Mutation(
        "ends: ids without a row", END_TOKENS, "for i in ids if 0 <= i < rows", "for i in ids"
    ),
    Mutation(
        "ends: the last one",
        END_TOKENS,
        "(i for i, token in enumerate(ids, 1)",
        "(len(ids) for i, token in enumerate(ids, 1)",
    ),
    Mutation(
        "ends: a chat closes like text",
        END_TOKENS,
        "return self.ids[0] if isinstance(prompt, str) else self.main",
        "return self.ids[0]",
    ),
    Mutation(
        "ends: the tokenizer's is the main one",
        END_TOKENS,
        "return self.ids[0] if self.turn is None else self.turn",
        "return self.ids[0]",
    ),
    Mutation(
        "ends: always written anew",
        END_TOKENS_IN_RUNS,
        "if ids[length - 1] in ends.ids:",
        "if ids[length - 1] == ends.ids[0]:",
    ),
    # Loading: what is random, left out, refused or frozen.
    Mutation("reached: parts of layers frozen", REACHED, "if not in_layer <= names:", "if False:"),
    Mutation(
        "ends: white space after a trace's end is kept",
        ("datamodule/supervised.py", "datamodule/test_supervised.py"),
        "elif tokenizer.decode(ids[place]).strip():",
        "else:",
    ),
    # What the command line keeps.
    Mutation(
        "settings: a plus replaces",
        ("cli/settings/unions.py", "cli/settings/test_given.py"),
        'if kwargs.get("append") and sequences:',
        "if False:",
    ),
    Mutation(
        "settings: a module's error has no place",
        ("cli/settings/user_code.py", "cli/settings/test_unions.py"),
        "if not place or _is_lookup(error):",
        "if True:",
    ),
    Mutation(
        "monitors: a metric that never comes is found at the end",
        ("trainer/checks/monitors.py", "trainer/test_end_of_run.py"),
        'missing = bool(name) and not name.startswith("val/") and name not in known',
        "missing = False",
    ),
    Mutation(
        "optimizers: none is tried",
        ("trainer/optimizers.py", "runs/test_components.py"),
        "    check_step(make)\n    try:",
        "    try:",
    ),
    Mutation(
        "runs: a user's config.yaml is overwritten",
        ("trainer/run_folder.py", "trainer/test_run_folder.py"),
        '"summary.json", "samples.html", CONFIG)',
        '"summary.json", "samples.html")',
    ),
    Mutation(
        "settings: 010 is 8",
        ("cli/settings/text.py", "cli/settings/test_settings_text.py"),
        'text.lstrip("+-")[:2].lower(), 10)',
        'text.lstrip("+-")[:2].lower(), 8)',
    ),
    Mutation(
        "settings: yes is no name",
        ("cli/settings/text.py", "cli/settings/test_settings_text.py"),
        "if key.tag in (BOOL, NULL):",
        "if False:",
    ),
    Mutation(
        "settings: dots after the base",
        ("cli/layered_yaml.py", "cli/settings/test_given.py"),
        'over = nested({k: v for k, v in value.items() if k != "base"})',
        'over = {k: v for k, v in value.items() if k != "base"}',
    ),
    Mutation(
        "answers: a float32 keeps its noise",
        ("rewards/answers/references.py", "rewards/answers/test_references.py"),
        ", *_of_single(value)]",
        "]",
    ),
    Mutation(
        "answers: leading zeros dropped",
        ("prompts/hugging_face.py", "rewards/answers/test_references.py"),
        "texts = text_columns(file)",
        "texts = list[str]()",
    ),
    Mutation(
        "settings: an empty group of no setting",
        ("cli/settings/empty.py", "cli/settings/test_dropped.py"),
        "if not held and name:",
        "if held and name:",
    ),
    Mutation(
        "settings: 0x10 is a precision",
        ("cli/settings/unions.py", "cli/settings/test_dropped.py"),
        "if any(isinstance(one, bool) for one in choices):",
        "if any(isinstance(one, int) for one in choices):",
    ),
    Mutation(
        "settings: a flag before its file is no matter",
        ("cli/settings/layers/overlaid.py", "cli/settings/test_dropped.py"),
        "if _at(settings, flag[2:]) is not None:",
        "if _at(settings, flag) is not None:",
    ),
    Mutation(
        "prompts: a template may lose a message",
        ("prompts/turns.py", "prompts/test_templates.py"),
        'if turn["role"] in ("system", "developer", "user")',
        'if turn["role"] not in ("system", "developer", "user")',
    ),
    Mutation(
        "prompts: a message is found inside of another one",
        ("prompts/turns.py", "prompts/test_templates.py"),
        "words = words.replace(part, GAP, 1)",
        "words = words.replace(part, part, 1)",
    ),
    Mutation(
        "prompts: an answer in a role of the template's own",
        ("prompts/encoding.py", "prompts/test_templates.py"),
        'return {"assistant", last} if last in',
        'return {"assistant", last} if last not in',
    ),
    Mutation(
        "traces: a completion begins with the tokenizer's space",
        ("datamodule/supervised.py", "datamodule/test_supervised.py"),
        "ids = encode_inside(tokenizer, text)",
        'ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])',
    ),
    Mutation(
        "rewards: a scorer may reject the row's own answer",
        ("rewards/reasoning_gym.py", "rewards/test_rewards.py"),
        "if found and not any(",
        "if not found and not any(",
    ),
    Mutation(
        "resume: another tokenizer",
        ("checkpoints/resume.py", "checkpoints/test_resumed_settings.py"),
        'if saved.get("vocabulary", module.vocabulary) != module.vocabulary:',
        'if saved.get("vocabulary", "") != saved.get("vocabulary", ""):',
    ),
    Mutation(
        "prompts: one end token closes a prompt",
        ("prompts/encoding.py", "prompts/test_templates.py"),
        'known = {getattr(tokenizer, "eos_token_id", None), *ends}',
        'known = {getattr(tokenizer, "eos_token_id", None)}',
    ),
    Mutation(
        "answers: numbers of a CSV lose their form",
        ("prompts/columns/csv_columns.py", "prompts/test_files_as_written.py"),
        "return repr(float(cell)) != cell",
        "return False",
    ),
    Mutation(
        "answers: the number of a class",
        ("prompts/hugging_face.py", "prompts/test_files_as_written.py"),
        "if has_names(one)}",
        "if not has_names(one)}",
    ),
    Mutation(
        "answers: a route of one type",
        ("rewards/composed.py", "rewards/answers/test_references.py"),
        "for name in (str(value), *names) if",
        "for name in (str(value),) if",
    ),
    Mutation(
        "prompts: no suffix after parts",
        ("prompts/messages.py", "prompts/test_messages.py"),
        "if isinstance(content, list) and content:",
        "if False:",
    ),
    Mutation(
        "prompts: a stream downloads all",
        ("prompts/hugging_face.py", "prompts/test_hugging_face.py"),
        "    _streaming = True",
        "    _streaming = False",
    ),
    # How settings are read.
    Mutation(
        "settings: a class splits without its argument",
        ("cli/settings/renamed.py", "cli/settings/test_renamed.py"),
        "            if given[argument]:",
        "            if True:",
    ),
    Mutation(
        "settings: a set by name is a class",
        SHAPES,
        "if is_spec(previous) and not by_name(val)",
        "if is_spec(previous)",
    ),
    Mutation("settings: quoted null is none", SHAPES, "not isinstance(val, Text) and val", "val"),
    Mutation(
        "settings: a number is none",
        SHAPES,
        "leaf = member in LEAVES and member is not NoneType",
        "leaf = member in LEAVES",
    ),
    Mutation(
        "settings: any name beside a class",
        SHAPES,
        'bool(names & {"class_path", "init_args"}) and names <= SPEC',
        'bool(names & {"class_path", "init_args"})',
    ),
    Mutation("settings: one class stands for two", REPLACED, "        rest.remove(found)\n", ""),
    Mutation(
        "settings: lost arguments of a class that stays",
        REPLACED,
        "for name in one.arguments if name not in found.arguments",
        "for name in ()",
    ),
    Mutation(
        "settings: data counts as classes",
        REPLACED,
        "return last.isidentifier() and last[0].isupper()",
        "return bool(last)",
    ),
    Mutation(
        "settings: others read another text",
        YAML_TEXT,
        "# Other YAML readers, e.g. Lightning for hyper-parameters, must read back the same "
        "values.\n",
        "_resolve_as_we_do(Dumper)\n",
    ),
    Mutation(
        "settings: a component receives marked text",
        YAML_TEXT,
        "        return str(value)\n",
        "        return value\n",
    ),
    Mutation("settings: notes stay", NOTES, "    _waiting.clear()\n", ""),
    Mutation("settings: any jsonargparse", PRIVATE, "    if lacking:", "    if False:"),
    Mutation(
        "settings: only the outer key",
        PARSER,
        "while found := KEY.match(text)",
        "if found := KEY.match(text)",
    ),
    Mutation(
        "step log: a resume loses a rollout's numbers",
        RESUMED_LOG,
        "self._step_log.resume(self.trainer)",
        "pass",
    ),
    Mutation(
        "step log: a finished rollout's numbers return",
        ("metrics/step_log.py", "checkpoints/test_resumed_log.py"),
        "return {} if ends_rollout(trainer) else dict(self._values)",
        "return dict(self._values)",
    ),
    Mutation(
        "statistics: a resume leaves no gaps",
        ("metrics/step_stats.py", "checkpoints/test_resumed_log.py"),
        "self._shown = set(state_dict)",
        "pass",
    ),
    Mutation(
        "plan: freed tensors stay counted",
        METER,
        "self.bytes -= self._held.pop(key)[1]",
        "self._held.pop(key)",
    ),
    Mutation(
        "plan: a gathered weight stays when it is freed",
        METER,
        "        meter.resized(storage)\n",
        "",
    ),
    Mutation(
        "plan: causal attention counts whole squares",
        METER,
        "if causal else every",
        "if 0 else every",
    ),
    Mutation(
        "plan: fsdp2 reduces after every micro-batch",
        REHEARSED,
        "            self._leave_whole_gradients()\n",
        "",
    ),
    Mutation(
        "plan: the transformers engine fills a card",
        ("hardware/planning/engine.py", "hardware/planning/test_plan.py"),
        "free = SHARE * max(",
        "free = 2.0 * max(",
    ),
    Mutation(
        "trunk: a pass with a cache is compiled",
        TRUNK,
        "self.on and not cached else",
        "self.on else",
    ),
    Mutation(
        "trunk: layers are compiled for the comparison",
        TRUNK,
        "    on = False\n",
        "    on = True\n",
    ),
    Mutation(
        "trunk: another kernel than the user's",
        TRUNK,
        "elif name is not None and kernel_of(model) != name:",
        "elif False:",
    ),
    Mutation(
        "trunk: a recomputed layer is left in its middle",
        ("models/sharding.py", TRUNK[1]),
        "set_checkpoint_early_stop(not isinstance(forward, Layer))",
        "set_checkpoint_early_stop(True)",
    ),
    Mutation(
        "trunk: padded rows get a mask",
        ("models/scorer.py", TRUNK[1]),
        "decoder(input_ids=input_ids, use_cache=False)",
        "decoder(input_ids=input_ids, attention_mask=(torch.arange(input_ids.shape[1]) < "
        "lengths[:, None]).long(), use_cache=False)",
    ),
    Mutation(
        "shared prompts: tokens decide on a GPU, too",
        MERGING,
        "self.below = statistics.median(self._found[1:])",
        "pass",
    ),
    Mutation(
        "shared prompts: the start of the kernels counts",
        MERGING,
        "statistics.median(self._found[1:])",
        "self._found[0]",
    ),
    Mutation(
        "plan: moments are forgotten",
        ("hardware/planning/rehearsal/building.py", "hardware/planning/test_plan.py"),
        'held["moments"] = meter.bytes - before',
        'held["moments"] = 0',
    ),
    Mutation(
        "plan: the largest micro-batch by one phase",
        PLANNED,
        "int(min(limits))",
        "int(max(limits))",
    ),
    Mutation(
        "plan: a teacher with the student's weights is as shallow as the student that is counted",
        ("hardware/planning/rehearsal/steps.py", TAUGHT),
        "            if not follows_student(model):\n",
        "            if True:\n",
    ),
    Mutation(
        "plan: another tokenizer makes the student's number of tokens",
        ("hardware/planning/teachers/stand_ins.py", TAUGHT),
        "math.ceil(self.share * length)",
        "length",
    ),
    Mutation(
        "plan: a pass of the teacher has as many rows as a micro-batch",
        ("hardware/planning/rehearsal/steps.py", TAUGHT),
        "        if self.job.rollout.max_tokens_per_micro_batch is not None:\n            rows = ",
        "        if False:\n            rows = ",
    ),
    Mutation(
        "plan: what the teacher's prompt shows has no length",
        ("hardware/planning/teachers/own_prompts.py", TAUGHT),
        "            tokens += job.rollout.max_tokens\n",
        "",
    ),
    Mutation(
        "plan: no row leaves while others are sampled",
        ("hardware/planning/engine.py", "hardware/planning/test_sampling_memory.py"),
        "    cache.batch_select_indices(torch.arange(rows))\n",
        "",
    ),
    Mutation(
        "engine: the head is copied for each prompt",
        PREFIXES,
        "tuple(rows.contiguous() for rows in given)",
        "given",
    ),
    Mutation(
        "plan: a checkpoint without the weights that follow the student",
        ("hardware/planning/rehearsal/steps.py", TAUGHT),
        "tensors = [*trained, *kept, ",
        "tensors = [*trained, ",
    ),
    Mutation(
        "devices: every card is large enough",
        ("trainer/checks/devices.py", "trainer/test_devices.py"),
        "    if least <= total:\n",
        "    if True:\n",
    ),
    # What users bring: limits, quantized files, long numbers, words of a CSV.
    Mutation(
        "limits: no step is enough",
        ("trainer/checks/limits.py", "trainer/test_limits.py"),
        "if getattr(trainer, name) == 0:",
        "if False:",
    ),
    Mutation(
        "limits: a share of nothing",
        ("trainer/checks/limits.py", "trainer/test_limits.py"),
        "if not limit or limited(length, limit):",
        "if True:",
    ),
    Mutation(
        "loading: whole numbers are weights",
        ("models/architectures/values.py", "models/test_loading.py"),
        "len(some.unique()) > FEW",
        "False",
    ),
    Mutation(
        "loading: integers of a file are weights",
        ("models/architectures/values.py", "models/test_loading.py"),
        "if renamed or {name",
        "if False and {name",
    ),
    Mutation(
        "evaluation: any id is embedded",
        ("evaluation/source.py", "evaluation/test_sets.py"),
        "if highest >= rows:",
        "if False:",
    ),
    Mutation(
        "files: a long number between blocks",
        ("prompts/columns/column_types.py", "prompts/test_files_as_written.py"),
        "LONG.search(before + part)",
        "LONG.search(part)",
    ),
    Mutation(
        "answers: the last digits of a whole float",
        ("rewards/answers/references.py", "rewards/answers/test_references.py"),
        "if value.is_integer():  #",
        "if False:  #",
    ),
    Mutation(
        "answers: bf16 keeps the digits of float32",
        ("rewards/answers/references.py", "rewards/answers/test_references.py"),
        "one = value.new_tensor if",
        "one = np.float32 if",
    ),
    Mutation(
        "answers: a mathematical list of one is no list",
        ("rewards/math.py", "rewards/answers/test_lists_as_texts.py"),
        " and not LIST_OF_ONE.fullmatch(found)",
        "",
    ),
    Mutation(
        "answers: a routed row asks every reward for lists",
        ("rewards/composed.py", "rewards/answers/test_lists_as_texts.py"),
        "return reward.list_as_text(row) if isinstance(reward, TaskReward) else None",
        "return super().list_as_text(row)",
    ),
    Mutation(
        "files: a value in brackets is a tuple",
        ("common/written_values.py", "prompts/columns/test_parsed.py"),
        'if opened == "(" and len(values) == 1',
        "if False",
    ),
    Mutation(
        "files: a text between texts has no comma",
        ("common/written_values.py", "prompts/columns/test_parsed.py"),
        'elif opened != "[":',
        "else:",
    ),
    Mutation(
        "prompts: a template prints lists of parts",
        ("prompts/encoding.py", "prompts/test_templates.py"),
        "if not errors or not prints_parts(text):",
        "if True:",
    ),
    Mutation(
        "settings: a second file replaces a mapping",
        ("cli/settings/layers/files.py", "cli/settings/test_layers.py"),
        "return value if below == over else merge(below, over, where)",
        "return value",
    ),
    Mutation(
        "folders: between two renames there is none",
        ("common/folders.py", "common/test_replaced_folders.py"),
        "if not path.exists():\n                os.replace(old, path)",
        "pass",
    ),
    Mutation(
        "checkpoints: Ctrl-C leaves half a file",
        ("checkpoints/writer.py", "common/test_replaced_folders.py"),
        "except BaseException:  # half a checkpoint",
        "except Exception:  # half a checkpoint",
    ),
    Mutation(
        "rewards: the inside of a row is shared",
        ("rewards/base.py", "rewards/test_reward_runner.py"),
        "return deepcopy(value)",
        "return value",
    ),
    Mutation(
        "rewards: the working folder is left",
        ("rewards/processes/surroundings.py", "rewards/test_reward_runner.py"),
        "os.fchdir(here)",
        "pass",
    ),
    Mutation(
        "base: arguments drop those of their class",
        ("cli/settings/layers/merging.py", "cli/settings/test_layers.py"),
        '        over = {"init_args": over}\n',
        "        return over\n",
    ),
    Mutation(
        "notes: a list that a mapping replaces is not named",
        ("cli/settings/layers/replaced.py", "cli/settings/test_layers.py"),
        "lost = missing(had, classes)",
        "lost = []",
    ),
    Mutation(
        "loading: a tokenizer's mistake is the configuration's",
        ("models/architectures/load_errors.py", "models/test_loading.py"),
        'if part == "tokenizer":',
        "if False:",
    ),
    Mutation(
        "rewards: torch keeps what a reward sets",
        ("rewards/processes/surroundings.py", "rewards/processes/test_surroundings.py"),
        "setting.write(had)",
        "pass",
    ),
    Mutation(
        "rewards: a reward starts with the same random numbers in every rollout",
        ("rewards/processes/surroundings.py", "rewards/processes/test_surroundings.py"),
        "            _set_random_states(self._states)\n",
        "            pass\n",
    ),
    Mutation(
        "rewards: a reward seeds the run",
        ("rewards/processes/surroundings.py", "rewards/processes/test_surroundings.py"),
        "                _set_random_states(runs)\n",
        "                pass\n",
    ),
    Mutation(
        "notes: one for each look at a value",
        ("cli/settings/unused.py", "cli/settings/test_replaced.py"),
        ' if not any(w.endswith(f"`: {n}") for w in _waiting)',
        "",
    ),
    Mutation(
        "after an error: no hook is seen",
        ("trainer/internals.py", "trainer/test_internals.py"),
        "    return frame is not None",
        "    return False",
    ),
    Mutation(
        "Ctrl-C: any process speaks",
        ("common/distributed.py", "cli/settings/test_settings_on_two_ranks.py"),
        "if int(store.add(SAID, 0)):",
        "if False:",
    ),
    Mutation(
        "OPSD: the sum is capped, not its summands",
        OPSD,
        "(summands if clip is None else summands.clamp(max=clip)).sum(-1)",
        "summands.sum(-1) if clip is None else summands.sum(-1).clamp(max=clip)",
    ),
    Mutation(
        "OPSD: negative summands capped, too",
        OPSD,
        "summands.clamp(max=clip)",
        "summands.clamp(-clip, clip)",
    ),
    Mutation(
        "SDFT: one token more skipped",
        ("objectives/selections.py", "objectives/methods/test_opsd.py"),
        "(columns >= self.count)",
        "(columns > self.count)",
    ),
    Mutation(
        "SDAR: the gate has a gradient",
        ("losses/weights.py", "objectives/methods/test_sdar.py"),
        "(sharpness * gap.detach()).sigmoid()",
        "(sharpness * gap).sigmoid()",
    ),
    Mutation(
        "SDAR: pushes sampled tokens down",
        SDAR,
        "gate(gap, self.sharpness) * gap",
        "-gate(gap, self.sharpness) * gap",
    ),
    Mutation(
        "G-OPD: the sign of Eq. 14",
        G_OPD,
        "(extrapolation - 1.0) * (teacher_logprobs - ref_logprobs)",
        "(extrapolation - 1.0) * (ref_logprobs - teacher_logprobs)",
    ),
    Mutation(
        "EOPD: the student renormalised, too",
        EOPD,
        "generalized_jsd(student, torch.cat([teacher, outside], -1), self.jsd_beta)",
        "generalized_jsd(student[..., :-1], teacher, self.jsd_beta)",
    ),
    Mutation(
        "EOPD: acts where the teacher is sure",
        EOPD,
        '"teacher_entropy") > self.entropy_above',
        '"teacher_entropy") < self.entropy_above',
    ),
    Mutation(
        "EOPD: the gap to the current student",
        EOPD,
        "teacher_logprobs(batch, old) - old",
        "gap",
    ),
    Mutation(
        "SDPO: the ratio has a gradient",
        WEIGHTS_OF_TOKENS,
        "(logprobs - old_logprobs).detach().clamp",
        "(logprobs - old_logprobs).clamp",
    ),
    Mutation(
        "SDPO: the engine's weights forgotten",
        SDPO,
        'depend on the sampled tokens."""\n        return True',
        'depend on the sampled tokens."""\n        return False',
    ),
    Mutation(
        "SDPO: hybrid weights both losses alike",
        SDPO,
        "CappedKL(1.0 - reward_mix,",
        "CappedKL(reward_mix,",
    ),
    Mutation(
        "SRPO published: weights not normalised",
        SRPO,
        "torch.where(mask, weights / mean, 0.0)",
        "torch.where(mask, weights, 0.0)",
    ),
    Mutation(
        "SRPO published: rewards act on distilled tokens, too",
        SRPO,
        "torch.where(mask, 0.0, super().__call__(batch, gap))",
        "super().__call__(batch, gap)",
    ),
    Mutation(
        "step: a rank's own sum of weights",
        STEP_WEIGHTS,
        "prompts, max_tokens, weight)",
        "prompts, max_tokens, here.imitation_weight)",
    ),
    Mutation(
        "SCOPE: likely successes count more",
        SCOPE,
        "torch.where(correct, -student,",
        "torch.where(correct, student,",
    ),
    Mutation(
        "SCOPE: one softmax over both verdicts",
        SCOPE,
        "of_set = members == sign",
        "of_set = members != 0",
    ),
    Mutation(
        "HDPO published: the teacher's rewards in the group",
        HDPO,
        "out[rows] = super().prepare(rollout.select(rows))",
        "out = super().prepare(rollout)",
    ),
    Mutation(
        "HDPO published: kept tokens in GRPO's denominator",
        HDPO,
        "totals.num_loss_tokens - totals.num_imitated_tokens, 1.0",
        "totals.num_loss_tokens, 1.0",
    ),
    Mutation(
        "own top-k: scored without the temperature",
        OWN_TOP_K,
        "model.hidden, model.head, ids, batch.temperature",
        "model.hidden, model.head, ids, 1.0",
    ),
]


def main(words: list[str]) -> int:
    """Print a table of all mutations; 1 if one survives, is out of date, or nothing passes."""
    _preload()
    known = _page_rows() if "--new" in words else {}
    markdown = "--markdown" in words or "--new" in words
    words = [w for w in words if not w.startswith("--")]
    survived, by_name = 0, dict(known)
    with tempfile.TemporaryDirectory() as folder:
        copy = _copy(Path(folder))
        wanted = [m for m in MUTATIONS if not words or any(w in m.name for w in words)]
        wanted = [m for m in wanted if m.name not in known]
        for tests in sorted({m.where[1] for m in wanted}):
            verdict, seconds = _run(copy, tests)
            print(f"{'unbroken: ' + tests:48} {verdict:10} {seconds:5.1f} s", flush=True)
            survived += verdict != "passed"
        for mutation in wanted:
            verdict, seconds = _try(copy, mutation)
            by = _killer(copy) if verdict == "killed" else ""
            print(f"{mutation.name:48} {verdict:10} {seconds:5.1f} s  {by}", flush=True)
            survived += verdict != "killed"
            by_name[mutation.name] = by.partition(":")[0] or f"none: {verdict}"
    print(f"{len(wanted)} mutations, {survived} problems")
    if markdown:
        PAGE.write_text(page([(m, by_name[m.name]) for m in MUTATIONS if m.name in by_name]))
    return int(survived > 0)


def _page_rows() -> dict[str, str]:
    """Return the test that died first by the name of the mutation, as the page has it."""
    text = PAGE.read_text()
    return dict(re.findall(r"^\| (.+) \| `[\w/.]+` (test_\w+) \|$", text, re.MULTILINE))


def page(rows: list[tuple[Mutation, str]]) -> str:
    """Render the page of the docs: what is broken, file by file, and the test that dies first."""
    lines = [
        "# What the tests notice",
        "",
        f"`python tests/mutations.py --markdown` breaks a copy of the package in {len(rows)} ways,",
        "one at a time, runs one test file on each, and wrote this page. Each line names what is",
        "wrong and the first test that fails.",
    ]
    for file in dict.fromkeys(m.where[0] for m, _ in rows):
        lines += ["", f"## {file}", "", "| broken | the test that dies |", "| --- | --- |"]
        lines += [f"| {m.name} | `{m.where[1]}` {by} |" for m, by in rows if m.where[0] == file]
    return "\n".join([*lines, ""])


def _preload() -> None:
    os.environ.pop("PYTEST_ADDOPTS", None)
    os.environ["COLUMNS"] = "300"  # room for the reason of a failure in pytest's summary
    sys.dont_write_bytecode = True  # two edits within a second can share a stale .pyc
    import hypothesis.strategies  # noqa: F401
    import lightning.pytorch  # noqa: F401
    import pytest  # noqa: F401
    import torch
    import transformers.models.qwen2.modeling_qwen2  # noqa: F401

    torch.set_num_threads(1)


def _copy(folder: Path) -> Path:
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "kdrl_lightning", folder / "kdrl_lightning", ignore=ignore)
    shutil.copytree(ROOT / "tests", folder / "tests", ignore=ignore)
    for name in ("benchmarks", "configs"):  # tests read them
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    (folder / "pytest.ini").write_text("[pytest]\npythonpath = tests .\n")
    return folder


def _try(copy: Path, mutation: Mutation) -> tuple[str, float]:
    source, tests = mutation.where
    path = copy / "kdrl_lightning" / source
    text = path.read_text()
    if text.count(mutation.old) != 1:
        return f"stale: text occurs {text.count(mutation.old)} times", 0.0
    path.write_text(text.replace(mutation.old, mutation.new))
    verdict, seconds = _run(copy, tests)
    path.write_text(text)
    return {"passed": "SURVIVED", "failed": "killed"}.get(verdict, verdict), seconds


def _killer(copy: Path) -> str:
    """Name the failing test and what it raised."""
    lines = (copy / "output.txt").read_text().splitlines()
    line = next((x for x in lines if x.startswith(("FAILED tests/", "ERROR tests/"))), "")
    name, _, reason = line.rpartition("::")[2].partition(" - ")
    return f"{name.partition('[')[0]}: {reason.partition(':')[0][:50]}"


def _run(copy: Path, tests: str) -> tuple[str, float]:
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        os._exit(_pytest(copy, tests))
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    verdict = {0: "passed", 1: "failed", -signal.SIGALRM: "too slow"}.get(code, f"error {code}")
    return verdict, time.monotonic() - started


def _pytest(copy: Path, tests: str) -> int:
    import pytest

    signal.alarm(SECONDS)
    sink = os.open(copy / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    os.chdir(copy)
    sys.path.insert(0, str(copy))
    import kdrl_lightning

    if not Path(kdrl_lightning.__file__).is_relative_to(copy.resolve()):
        return 99
    return int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", f"tests/{tests}"]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
