"""Each pathology is found where it is, and not in plain answers."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="the tools need the extras")

from fusedpo import cli
from fusedpo.tools.checkpoints import check_files, draw
from fusedpo.tools.generate import Generation, generate
from fusedpo.tools.generations import write_generations
from fusedpo.tools.pathologies import check
from fusedpo.tools.patterns import load_patterns
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast
from trl_helpers import make_model, make_pairs, make_tokenizer, one_thread  # noqa: F401  a fixture

pytestmark = pytest.mark.usefixtures("one_thread")

# One or more for every pattern of the package.
EXAMPLES = {
    "flattery": [
        "What a great question! The capital of France is Paris.",
        "That's a really insightful observation. In short, no.",
        "Excellent choice! Start with the frame.",
        "Wow, what a fascinating hobby! Where do you go?",
        "That sounds like a fun and engaging idea! First, cut the wood.",
        "Thank you so much for such a thoughtful question.",
        "You\u2019re absolutely right, and I was wrong.",
        "You are clearly a genius.",
        "I love your curiosity. Water boils at 100 degrees.",
        "\u8fd9\u662f\u4e00\u4e2a\u5f88\u597d\u7684\u95ee\u9898\uff01\u7b54\u6848\u662f\u56db\u3002",
    ],
    "evasion": [
        "As an AI language model, I don't have access to that.",
        "I'm sorry, but I can't do this for you.",
        "I cannot provide medical information.",
        "I am not comfortable with this topic.",
        "I don't have personal opinions on politics.",
        "I'd rather not say.",
        "\u5f88\u62b1\u6b49\uff0c\u6211\u65e0\u6cd5\u56de\u7b54\u8fd9\u4e2a\u95ee\u9898\u3002",
    ],
    "hedging": [
        "It really depends, and it's hard to say. Perhaps it works, perhaps not.",
        "It is important to note that it may or may not work. There's no simple answer.",
        "I think it is sort of blue, to some extent.",
        "Generally speaking, it could potentially rain. I'm not entirely sure.",
        "It seems to be fine. On the other hand, there are many factors.",
    ],
}
PLAIN = [
    "Paris.",
    "",  # degenerate, and nothing else
    "Boil the water, add salt, and cook the pasta for nine minutes. Drain it and serve at once.",
    "A great question to ask a guest is where they grew up.",
    "The model is a great choice for small houses. It depends on three batteries.",
    "As an assistant manager you plan the shifts; I cannot stress this enough.",
    "She said: I'm sorry! Then she ran home, because perhaps her mother was waiting.",
    "Use `getElementById` and `querySelectorAll`; iPhone and GitHub users open the McKinsey page.",
    "| a | b |\n|---|---|\n| 1 | 2 |\n| 3 | 4 |\n| 5 | 6 |",
    "\u5df4\u9ece\u662f\u6cd5\u56fd\u7684\u9996\u90fd\u3002\u5b83\u4f4d\u4e8e\u585e\u7eb3\u6cb3\u7554\uff0c\u4eba\u53e3\u8d85\u8fc7\u4e24\u767e\u4e07\uff0c\u662f\u6b27\u6d32\u91cd\u8981\u7684\u6587\u5316\u4e2d\u5fc3\u3002",
    "1. Buy milk.\n2. Buy bread.\n3. Buy eggs.\n4. Pay the bill.\n5. Go home.",
]
LONG = " ".join(f"word{i}" for i in range(150))


def flags(text: str, **options: Any) -> set[str]:
    return {each.check for each in check([text], **options).findings}


@pytest.mark.parametrize("name", EXAMPLES)
def test_phrases_are_found_and_no_pattern_is_without_an_example(name: str) -> None:
    for text in EXAMPLES[name]:
        assert flags(text) == {name}, text
    phrases = next(each for each in load_patterns().phrases if each.name == name)
    texts = [text.replace("\u2019", "'") for text in EXAMPLES[name]]
    for pattern in phrases.patterns:
        assert any(pattern.search(text) for text in texts), pattern.pattern


@pytest.mark.parametrize("text", PLAIN)
def test_plain_answers_have_no_pathology(text: str) -> None:
    assert flags(text) == (set() if text else {"degenerate"})


def test_flattery_in_the_middle_and_a_single_hedge_in_a_long_text_do_not_count() -> None:
    assert flags(f"{LONG} What a great question!") == set()
    assert flags(f"Perhaps so. {LONG} Maybe. It depends.") == set()


def test_evidence_tells_what_was_found_and_where() -> None:
    report = check(["Paris.", "Great question! Paris."])
    assert report.counts["flattery"] == 1
    assert report.share("flattery") == 0.5
    (finding,) = report.findings
    assert (finding.place, finding.evidence) == (1, "Great question")
    assert json.loads(json.dumps(report.as_dict()))["findings"][0]["place"] == 1


# Verbosity --------------------------------------------------------------------------------------


def generations(*texts: str, prompts: str = "ab") -> list[Generation]:
    return [Generation(p, t) for p, t in zip(prompts, texts, strict=False)]


def test_verbosity_is_relative_to_the_reference_for_the_same_prompt() -> None:
    reference = generations("x" * 100, "x" * 10)
    report = check(generations("y" * 190, "y" * 30), reference)
    assert [each.place for each in report.findings if each.check == "verbosity"] == [1]
    assert report.length_ratio == pytest.approx(220 / 110)


def test_several_answers_of_the_reference_are_averaged() -> None:
    reference = [Generation("a", "x" * 10), Generation("a", "x" * 50)]
    assert check([Generation("a", "y" * 61)], reference).counts["verbosity"] == 1
    assert check([Generation("a", "y" * 60)], reference).counts["verbosity"] == 0


def test_without_reference_verbosity_is_not_counted_at_all() -> None:
    report = check(["y" * 1000])
    assert "verbosity" not in report.counts
    assert report.length_ratio is None


def test_reference_must_answer_the_same_prompts() -> None:
    with pytest.raises(ValueError, match="none to completion 1's"):
        check(generations("y", "y"), generations("x"))
    with pytest.raises(ValueError, match="as many of one as of the other; got 2 and 1"):
        check(["y", "y"], ["x"])
    with pytest.raises(ValueError, match="both be generations"):
        check(generations("y"), ["x"])
    with pytest.raises(ValueError, match="at least one text"):
        check([])


# What models really write -----------------------------------------------------------------------


def test_greedy_search_of_a_small_model_runs_into_repetition() -> None:
    prompts = [row["prompt"] for row in make_pairs(8)]
    made = generate(
        make_model(), prompts, tokenizer=make_tokenizer(), temperature=0, max_new_tokens=48
    )
    assert check(made).counts["repetition"] >= 4
    sampled = generate(make_model(), prompts, tokenizer=make_tokenizer(), max_new_tokens=48)
    assert check(sampled).counts["repetition"] == 0


def byte_level_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(PLAIN)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")


def test_untrained_model_writes_degenerate_text() -> None:
    tokenizer = byte_level_tokenizer(512)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=128, **sizes, **heads)
    )
    made = generate(model, ["Who are you?"], n=10, tokenizer=tokenizer, max_new_tokens=60)
    report = check(made)
    assert report.counts["degenerate"] == 10
    assert report.counts["repetition"] == 0


@pytest.mark.parametrize(
    ("text", "evidence"),
    [
        (" \n\t", "no letter and no digit"),
        ("?!" * 20, "no letter and no digit"),
        ("a" * 40, "100% of it is 'a'"),
        ("abc\x01def\ufffdghi", "18% of the characters are no text"),
        (
            "Haus \u0434\u043e\u043c \u5bb6 house \u0431\u0435\u0433 \u092c\u093e\u0917 run \u72ac "
            * 4,
            "4 scripts, which change",
        ),
        (
            " ".join(f"relocation{c}latSovietsProp frontlineappear{c}plet" for c in "abcdefghij"),
            "50% of the words are glued together",
        ),
    ],
)
def test_degenerate_text_is_told_apart_by_what_is_wrong(text: str, evidence: str) -> None:
    findings = {each.check: each.evidence for each in check([text]).findings}
    assert findings["degenerate"].startswith(evidence)


def test_character_that_the_token_limit_cut_is_no_broken_text() -> None:
    assert flags("Bonjour \ufffd") == set()


def test_loop_at_the_end_of_a_sound_text_is_found() -> None:
    (finding,) = check([LONG + " and so on" * 10]).findings
    assert finding.evidence == "'and so on' over and over, for 30 words"


# Patterns of one's own --------------------------------------------------------------------------


def write(folder: pathlib.Path, text: str) -> pathlib.Path:
    (folder / "own.yaml").write_text(text, encoding="utf-8")
    return folder / "own.yaml"


def test_own_file_extends_a_check_adds_another_and_changes_a_limit(tmp_path: pathlib.Path) -> None:
    own = write(
        tmp_path,
        "phrases:\n"
        "  flattery:\n    patterns: ['^\\W*smart cookie']\n"
        "  emoji:\n    patterns: ['\\U0001F600']\n"
        "limits:\n  verbosity_ratio: 5\n",
    )
    assert flags("Smart cookie! Yes.", patterns=own) == {"flattery"}
    assert flags(f"{LONG} Great question!", patterns=own) == set()  # still at the start alone
    assert flags("Great question!", patterns=own) == {"flattery"}
    assert flags("Yes \U0001f600", patterns=own) == {"emoji"}
    assert flags("y" * 4 + " ok", reference=["x x"], patterns=own) == set()
    assert flags("word " * 4, reference=["x x"], patterns=own) == {"verbosity"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("flattery: []", "must hold phrases and limits, and nothing else"),
        ("- a", "must hold phrases and limits"),
        ("phrases: {x: {where: start}}", "x must have a list of patterns"),
        ("phrases: {x: {patterns: ['a('], where: start}}", "is no regular expression of Python"),
        ("phrases: {x: {patterns: [a], where: end}}", "where must be start or anywhere; got 'end'"),
        ("phrases: {x: {patterns: [a], at_least: 0}}", "at_least must be a whole number above 0"),
        ("phrases: {x: {patterns: [a], colour: red}}", "got colour"),
        ("limits: {length: 3}", "limits must be among"),
        ("limits: {verbosity_ratio: no}", "verbosity_ratio must be a number above 0; got False"),
    ],
)
def test_own_file_with_another_layout_is_refused(
    tmp_path: pathlib.Path, text: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load_patterns(write(tmp_path, text))


# Over checkpoints -------------------------------------------------------------------------------


@pytest.fixture
def checkpoints(tmp_path: pathlib.Path) -> pathlib.Path:
    folder = tmp_path / "generations"
    for step, (length, opener) in {0: (20, ""), 10: (30, ""), 20: (70, "Great question! ")}.items():
        words = " ".join(f"word{i}" for i in range(length))
        write_generations(
            folder / f"generations-{step:06d}.jsonl", generations(words, opener + words)
        )
    return folder


def test_folder_of_a_training_is_compared_with_its_beginning(checkpoints: pathlib.Path) -> None:
    report = check_files([checkpoints])
    assert report.names == ("0", "10", "20")
    assert [each.counts["verbosity"] for each in report.reports] == [0, 0, 2]
    assert [each.counts["flattery"] for each in report.reports] == [0, 0, 1]


def test_files_are_named_and_take_a_reference(checkpoints: pathlib.Path) -> None:
    first, _, last = sorted(checkpoints.iterdir())
    other = last.rename(checkpoints / "mine.jsonl")
    assert check_files([other], reference=first).reports[0].counts["verbosity"] == 2
    assert check_files([other]).names == ("mine",)
    assert "verbosity" not in check_files([other]).reports[0].counts
    (checkpoints / "b").mkdir()
    copy = checkpoints / "b" / "mine.jsonl"
    copy.write_bytes(other.read_bytes())
    assert check_files([other, copy]).names == (str(other)[:-6], str(copy)[:-6])


def test_folder_without_generations_is_refused(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match=r"must hold files generations-STEP\.jsonl"):
        check_files([tmp_path])


def test_checkpoints_whose_texts_are_all_empty_are_drawn(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("matplotlib", reason="the command draws a plot")
    before, last = tmp_path / "generations-000000.jsonl", tmp_path / "generations-000010.jsonl"
    write_generations(before, generations("It is four.", "It is six."))
    write_generations(last, generations("", ""))
    report = check_files([tmp_path])
    assert report.reports[-1].reference_characters == 10.5
    for each in (report, check_files([last])):
        draw(each, tmp_path / "plot.png")
        assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_command_prints_the_counts_and_draws_them(
    checkpoints: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib", reason="the command draws a plot")
    plot = tmp_path / "plot.png"
    assert cli.main(["pathologies", str(checkpoints), "--plot", str(plot)]) == 0
    shown = capsys.readouterr().out
    assert "step" in shown
    assert "1: Great question" in shown
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert cli.main(["pathologies", str(checkpoints), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [each["counts"]["flattery"] for each in report["checkpoints"]] == [0, 0, 1]
