"""DPO without any trainer. Run: python examples/hand_written_loop.py"""

import fusedpo
import torch


def train(steps: int = 30) -> list[float]:
    """Teach a tiny model one preference; return the reward margin of every step."""
    torch.manual_seed(0)
    vocabulary, size = 50, 16
    body = torch.nn.Sequential(torch.nn.Embedding(vocabulary, size), torch.nn.Linear(size, size))
    head = torch.nn.Linear(size, vocabulary, bias=False)
    optimizer = torch.optim.AdamW([*body.parameters(), *head.parameters()], lr=3e-3)

    ids = torch.randint(0, vocabulary, (8, 10))  # rows 0-3 chosen, 4-7 rejected
    labels = ids[:, 1:].masked_fill(torch.arange(1, 10) < 4, -100)  # 4 tokens of prompt

    def score() -> fusedpo.PairLogps:
        tokens = fusedpo.linear_token_logps(body(ids[:, :-1]), head.weight, labels)
        return fusedpo.pair_logps(tokens.logps, labels != -100)

    with torch.no_grad():
        reference = score()
    margins = []
    for _ in range(steps):
        policy = score()
        result = fusedpo.preference_loss(*policy[:2], *reference[:2], beta=0.1)
        optimizer.zero_grad()
        result.loss.backward()
        optimizer.step()
        margins.append(result.margins.mean().item())
    return margins


if __name__ == "__main__":
    print("mean reward margin:", " ".join(f"{margin:.2f}" for margin in train()[::5]))
