"""Preference data as people keep it: which form a file has, and its rows as one kind of value.

>>> pair = from_record({"prompt": "2+2?", "chosen": " 4", "rejected": " 5"}, "preference")
>>> pair
PreferencePair(prompt='2+2?', chosen=' 4', rejected=' 5')
"""

from .forms import FORMS, from_record
from .reading import read_rows
from .rows import (
    FormatError,
    LabelledCompletion,
    Loaded,
    Message,
    PreferencePair,
    Problem,
    Row,
    Text,
    Value,
)
from .saving import write_records
from .targets import TARGETS, to_record

__all__ = [
    "FORMS",
    "TARGETS",
    "FormatError",
    "LabelledCompletion",
    "Loaded",
    "Message",
    "PreferencePair",
    "Problem",
    "Row",
    "Text",
    "Value",
    "from_record",
    "read_rows",
    "to_record",
    "write_records",
]
