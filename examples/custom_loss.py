"""A loss of your own: any expression over the log-probs of the two completions.

Here a margin that grows with the length difference. Fused log-probs are ordinary tensors with
gradients, so nothing has to be registered. Run: python examples/custom_loss.py
"""

import fusedpo
import torch
import torch.nn.functional as F


def length_aware_loss(
    policy: fusedpo.PairLogps, reference: fusedpo.PairLogps, beta: float = 0.1, rate: float = 0.02
) -> torch.Tensor:
    """-log sigmoid(beta * delta - rate * (|y_c| - |y_r|)), mean over pairs."""
    delta = (policy.chosen - reference.chosen) - (policy.rejected - reference.rejected)
    surplus = policy.chosen_lengths - policy.rejected_lengths
    return -F.logsigmoid(beta * delta - rate * surplus).mean()


def main() -> None:
    torch.manual_seed(0)
    pairs, positions, hidden_size, vocabulary = 4, 12, 32, 1000
    hidden = torch.randn(2 * pairs, positions, hidden_size, requires_grad=True)
    weight = torch.randn(vocabulary, hidden_size) / hidden_size**0.5
    labels = torch.randint(0, vocabulary, (2 * pairs, positions))
    labels[:, :5] = -100  # the prompt
    policy = fusedpo.linear_token_logps(hidden, weight, labels).logps
    reference = fusedpo.linear_token_logps(hidden.detach() * 0.9, weight, labels).logps
    mask = labels != -100
    loss = length_aware_loss(fusedpo.pair_logps(policy, mask), fusedpo.pair_logps(reference, mask))
    loss.backward()
    print(f"loss {loss.item():.4f}, gradient norm {hidden.grad.norm().item():.4f}")


if __name__ == "__main__":
    main()
