"""Checks a data set of preferences before the training."""

from __future__ import annotations

import importlib.util
import os
from collections import Counter
from typing import Any

from fusedpo.tools.formats import read_rows
from fusedpo.tools.formats.saving import check_output
from fusedpo.tools.tokenizer import load_tokenizer

from .corpus import Corpus
from .encoding import Limit, encode
from .findings import SEVERITIES, Finding, LintReport
from .fix import write_without
from .registry import OPTIONAL, Hits, Rule, examples
from .rules import RULES
from .statistics import Lengths, summarise

FAIL_ON = ("error", "warning", "never")


def lint(
    data: str | os.PathLike[str],
    *,
    form: str | None = None,
    tokenizer: Any = None,
    max_length: int | None = 1024,
    truncation_mode: str = "keep_start",
    fail_on: str = "error",
    fix: str | os.PathLike[str] | None = None,
) -> LintReport:
    """Check a data set of preferences: what is wrong, how much of it, where, and what to do.

    Args:
        data: a file in any form that `fusedpo.tools.formats.read_rows` reads.
        form: its form; None: recognised from its columns.
        tokenizer: of the model that will be trained: a `transformers` tokenizer, or the model's
            folder or name. None: nothing is counted in tokens, and chat templates are not tried.
        max_length: DPOConfig.max_length of the training; None: sequences are not cut.
        truncation_mode: DPOConfig.truncation_mode.
        fail_on: the least severity for which the report has failed: "error", "warning", "never".
        fix: write a copy without the rows of the removable findings to this file (.jsonl, .json,
            .parquet).

    Returns:
        A `LintReport`; `not_fixed` tells why the copy could not be written.

    Raises:
        FileNotFoundError, ValueError: no such file, no known form, pairs and labelled rows in one
            file, a bad option.
        ImportError: a library of the extra "tools" is missing.

    Example:
        >>> import pathlib, tempfile
        >>> file = pathlib.Path(tempfile.mkdtemp(), "pairs.jsonl")
        >>> row = '{"prompt": "2+2?", "chosen": "It is four.", "rejected": "It is five."}'
        >>> _ = file.write_text(row + "\\n" + row + "\\n")
        >>> report = lint(file)
        >>> [(each.severity, each.rule, each.count) for each in report.findings]
        [('warning', 'duplicate_rows', 1), ('note', 'duplicate_prompts', 2)]
        >>> report.failed
        False
    """
    if fail_on not in FAIL_ON:
        raise ValueError(f"fail_on must be one of {', '.join(FAIL_ON)}; got {fail_on!r}.")
    limit = Limit(max_length, truncation_mode)
    if fix is not None:
        check_output(fix, data)
    _require_libraries()
    loaded = read_rows(data, form)
    encoded = None
    if tokenizer is not None:
        if isinstance(tokenizer, (str, os.PathLike)):
            tokenizer = load_tokenizer(os.fspath(tokenizer))
        encoded = encode(loaded.rows, tokenizer, limit)
    corpus = Corpus(loaded.rows, loaded.problems, loaded.not_carried, encoded, limit)

    findings, not_checked = [], {}
    removable: dict[int, list[str]] = {}
    for rule in RULES.values():
        missing = [need for need in rule.needs if need not in corpus.properties]
        if missing:
            if all(need in OPTIONAL for need in missing):
                not_checked[rule.name] = "needs " + " and ".join(OPTIONAL[need] for need in missing)
            continue
        hits = rule.find(corpus)
        if hits is not None:
            findings.append(_finding(rule, corpus, hits))
            for index in hits.rows if rule.removable else ():
                removable.setdefault(index, []).append(rule.name)
    findings.sort(key=lambda each: SEVERITIES.index(each.severity))
    worst = SEVERITIES[: SEVERITIES.index(fail_on) + 1] if fail_on != "never" else ()
    fixed, not_fixed = None, ""
    if fix is not None:
        try:
            fixed = write_without(corpus, removable, os.fspath(fix))
        except (ValueError, OSError, ImportError) as error:
            not_fixed = f"{os.fspath(fix)} was not written: {error}"  # the findings are still told
    return LintReport(
        data=os.fspath(data),
        form=loaded.form,
        rows=len(corpus.entries),
        findings=tuple(findings),
        lengths=_lengths(corpus),
        languages=_languages(corpus),
        not_checked=not_checked,
        failed=bool(not_fixed) or any(each.severity in worst for each in findings),
        fixed=fixed,
        not_fixed=not_fixed,
    )


def _require_libraries() -> None:
    needed = ("rapidfuzz", "py3langid", "networkx")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"checking data needs {' and '.join(missing)}, which is not installed: "
            'pip install "fusedpo[tools]"'
        )


def _finding(rule: Rule, corpus: Corpus, hits: Hits) -> Finding:
    return Finding(
        rule=rule.name,
        severity=rule.severity,
        count=len(hits.rows) if hits.count is None else hits.count,
        of=len(corpus.entries) + len(corpus.problems),
        what=hits.what or rule.about,
        advice=rule.advice,
        examples=examples(corpus, hits),
        lines=(
            *(place.line for place in hits.places),
            *(corpus.entries[index].line for index in hits.rows),
        ),
        removable=rule.removable,
        figures=hits.figures,
    )


def _lengths(corpus: Corpus) -> tuple[Lengths, ...]:
    in_words = {"prompt": corpus.prompt_words}
    in_words.update(zip(corpus.sides, corpus.word_counts.T, strict=True))
    found = [summarise("words", in_words)]
    if "tokenizer" in corpus.properties:
        in_tokens = {"prompt": corpus.prompt_tokens}
        in_tokens.update(zip(corpus.sides, corpus.token_counts.T, strict=True))
        found.append(summarise("tokens", in_tokens))
    return tuple(found)


def _languages(corpus: Corpus) -> dict[str, float]:
    """Share of the completions in each language, the most frequent first; "" is unclear."""
    counts = Counter(code for sides in corpus.languages for code in sides)
    total = counts.total()
    return {code: count / total for code, count in counts.most_common()}
