"""A packed row against padded rows: precision, and pairs that know nothing of each other."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("trl", reason="the fused head needs TRL")

import transformers
from fusedpo._head import add_fused_head
from fusedpo._packing.attention import use_packed_attention
from fusedpo._packing.layout import Group, pack
from packing_helpers import (
    LENGTHS,
    VOCABULARY,
    assert_equal_gradients,
    backward,
    make_groups,
    packed_logps,
    padded_logps,
    relative_difference,
    summed,
)
from trl_helpers import one_thread  # noqa: F401  a fixture

pytestmark = [pytest.mark.trl, pytest.mark.usefixtures("one_thread")]


def make_llama(dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """Grouped-query attention, and logits of several nats."""
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,
        **options,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype)
    add_fused_head(model)
    use_packed_attention(model)
    return model


@pytest.fixture(scope="module")
def llama() -> Any:
    return make_llama()


def test_a_row_without_a_token_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one token"):
        pack(make_groups([(0, [0, 0])]))


def test_sgd_steps_stay_together(llama: Any) -> None:
    models = copy.deepcopy(llama), copy.deepcopy(llama)
    before = summed(packed_logps(llama, make_groups()))
    for step in range(3):
        gradients = []
        for model, logps in zip(models, (packed_logps, padded_logps), strict=True):
            gradients.append(backward(logps(model, make_groups(seed=step)), model))
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter -= 1e-3 * parameter.grad
        assert_equal_gradients(*gradients)
    after = [summed(packed_logps(model, make_groups())) for model in models]
    moved = (after[1] - before).norm()
    assert moved > 0.1 * before.norm()
    assert (after[0] - after[1]).norm() <= 1e-5 * moved


def test_bf16_is_as_close_to_fp64_as_padded_rows_are() -> None:
    model = make_llama(torch.bfloat16)
    exact = make_llama(torch.bfloat16).double()
    lengths = [(9, (12, 7)), (4, (15, 6)), (14, (3, 10)), (1, (8, 8))]
    squares = torch.zeros(2, dtype=torch.float64)
    with torch.no_grad():
        for seed in range(40):
            groups = make_groups(lengths, seed)
            truth = summed(padded_logps(exact, groups))
            for i, logps in enumerate((packed_logps, padded_logps)):
                squares[i] += ((summed(logps(model, groups)) - truth) ** 2).sum()
    packed, padded = squares.sqrt().tolist()
    assert padded > 0
    print(f"rms distance from fp64: packed {packed:.4f}, padded {padded:.4f}")
    assert packed <= 1.1 * padded


# Pairs among themselves ---------------------------------------------------------------------------


def test_tokens_of_another_pair_change_nothing_to_the_bit(llama: Any) -> None:
    groups, others = make_groups(seed=0), make_groups(seed=1)
    with torch.no_grad():
        before = packed_logps(llama, groups)
        after = packed_logps(llama, [groups[0], *others[1:3], groups[3], *others[4:]])
    kept = [0, 1, 6]  # the completions of groups 0 and 3
    for i in kept:
        assert torch.equal(before[i], after[i])
    assert not torch.equal(before[5], after[5])


def test_gradient_for_the_embeddings_of_another_pair_is_exactly_zero(llama: Any) -> None:
    groups = make_groups()
    seen = []

    def keep(module: Any, arguments: Any, output: torch.Tensor) -> None:
        output.retain_grad()
        seen.append(output)

    handle = llama.model.embed_tokens.register_forward_hook(keep)
    logps = packed_logps(llama, groups)
    handle.remove()
    sum(each.sum() for each in logps[4:6]).backward()  # group 2
    gradient = seen[0].grad[0].abs().sum(-1)
    sizes = [len(prompt) + sum(map(len, completions)) for prompt, completions, _ in groups]
    start, end = sum(sizes[:2]), sum(sizes[:3])
    assert not gradient[:start].any()
    assert not gradient[end:].any()
    assert gradient[start : end - 1].all()  # the last token of a completion predicts nothing


def test_one_completion_does_not_see_the_other(llama: Any) -> None:
    (prompt, (chosen, rejected), _), *_ = make_groups([(6, (5, 7))])
    with torch.no_grad():
        both = packed_logps(llama, [Group(prompt, [chosen, rejected])])
        changed = packed_logps(llama, [Group(prompt, [rejected[:5], rejected])])
        swapped = packed_logps(llama, [Group(prompt, [rejected, chosen])])
    assert torch.equal(both[1], changed[1])
    torch.testing.assert_close(swapped[0], both[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(swapped[1], both[0], rtol=1e-5, atol=1e-5)


def test_permuted_groups_give_permuted_results(llama: Any) -> None:
    groups = make_groups()
    order = [4, 0, 5, 2, 1, 3]
    with torch.no_grad():
        straight, permuted = (
            packed_logps(llama, groups),
            packed_logps(llama, [groups[i] for i in order]),
        )
    starts = np.cumsum([0, *(len(completions) for _, completions in LENGTHS)])
    want = [straight[j] for i in order for j in range(starts[i], starts[i + 1])]
    for one, other in zip(permuted, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


# How the layout travels ---------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_recomputes_with_the_same_layout(reentrant: bool) -> None:
    model = make_llama().train()
    groups = make_groups()
    want = backward(packed_logps(model, groups), model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()  # what reentrant checkpointing needs
    logps = packed_logps(model, groups)
    # Another forward before the backward: its layout must not be the one that is recomputed with.
    packed_logps(model, make_groups([(3, (4, 5))], seed=1))
    assert relative_difference(backward(logps, model), want) < 1e-6


def test_threads_do_not_take_each_others_layout(llama: Any) -> None:
    # Of equally many tokens, so that a layout taken from the other fits.
    batches = [make_groups(), make_groups([(3, (20, 12)), (8, (4, 30))], seed=1)]
    assert len({pack(groups).input_ids.shape for groups in batches}) == 1
    with torch.no_grad():
        want = [packed_logps(llama, groups) for groups in batches]

    def work(i: int) -> None:
        with torch.no_grad():
            for _ in range(10):
                got = packed_logps(llama, batches[i])
                assert all(torch.equal(a, b) for a, b in zip(got, want[i], strict=True))

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(work, range(2)))  # raises what a thread has raised


def test_compiled_model_gives_the_same_without_compiling_for_each_layout() -> None:
    model = make_llama()
    batches = [make_groups(seed=seed, lengths=LENGTHS[seed:]) for seed in range(4)]
    want = [packed_logps(model, groups) for groups in batches]
    gradient = backward(want[0], model)
    graphs: list[Any] = []

    def backend(graph: Any, example_inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend)
    counts = []
    for groups, logps in zip(batches, want, strict=True):
        got = packed_logps(compiled, groups)
        assert all(torch.equal(a, b) for a, b in zip(got, logps, strict=True))
        counts.append(len(graphs))
    assert relative_difference(backward(packed_logps(compiled, batches[0]), model), gradient) < 1e-6
    # The second layout makes the sizes dynamic; later ones find everything compiled.
    assert counts[0] > 0
    assert counts[3] == counts[1]
    torch._dynamo.reset()
