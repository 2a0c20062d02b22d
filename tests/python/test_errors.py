"""Bad arguments: which exception, and a message that says what must hold and what it got."""

from __future__ import annotations

import fusedpo
import pytest
import torch
from fusedpo import reference
from logps_cases import METRICS

LOGITS = torch.zeros(4, 6, 10)
HIDDEN, WEIGHT, BIAS = torch.zeros(4, 6, 8), torch.zeros(10, 8), torch.zeros(10)
LABELS = torch.zeros(4, 6, dtype=torch.int64)
LORA = (torch.zeros(2, 8), torch.zeros(10, 2), 1.0)
LOGPS, MASK = torch.zeros(4, 6), torch.ones(4, 6, dtype=torch.int64)

TOKEN = {"logits": LOGITS, "labels": LABELS}
LINEAR = {"hidden": HIDDEN, "weight": WEIGHT, "labels": LABELS}
PAIR = {"logps": LOGPS, "completion_mask": MASK}

# (the function, what is changed in a good call, the exception, what the message must hold)
TOKEN_CASES = [
    (
        {"labels": LABELS[:, :-1]},
        ValueError,
        [
            r"labels must have shape \[4, 6\] to match logits",
            r"got \[4, 5\]",
            "Shift labels before",
        ],
    ),
    (
        {"labels": LABELS.view(6, 4)},
        ValueError,
        [r"labels must have shape \[4, 6\]", r"got \[6, 4\]"],
    ),
    ({"labels": LABELS.view(-1)}, ValueError, [r"labels must have shape \[4, 6\]", r"got \[24\]"]),
    (
        {"labels": LABELS.int()},
        TypeError,
        ["labels must be int64", "got torch.int32", r"labels\.long\(\)"],
    ),
    ({"labels": LABELS.float()}, TypeError, ["labels must be int64", "got torch.float32"]),
    ({"labels": [[0] * 6] * 4}, TypeError, ["labels must be a torch.Tensor", "got list"]),
    (
        {"labels": LABELS.to("meta")},
        ValueError,
        ["labels must be on the device of logits, cpu", "got meta"],
    ),
    (
        {"logits": LOGITS.int()},
        TypeError,
        ["logits must be float64, float32, bfloat16 or float16", "got torch.int32"],
    ),
    (
        {"logits": LOGITS.to(torch.complex64)},
        TypeError,
        ["logits must be float64", "got torch.complex64"],
    ),
    (
        {"logits": LOGITS.to(torch.float8_e4m3fn)},
        TypeError,
        ["logits must be float64", "float8_e4m3fn"],
    ),
    (
        {"logits": LOGITS[..., :0]},
        ValueError,
        [r"logits must have shape \[\.\.\., V\] with V >= 1", r"got \[4, 6, 0\]"],
    ),
    (
        {"logits": torch.zeros(())},
        ValueError,
        [r"logits must have shape \[\.\.\., V\]", r"got \[\]"],
    ),
    ({"logits": LOGITS.numpy()}, TypeError, ["logits must be a torch.Tensor", "got ndarray"]),
]
LINEAR_CASES = [
    (
        {"labels": LABELS[:, 1:]},
        ValueError,
        [
            r"labels must have shape \[4, 6\] to match hidden \[4, 6, 8\]",
            r"got \[4, 5\]",
            "Shift labels before",
        ],
    ),
    ({"labels": LABELS.to(torch.int16)}, TypeError, ["labels must be int64", "got torch.int16"]),
    (
        {"labels": LABELS.to("meta")},
        ValueError,
        ["labels must be on the device of hidden, cpu", "got meta"],
    ),
    (
        {"weight": WEIGHT.t()},
        ValueError,
        [r"weight must have shape \[V, 8\]", r"got \[8, 10\]", "untransposed"],
    ),
    ({"weight": WEIGHT[0]}, ValueError, [r"weight must have shape \[V, 8\]", r"got \[8\]"]),
    ({"weight": WEIGHT[:0]}, ValueError, [r"weight must have shape \[V, 8\]", r"got \[0, 8\]"]),
    (
        {"weight": WEIGHT.to(torch.int8)},
        TypeError,
        ["weight must be float64", "got torch.int8", "dequantised"],
    ),
    (
        {"weight": WEIGHT.bfloat16()},
        TypeError,
        ["weight must have the dtype of hidden, torch.float32", "got torch.bfloat16", "autocast"],
    ),
    (
        {"weight": WEIGHT.to("meta")},
        ValueError,
        ["weight must be on the device of hidden, cpu", "got meta"],
    ),
    ({"hidden": HIDDEN.long()}, TypeError, ["hidden must be float64", "got torch.int64"]),
    ({"hidden": torch.zeros(())}, ValueError, [r"hidden must have shape \[\.\.\., H\]", "0-d"]),
    ({"bias": BIAS[:-1]}, ValueError, [r"bias must have shape \[10\]", r"got \[9\]"]),
    (
        {"bias": BIAS.half()},
        TypeError,
        ["bias must have the dtype of hidden, torch.float32", "got torch.float16"],
    ),
    ({"bias": BIAS.long()}, TypeError, ["bias must be float64", "got torch.int64"]),
    ({"bias": 0.0}, TypeError, ["bias must be a torch.Tensor", "got float"]),
    ({"softcap": 0.0}, ValueError, ["softcap must be finite and > 0", "got 0.0", "None"]),
    ({"softcap": -30.0}, ValueError, ["softcap must be finite and > 0", "got -30.0"]),
    ({"softcap": "30"}, TypeError, ["softcap must be a Python number", "got str"]),
    ({"logit_scale": float("inf")}, ValueError, ["logit_scale must be finite", "got inf"]),
    ({"logit_scale": None}, TypeError, ["logit_scale must be a Python number", "got NoneType"]),
    (
        {"lora": (LORA[0], LORA[1])},
        TypeError,
        [r"lora must be None or a tuple \(A \[r, H\], B \[V, r\], scale\)", "got 2 entries"],
    ),
    ({"lora": LORA[0]}, TypeError, ["lora must be None or a tuple", "got Tensor"]),
    (
        {"lora": (LORA[1], LORA[0], 1.0)},
        ValueError,
        [r"lora A must have shape \[r, 8\]", r"got \[10, 2\]"],
    ),
    (
        {"lora": (LORA[0], LORA[1][:, :1], 1.0)},
        ValueError,
        [r"lora B must have shape \[10, 2\]", r"got \[10, 1\]"],
    ),
    (
        {"lora": (LORA[0].double(), LORA[1], 1.0)},
        TypeError,
        ["lora A must have the dtype of hidden", "got torch.float64"],
    ),
    (
        {"lora": (*LORA[:2], torch.ones(()))},
        TypeError,
        ["lora scale must be a Python number", "got Tensor"],
    ),
    ({"lora": (*LORA[:2], float("nan"))}, ValueError, ["lora scale must be finite", "got nan"]),
    ({"logits_budget_bytes": -1}, ValueError, ["logits_budget_bytes must be >= 0", "got -1"]),
    (
        {"logits_budget_bytes": 1e6},
        TypeError,
        ["logits_budget_bytes must be a Python int", "got float"],
    ),
]
SHARED_CASES = [
    ({"temperature": 0.0}, ValueError, ["temperature must be finite and > 0", "got 0.0"]),
    ({"temperature": -1}, ValueError, ["temperature must be finite and > 0", "got -1"]),
    ({"temperature": float("nan")}, ValueError, ["temperature must be finite and > 0", "got nan"]),
    (
        {"temperature": torch.ones(())},
        TypeError,
        ["temperature must be a Python number", "got Tensor"],
    ),
    ({"ignore_index": -100.0}, TypeError, ["ignore_index must be a Python int", "got float"]),
    (
        {"metrics": ("perplexity",)},
        ValueError,
        [f"metrics must be among {', '.join(METRICS)}", "got 'perplexity'"],
    ),
    ({"metrics": ("entropy", "Entropy")}, ValueError, ["metrics must be among", "got 'Entropy'"]),
    (
        {"metrics": "entropy"},
        TypeError,
        ["metrics must be a tuple or list", "the string 'entropy'"],
    ),
    ({"metrics": None}, TypeError, ["metrics must be a tuple or list", "got NoneType"]),
]
PAIR_CASES = [
    (
        {"logps": LOGPS[:3], "completion_mask": MASK[:3]},
        ValueError,
        [r"logps must have shape \[2B, T\]", r"got \[3, 6\]"],
    ),
    ({"logps": LOGPS[0]}, ValueError, [r"logps must have shape \[2B, T\]", r"got \[6\]"]),
    (
        {"logps": LOGPS.bfloat16()},
        TypeError,
        ["logps must be float32 or float64", "got torch.bfloat16"],
    ),
    (
        {"completion_mask": MASK[:, 1:]},
        ValueError,
        [r"completion_mask must have shape \[4, 6\]", r"got \[4, 5\]", "Shift"],
    ),
    (
        {"completion_mask": MASK.float()},
        TypeError,
        ["completion_mask must be bool or integer", "got torch.float32"],
    ),
    (
        {"completion_mask": MASK.to("meta")},
        ValueError,
        ["completion_mask must be on the device of logps", "got meta"],
    ),
    ({"ld_alpha": 1.5}, ValueError, [r"ld_alpha must be in \[0, 1\]", "got 1.5"]),
    ({"ld_alpha": "1"}, TypeError, ["ld_alpha must be a Python number", "got str"]),
]
CASES = [
    (name, {**good, **change}, error, parts)
    for name, good, cases in [
        ("token_logps", TOKEN, TOKEN_CASES + SHARED_CASES),
        ("linear_token_logps", LINEAR, LINEAR_CASES + SHARED_CASES),
        ("pair_logps", PAIR, PAIR_CASES),
    ]
    for change, error, parts in cases
]
POSITIONAL = {
    "token_logps": ("logits", "labels"),
    "linear_token_logps": ("hidden", "weight", "labels"),
    "pair_logps": ("logps", "completion_mask"),
}


