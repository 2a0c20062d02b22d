"""Marks of turns that texts may hold, of many chat templates: more than can be read here."""

from __future__ import annotations

import re

# What opens a turn. In a completion the text after one belongs to somebody else.
TURN_OPENS = re.compile(
    r"(?:^|\n\n)(?:Human|User|Assistant|System):(?=\s|$)"
    r"|(?:^|\n)### (?:Instruction|Response|Human|User|Assistant):"
    r"|<\|im_start\|>(?:\w+\n)?|<start_of_turn>(?:\w+\n)?"
    r"|<\|start_header_id\|>(?:\w+<\|end_header_id\|>)?"
    r"|\[INST\]|\[/INST\]|<\|(?:user|assistant|system)\|>"
)
# What closes one. A template writes it; a message should not hold it.
TURN_ENDS = re.compile(r"<\|im_end\|>|<\|eot_id\|>|<end_of_turn>|<\|endoftext\|>|<\|end\|>|</s>")
TURN = re.compile(f"{TURN_OPENS.pattern}|{TURN_ENDS.pattern}")
# What some templates begin a text with, before the first turn.
BOS = re.compile(r"(?:<\|begin_of_text\|>|<s>|<bos>|<\uff5cbegin\u2581of\u2581sentence\uff5c>)\s*?")
