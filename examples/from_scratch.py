"""DPO without a trainer, on one page: tokens, log-probs, a cached reference, losses, steps.

python from_scratch.py MODEL PREFERENCES.jsonl [LOSS]       rows with prompt, chosen, rejected

The reference is scored once, into the folder "refs"; run it again with another loss and nothing is
scored twice.
"""

import json
import pathlib
import sys

import fusedpo
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

LOSSES = {
    "sigmoid": {"beta": 0.1},  # DPO
    "hinge": {"beta": 0.1},  # SLiC: no pull past the margin 1 / beta
    "ipo": {"beta": 0.1},  # means per token, and a target of 1 / (2 beta)
    "cdpo": {"beta": 0.1, "label_smoothing": 0.1},  # sigmoid, where a tenth of the labels is wrong
}


def tokenize(tokenizer, row):
    """Prompt ids, and the ids of chosen and rejected, which end with the end of text."""
    prompt = tokenizer(row["prompt"])["input_ids"]
    sides = [
        tokenizer(row["prompt"] + row[side] + tokenizer.eos_token)["input_ids"][len(prompt) :]
        for side in ("chosen", "rejected")
    ]
    return prompt, *sides


def score(model, rows):
    """Log-probs of both completions of B pairs; [2B, T] inside, chosen first, for pair_logps."""
    texts = [(prompt, chosen) for prompt, chosen, _ in rows]
    texts += [(prompt, rejected) for prompt, _, rejected in rows]
    longest = max(len(prompt) + len(completion) for prompt, completion in texts)
    ids = torch.zeros(len(texts), longest, dtype=torch.int64)
    labels = torch.full_like(ids, -100)  # prompt and padding are not scored
    for row, (prompt, completion) in enumerate(texts):
        end = len(prompt) + len(completion)
        ids[row, :end] = torch.tensor(prompt + completion)
        labels[row, len(prompt) : end] = ids[row, len(prompt) : end]
    attention_mask = torch.arange(longest) < torch.tensor([[len(p) + len(c)] for p, c in texts])
    hidden = model.base_model(ids, attention_mask=attention_mask).last_hidden_state[:, :-1]
    head = model.get_output_embeddings()
    tokens = fusedpo.linear_token_logps(hidden, head.weight, labels[:, 1:], bias=head.bias)
    return fusedpo.pair_logps(tokens.logps, labels[:, 1:] != -100)


@torch.no_grad()
def cache_reference(model, name, rows, folder, batch=8):
    """A store with the log-probs of every pair under `model`; what it has is not scored again."""
    store = fusedpo.RefStore(folder, "a", identity={"model": name, "dtype": str(model.dtype)})
    new = [row for row in rows if store.missing(keys_of([row])).any()]
    with store.writer() as writer:
        for start in range(0, len(new), batch):
            part = new[start : start + batch]
            pair = score(model, part)
            writer.append(
                keys_of(part), torch.cat([pair[0], pair[1]]), torch.cat([pair[2], pair[3]])
            )
    store.refresh()
    print(f"reference: {len(rows) - len(new)} pairs were in {folder}, {len(new)} were scored")
    return store


def keys_of(rows):
    prompts = [prompt for prompt, _, _ in rows] * 2
    return fusedpo.record_keys(prompts, [row[side] for side in (1, 2) for row in rows])


def train(model, store, rows, loss_type="sigmoid", steps=30, batch=4, learning_rate=1e-5):
    """Train on batches in order; returns the loss of every step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    losses = []
    for step in range(steps):
        part = [rows[(step * batch + i) % len(rows)] for i in range(batch)]
        policy = score(model, part)
        reference = torch.from_numpy(store.lookup(keys_of(part))[1]).to(policy.chosen)
        result = fusedpo.preference_loss(
            policy.chosen,
            policy.rejected,
            *reference.chunk(2),
            loss_type=loss_type,
            chosen_lengths=policy.chosen_lengths,
            rejected_lengths=policy.rejected_lengths,
            **LOSSES[loss_type],
        )
        optimizer.zero_grad()
        result.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(result.loss.item())
        print(f"{step:4d}  loss {losses[-1]:.4f}  margin {result.margins.mean().item():.4f}")
    return losses


if __name__ == "__main__":
    model_name, data, loss_type = [*sys.argv[1:], "sigmoid"][:3]
    torch.manual_seed(0)
    policy = AutoModelForCausalLM.from_pretrained(model_name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    with pathlib.Path(data).open(encoding="utf-8") as lines:
        pairs = [tokenize(tokenizer, json.loads(line)) for line in lines]
    refs = cache_reference(policy, model_name, pairs, "refs")
    train(policy, refs, pairs, loss_type)
