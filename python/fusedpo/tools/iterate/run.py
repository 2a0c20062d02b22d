"""`iterate`: rounds of sample, judge, train; each on the policy that the one before made.

The reference of a round is the policy at its beginning, with a store of its own in its folder.
Every round is a folder that `make_pairs` and `train` fill; what they find there they do not do
again, and nothing else is remembered. So the same command goes on after a kill wherever it fell.
"""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from fusedpo.tools.files import folder_of, write_whole
from fusedpo.tools.generate import Generation, Prompt
from fusedpo.tools.generations import read_generations
from fusedpo.tools.iterate.report import IterateReport, Round
from fusedpo.tools.iterate.training import (
    TRAINING,
    Schedule,
    check_config,
    check_resolves,
    round_config,
    scheduled,
    train_round,
)
from fusedpo.tools.judge import DEFAULT_TEMPLATE, Judge, judge_identity
from fusedpo.tools.pairs.run import (
    PAIRS,
    Progress,
    Prompts,
    check_options,
    make_pairs,
    make_samples,
    prompts_of,
)
from fusedpo.tools.pairs.samples import PRODUCED, SAMPLES, sampling_settings
from fusedpo.tools.pathologies import check
from fusedpo.tools.sampling import Sampling
from fusedpo.tools.train.options import read_config

REPORT = "report.json"


def iterate(
    prompts: Prompts,
    *,
    model: str | os.PathLike[str],
    judge: Judge,
    config: str | os.PathLike[str] | Mapping[str, Any],
    output: str | os.PathLike[str],
    rounds: int = 3,
    beta: float | Sequence[float] | None = None,
    learning_rate: float | Sequence[float] | None = None,
    sampling: Sampling | None = None,
    dtype: str = "auto",
    near_duplicate: float = 95.0,
    template: str = DEFAULT_TEMPLATE,
    progress: Progress = lambda what, done, total: None,
) -> IterateReport:
    """Iterative DPO: in each round the policy answers, a judge prefers, the policy is trained.

    Run it again after whatever happened; with more `rounds` it goes on after the last one.

    Args:
        prompts: as for `make_pairs`; each round answers all of them, with a seed of its own.
        model: a folder or a name on the Hub: the first policy.
        judge: an `Endpoint` or a function, as for `fusedpo.tools.judge.judge`.
        config: the training of every round, as for `fusedpo.tools.train.train`, without model,
            data, folder and reference store, which are the round's own.
        output: a folder, made if it is not there. round-1/, round-2/, ... have samples, verdicts,
            pairs and training; the folder after the last round's has samples alone.
        rounds: how many trainings.
        beta, learning_rate: one number, or one for each round; None: the configuration's.
        sampling: how to sample; its seed is the first round's, and goes up by one each round.
        dtype, near_duplicate, template: as for `make_pairs`.
        progress: told ("round 1: samples", done, total) and the like.

    Returns:
        IterateReport, which is in `output/report.json`, too.

    Raises:
        ValueError, TypeError, ImportError, OSError: an argument, before anything is sampled; or a
            round of which no pair is left to train on.
        EndpointError: a server failed for good.
    """
    sampling, prompts = sampling or Sampling(n=4), prompts_of(prompts)
    first, config = os.fspath(model), read_config(config)
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1; got {rounds}.")
    check_options(first, sampling, near_duplicate, template, judge)
    check_config(config)
    options = _options(rounds, beta=beta, learning_rate=learning_rate)
    for each in options:
        check_resolves(round_config(config, each, model=first, pairs=PAIRS), os.fspath(output))
    settings = {
        **sampling_settings(prompts, first, sampling, dtype),
        "judge": judge_identity(judge, template),
        "near_duplicate": near_duplicate,
        "config": config,
    }
    produced = [f"round-*/{name}" for name in PRODUCED]
    with folder_of(output, settings, produced) as folder:
        found: list[Round] = []
        reference: list[Generation] = []
        policy = first
        for number, each in enumerate(options, start=1):
            here = folder / f"round-{number}"
            pairs = make_pairs(
                prompts,
                model=policy,
                judge=judge,
                output=here,
                sampling=_seeded(sampling, number),
                dtype=dtype,
                near_duplicate=near_duplicate,
                template=template,
                progress=_named(progress, number),
            )
            if not pairs.pairs:
                raise ValueError(
                    f"{here / PAIRS} has no pair to train on: of {pairs.prompts} prompts "
                    f"{pairs.single} have no two different answers, and {pairs.undecided} are "
                    "undecided. Sample more, or hotter; or look at the judge."
                )
            trained = train_round(
                here, round_config(config, each, model=policy, pairs=str(here / PAIRS))
            )
            samples = read_generations(here / SAMPLES)
            reference = reference or samples
            metrics = trained["metrics"]
            found.append(_round(number, samples, reference, pairs=pairs, metrics=metrics, **each))
            policy = str(here / TRAINING)
        last = _last_samples(folder, prompts, policy, sampling, rounds + 1, dtype, progress)
        found.append(_round(rounds + 1, last, reference))
        report = IterateReport(str(folder), policy, tuple(found))
        write_whole(folder / REPORT, json.dumps(report.as_dict(), indent=2) + "\n")
        return report


def _options(rounds: int, **schedules: Schedule) -> list[dict[str, float | None]]:
    columns = {name: scheduled(name, each, rounds) for name, each in schedules.items()}
    return [{name: column[i] for name, column in columns.items()} for i in range(rounds)]


def _seeded(sampling: Sampling, number: int) -> Sampling:
    return Sampling(**{**vars(sampling), "seed": sampling.seed + number - 1})


def _named(progress: Progress, number: int) -> Progress:
    return lambda what, done, total: progress(f"round {number}: {what}", done, total)


def _last_samples(
    folder: pathlib.Path,
    prompts: Sequence[Prompt],
    policy: str,
    sampling: Sampling,
    number: int,
    dtype: str,
    progress: Progress,
) -> list[Generation]:
    """What one more round would begin with."""
    return make_samples(
        prompts,
        model=policy,
        output=folder / f"round-{number}",
        sampling=_seeded(sampling, number),
        dtype=dtype,
        progress=_named(progress, number),
    )


def _round(
    number: int, samples: Sequence[Generation], reference: Sequence[Generation], **rest: Any
) -> Round:
    return Round(
        number=number,
        tokens=fmean([each.num_tokens for each in samples]),
        pathologies=check(samples, reference),
        **rest,
    )
