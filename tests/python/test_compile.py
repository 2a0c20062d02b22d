"""torch.compile(fullgraph=True) with dynamic shapes, and opcheck of every operator."""

from __future__ import annotations

import contextlib

import fusedpo
import pytest
import torch
from logps_cases import (
    IGNORE,
    METRICS,
    assert_same_bits,
    autocast,
    generator,
    leaf,
    make_head,
    make_logits,
    needs_native,
)

pytestmark = needs_native

# "aot_eager" traces forward and backward as inductor does and then runs the operators as they are:
# the bits must agree. One test goes through inductor, whose own C++ takes long to compile.
SHAPES = [(3, 5), (2, 9), (4, 1)]


def compiled(function, backend="aot_eager"):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, dynamic=True, backend=backend)


def token_step(logits, labels):
    out = fusedpo.token_logps(logits[:, :-1], labels[:, 1:], temperature=0.8, metrics=METRICS)
    return out, (out.logps * 2 - 0.1 * out.entropy).sum()


def token_inputs(batch, length):
    logits = make_logits(batch * (length + 1), 77, seed=length).view(batch, length + 1, 77)
    labels = torch.randint(77, (batch, length + 1), generator=generator(length))
    labels[:, : length // 2] = IGNORE
    return [leaf(logits)], labels


def linear_step(hidden, weight, bias, lora_a, lora_b, labels):
    out = fusedpo.linear_token_logps(
        hidden,
        weight,
        labels,
        bias=bias,
        temperature=0.8,
        softcap=20.0,
        metrics=METRICS,
        lora=(lora_a, lora_b, 0.5),
    )
    return out, (out.logps * 2 - 0.1 * out.entropy).sum()


def linear_inputs(batch, length):
    head = make_head(batch * length, 16, 77, seed=length, bias=True, rank=2, ignored=0.3)
    hidden = head.hidden.view(batch, length, 16)
    leaves = [leaf(t) for t in (hidden, head.weight, head.bias, *head.lora[:2])]
    return leaves, head.labels.view(batch, length)


CASES = pytest.mark.parametrize(
    ("step", "inputs"),
    [(token_step, token_inputs), (linear_step, linear_inputs)],
    ids=["token_logps", "linear_token_logps"],
)


def run(step, leaves, labels, context):
    with context():
        out, loss = step(*leaves, labels)
    gradients = torch.autograd.grad(loss, leaves)
    return (*(v.detach() for v in out), *gradients)


@CASES
@pytest.mark.parametrize("context", [contextlib.nullcontext, autocast], ids=["plain", "autocast"])
def test_one_graph_with_dynamic_shapes_gives_the_bits_of_eager(step, inputs, context):
    graph = compiled(step)
    for shape in SHAPES:
        leaves, labels = inputs(*shape)
        expected = run(step, leaves, labels, context)
        assert_same_bits(run(graph, leaves, labels, context), expected)


@CASES
def test_dynamic_shapes_do_not_recompile(step, inputs):
    graph = compiled(step)
    leaves, labels = inputs(3, 5)
    run(graph, leaves, labels, contextlib.nullcontext)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for shape in [(2, 9), (5, 7)]:
            leaves, labels = inputs(*shape)
            run(graph, leaves, labels, contextlib.nullcontext)


def test_inductor_gives_the_values_of_eager():
    def step(hidden, weight, labels):
        from_hidden = fusedpo.linear_token_logps(hidden, weight, labels).logps
        return from_hidden + fusedpo.token_logps(hidden @ weight.T, labels).logps

    head = make_head(6, 16, 77, seed=5, ignored=0.3)
    results = []
    for function in (step, compiled(step, "inductor")):
        hidden, weight = leaf(head.hidden), leaf(head.weight)
        out = function(hidden, weight, head.labels)
        out.sum().backward()
        results.append((out.detach(), hidden.grad, weight.grad))
    for mine, his in zip(*results, strict=True):
        torch.testing.assert_close(mine, his, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("trained", [False, True])
def test_a_frozen_and_a_trained_head_compile(trained):
    head = make_head(10, 16, 77, seed=1, ignored=0.3)
    step = compiled(lambda h, w, y: fusedpo.linear_token_logps(h, w, y).logps)
    results = []
    for function in (step, lambda h, w, y: fusedpo.linear_token_logps(h, w, y).logps):
        hidden, weight = leaf(head.hidden), leaf(head.weight) if trained else head.weight
        function(hidden, weight, head.labels).sum().backward()
        results.append((hidden.grad, weight.grad))
    assert_same_bits(*results)


def test_the_pair_sums_compile_with_the_log_probs():
    def step(hidden, weight, labels):
        logps = fusedpo.linear_token_logps(hidden, weight, labels).logps
        return fusedpo.pair_logps(logps, labels != IGNORE, ld_alpha=0.5)

    head = make_head(24, 16, 77, seed=2, ignored=0.3)
    arguments = (head.hidden.view(4, 6, 16), head.weight, head.labels.view(4, 6))
    assert_same_bits(tuple(compiled(step)(*arguments)), tuple(step(*arguments)))


def test_a_bad_shape_is_refused_while_compiling_with_the_same_message():
    step = compiled(lambda x, y: fusedpo.token_logps(x, y).logps)
    with pytest.raises(Exception, match=r"Shift labels before the call\?"):
        step(torch.zeros(2, 5, 9), torch.zeros(2, 4, dtype=torch.int64))


# ---- opcheck: schema, fake kernels, autograd registration, dynamic-shape tracing ----------------


def token_arguments(dtype, grad):
    logits = make_logits(6, 33, seed=3, dtype=dtype).view(2, 3, 33)
    labels = torch.tensor([[0, IGNORE, 32], [5, 6, IGNORE]])
    return (leaf(logits) if grad else logits, labels, IGNORE, 0.8, 15, False)


def linear_arguments(dtype, grad, *, keep_rows=0, lora=True):
    head = make_head(6, 16, 33, seed=4, dtype=dtype, bias=True, rank=2, ignored=0.3)
    lora_hidden = head.hidden @ head.lora[0].T if lora else None
    tensors = [head.hidden, head.weight, head.bias, lora_hidden, head.lora[1] if lora else None]
    tensors = [leaf(t) if grad and t is not None else t for t in tensors]
    return (*tensors, head.labels, IGNORE, 0.8, 20.0, 1.5, 15, dtype, 16, grad, keep_rows)


def operator_calls():
    """(name, arguments) of every operator: with and without gradients, kept rows, lora, metrics."""
    ops = torch.ops.fusedpo
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        for grad in (False, True):
            yield "token_logps", token_arguments(dtype, grad)
        logits, labels, ignore_index, temperature, *_ = token_arguments(dtype, False)
        _, entropy, *_, stats = ops.token_logps(*token_arguments(dtype, False))
        g = torch.randn(labels.shape, dtype=wide)
        rest = (logits, labels, entropy, stats, ignore_index, temperature)
        yield "token_logps_backward", (g, g, *rest)
        yield "token_logps_backward", (g, None, *rest)
        yield "token_logps_backward_", (g, g, logits.clone(), *rest[1:])

        for grad, keep_rows, lora in [(False, 0, True), (True, 0, False), (True, 4, True)]:
            arguments = linear_arguments(dtype, grad, keep_rows=keep_rows, lora=lora)
            yield "linear_token_logps", arguments
            detached = [t.detach() if isinstance(t, torch.Tensor) else t for t in arguments]
            out = ops.linear_token_logps(*detached)
            _, entropy, _, _, _, stats, unit, _, kept, anchors, count = out
            tensors, labels, options = detached[:5], detached[5], detached[6:]
            g = torch.randn(labels.shape, dtype=wide)
            if unit is not None:
                yield "linear_token_logps_backward_hidden", (g, unit, labels, IGNORE, dtype)
            saved = (labels, entropy, stats, kept, anchors, count)
            needs = 31 if lora else 7
            rest = (*options[:4], *options[5:7], needs)
            yield "linear_token_logps_backward", (g, None, *tensors, *saved, *rest)
            yield "linear_token_logps_backward", (g, g, *tensors, *saved, *rest)
    yield "cpu_info", ()


def test_opcheck_passes_for_every_operator():
    checked = set()
    for name, arguments in operator_calls():
        operator = getattr(torch.ops.fusedpo, name).default
        checked.add(name)
        if name == "cpu_info":
            assert operator()  # no tensor, nothing to trace
            continue
        torch.library.opcheck(operator, arguments)
    # test_losses.py checks these.
    others = {"preference_loss", "unpaired_loss", "loss_backward", "has_empty_completion"}
    others.add("cuda_info")  # needs the CUDA operators
    assert checked | others == {op.split("::")[1] for op in registered_operators()}


def registered_operators():
    names = torch._C._dispatch_get_all_op_names()
    return [name.split(".")[0] for name in names if name.startswith("fusedpo::")]
