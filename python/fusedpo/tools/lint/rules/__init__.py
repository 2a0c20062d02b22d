"""The rules by name, in the order of a report. One module for each idea."""

from __future__ import annotations

from ..registry import Rule
from .characters import suspicious_characters
from .cycles import circular_preferences
from .labels import unbalanced_labels
from .language import language_differs, mixed_languages
from .leaks import prompt_at_start, prompt_inside, turn_marks
from .length import length_bias
from .likeness import identical_sides, near_identical_sides, unlike_sides, white_space_alone
from .repeats import (
    contradicting_labels,
    contradicting_pairs,
    duplicate_prompts,
    duplicate_rows,
    repeats_but_for_white_space,
)
from .rows import (
    empty_completions,
    empty_prompts,
    other_columns,
    short_completions,
    unreadable_rows,
)
from .template import (
    cannot_be_tokenised,
    double_bos,
    missing_eos,
    not_read_by_trl,
    odd_turns,
    prompt_is_no_prefix,
)
from .truncation import cut_by_max_length, dropped_by_max_length, same_when_cut

_IN_ORDER = (
    unreadable_rows,
    empty_completions,
    identical_sides,
    contradicting_pairs,
    contradicting_labels,
    cannot_be_tokenised,
    missing_eos,
    not_read_by_trl,
    empty_prompts,
    circular_preferences,
    duplicate_rows,
    repeats_but_for_white_space,
    white_space_alone,
    near_identical_sides,
    unlike_sides,
    length_bias,
    unbalanced_labels,
    prompt_at_start,
    turn_marks,
    odd_turns,
    prompt_is_no_prefix,
    double_bos,
    dropped_by_max_length,
    cut_by_max_length,
    same_when_cut,
    language_differs,
    suspicious_characters,
    short_completions,
    duplicate_prompts,
    prompt_inside,
    mixed_languages,
    other_columns,
)
RULES: dict[str, Rule] = {each.name: each for each in _IN_ORDER}
