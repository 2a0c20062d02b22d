"""Sampling with a stream of random numbers for every sample.

`generate` with `do_sample=True` draws a whole batch from torch's one generator: a sample then
depends on its neighbours and on the size of the batch. Here the noise is added to the scores first,
and the likeliest token is taken (the Gumbel-max trick): argmax(log p_v - log e_v) with independent
exponential e_v is distributed as p. The e_v of a sample come from a generator of its own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How to sample, checked; the fields are those of `fusedpo.tools.generate.generate`.

    >>> Sampling(temperature=-1.0)
    Traceback (most recent call last):
    ValueError: temperature must be 0 (greedy) or more; got -1.0.
    """

    n: int = 1
    max_new_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    seed: int = 0
    batch_size: int = 8

    def __post_init__(self) -> None:
        for name in ("n", "max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}.")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be 0 (greedy) or more; got {self.temperature}.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1; got {self.top_p}.")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, or None for all; got {self.top_k}.")
        if self.temperature == 0 and self.n > 1:
            raise ValueError(
                f"n must be 1 with temperature 0, where all samples are the same; got {self.n}."
            )

    def processors(self, seeds: Sequence[int]) -> Any:
        """Return what turns the scores of a batch into those whose maximum is the sample.

        Args:
            seeds: one for each row of the batch, from `stream_seed`.
        """
        from transformers.generation import logits_process as steps

        processors = steps.LogitsProcessorList()
        if self.temperature == 0:
            return processors
        if self.temperature != 1:
            processors.append(steps.TemperatureLogitsWarper(self.temperature))
        if self.top_k is not None:
            processors.append(steps.TopKLogitsWarper(self.top_k))
        if self.top_p < 1:
            processors.append(steps.TopPLogitsWarper(self.top_p))
        processors.append(OwnStreams(seeds))
        return processors


class OwnStreams:
    """Adds the noise of each row's own stream to its scores (a transformers `LogitsProcessor`)."""

    def __init__(self, seeds: Sequence[int]) -> None:
        self._seeds = seeds
        self._generators: list[torch.Generator] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores [rows, V] with noise; one call for each new token."""
        if not self._generators:
            self._generators = [
                torch.Generator(scores.device).manual_seed(seed) for seed in self._seeds
            ]
        noise = torch.empty_like(scores, dtype=torch.float32)
        for row, generator in zip(noise, self._generators, strict=True):
            row.exponential_(generator=generator)
        # exponential_ may give 0 in fp32; a score of +inf would always win.
        return scores - noise.clamp_min_(torch.finfo(torch.float32).tiny).log_()


def stream_seed(seed: int, prompt: str, index: int) -> int:
    """Return the seed of one sample's stream: the same wherever the prompt stands in a list."""
    text = json.dumps([seed, prompt, index])
    # A signed 64-bit number, as torch wants it, of which the sign bit is left alone.
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
