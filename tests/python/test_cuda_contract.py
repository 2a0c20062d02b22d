"""The numerical contract (docs/design.md, section 5) and the public functions once more, on a GPU.

These are the CPU's tests: the default device decides where their inputs are made. What differs on
CUDA by design, and what only a GPU has, is in test_cuda.py.
"""

from __future__ import annotations

import pytest
import test_autocast
import test_compile
import test_contract
import test_extremes
import test_linear_logps
import test_symptoms
import test_token_logps
from cuda_cases import borrowed, need_device, on_device  # noqa: F401  a fixture

need_device()
pytestmark = pytest.mark.usefixtures("on_device")

globals().update(
    borrowed(
        test_contract,
        {
            "test_a_label_out_of_range_is_named_with_its_first_position": "NaN on CUDA",
            "test_the_position_of_a_bad_label_reads_as_an_index_in_one_dimension": "NaN on CUDA",
            "test_results_are_bit_equal_from_process_to_process": "test_cuda.py has its own",
            "test_thread_count_does_not_change_the_result": "no thread count on a GPU",
        },
    )
)
globals().update(borrowed(test_extremes))
globals().update(borrowed(test_autocast))
globals().update(borrowed(test_token_logps))
globals().update(borrowed(test_linear_logps))
globals().update(borrowed(test_compile))
globals().update(
    borrowed(
        test_symptoms,
        {
            "test_a_label_that_repeats_does_not_stall_the_bf16_weight_gradient": "a CPU route",
            "test_subnormal_half_logits_survive_flushing": "flushing is the host's",
            "test_a_foreign_order_does_not_write_out_of_bounds": "checking would synchronise",
        },
    )
)
