"""Files as other programs leave them: byte order marks, line ends, broken rows, other endings."""

from __future__ import annotations

import csv
import datetime
import json
import pathlib

import pytest
from fusedpo.tools.formats import FormatError, PreferencePair, read_rows, write_records

ROWS = [
    {"prompt": "2+2?", "chosen": " 4", "rejected": " 5"},
    {"prompt": "A\u2028B\x85C\nD", "chosen": '\u00e9, "\U0001f600"', "rejected": " NA"},
]
PAIRS = [PreferencePair(**row) for row in ROWS]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def read(path: pathlib.Path, content: bytes | str) -> tuple[list[PreferencePair], list[int]]:
    """The pairs in a file with this content, and their lines; nothing may be wrong with it."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    loaded = read_rows(path)
    assert loaded.problems == []
    return [row.value for row in loaded.rows], [row.line for row in loaded.rows]


@pytest.mark.parametrize(
    ("content", "lines"),
    [
        (LINES, [1, 2]),
        ("\ufeff" + LINES, [1, 2]),
        (LINES.replace("\n", "\r\n"), [1, 2]),
        (LINES.removesuffix("\n"), [1, 2]),
        (LINES.replace("\n", "\n\n  \n"), [1, 4]),
    ],
    ids=["plain", "byte order mark", "CRLF", "no end of line", "empty lines"],
)
def test_json_lines_are_cut_at_line_feeds_alone(
    content: str, lines: list[int], tmp_path: pathlib.Path
) -> None:
    assert read(tmp_path / "a.jsonl", content) == (PAIRS, lines)
    assert read(tmp_path / "a.json", content) == (PAIRS, lines)  # as many call them


def test_a_json_list_is_read_with_the_lines_of_its_rows(tmp_path: pathlib.Path) -> None:
    text = json.dumps(ROWS, ensure_ascii=False, indent=2)
    assert read(tmp_path / "a.json", text) == (PAIRS, [2, 7])
    assert read(tmp_path / "a.json", "\ufeff\n" + text.replace("\n", "\r\n")) == (PAIRS, [3, 8])
    assert read(tmp_path / "a.json", json.dumps(ROWS)) == (PAIRS, [1, 1])


def test_csv_keeps_texts_as_they_are_and_knows_their_lines(tmp_path: pathlib.Path) -> None:
    text = '\ufeffprompt,chosen,rejected\r\n"A\nB",42,NA\r\n\r\n"say ""x""",true,\r\n'
    assert read(tmp_path / "a.csv", text) == (
        [PreferencePair("A\nB", "42", "NA"), PreferencePair('say "x"', "true", "")],
        [2, 5],
    )


def test_csv_has_texts_of_any_length(tmp_path: pathlib.Path) -> None:
    long = "x" * 200_000
    pairs, _ = read(tmp_path / "a.csv", f"prompt,chosen,rejected\n{long},b,c\n")
    assert pairs[0].prompt == long


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet"])
def test_what_is_written_is_read_again(name: str, tmp_path: pathlib.Path) -> None:
    write_records(ROWS, tmp_path / name)
    assert [row.value for row in read_rows(tmp_path / name).rows] == PAIRS


def test_a_broken_row_is_a_problem_with_its_line_and_the_others_are_read(
    tmp_path: pathlib.Path,
) -> None:
    path = tmp_path / "a.jsonl"
    good = LINES.split("\n")[0].encode()
    path.write_bytes(b"\n".join([good, b'{"prompt": ', b"[1, 2]", b'{"prompt": "\xff"}', good]))
    loaded = read_rows(path)
    assert [row.line for row in loaded.rows] == [1, 5]
    assert [(problem.file, problem.line) for problem in loaded.problems] == [
        (str(path), line) for line in (2, 3, 4)
    ]
    reasons = [problem.reason for problem in loaded.problems]
    assert reasons[0] == "must be JSON; Expecting value at character 12"
    assert reasons[1] == "must be a JSON object; got [1, 2]"
    assert reasons[2] == "must be UTF-8; byte 0xff at 12 is not"


