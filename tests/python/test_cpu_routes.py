"""Every instruction set and every bf16 GEMM route of this machine gives right results.

The environment chooses once per process, so each route runs in a process of its own.
"""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from logps_cases import needs_native, run_python

pytestmark = needs_native

ISAS = ("generic", "avx2", "avx512")
GEMMS = ("native", "widened")

SCRIPT = """
import json
import torch
import fusedpo
from fusedpo import reference
from logps_cases import DTYPES, METRICS, make_head, make_labels, make_logits
from test_linear_logps import assert_near, call, loss_of
from test_token_logps import CLOSE as TOKEN

CLOSE = {**TOKEN, torch.bool: {"rtol": 0, "atol": 0}}

for dtype in DTYPES:
    for options in ({}, {"softcap": 8.0, "logit_scale": 0.4, "temperature": 0.7}):
        head = make_head(19, 24, 5003, seed=1, dtype=dtype, bias=True, rank=2, ignored=0.3)
        results = []
        for function in (fusedpo.linear_token_logps, reference.linear_token_logps):
            out, leaves = call(function, head, "hwbl", metrics=METRICS, **options)
            results.append((*out, *torch.autograd.grad(loss_of(out), leaves)))
        assert_near(*results, dtype)
    logits, labels = make_logits(9, 5003, 2, dtype), make_labels(9, 5003, 2, ignored=0.3)
    results = []
    for function, x in ((fusedpo.token_logps, logits), (reference.token_logps, logits.double())):
        x = x.clone().requires_grad_()
        out = function(x, labels, metrics=METRICS)
        (out.logps - out.entropy).sum().backward()
        results.append((*out, x.grad))
    for mine, his in zip(*results):
        torch.testing.assert_close(mine, his.to(mine.dtype), **CLOSE[mine.dtype])
print(json.dumps(json.loads(torch.ops.fusedpo.cpu_info())))
"""


def best_isa() -> str:
    return json.loads(run_python("import fusedpo, torch; print(torch.ops.fusedpo.cpu_info())"))[
        "isa"
    ]


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set_agrees_with_the_reference(isa):
    best = best_isa()
    if ISAS.index(isa) > ISAS.index(best):
        pytest.skip(f"this processor, or this build, has no {isa} kernels; its best are {best}")
    info = json.loads(run_python(SCRIPT, FUSEDPO_CPU_ISA=isa).splitlines()[-1])
    assert info["isa"] == isa


@pytest.mark.parametrize("route", GEMMS)
def test_both_ways_to_multiply_bf16_agree_with_the_reference(route):
    info = json.loads(run_python(SCRIPT, FUSEDPO_BF16_GEMM=route).splitlines()[-1])
    assert info["bf16_gemm"] == route


REFUSAL = """
import fusedpo, torch
try:
    print(fusedpo.token_logps(torch.zeros(3, 4), torch.arange(3)))
except RuntimeError as error:
    print(error)
"""


def test_an_instruction_set_that_is_not_there_is_refused_by_name():
    for isa in ("sse9", *ISAS[ISAS.index(best_isa()) + 1 :]):
        message = run_python(REFUSAL, FUSEDPO_CPU_ISA=isa)
        assert "FUSEDPO_CPU_ISA must be generic, avx2 or avx512" in message
        assert f"got {isa}" in message


def test_an_unknown_route_is_refused_by_name():
    code = """
import fusedpo, torch
try:
    fusedpo.linear_token_logps(*[torch.zeros(3, 4, dtype=torch.bfloat16)] * 2, torch.arange(3))
except RuntimeError as error:
    print(error)
"""
    assert "FUSEDPO_BF16_GEMM must be native or widened; got fast" in run_python(
        code, FUSEDPO_BF16_GEMM="fast"
    )


def test_instruction_sets_agree_with_each_other_to_rounding():
    code = """
import torch, fusedpo
from logps_cases import make_labels, make_logits
out = fusedpo.token_logps(make_logits(5, 1000, 1), make_labels(5, 1000, 1), metrics=("entropy",))
print([out.logps.tolist(), out.entropy.tolist()])
"""
    usable = ISAS[: ISAS.index(best_isa()) + 1]
    results = [torch.tensor(json.loads(run_python(code, FUSEDPO_CPU_ISA=isa))) for isa in usable]
    for one, other in itertools.pairwise(results):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
