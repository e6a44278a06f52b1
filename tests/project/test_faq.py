"""The answers of docs/faq.md are claims, and each is held by tests that there are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
PAGE = (TESTS.parent / "docs" / "faq.md").read_text(encoding="utf-8")
QUESTIONS = re.findall(r"^\*\*(.+?)\*\*", PAGE, re.MULTILINE)
HELD = {
    "Does it save memory, or only time?": """
        cache/test_memory.py::test_a_generation_costs_its_keys_and_values_and_five_percent
        cache/test_memory.py::test_no_step_allocates_anything_of_the_caches_size
        adapters/test_attach.py::test_text_prompts_longer_than_the_budget""",
    "Is it faster?": """
        lab/test_bench.py::test_contenders_share_weights_and_nothing_else""",
    "Is it lossless?": """
        adapters/test_attach.py::test_lossless_when_it_fits
        adapters/test_attach.py::test_eviction_changes_what_the_model_says""",
    "Prompt or decoding?": """
        adapters/test_attach.py::test_text_prompts_longer_than_the_budget
        core/test_budget.py::test_text_without_a_length_takes_any_number_of_tokens""",
    "Where does my prompt go?": """
        policies/test_policy.py::test_the_prefix_stays_even_if_a_policy_protects_everything
        core/test_layout.py::test_text""",
    "Does it work with flash attention?": """
        adapters/test_implementations.py::test_a_policy_gives_what_it_gives_on_sdpa
        adapters/test_implementations.py::test_calls_without_the_cache_run_the_kernel_that_was_loaded
        cache/test_memory.py::test_observing_a_prompt_costs_chunk_times_length""",
    "Batches and padding?": """
        adapters/test_text_models.py::test_a_padded_sequence_decides_as_it_does_alone""",
    "Beam search?": """
        adapters/test_attach.py::test_beams_carry_their_decisions_along
        adapters/test_ways_to_generate.py::test_contrastive_search
        adapters/test_ways_to_generate.py::test_every_token_comes_to_the_policy""",
    "Assisted (speculative) decoding, prompt lookup, early exit?": """
        adapters/test_candidates.py
        adapters/test_ways_to_generate.py::test_what_goes_past_the_policy_is_refused""",
    "Several turns?": """
        adapters/test_ways_to_generate.py::test_a_second_turn_that_begins_with_the_first
        adapters/test_ways_to_generate.py::test_a_used_cache_and_another_prompt
        cache/test_cache_contract.py::test_a_cache_that_was_reset_is_as_new""",
    "Quantised caches?": """
        adapters/test_contexts.py::test_weights_in_eight_bits""",
    "Why do my tokens differ from the full cache's although everything fits?": """
        adapters/test_attach.py::test_logits_equal_the_full_cache_step_by_step""",
    "Why do they differ from another library's for the same policy?": """
        core/test_budget.py::test_arithmetic_is_what_pyramidkv_says""",
    "Can heads or layers have different budgets?": """
        core/test_budget.py::test_schedules_share_out_exactly
        lab/test_calibrate.py::test_a_file_is_a_schedule_for_any_policy_and_for_the_command_line""",
    "`torch.compile`?": """
        adapters/test_compile.py::test_one_graph_for_whole_images
        adapters/test_compile.py::test_every_policy_decides_as_it_does_without""",
    "GPU?": """
        ops/test_kernels.py""",
    "Which models?": """
        adapters/test_sweep.py
        adapters/test_text_models.py::test_a_model_that_cannot_be_served_is_refused_by_name_and_reason""",
    "Serving engines with a paged cache?": """
        project/test_install.py::test_core_alone_attends""",
    "Does it patch my model or transformers?": """
        project/test_install.py::test_importing_changes_nothing_in_transformers
        adapters/test_attach.py::test_the_model_is_as_it_was_after_the_block
        adapters/test_ways_to_generate.py::test_the_object_has_its_own_methods_again
        adapters/test_own_attention.py::test_other_calls_and_the_object_are_as_before
        adapters/test_llamagen.py::test_the_official_object_is_as_it_was_after_the_block""",
    "One prompt, many continuations?": """
        cache/test_copies.py::test_one_prefix_for_many_continuations
        cache/test_copies.py::test_a_prompt_is_cached_once_and_copied_for_each_continuation
        cache/test_copies.py::test_copies_go_on_as_the_original""",
    "After Ctrl-C, or any other exception?": """
        cache/test_interruption.py::test_at_every_line""",
    "Training through it?": """
        cache/test_odd_contexts.py::test_gradients_go_through_one_call
        cache/test_odd_contexts.py::test_gradients_through_several_calls_are_refused_at_the_second""",
}
NAMED = sorted({name for names in HELD.values() for name in names.split()})


def test_every_question_is_held_and_no_other():
    assert sorted(HELD) == sorted(QUESTIONS)


@pytest.mark.parametrize("named", NAMED)
def test_a_named_test_exists(named):
    file, _, name = named.partition("::")
    text = (TESTS / file).read_text(encoding="utf-8")
    assert re.search(rf"\bdef {name or 'test_'}", text)
