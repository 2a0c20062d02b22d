"""Large results on a CPU lie in pages that a step hands on to the next (csrc/cpu/page_pool.h).

Nobody may see that: not the values, not who holds them, not what can be done with them.
"""

from __future__ import annotations

import copy
import io
import mmap
import pathlib
import sys

import fusedpo
import pytest
import torch
from logps_cases import needs_native, run_python

TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])


def system_keeps_pages() -> bool:
    """Asked of the system, not of the pool: a pool that keeps nothing must fail, not skip."""
    if not sys.platform.startswith("linux"):
        return False
    with mmap.mmap(-1, 1 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as page:
        try:
            page.madvise(mmap.MADV_FREE)
        except OSError:
            return False
    return True


pytestmark = [
    needs_native,
    pytest.mark.skipif(not system_keeps_pages(), reason="the system has no MADV_FREE"),
    pytest.mark.skipif(TORCH < (2, 11), reason="torch before 2.11 takes no memory from others"),
]

# The weight's gradient and what backward keeps, 6.4 MB each, take each other's pages.
N, H, V = 80, 80, 20_000
HUGE_PAGE = 2 << 20


@pytest.fixture
def leaves() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(N, H, requires_grad=True)
    weight = (torch.randn(V, H) / 8).requires_grad_()
    return hidden, weight, torch.randint(V, (N,))


def gradients(leaves) -> tuple[torch.Tensor, torch.Tensor]:
    hidden, weight, labels = leaves
    loss = fusedpo.linear_token_logps(hidden, weight, labels).logps.sum()
    return torch.autograd.grad(loss, (hidden, weight))


def test_the_next_step_takes_the_pages_of_the_last(leaves):
    known = {gradients(leaves)[1].data_ptr() for _ in range(8)}
    assert len(known) <= 4  # what backward kept may have changed places with the gradient
    assert all(address % HUGE_PAGE == 0 for address in known)


def test_what_the_last_step_left_in_its_pages_reaches_no_result(leaves):
    expected = [gradient.clone() for gradient in gradients(leaves)]
    for left in (float("nan"), float("inf"), -1.0):
        for gradient in gradients(leaves):
            gradient.fill_(left)
        del gradient
        for mine, his in zip(gradients(leaves), expected, strict=True):
            assert torch.equal(mine, his)


def test_logits_gradients_come_out_the_same_from_used_pages():
    logits = torch.randn(N, V, requires_grad=True)
    labels = torch.randint(V, (N,))
    labels[::3] = -100  # rows that must be written as zero

    def gradient() -> torch.Tensor:
        return torch.autograd.grad(fusedpo.token_logps(logits, labels).logps.sum(), logits)[0]

    expected = gradient().clone()
    gradient().fill_(float("nan"))
    assert torch.equal(gradient(), expected)


def test_a_gradient_that_is_held_is_left_alone(leaves):
    held = [gradients(leaves)[1] for _ in range(4)]
    before = [gradient.clone() for gradient in held]
    assert len({gradient.data_ptr() for gradient in held}) == 4
    for _ in range(3):
        gradients(leaves)[1].fill_(float("nan"))
    for mine, his in zip(held, before, strict=True):
        assert torch.equal(mine, his)


def test_a_view_keeps_the_pages_alive(leaves):
    rows = gradients(leaves)[1][5:7]
    before = rows.clone()
    for _ in range(3):
        gradients(leaves)[1].fill_(float("nan"))
    assert torch.equal(rows, before)


def test_accumulating_and_an_optimizer_work_on_them(leaves):
    hidden, weight, labels = leaves
    optimizer = torch.optim.AdamW([hidden, weight], lr=1e-3)
    single = gradients(leaves)[1].clone()
    for step in range(3):
        optimizer.zero_grad(set_to_none=step != 1)
        for _ in range(2):
            fusedpo.linear_token_logps(hidden, weight, labels).logps.sum().backward()
        if step == 0:
            assert torch.equal(weight.grad, 2 * single)
        optimizer.step()
    assert weight.isfinite().all()


def test_they_can_be_copied_saved_and_shared_like_any_tensor(leaves):
    gradient = gradients(leaves)[1]
    expected = gradient.clone()
    assert gradient.device == leaves[1].device
    assert gradient.is_contiguous()
    assert gradient.storage_offset() == 0
    assert torch.equal(copy.deepcopy(gradient), expected)
    file = io.BytesIO()
    torch.save(gradient, file)
    file.seek(0)
    assert torch.equal(torch.load(file), expected)
    assert (gradient.numpy() == expected.numpy()).all()
    assert torch.equal(gradient.share_memory_(), expected)


def test_returned_pages_are_free_for_the_kernel_to_take(leaves):
    def lazily_free() -> int:
        rollup = pathlib.Path("/proc/self/smaps_rollup").read_text(encoding="ascii")
        lines = [line for line in rollup.splitlines() if line.startswith("LazyFree:")]
        if not lines:
            pytest.skip("smaps_rollup does not say what is free")
        return int(lines[0].split()[1]) * 1024

    held = gradients(leaves)
    before = lazily_free()
    del held
    assert lazily_free() - before >= 0.9 * V * H * 4


def test_the_pool_can_be_turned_off():
    script = f"""
import torch, fusedpo
logits = torch.randn({N}, {V}, requires_grad=True)
loss = fusedpo.token_logps(logits, torch.zeros({N}, dtype=torch.long)).logps.sum()
print(torch.autograd.grad(loss, logits)[0].data_ptr() % {HUGE_PAGE})
"""
    assert run_python(script, FUSEDPO_PAGE_POOL="on").strip() == "0"
    assert run_python(script, FUSEDPO_PAGE_POOL="off").strip() != "0"
    with pytest.raises(AssertionError, match="FUSEDPO_PAGE_POOL must be on or off; got maybe"):
        run_python(script, FUSEDPO_PAGE_POOL="maybe")


def test_storage_cannot_grow_and_says_so(leaves):
    gradient = gradients(leaves)[1]
    with pytest.raises(RuntimeError, match="not resizable"):
        gradient.resize_(2 * V, H)
