"""Are the tests awake? Breaks the package on purpose, one line at a time, and expects a test to fail each time.

    python tests/breakages.py                  # all of them, some minutes
    python tests/breakages.py NAME ...         # some
    python tests/breakages.py --list

Every breakage is one piece of text in one file of hooks/thinwire, there exactly once, what it is replaced by, and the
tests that must see it. The file is restored afterwards, on Ctrl-C and on SIGTERM too; one with uncommitted changes is
not touched. Exits with 1 if a breakage was not caught, or could not be tried.

Compiled operators are not rebuilt: what breaks their reference runs with THINWIRE_REFERENCE=1, and the tests that
compare the two hold the compiled ones to it.
"""
import argparse
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

TESTS = Path(__file__).resolve().parent
HOOKS = TESTS.parent / "hooks"
SECONDS = 240  # a breakage may end in ranks that wait for each other: then it is caught too


@dataclass(frozen=True)
class Breakage:
    """file: in hooks/thinwire. tests: node ids below tests/. reference: on the operators in plain PyTorch."""

    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    reference: bool = False


BREAKAGES = {
    # ---- ops ----
    "take-keeps-what-was-sent": Breakage(
        "ops/reference.py", "            if clear:\n", "            if False:\n",
        ("test_ops.py::test_nothing_is_lost",), reference=True,
    ),
    "take-forgets-the-rounding-error": Breakage(
        "ops/reference.py", "torch.where(torch.isfinite(taken), values - taken, values)", "torch.zeros_like(values)",
        ("test_memory.py::test_error_feedback_conserves_exactly[topk-wire_dtype1]",), reference=True,
    ),
    "velocity-stays-in-sent-blocks": Breakage(
        "ops/reference.py", "                velocity[index] = 0\n", "                pass\n",
        ("test_memory.py::test_momentum_is_cleared_where_a_block_was_sent",), reference=True,
    ),
    "reference-is-not-the-operator": Breakage(
        "ops/reference.py", "lanes[:, :half] + lanes[:, half:]", "lanes[:, :half] + 1.0001 * lanes[:, half:]",
        ("test_ops.py::TestEqualsReference::test_accumulate",),
    ),
    "scales-are-rounded-to-nearest": Breakage(
        "ops/reference_wire.py", "+ 0xFFFF) & -0x10000", "+ 0x8000) & -0x10000",
        ("test_wire_ops.py::test_codes_are_the_nearest_and_the_largest_fits",), reference=True,
    ),
    "codes-are-cut-off": Breakage(
        "ops/reference_wire.py", "code = torch.round(", "code = torch.trunc(",
        ("test_wire_ops.py::test_codes_are_the_nearest_and_the_largest_fits",), reference=True,
    ),
    "scales-whose-multiples-overflow": Breakage(
        "ops/reference_wire.py", "torch.isfinite(up * _largest(bits))", "torch.isfinite(up)",
        ("test_wire_ops.py::test_nothing_is_lost",), reference=True,
    ),
    "codes-leave-nothing": Breakage(
        "ops/reference_wire.py", "values - code * scale[:, None])", "values * 0)",
        ("test_wire_ops.py::test_nothing_is_lost",), reference=True,
    ),
    "codes-lie-from-the-highest-bits": Breakage(
        "ops/reference_wire.py", "shifts = torch.arange(0, 8, bits, dtype=torch.int32, device=code.device)",
        "shifts = torch.arange(8 - bits, -1, -bits, dtype=torch.int32, device=code.device)",
        ("test_wire_ops.py::test_the_bytes_of_a_row",), reference=True,
    ),
    "the-first-owner-has-every-first-slot": Breakage(
        "ops/reference_owners.py", "owner = (turn + slot) % ranks", "owner = slot * 0",
        ("test_wire_ops.py::test_owners_take_turns",), reference=True,
    ),
    "unions-forget-whole-parameters": Breakage(
        "ops/reference_owners.py", "        if slots == blocks:\n", "        if False:\n",
        ("test_wire_ops.py::test_a_union_is_what_was_named",), reference=True,
    ),
    # ---- core ----
    "settle-ignores-bad": Breakage(
        "core/memory.py", "torch.zeros_like(bad) if reading.restored else bad", "torch.zeros_like(bad)",
        ("test_ddp.py::test_a_step_that_overflows_is_skipped_everywhere_and_leaves_no_trace"
         "[topk-error_feedback-float32]",),
    ),
    "owners-lost-part-is-not-given-back": Breakage(
        "core/memory.py", "sent.dealing.add_part(total.lost, rank, choice.own, 1.0, bad, residual)", "pass",
        ("test_memory.py::test_error_feedback_conserves_exactly[shared-wire_dtype1]",),
    ),
    "what-owners-round-off-a-round-is-lost": Breakage(
        "core/memory.py", "sent.dealing.add_part(total.lost, rank, choice.own, 1.0, _flag(~good), left)", "pass",
        ("test_weights.py::test_what_is_sent_and_what_is_left_are_what_had_moved[int4-2]",),
    ),
    "a-round-brings-what-an-earlier-one-left": Breakage(
        "core/memory.py", "        return _accumulated_from_zero(flat, slots)\n\n    def settle",
        "        return super().add(flat, slots, ranks_blocks, of)\n\n    def settle",
        ("test_weights.py::test_a_round_follows_from_its_number_and_from_no_other_round",),
    ),
    "a-spoilt-round-takes-what-it-did-not-bring": Breakage(
        "core/memory.py", "        if left.is_cuda or not bool(good):\n", "        if False:\n",
        ("test_weights.py::test_a_round_that_is_not_finite_leaves_all_where_it_was",),
    ),
    "every-block-of-a-round-is-said-to-be-sent": Breakage(
        "core/reducer.py", "return mask != 0", "return mask == mask",
        ("test_weights.py::test_what_is_sent_and_what_is_left_are_what_had_moved[torch.float32-2]",),
    ),
    "blocks-are-never-due": Breakage(
        "core/selection.py", "q.norms if q.max_age is None else _due_first(q)", "q.norms",
        ("test_weights.py::test_no_block_waits_longer_than_max_age[0.25-None-3]",),
    ),
    "due-blocks-go-to-ranks-without-places": Breakage(
        "core/selection.py", "mine = (due < ends) & (turns == (q.rank - q.step) % n)",
        "mine = (due < ends) & (turns == q.rank)",
        ("test_weights.py::test_no_block_waits_longer_than_max_age[0.25-None-3]",),
    ),
    "due-blocks-are-counted-over-the-bucket": Breakage(
        "core/selection.py", "torch.stack([first + number * age, ends,",
        "torch.stack([first // age * age + number * age, ends,",
        ("test_weights.py::test_a_round_follows_from_its_number_and_from_no_other_round",),
    ),
    "control-variate-learns-from-its-own-rank-only": Breakage(
        "core/memory.py", "_scatter(changes, total.rows, total.slots, total.to_mean, mean, accumulate=True)", "pass",
        ("test_estimator.py::test_control_variate_is_unbiased_whatever_it_holds",
         "test_checkpoint.py::test_at_another_number_of_ranks_no_mass_is_lost"),
    ),
    "mean-is-divided-by-one-rank-less": Breakage(
        "core/reducer.py", "n = self.world_size if divide_by", "n = self.world_size - 1 if divide_by",
        ("test_memory.py::test_error_feedback_conserves_exactly[shared-wire_dtype0]",),
    ),
    "estimates-are-not-scaled": Breakage(
        "core/reducer.py", "slots.shares if self.method.unbiased else", "slots.shares if False else",
        ("test_estimator.py::test_unbiased_with_the_papers_variance[independent-alike]",),
    ),
    "permuted-deals-overlap": Breakage(
        "core/selection.py", "_drawn(q, [0] * n, range(n))", "_drawn(q, [0] * n, [0] * n)",
        ("test_estimator.py::test_permuted_masks_are_disjoint_and_cover_all",),
    ),
    "independent-ranks-share-a-stream": Breakage(
        "core/selection.py", "_drawn(q, range(1, n + 1), [0] * n)", "_drawn(q, [1] * n, [0] * n)",
        ("test_estimator.py::test_independent_masks_overlap_by_tau_and_no_more",),
    ),
    "ranks-nominate-without-taking-turns": Breakage(
        "core/selection.py", "slots.layout.units % world_size - step", "slots.layout.units % world_size",
        ("test_methods.py::test_the_ranks_take_turns_in_nominating_what_does_not_divide",),
    ),
    "draws-ignore-the-step": Breakage(
        "core/selection.py", "q.seed, q.step, streams", "q.seed, 0, streams",
        ("test_estimator.py::test_draws_change_with_step_seed_and_parameter",),
    ),
    "residual-stays-behind-with-its-bucket": Breakage(
        "core/store.py", "_fill(one, one.now, {part.names[0]: part.now for part in parts})", "pass",
        ("test_memory.py::test_error_feedback_conserves[topk-error_feedback-float32]",),
    ),
    "state-is-loaded-onto-another-name": Breakage(
        "core/store.py", "(tensor.numel(),), tensor.detach()",
        "(tensor.numel(),), [t for t in tensors.values() if t.numel() == tensor.numel()][-1]",
        ("test_checkpoint.py::test_state_loaded_before_the_model_is_known",),
    ),
    "float16-wire-overflows": Breakage(
        "core/wire.py", "(15 - exponent)", "(18 - exponent)",
        ("test_replicas.py::test_float16_wire_neither_overflows_nor_flushes",),
    ),
    "dealt-payload-comes-back-shifted": Breakage(
        "core/dealing.py", "ops.undeal_elements(rows, table", "ops.undeal_elements(rows.roll(1, 1), table",
        ("test_replicas.py::test_nothing_left_out_is_plain_ddp[Dense(wire_dtype=torch.float32)-2]",),
    ),
    "bytes-are-counted-for-one-rank-more": Breakage(
        "core/stats.py", "2 * (world_size - 1) * nbytes", "2 * world_size * nbytes",
        ("test_ddp.py::test_stats",),
    ),
    # ---- which passes belong to a step ----
    "a-dropped-step-stays-in-memory": Breakage(
        "core/memory.py", "            store.put_back(names, step)\n", "            pass\n",
        ("test_loops.py::test_gradients_that_are_cleared_change_nothing",),
    ),
    "a-second-pass-forgets-what-was-before-the-first": Breakage(
        "core/store.py", "if step is None or one.step == step:", "if step is None:",
        ("test_loops.py::test_a_dropped_step_leaves_the_state_bit_for_bit",),
    ),
    "what-is-to-go-back-to-stays-with-its-bucket": Breakage(
        "core/store.py", "one.step, one.before = max(steps), one.now.clone()", "one.step, one.before = None, None",
        ("test_loops.py::test_a_dropped_step_leaves_the_state_bit_for_bit",),
    ),
    "a-second-pass-brings-the-first-again": Breakage(
        "ddp/hook.py", "        torch._foreach_sub_(*were)\n", "        pass\n",
        ("test_loops.py::test_passes_that_all_synchronise_add_up",),
    ),
    "momentum-decays-in-every-pass": Breakage(
        "core/memory.py", "if velocity is None or not of.again:", "if True:",
        ("test_loops.py::test_momentum_decays_once_a_step",),
    ),
    "a-pass-begins-with-bucket-0": Breakage(
        "ddp/passes.py", "self._last is None or bucket.index() <= self._last", "bucket.index() == 0",
        ("test_loops.py::test_buckets_that_are_left_out",),
    ),
    "zeros-are-no-gradient-whatever-is-late": Breakage(
        "state/steps.py", "cleared |= zeros & telling", "cleared |= zeros",
        ("test_loops.py::test_a_gradient_that_is_zero_because_it_is_late_was_not_cleared",),
    ),
    "what-another-optimizer-steps-is-dropped": Breakage(
        "state/steps.py", "self._forget(cleared & owned, self._drop)", "self._forget(cleared, self._drop)",
        ("test_loops.py::test_what_another_optimizer_steps_is_taken",),
    ),
    "an-optimizer-that-makes-no-steps-is-not-noticed": Breakage(
        "state/steps.py", "if self._changes >= self._allowed:", "if False:",
        ("test_loops.py::test_an_optimizer_that_is_never_stepped_is_named",),
    ),
    "a-dropped-step-leaves-what-it-made-late": Breakage(
        "elastic/lateness.py", "if name in names and name in late.parts():", "if False:",
        ("test_loops.py::test_gradients_that_are_cleared_change_nothing",),
    ),
    "a-dropped-step-takes-along-what-was-late": Breakage(
        "elastic/lateness.py", "            late.take_back(name)\n", "            pass\n",
        ("test_loops.py::test_gradients_that_are_cleared_change_nothing",),
    ),
    "a-ledger-forgets-what-it-issued-once-that-was-given": Breakage(
        "elastic/lateness.py", "if name in names and (late, name) not in self._issued]", "if name in names]",
        ("test_loops.py::test_what_is_void_does_not_come_back_by_parts",),
    ),
    "stand-ins-in-join-open-passes": Breakage(
        "ddp/hook.py", "        return torch._C._current_graph_task_id() != -1\n", "        return True\n",
        ("test_join.py::test_a_control_variate_stays_the_mean_of_all_ranks",),
    ),
    "what-was-skipped-is-used-again": Breakage(
        "state/steps.py", "        self._void.update(self._open)\n", "",
        ("test_loops.py::test_what_was_skipped_is_not_used_again",),
    ),
    "outliers-are-late-too": Breakage(
        "elastic/scheduling.py", "            until = step\n", "            pass\n",
        ("test_loops.py::test_nothing_of_an_outlier_is_late",),
    ),
    # ---- states and groups ----
    "states-are-in-the-order-of-memory": Breakage(
        "state/order.py", "p is None or p.is_contiguous() else shaped", "True else shaped",
        ("test_states.py::test_no_gradient_goes_to_other_elements_in_another_memory_format",),
    ),
    "a-residual-may-be-nan": Breakage(
        "state/entries.py", "if not bool(torch.isfinite(tensor).all()):", "if False:",
        ("test_states.py::test_an_edited_state_is_taken_as_it_is_or_refused_with_nothing_changed",),
    ),
    "join-divides-by-all-ranks": Breakage(
        "ddp/hook.py", "_finishing(n / self._with_data, were)", "_finishing(1, were)",
        ("test_join.py::test_the_mean_inside_join_is_plain_ddps",),
    ),
    "messages-without-elements-are-viewed": Breakage(
        "core/wire.py", "    if messages.numel() == 0:", "    if False:",
        ("test_buckets.py::test_a_bucket_without_elements_changes_nothing_and_is_not_sent",),
    ),
    "decisions-come-from-an-all-reduce": Breakage(
        "elastic/scheduling.py", "total = add_in_rank_order(gather_now(mine, self.now.group))",
        "total = mine\n        dist.all_reduce(total, group=self.now.group)",
        ("test_groups.py::test_an_all_reduce_that_differs_by_an_ulp_decides_nothing",),
    ),
    "groups-wait-for-half-an-hour": Breakage(
        "replicas/groups.py", "            return group._get_backend(torch.device(kind)).options._timeout\n",
        "            return None\n",
        ("test_groups.py::test_groups_wait_as_long_as_the_job_does",),
    ),
    # ---- methods ----
    "permuted-shares-blocks-by-rounding": Breakage(
        "methods/block_sparse.py", "count = min(count, blocks // world_size)", "pass",
        ("test_methods.py::test_permuted_ranks_never_share_a_block_at_the_default_density",),
    ),
    "gradients-are-left-in-weights": Breakage(
        "methods/block_sparse.py", 'if sparse.memory == "weights":', "if False:",
        ("test_weights.py::test_only_local_steps_run_it", "test_weights.py::test_attach_refuses_it"),
    ),
    "blocks-that-are-due-need-not-fit": Breakage(
        "methods/block_sparse.py", "if self.max_age < least:", "if False:",
        ("test_weights.py::test_combinations_that_cannot_be_right_are_refused",),
    ),
    "weights-drift-by-chance": Breakage(
        "methods/block_sparse.py", 'if self.selection != "nominated":', "if False:",
        ("test_weights.py::test_combinations_that_cannot_be_right_are_refused",),
    ),
    "ranks-that-never-meet-are-allowed": Breakage(
        "methods/schedules.py", "return len(found) == 1", "return True",
        ("test_schedules.py::test_ranks_that_never_meet_are_refused",),
    ),
    # ---- consistency ----
    "sketch-without-signs": Breakage(
        "consistency/measure.py", "(1 - 2 * (drawn & 1)) * tensor", "tensor",
        ("test_consistency.py::test_sketch_keeps_norms_and_sums",),
    ),
    "controller-steers-the-wrong-way": Breakage(
        "consistency/controller.py", "math.exp(GAIN *", "math.exp(-GAIN *",
        ("test_consistency.py::test_controller_does_not_oscillate_while_gradients_fall_a_hundredfold",),
    ),
    "bound-of-error-feedback-forgets-what-accumulates": Breakage(
        "consistency/bounds.py", "(1 - gamma) ** 3", "(1 - gamma)",
        ("test_bounds.py::test_values",),
    ),
    "the-pseudo-gradient-has-the-wrong-sign": Breakage(
        "local/flight.py",
        "part.mean = anchor - part.origin",
        "part.mean = part.origin - anchor",
        ("test_local_steps.py::test_rounds_are_what_they_say[False-1-0.7-momentum-1]",),
    ),
    "one-rank-meets-itself-by-rounding": Breakage(
        "local/anchor.py",
        "if self._is_mean and origin is not None:",
        "if False:",
        ("test_local_steps.py::test_one_rank_keeps_its_own_weights_to_the_bit[2]",),
    ),
    "momentum-moves-what-was-not-sent": Breakage(
        "local/anchor.py",
        "        for now, then in zip(both, before):\n",
        "        for now, then in ():\n",
        ("test_local_steps.py::test_momentum_moves_nothing_that_was_not_sent",),
    ),
    "what-is-done-meanwhile-is-lost": Breakage(
        "local/flight.py",
        "        moved = after if by is None else own + by\n",
        "        moved = after\n",
        ("test_local_steps.py::test_rounds_are_what_they_say[True-1-0.7-momentum-1]",),
    ),
    "what-was-not-sent-is-lost": Breakage(
        "local/flight.py",
        "            by -= self.left\n",
        "            pass\n",
        ("test_local_steps.py::test_what_partial_rounds_do_not_send_stays_in_the_weights[0]",),
    ),
    "what-waits-is-left-out-of-the-last-round": Breakage(
        "local/flight.py",
        "                    one += waiting[name].view_as(one)\n",
        "                    pass\n",
        ("test_local_steps.py::test_the_last_round_is_exact",),
    ),
    "the-last-round-is-in-4-bits": Breakage(
        "local/flight.py",
        "channel = self._exact if exactly else self._channel",
        "channel = self._channel",
        ("test_local_steps.py::test_the_last_round_is_exact",),
    ),
    "a-part-of-a-round-has-a-whole-ones-momentum": Breakage(
        "local/steps.py",
        "momentum=whole, together=True",
        "momentum=True, together=True",
        ("test_local_steps.py::test_the_last_round_is_exact",),
    ),
    "rounds-land-in-a-backward-pass": Breakage(
        "local/steps.py",
        "        if torch._C._current_graph_task_id() != -1:\n            self._owed += 1\n",
        "        if False:\n            self._owed += 1\n",
        ("test_local_steps.py::test_nothing_moves_inside_a_backward_pass",),
    ),
    "zeros-are-a-step-left-out": Breakage(
        "local/steps.py",
        "self._steps.take_in(parameters, _is_zero(flat))",
        "self._steps.take_in(parameters)",
        ("test_local_steps.py::test_a_step_is_a_step_in_every_loop[accumulated]",),
    ),
    "passes-in-a-closure-are-steps-left-out": Breakage(
        "state/steps.py",
        "if cleared & owned and not self._open and not self._alone.inside:",
        "if cleared & owned and not self._open:",
        ("test_local_steps.py::test_a_step_is_a_step_in_every_loop[closure]",),
    ),
    "a-skipping-scaler-says-nothing": Breakage(
        "replicas/stepping.py",
        "            self._listener.skip_step()\n",
        "            pass\n",
        ("test_local_steps.py::test_a_step_is_a_step_in_every_loop[scaler]",),
    ),
    "what-was-frozen-stays-apart": Breakage(
        "local/steps.py",
        "        self._trained.update(self._anchored)  #",
        "        pass  #",
        ("test_local_steps.py::test_what_is_frozen_in_a_round_is_still_averaged",),
    ),
    "a-loaded-anchor-is-not-compared": Breakage(
        "local/saved.py",
        "handle._owed, handle._agreed, handle._begun = 0, False,",
        "handle._owed, handle._begun = 0,",
        ("test_local_steps.py::test_states_of_different_steps_are_refused",),
    ),
    "what-is-under-way-is-not-saved": Breakage(
        "local/saved.py",
        "flight = {} if handle._flight is None else handle._flight.state_dict()",
        "flight = {}",
        ("test_local_steps.py::test_a_resumed_run_is_the_uninterrupted_one[int4]",),
    ),
    "a-round-in-a-state-begins-anew": Breakage(
        "replicas/handle.py",
        'self._since = mine.get("since", 0)',
        "self._since = 0",
        ("test_local_steps.py::test_a_resumed_run_is_the_uninterrupted_one[groups]",),
    ),
    "auto-waits-for-nothing": Breakage(
        "local/pace.py",
        "(exchange_s - overlap * step_s) / (WAIT * step_s)",
        "0.0",
        ("test_local_steps.py::test_every_auto_is_the_fewest_steps_that_hide_the_exchange",),
    ),
    "a-change-of-a-fifth-is-none": Breakage(
        "local/pace.py",
        "_DRIFT = 1.2",
        "_DRIFT = 9.0",
        ("test_local_steps.py::test_every_auto_is_the_fewest_steps_that_hide_the_exchange",),
    ),
    "local-steps-land-at-once": Breakage(
        "consistency/bounds.py", "(every - 1 + overlap) * second_moment", "(every - 1) * second_moment",
        ("test_bounds.py::test_local_steps_are_apart_for_as_long_as_their_bound_says",),
    ),
    "any-step-is-a-gradient": Breakage(
        "consistency/measure.py", "if _steps_by_gradients(optimizer) else None", "if True else None",
        ("test_consistency.py::test_the_bound_of_local_steps_is_for_steps_that_are_gradients",),
    ),
    # ---- state ----
    "estimated-rounds-forget-the-warm-up": Breakage(
        "state/estimate.py", "(step - method.warmup_steps) // method.every", "step // method.every",
        ("test_estimate.py::test_steps_of_the_warm_up_are_dense_and_those_after_it_count_rounds_of_the_method",),
    ),
    "beta1-is-raised-to-what-is-suggested": Breakage(
        "state/suggest.py", "min(own, most)", "most",
        ("test_suggest.py::test_where_a_search_begins",),
    ),
    "memory-follows-the-scale-backwards": Breakage(
        "state/gradients.py", "self._rescale(scale / self._scale)", "self._rescale(self._scale / scale)",
        ("test_ddp.py::test_memory_follows_the_scale",),
    ),
    "fewer-ranks-get-unscaled-residuals": Breakage(
        "state/checkpoint.py", "share = tensor * (now / was)", "share = tensor",
        ("test_checkpoint.py::test_at_another_number_of_ranks_no_mass_is_lost",),
    ),
    "ranks-agree-on-everything": Breakage(
        "state/agree.py", "        if len(ranks) > 1:\n", "        if False:\n",
        ("test_refusals.py::test_only_some_ranks_resumed",),
    ),
    # ---- ddp ----
    "closed-hook-stays-at-work": Breakage(
        "ddp/mount.py", "            self._group, self.occupant = self.occupant.group, None\n", "            pass\n",
        ("test_handle.py::test_after_close_the_model_is_plain_ddp",),
    ),
    # ---- elastic ----
    "late-gradients-are-applied-twice": Breakage(
        "elastic/lateness.py", "                    late.give_up(name)\n", "                    pass\n",
        ("test_elastic.py::test_ledger_applies_each_part_once_also_in_other_buckets",),
    ),
    "the-lightest-buckets-are-waited-for": Breakage(
        "elastic/lateness.py", "(-norms[i], i)", "(norms[i], i)",
        ("test_elastic.py::test_heaviest_are_the_fewest_that_make_up_beta",),
    ),
    "finalize-drops-what-is-late": Breakage(
        "elastic/late_steps.py", "        self._apply_pending()\n        self._ledger.clear()\n",
        "        self._land()\n        self._ledger.clear()\n",
        ("test_handle.py::test_closing_applies_what_is_late",),
    ),
    "evaluating-leaves-late-gradients-in-the-model": Breakage(
        "elastic/late_steps.py", "p.detach().copy_(saved[name])", "pass",
        ("test_elastic.py::test_evaluating_leaves_no_trace_in_model_or_optimizer",),
    ),
    "late-gradients-of-a-bad-step-are-kept": Breakage(
        "elastic/scheduling.py", "            self.ledger.drop(step)\n", "            pass\n",
        ("test_elastic.py::test_skipped_steps_drop_what_they_issued_and_nothing_else[0.5-1]",),
    ),
    # ---- replicas ----
    "every-round-has-the-same-groups": Breakage(
        "replicas/rounds.py", "self.partitions[index % len(self.partitions)]", "self.partitions[0]",
        ("test_shuffle.py::test_rounds_are_what_they_say[none]",),
    ),
    "moments-are-never-averaged": Breakage(
        "replicas/moments.py", 'int("betas" in optimizer.defaults)', "0",
        ("test_shuffle.py::test_adams_moments_are_averaged_and_sgds_momentum_is_not",),
    ),
    "evaluating-leaves-the-mean-in-the-model": Breakage(
        "replicas/handle.py", "tensor.detach().copy_(one)", "pass",
        ("test_shuffle.py::test_the_model_evaluated_is_the_same_everywhere_and_leaves_no_trace[none]",),
    ),
    # ---- hogwild ----
    "workers-residuals-are-their-own-copies": Breakage(
        "hogwild/worker.py", "        return self._given\n", "        return self._given.clone()\n",
        ("test_hogwild.py::test_what_is_written_and_what_waits_add_up_to_the_steps",),
    ),
    "workers-forget-how-late-they-are": Breakage(
        "hogwild/worker.py", "delay = int(counts[BEGUN].sum()) - seen", "delay = 0",
        ("test_hogwild.py::test_a_late_update_is_measured_as_late_as_it_is[dense-one rate]",),
    ),
    # ---- horovod ----
    "union-of-blocks-in-the-wrong-order": Breakage(
        "horovod/compressor.py", "values[torch.searchsorted(union, own)]", "values[torch.arange(len(own))]",
        ("test_horovod.py::test_on_ranks[2-union_by_hand-permuted-error_feedback-float16]",),
    ),
    # ---- advice ----
    "whole-rounds-are-one-step": Breakage(
        "advice/rounds.py", "step_s) / apart", "step_s)",
        ("test_advise.py::test_what_is_given_stays_and_is_shared_out_over_the_round",),
    ),
    "proposed-rounds-are-too-short": Breakage(
        "advice/rounds.py", "2 ** math.ceil(least - 1e-9)", "2 ** math.floor(least + 1e-9)",
        ("test_advise.py::test_the_shortest_round_that_costs_a_twentieth_or_is_hidden_is_proposed",),
    ),
    "buffers-of-rounds-cost-nothing": Breakage(
        "advice/trial.py", "if nbytes := self._replica_bytes(method):", "if nbytes := 0:",
        ("test_advise.py::test_a_step_of_a_round_sends_what_is_estimated",),
    ),
    "waves-travel-at-the-same-time": Breakage(
        "advice/rehearsal.py", "in_turn=bool(self._beside)", "in_turn=False",
        ("test_advise.py::test_waves_travel_one_after_the_other_and_pytorchs_buckets_do_not",),
    ),
    "a-backend-has-any-number-of-threads": Breakage(
        "advice/cost.py", "if len(self._ends) >= self.link.at_once:", "if False:",
        ("test_cost.py::test_what_a_backend_has_no_thread_for_waits_with_its_latency",),
    ),
    "a-ring-sends-everything-twice": Breakage(
        "advice/cost.py", "else (n - 1) / n)\n", "else 1.0)\n",
        ("test_cost.py::test_hops_and_bytes_are_those_of_counted_messages",),
    ),
    "the-slowest-method-is-advised": Breakage(
        "advice/verdict.py", "min(step_s, key=step_s.get)", "max(step_s, key=step_s.get)",
        ("test_advise.py::test_the_fastest_is_taken_where_the_network_costs_much",),
    ),
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--list", action="store_true", help="say what there is, and do nothing")
    args = parser.parse_args()
    if args.list:
        for name, one in BREAKAGES.items():
            print(f"{name}: {one.file}; {', '.join(one.tests)}")
        return 0
    if unknown := [name for name in args.names if name not in BREAKAGES]:
        parser.error(f"there is no {', '.join(unknown)}: see --list")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that files are restored
    missed = []
    for name in args.names or BREAKAGES:
        begin = time.monotonic()
        said = attempt(BREAKAGES[name])
        print(f"{name}: {said}, {time.monotonic() - begin:.0f} s", flush=True)
        missed += [name] if not said.startswith("caught") else []
    print(f"{len(missed)} not caught: {', '.join(missed)}" if missed else "all caught")
    return bool(missed)


def attempt(breakage: Breakage) -> str:
    """Break, test, restore; what came of it."""
    path = HOOKS / "thinwire" / breakage.file
    changed = subprocess.run(["git", "status", "--porcelain", "--", path], cwd=TESTS, capture_output=True, text=True)
    if changed.returncode or changed.stdout:
        return f"not tried: {breakage.file} {'has uncommitted changes' if changed.stdout else 'is in no git checkout'}"
    whole = path.read_text()
    if (found := whole.count(breakage.old)) != 1:
        return f"not tried: {breakage.old.strip()!r} is {found} times in {breakage.file}"
    try:
        path.write_text(whole.replace(breakage.old, breakage.new))
        return _caught(breakage)
    finally:
        path.write_text(whole)


def _caught(breakage):
    command = [sys.executable, "-B", "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-m", "not full",
               "--tb=line", *breakage.tests]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(HOOKS), "PYTHONDONTWRITEBYTECODE": "1"}
    if breakage.reference:
        environment["THINWIRE_REFERENCE"] = "1"
    process = subprocess.Popen(command, cwd=TESTS, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               text=True, start_new_session=True)  # fmt: skip
    try:
        output, _ = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return f"caught: its tests hang, stopped after {SECONDS} s"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # with all ranks that it started
            process.wait()
    if process.returncode == 1 and (failed := re.findall(r"^(?:FAILED|ERROR) (.+?)(?: - |$)", output, re.MULTILINE)):
        return f"caught by {failed[0].removeprefix('tests/')}"
    if process.returncode == 0:
        return "NOT CAUGHT: " + output.strip().splitlines()[-1]
    return f"not tried: pytest ended with status {process.returncode}:\n{output[-2000:]}\n"


if __name__ == "__main__":
    sys.exit(main())