def call(module, name, arguments):
    positional = [arguments[key] for key in POSITIONAL[name]]
    keywords = {k: v for k, v in arguments.items() if k not in POSITIONAL[name]}
    return getattr(module, name)(*positional, **keywords)


@pytest.mark.parametrize("module", [fusedpo, reference], ids=["public", "reference"])
@pytest.mark.parametrize(
    ("name", "good"), [("token_logps", TOKEN), ("linear_token_logps", LINEAR), ("pair_logps", PAIR)]
)
def test_the_good_call_that_the_bad_ones_vary_is_accepted(module, name, good):
    call(module, name, good)


@pytest.mark.parametrize("module", [fusedpo, reference], ids=["public", "reference"])
@pytest.mark.parametrize(
    ("name", "arguments", "error", "parts"), CASES, ids=lambda v: v if isinstance(v, str) else ""
)
def test_a_bad_argument_is_refused_with_what_it_is_what_it_got_and_what_to_do(
    module, name, arguments, error, parts
):
    with pytest.raises(error) as caught:
        call(module, name, arguments)
    for part in parts:
        assert caught.match(part)


@pytest.mark.parametrize("module", [fusedpo, reference], ids=["public", "reference"])
@pytest.mark.parametrize("name", ["inplace", "reduction"])
def test_an_unknown_argument_is_refused_by_its_name(module, name):
    for function in ("token_logps", "linear_token_logps"):
        with pytest.raises(TypeError, match=name):
            call(module, function, {**(TOKEN if function == "token_logps" else LINEAR), name: True})


