"""`make_pairs`: prompts in, preference pairs out; a model answers, a judge decides."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from fusedpo.tools.files import folder_of, write_whole
from fusedpo.tools.generate import Generation, Prompt
from fusedpo.tools.generations import read_prompts
from fusedpo.tools.judge import (
    DEFAULT_TEMPLATE,
    Comparison,
    Endpoint,
    Judge,
    ReplyCache,
    compare,
    judge_identity,
    judge_name,
)
from fusedpo.tools.judge.answers import plain_text
from fusedpo.tools.judge.comparison import check_judge
from fusedpo.tools.judge.endpoint import DEFAULT_BODY
from fusedpo.tools.pairs.choosing import Candidates, Choice, candidates, choose
from fusedpo.tools.pairs.report import PairsReport, summary
from fusedpo.tools.pairs.samples import PRODUCED, sample, sampling_settings
from fusedpo.tools.sampling import Sampling

PAIRS = "pairs.jsonl"
VERDICTS = "verdicts.jsonl"

Prompts = str | os.PathLike[str] | Sequence[Prompt]
Progress = Callable[[str, int, int], None]  # what is made, how much is there, of how much


def make_pairs(
    prompts: Prompts,
    *,
    model: str | os.PathLike[str] | Endpoint,
    judge: Judge,
    output: str | os.PathLike[str],
    sampling: Sampling | None = None,
    dtype: str = "auto",
    near_duplicate: float = 95.0,
    template: str = DEFAULT_TEMPLATE,
    progress: Progress = lambda what, done, total: None,
) -> PairsReport:
    """Sample answers to every prompt, compare each two of them, and write the clearest pair.

    Run it again after whatever happened: what was sampled and judged is not done again, and the
    result is that of a run that nothing interrupted.

    Args:
        prompts: a file as `read_prompts` takes it, or the prompts: texts or lists of messages.
        model: a folder or a name on the Hub, or an `Endpoint`, that answers.
        judge: an `Endpoint` or a function, as for `fusedpo.tools.judge.judge`.
        output: a folder, made if it is not there: samples.jsonl, verdicts.jsonl, pairs.jsonl,
            settings.json. It goes on only with the same prompts, model and sampling; another judge
            may look at the same samples.
        sampling: how to sample; four answers of at most 256 tokens if it is not given.
        dtype: of a model that is loaded here.
        near_duplicate: likeness in percent from which on an answer counts as one that is there.
        template: what a judging endpoint is asked.
        progress: told ("samples" or "replies", done, total).

    Returns:
        PairsReport. The file has `prompt`, `chosen`, `rejected` and `provenance` in each line, in
        the order of the prompts.

    Raises:
        ValueError, TypeError, OSError: an argument or a file; the message says which.
        EndpointError: a server failed for good.
    """
    sampling = sampling or Sampling(n=4)
    prompts = prompts_of(prompts)
    model = model if isinstance(model, Endpoint) else os.fspath(model)
    check_options(model, sampling, near_duplicate, template, judge)
    settings = sampling_settings(prompts, model, sampling, dtype)
    with folder_of(output, settings, PRODUCED) as folder:
        there: list[int] = []

        def sampled(done: int, total: int) -> None:
            there.append(done)
            progress("samples", done, total)

        generations = sample(folder, prompts, model, sampling, dtype=dtype, progress=sampled)
        groups = candidates(generations, sampling.n, near_duplicate)
        with ReplyCache(folder / VERDICTS) as replies:
            asked = compare(
                [question for group in groups for question in group.questions],
                judge,
                replies,
                template=template,
                progress=lambda done, total: progress("replies", done, total),
            )
        choices = _choices(groups, asked.comparisons)
        provenance = {
            "model": model.model if isinstance(model, Endpoint) else model,
            "judge": judge_name(judge),
            "seed": sampling.seed,
            "temperature": sampling.temperature,
        }
        rows = [json.dumps(_row(each, provenance), ensure_ascii=False) for each in choices]
        write_whole(folder / PAIRS, "".join(row + "\n" for row in rows))
        return summary(
            str(folder / PAIRS),
            groups,
            asked.comparisons,
            choices,
            lengths=[len(each.completion) for each in generations],
            sampled=there[-1] - there[0] if there else 0,
            asked=asked.asked,
            cached=asked.cached,
        )


def make_samples(
    prompts: Sequence[Prompt],
    *,
    model: str,
    output: str | os.PathLike[str],
    sampling: Sampling,
    dtype: str = "auto",
    progress: Progress = lambda what, done, total: None,
) -> list[Generation]:
    """Do the first half of `make_pairs`, which goes on with it: n answers to each prompt."""
    settings = sampling_settings(prompts, model, sampling, dtype)
    with folder_of(output, settings, PRODUCED) as folder:
        return sample(
            folder,
            prompts,
            model,
            sampling,
            dtype=dtype,
            progress=lambda done, total: progress("samples", done, total),
        )


def prompts_of(prompts: Prompts) -> list[Prompt]:
    """A file's prompts, or those that are given.

    Raises:
        ValueError: there is none; one is there twice, whose samples would be the same; or one is no
            text or conversation of texts, and could not be shown to a judge.
    """
    if isinstance(prompts, (str, os.PathLike)):
        prompts = read_prompts(pathlib.Path(prompts))
    for place, prompt in enumerate(prompts):
        try:
            plain_text(prompt)  # what the judge is shown
        except TypeError as error:
            raise ValueError(
                f"prompt {place} {error}. Each message needs a role and a content that are texts."
            ) from None
    given = [json.dumps(prompt, sort_keys=True) for prompt in prompts]
    if not given:
        raise ValueError("there must be at least one prompt; got none.")
    if len(set(given)) < len(given):
        twice = next(prompt for prompt in given if given.count(prompt) > 1)
        raise ValueError(
            f"prompts must be different from one another; {twice[:80]} is there twice."
        )
    return list(prompts)


def check_options(
    model: str | Endpoint,
    sampling: Sampling,
    near_duplicate: float,
    template: str,
    judge: Judge,
) -> None:
    """Refuse what would fail after the sampling.

    Raises:
        ValueError, TypeError: the message says which.
    """
    if sampling.n < 2:
        raise ValueError(
            f"n must be at least 2 answers, of which a pair is made; got {sampling.n}."
        )
    if isinstance(model, Endpoint):
        _check_server(model, sampling)
    if not 0 < near_duplicate <= 100:
        raise ValueError(
            f"near_duplicate must be a likeness above 0 and at most 100 percent; got "
            f"{near_duplicate}."
        )
    check_judge(judge, template)
    judge_identity(judge, template)


def _check_server(model: Endpoint, sampling: Sampling) -> None:
    if sampling.top_k is not None:
        raise ValueError("top_k is unknown to an OpenAI-compatible server; leave it out.")
    for name in ("temperature", "top_p", "seed"):
        if name in model.body and model.body is not DEFAULT_BODY:
            raise ValueError(
                f"the body of the model that answers must not have {name!r}, which the sampling "
                "sets; give it there."
            )


def _choices(groups: Sequence[Candidates], comparisons: Sequence[Comparison]) -> list[Choice]:
    found, start = [], 0
    for group in groups:
        stop = start + len(group.matches)
        choice = choose(group, comparisons[start:stop])
        start = stop
        if choice is not None:
            found.append(choice)
    return found


def _row(choice: Choice, provenance: dict[str, Any]) -> dict[str, Any]:
    """A line of the file; completions of a conversation are messages, as TRL wants them."""
    texts: dict[str, Any] = {
        "chosen": choice.chosen.completion,
        "rejected": choice.rejected.completion,
    }
    if not isinstance(choice.prompt, str):
        texts = {name: [{"role": "assistant", "content": text}] for name, text in texts.items()}
    return {
        "prompt": choice.prompt,
        **texts,
        "provenance": {
            **provenance,
            "chosen_sample": choice.chosen.index,
            "rejected_sample": choice.rejected.index,
            "chosen_score": choice.chosen_score,
            "rejected_score": choice.rejected_score,
        },
    }
