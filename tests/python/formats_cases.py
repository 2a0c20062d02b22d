"""Rows of every form with the values that they are, and rows that are wrong."""

from __future__ import annotations

from typing import Any

from convert_cases import assistant, system, user
from fusedpo.tools.formats import LabelledCompletion, PreferencePair


def sharegpt(sender: str, text: str) -> dict[str, str]:
    return {"from": sender, "value": text}


TEXTS = {"prompt": "2+2?", "chosen": " 4", "rejected": " 5"}
SUM = PreferencePair([user("2+2?")], [assistant("4")], [assistant("5")])
CHAT = [system("Be brief."), user("Hi"), assistant("Hello."), user("2+2?")]
LONG = PreferencePair(CHAT, [assistant("4")], [assistant("5")])
TRANSCRIPT = "\n\nSystem: Be brief.\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: 2+2?\n\nAssistant:"

# name of the case -> (form, record, value)
CASES: dict[str, tuple[str, dict[str, Any], Any]] = {
    "texts": ("preference", TEXTS, PreferencePair(**TEXTS)),
    "messages": (
        "conversational",
        {"prompt": CHAT, "chosen": [assistant("4")], "rejected": [assistant("5")]},
        LONG,
    ),
    "whole conversations": (
        "conversational",
        {"chosen": [*CHAT, assistant("4")], "rejected": [*CHAT, assistant("5")]},
        LONG,
    ),
    "whole conversations, and the question as a text": (
        "conversational",
        {"prompt": "2+2?", "chosen": [user("2+2?"), assistant("4")]}
        | {"rejected": [user("2+2?"), assistant("5")]},
        SUM,
    ),
    "a question as a text, answers as messages": (
        "conversational",
        {"prompt": "2+2?", "chosen": [assistant("4")], "rejected": [assistant("5")]},
        SUM,
    ),
    "whole conversations with a system message, and the question as a text": (
        "conversational",
        {"prompt": "2+2?", "chosen": [*CHAT, assistant("4")], "rejected": [*CHAT, assistant("5")]},
        LONG,
    ),
    "whole conversations, and their prompt again": (
        "conversational",
        {"prompt": CHAT, "chosen": [*CHAT, assistant("4")], "rejected": [*CHAT, assistant("5")]},
        LONG,
    ),
    "messages with a column for the system": (
        "conversational",
        {"system": "Be brief.", "prompt": CHAT[1:], "chosen": [assistant("4")]}
        | {"rejected": [assistant("5")]},
        LONG,
    ),
    "a system message that is there twice": (
        "conversational",
        {"system": "Be brief.", "prompt": CHAT, "chosen": [assistant("4")]}
        | {"rejected": [assistant("5")]},
        LONG,
    ),
    "conversations that part before their end": (
        "conversational",
        {
            "chosen": [user("Hi"), assistant("Hello."), user("2+2?"), assistant("4")],
            "rejected": [user("Hi"), assistant("Hello."), user("3+3?"), assistant("6")],
        },
        PreferencePair(
            [user("Hi")],
            [assistant("Hello."), user("2+2?"), assistant("4")],
            [assistant("Hello."), user("3+3?"), assistant("6")],
        ),
    ),
    "sharegpt": (
        "sharegpt",
        {
            "conversations": [
                sharegpt("system", "Be brief."),
                sharegpt("human", "Hi"),
                sharegpt("gpt", "Hello."),
                sharegpt("human", "2+2?"),
            ],
            "chosen": sharegpt("gpt", "4"),
            "rejected": sharegpt("gpt", "5"),
        },
        LONG,
    ),
    "sharegpt with a column for the system": (
        "sharegpt",
        {
            "system": "Be brief.",
            "conversations": [user("Hi"), assistant("Hello."), user("2+2?")],
            "chosen": assistant("4"),
            "rejected": assistant("5"),
        },
        LONG,
    ),
    "transcripts with a column for the system": (
        "hh",
        {"system": "Be brief.", "chosen": "\n\nHuman: 2+2?\n\nAssistant: 4"}
        | {"rejected": "\n\nHuman: 2+2?\n\nAssistant: 5"},
        PreferencePair([CHAT[0], user("2+2?")], [assistant("4")], [assistant("5")]),
    ),
    "transcripts": ("hh", {"chosen": TRANSCRIPT + " 4", "rejected": TRANSCRIPT + " 5"}, LONG),
    "labelled texts": (
        "kto",
        {"prompt": "2+2?", "completion": " 4", "label": True},
        LabelledCompletion("2+2?", " 4", True),
    ),
    "labelled messages": (
        "kto",
        {"prompt": CHAT, "completion": [assistant("5")], "label": 0},
        LabelledCompletion(CHAT, [assistant("5")], False),
    ),
    "labelled messages with a column for the system": (
        "kto",
        {"system": "Be brief.", "prompt": CHAT[1:], "completion": [assistant("5")], "label": 0},
        LabelledCompletion(CHAT, [assistant("5")], False),
    ),
    "a label as pandas writes it": (
        "kto",
        {"prompt": "2+2?", "completion": " 4", "label": 1.0},
        LabelledCompletion("2+2?", " 4", True),
    ),
    "a label as a text of a number": (
        "kto",
        {"prompt": "2+2?", "completion": " 5", "label": "0.0"},
        LabelledCompletion("2+2?", " 5", False),
    ),
    "a labelled conversation": (
        "kto",
        {"messages": [*CHAT, assistant("4")], "label": True},
        LabelledCompletion(CHAT, [assistant("4")], True),
    ),
    "a tagged conversation": (
        "kto",
        {"conversations": [sharegpt("human", "2+2?"), sharegpt("gpt", "5")], "kto_tag": False},
        LabelledCompletion([user("2+2?")], [assistant("5")], False),
    ),
    "an instruction and two answers": (
        "instruction",
        {"instruction": "2+2?", "input": "", "chosen": "4", "rejected": "5"},
        SUM,
    ),
    "an instruction and a list of answers": (
        "instruction",
        {"system": "Be brief.", "history": [["Hi", "Hello."]], "instruction": "2+2?"}
        | {"output": ["4", "5"]},
        LONG,
    ),
    "an instruction, its input and its output": (
        "instruction",
        {"instruction": "Add.", "input": "2 2", "output": "4"},
        LabelledCompletion([user("Add.\n\n2 2")], [assistant("4")], True),
    ),
    "a labelled output": (
        "instruction",
        {"instruction": "2+2?", "output": "5", "label": False},
        LabelledCompletion([user("2+2?")], [assistant("5")], False),
    ),
}

