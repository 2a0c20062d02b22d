"""`fusedpo convert`: what is never lost, and arguments that are refused."""

from __future__ import annotations

import errno
import os
import pathlib

import pytest
from convert_cases import (
    PAIR,
    TEXTS,
    values,
    write,
)
from fusedpo.tools.convert import convert
from fusedpo.tools.formats import (
    FormatError,
)


def test_nothing_is_written_where_no_row_can_be(tmp_path: pathlib.Path) -> None:
    source = write(tmp_path / "a.jsonl", [{"prompt": "a", "completion": "b", "label": True}])
    with pytest.raises(FormatError, match=r"no row of .* could be converted.*a.jsonl:1: no compl"):
        convert(source, tmp_path / "b.jsonl", to="hh")
    assert os.listdir(tmp_path) == ["a.jsonl"]


@pytest.mark.parametrize("by", ["name", "link", "hard link"])
def test_the_input_is_never_overwritten(by: str, tmp_path: pathlib.Path) -> None:
    source = write(tmp_path / "a.jsonl", [TEXTS])
    before = source.read_bytes()
    output = source if by == "name" else tmp_path / "b.jsonl"
    if by == "link":
        output.symlink_to(source)
    elif by == "hard link":
        os.link(source, output)
    with pytest.raises(ValueError, match="the output must not be the input"):
        convert(source, output, to="hh")
    assert source.read_bytes() == before


def test_an_old_output_stays_until_the_new_one_is_complete(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "b.jsonl"
    output.write_text("old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            convert([PAIR], output, to="hh")
    assert output.read_text() == "old"
    assert os.listdir(tmp_path) == ["b.jsonl"]
    convert([PAIR], output, to="hh")
    assert values(output) == [PAIR]


def test_an_output_that_is_a_link_stays_one(tmp_path: pathlib.Path) -> None:
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "real.jsonl")
    convert([PAIR], tmp_path / "b.jsonl", to="hh")
    assert (tmp_path / "b.jsonl").is_symlink()
    assert values(tmp_path / "real.jsonl") == [PAIR]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to": "dpo"}, "the form to write must be one of preference, .*got 'dpo'"),
        ({"to": "hh", "form": "dpo"}, "the form must be one of preference, .*got 'dpo'"),
        ({"to": "preference", "template": "x"}, "template must be one of hh, .*got 'x'"),
        ({"to": "sharegpt", "template": "chatml"}, "sharegpt does not take one"),
        ({"to": "unpaired", "template": "hh", "tokenizer": "a"}, "got both"),
    ],
)
def test_wrong_arguments_are_refused(
    options: dict[str, str], message: str, tmp_path: pathlib.Path
) -> None:
    source = write(tmp_path / "a.jsonl", [TEXTS])
    with pytest.raises(ValueError, match=message):
        convert(source, tmp_path / "b.jsonl", **options)


@pytest.mark.parametrize(
    ("output", "kind", "message"),
    [
        ("b.txt", ValueError, "must end in .jsonl, .json, .parquet; got"),
        (
            "folder.jsonl",
            IsADirectoryError,
            "the output must be a file; .*folder.jsonl is a folder",
        ),
        ("no/b.jsonl", FileNotFoundError, "the output's folder must exist; no such folder"),
    ],
)
def test_an_output_that_cannot_be_is_refused_before_anything_is_read(
    output: str, kind: type[Exception], message: str, tmp_path: pathlib.Path
) -> None:
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(kind, match=message):
        convert(tmp_path / "not there.jsonl", tmp_path / output, to="hh")


def test_rows_that_are_no_values_are_refused(tmp_path: pathlib.Path) -> None:
    with pytest.raises(
        TypeError, match=r"got a dict\. from_record\(row, form\) makes one of a row"
    ):
        convert([TEXTS], tmp_path / "a.jsonl", to="hh")


def test_a_tokenizer_whose_folder_is_not_there_is_told(tmp_path: pathlib.Path) -> None:
    source = write(tmp_path / "a.jsonl", [TEXTS])
    missing = str(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=f"no such folder: {missing}"):
        convert(source, tmp_path / "b.jsonl", to="preference", tokenizer=missing)
