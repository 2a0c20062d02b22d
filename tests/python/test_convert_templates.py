"""Conversations as texts, and back: nothing is lost on the way, and what would be is refused."""

from __future__ import annotations

from typing import Any

import pytest
from convert_cases import assistant, conversations, pairs, system, texts, user
from fusedpo.tools.formats import FormatError, LabelledCompletion, PreferencePair
from fusedpo.tools.formats.conversations import as_messages, as_texts
from fusedpo.tools.formats.marks import TURN_OPENS
from fusedpo.tools.formats.renderers import Plain, TokenizerTemplate, renderer_named
from fusedpo.tools.formats.templates import CHATML, TEMPLATES
from hypothesis import given, settings
from hypothesis import strategies as st

CHAT = [system("S"), user("U"), assistant("A"), user("V")]
WRITTEN = {
    "hh": ("\n\nSystem: S\n\nHuman: U\n\nAssistant: A\n\nHuman: V\n\nAssistant:", " B"),
    "chatml": (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n"
        "<|im_start|>assistant\nA<|im_end|>\n<|im_start|>user\nV<|im_end|>\n"
        "<|im_start|>assistant\n",
        "B<|im_end|>",
    ),
    "llama": (
        "<|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nU<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nA<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nV<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "B<|eot_id|>",
    ),
    "zephyr": (
        "<|system|>\nS</s>\n<|user|>\nU</s>\n<|assistant|>\nA</s>\n<|user|>\nV</s>\n<|assistant|>\n",
        "B</s>",
    ),
    "plain": ("S\n\nU\n\nA\n\nV\n\n", "B"),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_a_conversation_is_written_as(name: str) -> None:
    prompt, completion = WRITTEN[name]
    written = renderer_named(name).render(CHAT, [[assistant("B")]])
    assert written == (prompt, [completion])


def test_an_unknown_template_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must be one of hh, chatml, .*got 'alpaca'"):
        renderer_named("alpaca")


@pytest.mark.parametrize("name", TEMPLATES)
@settings(deadline=None)
@given(pair=pairs(turns=st.sampled_from([1, 3])))
def test_what_a_template_writes_is_read_again(name: str, pair: PreferencePair) -> None:
    written = as_texts(pair, TEMPLATES[name])
    assert as_messages(written) == (pair, name)


@settings(deadline=None)
@given(conversations, texts, st.booleans())
def test_what_a_template_writes_is_read_again_with_its_label(
    prompt: Any, completion: str, label: bool
) -> None:
    value = LabelledCompletion(prompt, [assistant(completion)], label)
    assert as_messages(as_texts(value, TEMPLATES["chatml"])) == (value, "chatml")


@settings(deadline=None)
@given(texts, texts, texts)
def test_texts_without_marks_become_messages_and_the_same_texts_again(
    prompt: str, chosen: str, rejected: str
) -> None:
    pair = PreferencePair(prompt, f" {chosen}", f"\n{rejected}")
    value, how = as_messages(pair)
    assert how == ("unknown" if TURN_OPENS.search(prompt) else "plain")
    assert as_texts(value, Plain()) == pair


def test_plain_separates_what_has_no_space_of_its_own() -> None:
    pair = PreferencePair([user("2+2?")], [assistant("4")], [assistant(" 5")])
    assert as_texts(pair, Plain()) == PreferencePair("2+2?\n\n", "4", " 5")
    spaced = PreferencePair([user("2+2?\n")], [assistant("4")], [assistant("5")])
    assert as_texts(spaced, Plain()) == PreferencePair("2+2?\n", "4", "5")


@pytest.mark.parametrize(
    ("name", "mark"),
    [
        ("hh", "\n\nHuman:"),
        ("chatml", "<|im_end|>"),
        ("llama", "<|start_header_id|>user<|end_header_id|>"),
        ("zephyr", "</s>"),
    ],
)
@pytest.mark.parametrize("where", ["prompt", "completion"])
def test_a_content_with_the_marks_of_the_template_is_refused(
    name: str, mark: str, where: str
) -> None:
    contents = {"prompt": "a", "completion": "b", where: f"x{mark}y"}
    value = LabelledCompletion(
        [user(contents["prompt"])], [assistant(contents["completion"])], True
    )
    with pytest.raises(FormatError) as refused:
        as_texts(value, TEMPLATES[name])
    assert f"has {mark!r} in it, a mark of the template {name}" in str(refused.value)


READ = {
    "an opening with its space": ("\n\nHuman: a\n\nAssistant: ", "b", "b"),
    "a BOS before the first turn": (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\na<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "b<|eot_id|>",
        "b",
    ),
    "no space after the opening": ("\n\nHuman:a\n\nAssistant:", "b", "b"),
    "the opening in the completion": ("\n\nHuman: a", "\n\nAssistant: b", "b"),
    "a completion without its end": (
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n",
        "b",
        "b",
    ),
    "a completion with the break after its end": (
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n",
        "b<|im_end|>\n",
        "b",
    ),
}


@pytest.mark.parametrize("case", READ)
def test_other_ways_to_write_a_template_are_read(case: str) -> None:
    prompt, completion, content = READ[case]
    value, _ = as_messages(LabelledCompletion(prompt, completion, True))
    assert value == LabelledCompletion([user("a")], [assistant(content)], True)


def test_a_content_may_quote_the_marks_of_another_template() -> None:
    quoted = "What is \n\nHuman: a?"
    written = as_texts(LabelledCompletion([user(quoted)], [assistant("b")], True), CHATML)
    value, how = as_messages(written)
    assert (value.prompt, how) == ([user(quoted)], "chatml")


@pytest.mark.parametrize(
    ("prompt", "completion", "reason"),
    [
        ("\n\nHuman: a", "b", "must end with '\\n\\nAssistant:'"),
        ("<|im_start|>user\na<|im_start|>assistant\n", "b", "do not go on so"),
        ("Human: a\n\nAssistant:", "b", "has '\\n\\nAssistant:', a mark of the template hh"),
        ("\n\nHuman: a\n\nAssistant:", " b\n\nHuman: c", "must end with the assistant's message"),
        ("\n\nAssistant: a\n\nAssistant:", " b", "prompt must end with a user's message"),
    ],
)
def test_texts_with_marks_that_are_no_conversation_are_refused(
    prompt: str, completion: str, reason: str
) -> None:
    with pytest.raises(FormatError) as refused:
        as_messages(LabelledCompletion(prompt, completion, True))
    assert reason in str(refused.value)


class Tokenizer:
    """What a template of a tokenizer needs of it, without files."""

    name_or_path = "tiny"
    bos_token, bos_token_id, eos_token = "<s>", 1, "</s>"
    chat_template = "there is one"

    def __init__(self, adds_bos: bool = True, forgets: bool = False) -> None:
        self.adds_bos, self.forgets = adds_bos, forgets

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [1] if self.adds_bos else []}

    def apply_chat_template(
        self, messages: list[dict[str, str]], tokenize: bool, add_generation_prompt: bool
    ) -> str:
        assert tokenize is False
        if messages[0]["role"] == "system":
            import jinja2

            raise jinja2.TemplateError("no system here")
        turns = "".join(f"[{m['role']}]{m['content']}</s>\n" for m in messages)
        opening = "[assistant]" if add_generation_prompt else ""
        return "<s>" + ("" if self.forgets and opening else turns) + opening


PAIR = PreferencePair([user("a")], [assistant("b")], [assistant("c")])


def test_a_tokenizers_template_leaves_the_special_tokens_that_trl_adds_to_trl() -> None:
    assert as_texts(PAIR, TokenizerTemplate(Tokenizer())) == PreferencePair(
        "[user]a</s>\n[assistant]", "b</s>", "c</s>"
    )
    written = as_texts(PAIR, TokenizerTemplate(Tokenizer(adds_bos=False)))
    assert written.prompt == "<s>[user]a</s>\n[assistant]"


def test_a_tokenizers_template_that_cannot_write_a_row_is_refused() -> None:
    with pytest.raises(FormatError, match="must write a prompt alike"):
        as_texts(PAIR, TokenizerTemplate(Tokenizer(forgets=True)))
    with pytest.raises(FormatError, match="the template of tiny refuses it: no system here"):
        as_texts(
            LabelledCompletion([system("a")], [assistant("b")], True),
            TokenizerTemplate(Tokenizer()),
        )


def test_a_tokenizer_without_a_template_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tokenizer, "chat_template", None)
    with pytest.raises(ValueError, match="tiny must have a chat template; it has none"):
        TokenizerTemplate(Tokenizer())
