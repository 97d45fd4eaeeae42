"""Features against features: for each pair the tests that run both at once, or the reason why it cannot go wrong.

``python tests/crossings.py`` prints the table.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations
from pathlib import Path

# "bias": one that trains; "frozen": an adapter's part, or x, that does not; "sharding": by torch's plans or FSDP2;
# "backends": each of them; "several adapters": active at once, in PEFT's layers.
FEATURES = (
    *("dropout", "frozen", "group", "checkpoint", "bias", "lora_bias", "dora", "activation", "sharding", "merging"),
    *("compile", "autocast", "16-bit", "conv1d", "strided", "few tokens", "several adapters", "backends"),
)
SWITCHES = tuple(name for name in FEATURES if name not in ("sharding", "several adapters"))

Pair = tuple[str, str]
Pairs = frozenset[Pair]

# Of at most 25 words each; a test that is named shows the refusal.
REASONS: dict[Pair, str] = {
    ("lora_bias", "dora"): (
        "refused with a sentence: test_nn_lora_bias.py::test_it_goes_with_neither_dora_nor_gaussian_initialisation"
    ),
    ("dora", "activation"): "refused with a sentence: test_nn_activation.py::test_what_does_not_go_with_it",
    ("activation", "merging"): (
        "refused with a sentence: test_nn_activation.py::test_merging_and_pefts_files_are_refused_with_a_sentence"
    ),
    (
        "activation",
        "several adapters",
    ): "PEFT's adapters have no activation between A and B, so there is no such layer.",
}


def pair(one: str, other: str) -> Pair:
    """In the order of ``FEATURES``."""
    first, second = sorted((one, other), key=FEATURES.index)
    return first, second


def every(*features: str) -> Pairs:
    """All pairs among ``features``."""
    return frozenset(pair(*both) for both in combinations(features, 2))


def each(feature: str, *others: str) -> Pairs:
    """``feature`` with each of ``others``."""
    return frozenset(pair(feature, other) for other in others)


# By file and name: the pairs that a test has at once, in one of its cases at least.
TESTS: dict[str, Pairs] = {
    "test_any_two_features.py::test_it_is_as_in_plain_formulas": every(*SWITCHES) - REASONS.keys(),
    "test_autograd.py::test_checkpointing_draws_the_same_mask_again": every("dropout", "checkpoint", "backends"),
    "test_autograd.py::test_double_backward_of_every_frozen_set_is_right_or_refused": every(
        "dropout", "frozen", "backends"
    ),
    "test_branches.py::test_against_float64": every("group", "activation", "dropout", "backends", "few tokens"),
    "test_compile.py::test_checkpointed_compiled_dropout_gives_the_same_bits": (
        every("compile", "checkpoint", "dropout")
        | each("compile", "dora", "group")
        | each("checkpoint", "dora", "group")
    ),
    "test_compile.py::test_every_kind_compiles_once_for_all_sizes_and_gives_the_same_bits": each(
        *("compile", "dropout", "lora_bias", "16-bit", "autocast", "dora", "group")
    ),
    "test_compile.py::test_merged_and_disabled_layers_compile": every("compile", "merging"),
    "test_dispatch.py::test_a_checkpoint_runs_again_by_the_backend_of_its_forward": every(
        "checkpoint", "backends", "dropout"
    ),
    "test_crossings.py::test_a_merged_weight_has_the_bits_of_one_rounding": every("merging", "16-bit", "lora_bias"),
    "test_crossings.py::test_a_strided_x_of_few_rows_is_as_a_whole_one": each(
        *("strided", "few tokens", "dropout", "activation", "lora_bias", "dora")
    ),
    "test_crossings.py::test_an_fp32_bias_over_a_16_bit_base_has_a_gradient_of_fp32": every(
        "bias", "16-bit", "backends"
    ),
    "test_crossings.py::test_dora_s_merged_weight_has_the_bits_of_one_rounding": every("dora", "merging", "16-bit"),
    "test_crossings.py::test_the_mask_goes_on_from_chunk_to_chunk": every("dropout", "backends"),
    "test_crossings.py::test_what_is_frozen_of_one_member_changes_no_other": every(
        "frozen", "group", "dropout", "activation", "backends"
    ),
    "test_dora.py::test_dora_compiles_in_one_graph": every("dora", "compile"),
    "test_functional.py::test_bias_of_another_dtype": every("bias", "16-bit", "backends"),
    "test_gradients.py::test_no_tokens": every("few tokens", "dropout", "backends"),
    "test_nn_activation.py::test_a_conv1d_has_the_same": every("activation", "conv1d"),
    "test_nn_lora_bias.py::test_merging_adds_it_to_the_bias_and_unmerging_is_exact": every("lora_bias", "merging"),
    "test_nn_merging.py::test_merging_under_autocast_gives_the_same_bits": every("merging", "autocast"),
    "test_random_problems.py::test_no_problem_fails": every(
        *("dropout", "frozen", "bias", "strided", "16-bit", "few tokens", "backends")
    ),
    "test_shared_checkpoints.py::test_a_compiled_layer_beside_others": every("group", "checkpoint", "compile"),
    "test_shared_checkpoints.py::test_a_region_that_holds_some_layers_changes_nothing": every(
        "group", "checkpoint", "dropout"
    ),
    "test_shared_checkpoints.py::test_any_assignment_of_layers_to_regions_is_as_alone": every(
        "group", "checkpoint", "dropout"
    ),
    "test_shared_inputs.py::test_a_group_is_as_exact_as_its_layers": every("group", "16-bit"),
    "test_shared_inputs.py::test_those_that_can_run_in_common_do": every("group", "merging"),
    "test_peft_crossings.py::test_parity_of_two_adapters": each(
        *("several adapters", "frozen", "bias", "lora_bias", "dora", "conv1d", "few tokens", "checkpoint", "strided")
    ),
    "test_peft_crossings.py::test_parity_of_two_adapters_by_every_backend": every("several adapters", "backends"),
    "test_peft_dora.py::test_parity_in_fp32": every("several adapters", "dora", "conv1d"),
    "test_peft_fuse.py::test_it_compiles_whole_and_counting_does_not_break_it": every("several adapters", "compile"),
    "test_peft_fuse.py::test_merging_gives_pefts_bits": every("several adapters", "merging"),
    "test_peft_gradients.py::test_parity_of_fp32_adapters_over_a_bf16_base": every("several adapters", "16-bit"),
    "test_peft_gradients.py::test_parity_under_autocast": every("several adapters", "autocast"),
    "test_peft_own_path.py::test_the_bits_are_pefts_and_the_reason_is_counted": every("several adapters", "dropout"),
    "test_peft_shared_inputs.py::test_parity": every("several adapters", "group", "16-bit"),
    "distributed_crossings.py::check_a_conv1d_in_parts": every("sharding", "conv1d", "bias"),
    "distributed_crossings.py::check_a_group_in_parts": every("sharding", "group", "bias"),
    "distributed_crossings.py::check_activations_are_gathered": every("sharding", "activation", "bias"),
    "distributed_crossings.py::check_autocast_in_parts": every("sharding", "autocast", "bias"),
    "distributed_crossings.py::check_checkpointed_layers_in_parts": every("sharding", "checkpoint", "bias"),
    "distributed_crossings.py::check_compiled_layers_in_parts": every("sharding", "compile", "bias"),
    "distributed_crossings.py::check_every_backend_in_parts": every("sharding", "backends", "bias"),
    "distributed_crossings.py::check_few_and_strided_tokens_in_parts": each("sharding", "few tokens", "strided"),
    "distributed_crossings.py::check_frozen_parts_stay_frozen": every("sharding", "frozen"),
    "distributed_crossings.py::check_two_adapters_of_peft_in_parts": every("sharding", "several adapters"),
    "distributed_layers.py::check_activation_checkpointing_drops_the_same_again": every(
        "sharding", "checkpoint", "dropout"
    ),
    "distributed_layers.py::check_dropout_on_two_dimensions_has_a_mask_for_each_part_of_x": every(
        "sharding", "dropout"
    ),
    "distributed_layers.py::check_merging_a_layer_under_both_plans": each(
        *("sharding", "merging", "lora_bias", "dora", "16-bit")
    ),
    "distributed_layers.py::check_outputs_and_gradients_under_both_plans": each(
        "sharding", "bias", "lora_bias", "dora", "16-bit"
    ),
    "distributed_training.py::check_merging_whole_models": every("sharding", "merging"),
}


def tests_of(wanted: Pair) -> list[str]:
    return [name for name, pairs in TESTS.items() if wanted in pairs]


def missing(names: Iterable[str]) -> list[str]:
    """Which of ``names``, file::function, are not there: files in any folder of the tests."""
    folder, gone = Path(__file__).parent, []
    for name in names:
        file, _, function = name.partition("::")
        places = list(folder.rglob(file))
        if len(places) != 1 or f"def {function}(" not in places[0].read_text(encoding="utf-8"):
            gone.append(name)
    return gone


def table() -> str:
    lines = []
    for both in combinations(FEATURES, 2):
        names = tests_of(both)
        more = f" and {len(names) - 1} more" if names[1:] else ""
        lines.append(f"{' x '.join(both)}: {REASONS[both] if both in REASONS else names[0] + more}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
