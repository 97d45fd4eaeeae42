"""Features against features: which test runs them at once. A pair that stands nowhere has no test of its own."""

from __future__ import annotations

from pathlib import Path

FEATURES = (
    *("dropout", "frozen", "group", "checkpoint", "bias", "lora_bias", "dora", "activation", "sharding", "merging"),
    *("compile", "autocast", "16-bit", "conv1d", "strided", "few tokens", "several adapters", "backends"),
)

# By its file and name, the features that each of its cases has, or that its cases pair one by one.
TESTS: dict[str, tuple[str, ...]] = {
    "test_autograd.py::test_double_backward_of_every_frozen_set_is_right_or_refused": ("frozen", "backends"),
    "test_autograd.py::test_checkpointing_draws_the_same_mask_again": ("dropout", "checkpoint"),
    "test_branches.py::test_against_float64": ("group", "activation", "dropout", "backends", "few tokens"),
    "test_compile.py::test_autocast_mixed_dtypes_and_no_grad": ("compile", "autocast", "16-bit"),
    "test_compile.py::test_checkpointed_compiled_dropout_gives_the_same_bits": ("compile", "checkpoint", "dropout"),
    "test_compile.py::test_merged_and_disabled_layers_compile": ("compile", "merging"),
    "test_crossings.py::test_a_choice_that_is_remembered_is_no_other_request_s": ("backends", "few tokens"),
    "test_crossings.py::test_a_merged_weight_has_the_bits_of_one_rounding": ("merging", "16-bit", "lora_bias", "bias"),
    "test_crossings.py::test_a_strided_x_of_few_rows_is_as_a_whole_one": ("strided", "few tokens"),
    "test_crossings.py::test_an_fp32_bias_over_a_16_bit_base_has_a_gradient_of_fp32": ("bias", "16-bit", "backends"),
    "test_crossings.py::test_dora_s_merged_weight_has_the_bits_of_one_rounding": ("dora", "merging", "16-bit"),
    "test_crossings.py::test_the_mask_goes_on_from_chunk_to_chunk": ("dropout", "backends"),
    "test_crossings.py::test_what_is_frozen_of_one_member_changes_no_other": ("frozen", "group", "dropout", "backends"),
    "test_dora.py::test_dora_compiles_in_one_graph": ("dora", "compile"),
    "test_dora.py::test_dora_under_autocast_runs_in_its_dtype_with_norms_in_fp32": ("dora", "autocast"),
    "test_functional.py::test_autocast_casts_mixed_base_dtypes": ("autocast", "16-bit"),
    "test_functional.py::test_bias_of_another_dtype": ("bias", "16-bit"),
    "test_gradients.py::test_no_tokens": ("few tokens", "backends"),
    "test_nn_activation.py::test_a_conv1d_has_the_same": ("activation", "conv1d"),
    "test_nn_activation.py::test_dropout_acts_on_its_input_while_training": ("activation", "dropout"),
    "test_nn_activation.py::test_it_runs_under_autocast_and_compiles_in_one_graph": ("activation", "autocast"),
    "test_nn_activation.py::test_merging_and_pefts_files_are_refused_with_a_sentence": ("activation", "merging"),
    "test_nn_conv1d.py::test_a_conv1d_runs_under_autocast_and_compiles_in_one_graph": ("conv1d", "autocast"),
    "test_nn_lora_bias.py::test_it_goes_with_neither_dora_nor_gaussian_initialisation": ("lora_bias", "dora"),
    "test_nn_lora_bias.py::test_merging_adds_it_to_the_bias_and_unmerging_is_exact": ("lora_bias", "merging", "bias"),
    "test_nn_merging.py::test_merging_under_autocast_gives_the_same_bits": ("merging", "autocast"),
    "test_peft_gradients.py::test_parity_under_autocast": ("several adapters", "autocast"),
    "test_peft_shared_inputs.py::test_parity": ("several adapters", "group"),
    "test_random_problems.py::test_no_problem_fails": ("dropout", "frozen", "strided", "backends"),
    "test_shared_checkpoints.py::test_a_region_that_holds_some_layers_changes_nothing": ("group", "checkpoint"),
    "test_shared_checkpoints.py::test_any_assignment_of_layers_to_regions_is_as_alone": (
        *("group", "checkpoint", "dropout"),
    ),
    "test_shared_checkpoints.py::test_a_compiled_layer_beside_others": ("group", "checkpoint", "compile"),
    "test_shared_inputs.py::test_a_group_is_as_exact_as_its_layers": ("group", "16-bit"),
    "test_shared_inputs.py::test_dora_with_dropout_runs_alone": ("group", "dora"),
    "test_shared_inputs.py::test_those_that_can_run_in_common_do": ("group", "merging"),
    "distributed_layers.py::check_activation_checkpointing_drops_the_same_again": ("sharding", "checkpoint", "dropout"),
    "distributed_layers.py::check_dropout_on_two_dimensions_has_a_mask_for_each_part_of_x": ("sharding", "dropout"),
    "distributed_layers.py::check_merging_a_layer_under_both_plans": ("sharding", "merging"),
    "distributed_training.py::check_merging_whole_models": ("sharding", "merging"),
}


def missing() -> list[str]:
    """The tests that are named here and are not there, and what is named as a feature and is none."""
    folder, gone = Path(__file__).parent, []
    for name, features in TESTS.items():
        file, _, function = name.partition("::")
        if f"def {function}(" not in (folder / file).read_text() or not set(features) <= set(FEATURES):
            gone.append(name)
    return gone