def test_a_row_of_another_width_is_a_problem(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("prompt,chosen,rejected\na,b,c\na,b\n")
    loaded = read_rows(path)
    assert len(loaded.rows) == 1
    assert [(p.line, p.reason) for p in loaded.problems] == [
        (3, "must have 3 cells, as the first line; got 2")
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "must have at least one row; got none"),
        ("a.jsonl", b"\n \n", "must have at least one row; got none"),
        ("a.json", b"[]", "must have at least one row; got none"),
        ("a.csv", b"", "must have at least one row; got none"),
        ("a.csv", b"prompt,chosen,rejected\n", "must have at least one row; got none"),
        ("a.jsonl", b"{\n", "a.jsonl:1: must be JSON"),
        ("a.jsonl", LINES.encode("utf-16"), "must be UTF-8; it begins as UTF-16"),
        ("a.json", LINES.encode("utf-16"), "must be UTF-8; it begins as UTF-16"),
        ("a.json", b'[\n{"prompt": "\xff"}]', "a.json:2: must be UTF-8; byte 0xff"),
        ("a.json", b'[{"a": 1}\n{"a": 2}]', "a.json:2: must be JSON; a comma or ] must follow"),
        ("a.json", b'[{"a": 1},\n', "a.json:2: must be JSON"),
        ("a.json", b"[{}]\n{}", "a.json:1: must be JSON; something follows the list"),
        ("a.json", b'{"data": [{}]}', "If data holds the rows, keep its list alone in the file"),
        ("a.json", b'{\n"data": [{"a": 1}]\n}', "If data holds the rows, keep its list alone"),
        ("a.csv", b"prompt,chosen,rejected,prompt\na,b,c,d\n", "names; got 'prompt' twice"),
        (
            "a.json",
            b"[{},\n" + b"[" * 100_000,
            "a.json:2: must be JSON that can be read; it is nest",
        ),
        ("a.json", b'[{"a": ' + b"1" * 5_000 + b"}]", "a.json:1: must have integers of fewer"),
        ("a.csv", b"prompt,chosen\n\xff,b\n", "must be UTF-8"),
        ("a.csv", b'prompt,chosen,rejected\n"a\n', "must be CSV; unexpected end of data"),
        ("a.parquet", b"PAR1", "must be Parquet"),
        ("a.txt", b"a", "must end in .jsonl, .json, .csv, .parquet; got 'a.txt'"),
        ("a.jsonl.gz", b"a", "got 'a.jsonl.gz'"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused(
    name: str, content: bytes, message: str, tmp_path: pathlib.Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FormatError) as refused:
        read_rows(tmp_path / name)
    assert message in str(refused.value)


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv", ".parquet"])
def test_a_missing_file_is_told(ending: str, tmp_path: pathlib.Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"missing{ending}"):
        read_rows(tmp_path / f"missing{ending}")


def test_a_row_that_json_would_read_in_two_ways_or_not_at_all_is_a_problem(
    tmp_path: pathlib.Path,
) -> None:
    good = LINES.split("\n")[0]
    path = tmp_path / "a.jsonl"
    broken = [
        '{"prompt": "a", "prompt": "b", "chosen": "c", "rejected": "d"}',
        '{"prompt": [{"role": "user", "role": "system", "content": "b"}]}',
        "[" * 100_000,
        '{"id": ' + "1" * 5_000 + "}",
        '{"score": NaN}',
    ]
    path.write_text("\n".join([*broken, good]))
    loaded = read_rows(path)
    assert [row.line for row in loaded.rows] == [6]
    assert [(problem.line, problem.reason) for problem in loaded.problems] == [
        (1, "must have each name once; got 'prompt' twice"),
        (2, "must have each name once; got 'role' twice"),
        (3, "must be JSON that can be read; it is nested too deeply"),
        (4, "must have integers of fewer digits; one has thousands"),
        (5, "must be JSON, which has no NaN; write null"),
    ]


def test_one_object_over_several_lines_is_one_row(tmp_path: pathlib.Path) -> None:
    assert read(tmp_path / "a.json", "\n" + json.dumps(ROWS[0], indent=2)) == (PAIRS[:1], [2])


def test_csv_cells_with_messages_are_conversations(tmp_path: pathlib.Path) -> None:
    prompt = [{"role": "user", "content": 'say "x"'}]
    chosen, rejected = ([{"role": "assistant", "content": text}] for text in ("x", "[y]"))
    with (tmp_path / "a.csv").open("w", newline="") as file:
        cells = csv.writer(file)
        cells.writerow(["prompt", "chosen", "rejected"])
        cells.writerow([json.dumps(each) for each in (prompt, chosen, rejected)])
    loaded = read_rows(tmp_path / "a.csv")
    assert loaded.form == "conversational"
    assert loaded.rows[0].value == PreferencePair(prompt, chosen, rejected)
    text = 'prompt,chosen,rejected\n[1],{},"[{""a"": 1}]"\n'
    assert read(tmp_path / "b.csv", text)[0] == [PreferencePair("[1]", "{}", '[{"a": 1}]')]


def test_csv_cells_with_a_history_are_turns_and_an_empty_one_is_none(
    tmp_path: pathlib.Path,
) -> None:
    text = 'instruction,history,output\na,,b\nc,"[[""d"", ""e""]]",f\n'
    (tmp_path / "a.csv").write_text(text)
    loaded = read_rows(tmp_path / "a.csv")
    assert loaded.problems == []
    assert [len(row.value.prompt) for row in loaded.rows] == [1, 3]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet"])
def test_columns_that_only_later_rows_have_are_written(name: str, tmp_path: pathlib.Path) -> None:
    rows = [ROWS[0], {**ROWS[1], "id": 7}, {"score": 0.5, **ROWS[0]}]
    write_records(rows, tmp_path / name)
    read_again = [row.record for row in read_rows(tmp_path / name).rows]
    assert [{k: v for k, v in row.items() if v is not None} for row in read_again] == rows
    if name == "a.parquet":
        assert list(read_again[0]) == ["prompt", "chosen", "rejected", "id", "score"]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("a.jsonl", "a\ud83d", "JSON: 'a\\ud83d' ("),
        ("a.jsonl", float("nan"), "JSON: nan (Out of range float"),
        ("a.json", datetime.date(2020, 1, 2), "JSON: datetime.date(2020, 1, 2) (Object of type"),
        ("a.json", b"a", "JSON: b'a' (Object of type bytes"),
        ("a.parquet", "a\ud83d", "Parquet: 'a\\ud83d' ("),
        ("a.parquet", ["list"], "Parquet: ['list'] ("),
    ],
)
def test_what_a_file_cannot_hold_is_told_with_its_row_and_column(
    name: str, value: object, message: str, tmp_path: pathlib.Path
) -> None:
    rows = [{"note": "text"}, {"note": None}, {"note": value}, {"note": "text"}]
    with pytest.raises(FormatError) as refused:
        write_records(rows, tmp_path / name)
    told = str(refused.value)
    assert told.startswith("row 3: the column note cannot be written as " + message)
    assert "leave the column out, or try ." in told
    assert list(tmp_path.iterdir()) == []
