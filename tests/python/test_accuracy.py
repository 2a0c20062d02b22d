"""Error bounds: how far from the exact values results are, against plain torch in the same dtype.

Root mean square over at least 20 independent draws, for every output and every gradient:

    error(ours) <= 2 error(plain torch, same dtype) + 4 ulp of the result

and for bf16 and fp16 logits error(ours) <= error(log_softmax(logits.float())). The exact values are
those of the same (rounded) inputs in float64, for float64 inputs in the longest float there is.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from typing import NamedTuple

import fusedpo
import numpy as np
import pytest
import torch
from fusedpo import reference
from logps_cases import (
    DTYPES,
    generator,
    leaf,
    make_head,
    make_labels,
    make_logits,
    needs_native,
    threads,
)
from torch import Tensor

pytestmark = needs_native  # the reference is what the operators are measured with

OUTPUTS = ("logps", "entropy", "log_sum_sq_probs", "mean_logits")
# 1: a lone row; 7: fewer rows than any block; 130: several blocks and a remainder.
ROWS = (1, 7, 130)
# 2, 3: below any vector; 127, 1000: tails; 32001, 151936: real vocabularies, one odd, many tiles.
VOCABULARIES = (2, 3, 127, 1000, 32_001, 151_936)
# Features: few, because the error of a long dot product is the GEMM library's and not ours, and
# because torch multiplies half-precision matrices slowly where the processor cannot.
SIZE = 16
# How many logits the exact evaluation affords per call. Past it only four rows (two in long double)
# carry a gradient and are compared: rows do not depend on each other; the operator gets all rows.
AFFORDABLE = {torch.float64: 100_000, torch.float32: 400_000}


def seeds(rows: int, vocabulary: int) -> range:
    """20 problems; where one is large, fewer with more compared rows: at least 20 draws each."""
    logits = rows * vocabulary
    return range(20 if logits <= 500_000 else 10 if logits <= 10_000_000 else 5)


def compared_columns(labels: Tensor, vocabulary: int) -> Tensor:
    """The vocabulary entries at which the weight's gradient is compared: labels and others."""
    step = 1 if vocabulary < 2000 else 97
    return torch.cat([torch.arange(0, vocabulary, step), labels]).unique()


@pytest.fixture(autouse=True)
def _one_thread():
    """Bits do not depend on the thread count (test_contract.py); on a busy machine time does."""
    with threads(1):
        yield


class Options(NamedTuple):
    temperature: float = 1.0
    softcap: float | None = None
    logit_scale: float = 1.0
    bias: bool = False


ON, OFF = Options(0.7, 30.0, 1.3, True), Options()


class Errors:
    """Sums of squares of differences, by output name and by who computed it."""

    def __init__(self) -> None:
        self.squares: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))

    def add(self, name: str, exact: np.ndarray | Tensor, **results: Tensor) -> None:
        if isinstance(exact, Tensor):
            exact = exact.detach().double().cpu().numpy()
        for who, result in results.items():
            # numpy: the exact value may be longer than float64, and torch has nothing longer.
            difference = result.detach().double().cpu().numpy().astype(exact.dtype) - exact
            self.squares[name][who] += float(np.square(difference).sum())
        ours = results["ours"]
        info = torch.finfo(ours.dtype)
        size = np.maximum(np.abs(exact), float(info.tiny))
        ulp = np.exp2(np.floor(np.log2(size.astype(np.float64)))) * float(info.eps)
        self.squares[name]["ulp"] += float(np.square(ulp).sum())

    def check(self, context: str) -> None:
        assert self.squares
        for name, squares in self.squares.items():
            root = {who: value**0.5 for who, value in squares.items()}
            limit = 2 * root["plain"] + 4 * root["ulp"]
            assert root["ours"] <= limit, f"{context}: {name}: {root}, allowed {limit}"