def test_options_cannot_be_passed_by_position():
    with pytest.raises(TypeError, match="positional"):
        fusedpo.token_logps(LOGITS, LABELS, -100)
    with pytest.raises(TypeError, match="positional"):
        fusedpo.linear_token_logps(HIDDEN, WEIGHT, LABELS, BIAS)


def test_dtypes_that_differ_are_allowed_under_autocast_but_not_float64_with_another():
    half = {**LINEAR, "weight": WEIGHT.bfloat16(), "bias": BIAS.half()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        call(fusedpo, "linear_token_logps", half)
        with pytest.raises(
            TypeError, match=r"weight must have the dtype of hidden, torch\.float32"
        ):
            call(fusedpo, "linear_token_logps", {**LINEAR, "weight": WEIGHT.double()})


def test_a_dtensor_is_refused_with_the_way_to_gather_it(tmp_path):
    if not torch.distributed.is_available():
        pytest.skip("this build of torch has no torch.distributed, hence no DTensor")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor

    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        mesh = init_device_mesh("cpu", (1,))
        weight = distribute_tensor(torch.zeros(10, 8), mesh, [Replicate()])
        for module in (fusedpo, reference):
            with pytest.raises(
                TypeError, match=r"weight must be a plain torch\.Tensor; got a DTensor.*full_tensor"
            ):
                module.linear_token_logps(HIDDEN, weight, LABELS)
    finally:
        torch.distributed.destroy_process_group()


LOSS = {
    key: torch.zeros(3)
    for key in ("chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps")
}
LOSS_CASES = [
    ({"loss_type": "ipo_typo"}, ValueError, ["loss_type", "ipo_typo"]),
    ({"loss_type": ["sigmoid", "nope"]}, ValueError, ["loss_type", "nope"]),
    ({"loss_type": []}, ValueError, ["loss_"]),
    ({"loss_weights": [1.0, 2.0]}, ValueError, ["loss_weights", "2.0"]),
    ({"label_smoothing": 0.1}, ValueError, ["label_smoothing", "0.1"]),
    ({"cpo_alpha": 1.0}, ValueError, ["cpo_alpha", "1.0"]),
    ({"reduction": "batchmean"}, ValueError, ["reduction", "batchmean"]),
    ({"ref_chosen_logps": None}, ValueError, ["ref_chosen_logps", "zeros"]),
    ({"rejected_logps": torch.zeros(4)}, ValueError, ["rejected_logps", r"\[4\]"]),
    (
        {"chosen_logps": torch.zeros(3, dtype=torch.bfloat16)},
        TypeError,
        ["chosen_logps", "bfloat16"],
    ),
]


@pytest.mark.parametrize(("change", "error", "parts"), LOSS_CASES)
def test_a_bad_loss_argument_is_refused_by_name(change, error, parts):
    with pytest.raises(error) as caught:
        reference.preference_loss(**{**LOSS, **change})
    for part in parts:
        assert caught.match(part)