# name of the case -> (form, record, part of the reason)
WRONG: dict[str, tuple[str, dict[str, Any], str]] = {
    "a text that is not one": (
        "preference",
        {**TEXTS, "chosen": 4},
        "chosen must be a text; got 4",
    ),
    "a missing column": ("preference", {"prompt": "2+2?", "chosen": "4"}, "rejected is missing"),
    "half a surrogate pair": (
        "preference",
        {**TEXTS, "chosen": "a\ud83d"},
        "U+D83D, at character 1",
    ),
    "an unknown role": (
        "conversational",
        {"prompt": [user("a"), {"role": "tool", "content": "b"}], "chosen": [], "rejected": []},
        "prompt[1].role must be one of",
    ),
    "a tool call": (
        "conversational",
        {"prompt": [user("a")], "rejected": [assistant("b")]}
        | {"chosen": [{**assistant(""), "tool_calls": [1]}]},
        "chosen[0] has tool_calls",
    ),
    "content in parts": (
        "conversational",
        {"prompt": [{"role": "user", "content": [{"type": "image"}]}]}
        | {"chosen": [assistant("a")], "rejected": [assistant("b")]},
        "prompt[0].content must be a text; got a list",
    ),
    "a prompt that ends with the assistant": (
        "conversational",
        {"prompt": [assistant("a")], "chosen": [assistant("b")], "rejected": [assistant("c")]},
        "prompt must end with a user's message",
    ),
    "a completion of the user": (
        "sharegpt",
        {"conversations": [user("a")], "chosen": user("b"), "rejected": assistant("c")},
        "chosen must begin with the assistant's message; got the user's",
    ),
    "nothing chosen": (
        "conversational",
        {"prompt": [user("a")], "chosen": [], "rejected": [assistant("c")]},
        "chosen must have a message",
    ),
    "a system message beside texts": (
        "preference",
        {**TEXTS, "system": "Be brief."},
        "a column system needs a prompt of messages",
    ),
    "a system message beside labelled texts": (
        "kto",
        {"system": "Be brief.", "prompt": "a", "completion": "b", "label": True},
        "a column system needs a prompt of messages",
    ),
    "two system messages": (
        "sharegpt",
        {"system": "Be long.", "conversations": CHAT, "chosen": assistant("4")}
        | {"rejected": assistant("5")},
        "there must be one system message; got one in the column system and another one",
    ),
    "a prompt that the conversations do not begin with": (
        "conversational",
        {"prompt": [user("b")], "chosen": [user("a"), assistant("b")]}
        | {"rejected": [user("a"), assistant("c")]},
        "chosen must begin with the assistant's message; got the user's",
    ),
    "another question": (
        "conversational",
        {"prompt": "b", "chosen": [user("a"), assistant("b")]}
        | {"rejected": [user("a"), assistant("c")]},
        "prompt must repeat one of their messages; got 'b'",
    ),
    "transcripts of two conversations": (
        "hh",
        {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: c\n\nAssistant: d"},
        "must begin with the same turns",
    ),
    "texts without a prompt": ("hh", {"chosen": "a", "rejected": "b"}, "Plain texts need a column"),
    "a label that is neither": (
        "kto",
        {"prompt": "a", "completion": "b", "label": "good"},
        "label must be true or false, or 1 or 0; got 'good'",
    ),
    "a label of 2": ("kto", {"prompt": "a", "completion": "b", "label": 2}, "got 2"),
    "two completions": (
        "kto",
        {"prompt": "a", "completion": "b", "messages": [user("a"), assistant("c")], "label": True},
        "got completion and messages",
    ),
    "no completion": ("kto", {"prompt": "a", "label": True}, "got none"),
    "three answers": ("instruction", {"instruction": "a", "output": ["b", "c", "d"]}, "got 3"),
    "a broken history": (
        "instruction",
        {"instruction": "a", "output": "b", "history": [["c"]]},
        "history must be a list of [question, answer]",
    ),
}