def compared_rows(rows: int, vocabulary: int, dtype: torch.dtype) -> Tensor:
    if rows * vocabulary <= AFFORDABLE.get(dtype, AFFORDABLE[torch.float32]):
        return torch.arange(rows)
    some = [0, rows - 1]
    if dtype != torch.float64 or rows * vocabulary > 10_000_000:
        some += [rows // 2, rows // 2 + 1]
    return torch.tensor(sorted(set(some)))


def upstream(rows: int, compared: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Gradients of logps and entropy, zero at the rows that are not compared."""
    g = generator(seed)
    c = torch.zeros(2, rows, dtype=torch.float64)
    c[:, compared] = (
        torch.randn(2, len(compared), generator=g, dtype=torch.float64).float().double()
    )
    return c[0], c[1]


def differentiate(out, leaves: list[Tensor], c: tuple[Tensor, Tensor], entropy: bool):
    outputs = [out.logps, out.entropy] if entropy else [out.logps]
    gradients = [g.to(o.dtype) for g, o in zip(c, outputs, strict=False)]
    return torch.autograd.grad(outputs, leaves, gradients, retain_graph=True)


# ---- exact values of float64 inputs, in long double ---------------------------------------------


def exact_from_z(z: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    """z [N, V] in long double -> outputs and d logps / dz, d entropy / dz."""
    rows = np.arange(len(labels))
    shifted = z - z.max(axis=1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    p = np.exp(log_p)
    entropy = -(p * log_p).sum(axis=1)
    d_logps = -p
    d_logps[rows, labels] += 1
    return {
        "logps": log_p[rows, labels],
        "entropy": entropy,
        "log_sum_sq_probs": np.log(np.square(p).sum(axis=1)),
        "mean_logits": z.mean(axis=1),
        "d_logps": d_logps,
        "d_entropy": -p * (log_p + entropy[:, None]),
    }


def long(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy().astype(np.longdouble)


# ---- token_logps --------------------------------------------------------------------------------


def plain_token_logps(logits: Tensor, labels: Tensor, temperature: float) -> reference.TokenLogps:
    """What one writes in torch, in the dtype of the logits throughout."""
    z = logits / temperature
    log_p = z.log_softmax(-1)
    p = log_p.exp()
    return reference.TokenLogps(
        log_p.gather(-1, labels.unsqueeze(-1)).squeeze(-1),
        -(p * log_p).sum(-1),
        torch.logsumexp(2 * log_p, -1),
        z.mean(-1),
        None,
    )


def token_errors(errors: Errors, logits: Tensor, labels: Tensor, temperature: float, seed: int):
    dtype = logits.dtype
    rows = compared_rows(*logits.shape, dtype)
    c = upstream(len(logits), rows, seed)
    few_c = (c[0][rows], c[1][rows])
    ours_leaf = logits.detach().requires_grad_()
    plain_leaf, wide_leaf = leaf(logits[rows]), leaf(logits[rows])
    ours = fusedpo.token_logps(ours_leaf, labels, temperature=temperature, metrics=OUTPUTS[1:])
    plain = plain_token_logps(plain_leaf, labels[rows], temperature)
    half = dtype in (torch.bfloat16, torch.float16)
    wide = plain_token_logps(wide_leaf.float(), labels[rows], temperature) if half else None
    gradients = {
        name: {
            "ours": differentiate(ours, [ours_leaf], c, entropy)[0][rows],
            "plain": differentiate(plain, [plain_leaf], few_c, entropy)[0],
            **({"wide": differentiate(wide, [wide_leaf], few_c, entropy)[0]} if half else {}),
        }
        for name, entropy in (("logits' gradient", False), ("logits' gradient with entropy", True))
    }
    if dtype == torch.float64:
        exact = exact_from_z(
            long(logits[rows]) / np.longdouble(temperature), labels[rows].cpu().numpy()
        )
        d = [long(few_c[i])[:, None] * exact[k] for i, k in enumerate(("d_logps", "d_entropy"))]
        exact_gradients = [d[0] / temperature, (d[0] + d[1]) / temperature]
    else:
        x = leaf(logits[rows].double())
        out = reference.token_logps(x, labels[rows], temperature=temperature, metrics=OUTPUTS[1:])
        exact = out._asdict()
        exact_gradients = [differentiate(out, [x], few_c, e)[0] for e in (False, True)]
    for name in OUTPUTS:
        results = {"ours": getattr(ours, name)[rows], "plain": getattr(plain, name)}
        if half:
            results["wide"] = getattr(wide, name)
        errors.add(name, exact[name], **results)
    for (name, results), exact_gradient in zip(gradients.items(), exact_gradients, strict=True):
        errors.add(name, exact_gradient, **results)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_token_logps_is_as_exact_as_plain_torch(dtype, vocabulary, rows, temperature):
    errors = Errors()
    logits = make_logits(rows, vocabulary, seed=99, dtype=dtype)
    compared = compared_rows(rows, vocabulary, dtype)
    for seed in seeds(rows, vocabulary):
        # Fresh numbers where they are compared; drawing 20 million per seed would take longer than
        # everything else.
        logits[compared] = make_logits(len(compared), vocabulary, seed, dtype)
        token_errors(errors, logits, make_labels(rows, vocabulary, seed), temperature, seed)
    errors.check(f"{rows} x {vocabulary} {dtype}")


# Slack for a coin toss: both numbers are the same float32 but for its last bits; the gradients are
# then rounded to half precision.
COIN_TOSS = 1.02


def check_against_widened(errors: Errors) -> None:
    for name, squares in errors.squares.items():
        root = {who: value**0.5 for who, value in squares.items()}
        limit = COIN_TOSS * root["wide"]
        assert root["ours"] <= limit, f"{name}: {root}, allowed {limit}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_half_precision_logits_lose_nothing_against_widening_them_first(dtype, vocabulary):
    errors = Errors()
    rows = 130 if vocabulary < 10_000 else 4
    for seed in range(20):
        logits = make_logits(rows, vocabulary, seed, dtype)
        token_errors(errors, logits, make_labels(rows, vocabulary, seed), 1.0, seed)
    check_against_widened(errors)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_a_target_50_nats_below_the_maximum_is_as_exact_as_any(dtype, vocabulary):
    errors = Errors()
    for seed in range(20):
        logits = make_logits(4, vocabulary, seed, torch.float64)
        labels = logits.argmin(-1)
        best = logits.max(-1).values
        logits = logits.scatter(1, labels.unsqueeze(1), (best - 50).unsqueeze(1)).to(dtype)
        token_errors(errors, logits, labels, 1.0, seed)
    errors.check(f"{vocabulary} {dtype}")
    if dtype in (torch.bfloat16, torch.float16):
        check_against_widened(errors)


# ---- linear_token_logps -------------------------------------------------------------------------


class Problem(NamedTuple):
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor

    def at(self, rows: Tensor) -> Problem:
        return self._replace(hidden=self.hidden[rows], labels=self.labels[rows])

    def leaves(self, dtype: torch.dtype) -> tuple[Problem, list[Tensor]]:
        grown = [leaf(t.to(dtype)) for t in self[:3] if t is not None]
        bias = grown[2] if self.bias is not None else None
        return Problem(grown[0], grown[1], bias, self.labels), grown


def score(function, problem: Problem, options: Options, metrics=OUTPUTS[1:], **more):
    return function(
        problem.hidden,
        problem.weight,
        problem.labels,
        bias=problem.bias,
        temperature=options.temperature,
        softcap=options.softcap,
        logit_scale=options.logit_scale,
        metrics=metrics,
        **more,
    )


def exact_head(problem: Problem, options: Options, c: tuple[Tensor, Tensor], columns: Tensor):
    """Outputs and the gradients (hidden, weight, bias) without and with entropy, in long double.

    No matrix product: numpy's takes ten times as long as these loops where BLAS does not help.
    """
    x, w = long(problem.hidden), long(problem.weight)
    w_columns = list(np.ascontiguousarray(w.T))
    y = sum(np.outer(x[:, k], column) for k, column in enumerate(w_columns))
    if problem.bias is not None:
        y = y + long(problem.bias)
    slope = np.longdouble(options.logit_scale) / np.longdouble(options.temperature)
    z = options.logit_scale * y
    if options.softcap is not None:
        tanh = np.tanh(z / options.softcap)
        z, slope = options.softcap * tanh, slope * (1 - np.square(tanh))
    exact = exact_from_z(z / np.longdouble(options.temperature), problem.labels.cpu().numpy())
    gradients = []
    total = 0
    for upstream_gradient, name in zip(c, ("d_logps", "d_entropy"), strict=True):
        total = total + long(upstream_gradient)[:, None] * exact[name] * slope
        at_hidden = np.stack([(total * column).sum(axis=1) for column in w_columns], axis=1)
        at_weight = sum(np.outer(row, x[i]) for i, row in enumerate(total[:, columns]))
        gradients.append([at_hidden, at_weight, total[:, columns].sum(axis=0)])
    return exact, gradients


def linear_errors(errors: Errors, problem: Problem, options: Options, seed: int) -> None:
    dtype = problem.hidden.dtype
    rows = compared_rows(len(problem.labels), len(problem.weight), dtype)
    c = upstream(len(problem.labels), rows, seed)
    few, few_c = problem.at(rows), (c[0][rows], c[1][rows])
    columns = compared_columns(few.labels, len(problem.weight))
    if dtype == torch.float64:
        exact, exact_gradients = exact_head(few, options, few_c, columns)
    else:
        grown, leaves = few.leaves(torch.float64)
        out = score(reference.linear_token_logps, grown, options)
        exact = out._asdict()
        exact_gradients = [
            [
                g if i == 0 else g[columns]
                for i, g in enumerate(differentiate(out, leaves, few_c, e))
            ]
            for e in (False, True)
        ]
    # "Plain torch in the same dtype": F.linear in that dtype, everything behind it in float32.
    grown, leaves = few.leaves(dtype)
    plain = score(reference.linear_token_logps, grown, options)
    plain_gradients = [differentiate(plain, leaves, few_c, entropy) for entropy in (False, True)]

    # The head trained: with the logits kept, with them recomputed, with the entropy's gradient.
    grown, leaves = problem.leaves(dtype)
    trained = score(fusedpo.linear_token_logps, grown, options)
    recomputing = score(fusedpo.linear_token_logps, grown, options, (), logits_budget_bytes=0)
    # The head frozen.
    hidden = leaf(problem.hidden)
    frozen = score(fusedpo.linear_token_logps, problem._replace(hidden=hidden), options, ())
    for name in OUTPUTS:
        errors.add(name, exact[name], ours=getattr(trained, name)[rows], plain=getattr(plain, name))
    ways = {
        "kept": (0, differentiate(trained, leaves, c, False)),
        "recomputed": (0, differentiate(recomputing, leaves, c, False)),
        "with entropy": (1, differentiate(trained, leaves, c, True)),
        "frozen": (0, differentiate(frozen, [hidden], c, False)),
    }
    for way, (which, ours) in ways.items():
        for index, gradient in enumerate(ours):
            name = ("hidden", "weight", "bias")[index]
            at = rows if index == 0 else columns
            plain_gradient = plain_gradients[which][index]
            errors.add(
                f"{name}'s gradient, {way}",
                exact_gradients[which][index],
                ours=gradient[at],
                plain=plain_gradient if index == 0 else plain_gradient[at],
            )


def make_problem(rows: int, vocabulary: int, seed: int, dtype: torch.dtype, bias: bool) -> Problem:
    head = make_head(rows, SIZE, vocabulary, seed, dtype, bias=bias)
    return Problem(head.hidden, head.weight, head.bias, head.labels)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("options", [OFF, ON], ids=["off", "on"])
def test_linear_token_logps_is_as_exact_as_plain_torch(dtype, vocabulary, rows, options):
    errors = Errors()
    for seed in seeds(rows, vocabulary):
        problem = make_problem(rows, vocabulary, seed, dtype, options.bias)
        linear_errors(errors, problem, options, seed)
    errors.check(f"{rows} x {vocabulary} {dtype}")


# All sixteen combinations, where they are cheap; the grid above has all of them off and all on.
COMBINATIONS = [
    Options(*values)
    for values in itertools.product((1.0, 0.7), (None, 30.0), (1.0, 1.3), (False, True))
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", COMBINATIONS, ids=lambda o: "-".join(map(str, o)))
def test_every_combination_of_options_is_as_exact_as_plain_torch(dtype, options):
    errors = Errors()
    for seed in range(20):
        problem = make_problem(7, 127, seed, dtype, options.bias)
        linear_errors(errors, problem, options, seed)
    errors.check(f"{options} {dtype}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", [2, 127, 32_001])
def test_a_target_50_nats_below_the_maximum_is_as_exact_behind_a_head(dtype, vocabulary):
    errors = Errors()
    for seed in range(20):
        problem = make_problem(4, vocabulary, seed, torch.float64, False)
        z = problem.hidden @ problem.weight.T
        best, worst = z.max(-1).values, z.min(-1)
        hidden = problem.hidden * (50 / (best - worst.values)).unsqueeze(1)
        problem = Problem(hidden.to(dtype), problem.weight.to(dtype), None, worst.indices)
        linear_errors(errors, problem, OFF, seed)
    errors.check(f"{vocabulary} {dtype}")


# ---- no rows ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_no_rows_give_empty_results_and_exact_zeros(dtype, vocabulary):
    problem = make_problem(0, vocabulary, 0, dtype, bias=True)
    grown, leaves = problem.leaves(dtype)
    logits = leaf(torch.zeros(0, vocabulary, dtype=dtype))
    linear = score(fusedpo.linear_token_logps, grown, ON)
    token = fusedpo.token_logps(logits, problem.labels, metrics=OUTPUTS[1:])
    for out, inputs in ((linear, leaves), (token, [logits])):
        assert all(getattr(out, name).shape == (0,) for name in OUTPUTS)
        for gradient, tensor in zip(
            torch.autograd.grad((out.logps + out.entropy).sum(), inputs), inputs, strict=True
        ):
            assert gradient.shape == tensor.shape
            assert not gradient.any()
