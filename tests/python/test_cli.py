"""The `fusedpo` command: what it prints, its exit codes, and how it takes being interrupted."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="the command needs the extras")

import fusedpo._precompute.run as run_module
from datasets import load_dataset
from fusedpo import RefStore, cli
from precompute_helpers import Inputs, contents, write_inputs, write_pairs
from trl_helpers import make_pairs, one_thread  # noqa: F401  a fixture

pytestmark = pytest.mark.usefixtures("one_thread")

COMMANDS = ("precompute", "inspect", "verify", "merge", "export", "import", "prune", "doctor")
SCRIPT = pathlib.Path(sys.executable).with_name("fusedpo")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    torch.set_num_threads(1)
    return write_inputs(tmp_path_factory.mktemp("inputs"), rows=20)


@pytest.fixture
def fusedpo(capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Run a command line in this process; returns (exit code, stdout, stderr)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        code = cli.main([str(argument) for argument in arguments])
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return run


@pytest.fixture
def refs(inputs: Inputs, tmp_path: pathlib.Path, fusedpo: Callable[..., Any]) -> pathlib.Path:
    code, _, error = fusedpo(*precompute(inputs, tmp_path / "refs"))
    assert code == 0, error
    return tmp_path / "refs"


def precompute(inputs: Inputs, output: object, *more: object) -> list[object]:
    what = ["precompute", "--model", inputs.model, "--data", inputs.data, "--output", output]
    return [*what, "--autocast", "no", *more]


def as_json(result: tuple[int, str, str]) -> dict[str, Any]:
    code, out, error = result
    assert code == 0, error
    report: dict[str, Any] = json.loads(out)
    return report


def test_help_names_every_command_and_the_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    for word in (*COMMANDS, "Exit codes", "run it again"):
        assert word in text
    for command in COMMANDS:
        assert cli.main([command, "--help"]) == 0
        assert "--json" in capsys.readouterr().out


def test_wrong_usage_is_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["score"], ["precompute"], ["inspect"], ["precompute", "--dtype", "int"]):
        assert cli.main(arguments) == 2
        assert "Usage: fusedpo" in capsys.readouterr().err


def test_every_flag_of_precompute_reaches_it(
    monkeypatch: pytest.MonkeyPatch, inputs: Inputs, fusedpo: Callable[..., Any]
) -> None:
    seen: dict[str, Any] = {}

    def spy(*arguments: Any, **keywords: Any) -> Any:
        seen.update(keywords)
        raise ValueError("enough")

    monkeypatch.setattr("fusedpo.precompute", spy)
    flags = {
        "--split": "s",
        "--ref-adapter": "a",
        "--max-length": "none",
        "--truncation-mode": "keep_end",
        "--dtype": "bfloat16",
        "--autocast": "fp16",
        "--revision": "r",
        "--attn-implementation": "eager",
        "--max-tokens-per-batch": "17",
        "--share-prompts": "never",
        "--verify-sample": "3",
    }
    words = [word for pair in flags.items() for word in pair]
    code, _, error = fusedpo(
        "precompute", "--model", "m", "--data", "d", "--output", "o", "--per-token", *words
    )
    assert (code, error) == (1, "fusedpo precompute: enough\n")
    del seen["progress"]
    assert seen == {
        "split": "s",
        "ref_adapter": "a",
        "max_length": None,
        "truncation_mode": "keep_end",
        "dtype": "bfloat16",
        "autocast": "fp16",
        "revision": "r",
        "attn_implementation": "eager",
        "max_tokens_per_batch": 17,
        "share_prompts": False,
        "verify_sample": 3,
        "per_token": True,
    }


def test_a_store_from_its_making_to_its_pruning(
    inputs: Inputs, refs: pathlib.Path, tmp_path: pathlib.Path, fusedpo: Callable[..., Any]
) -> None:
    code, out, error = fusedpo(*precompute(inputs, refs, "--verify-sample", 4))
    assert code == 0
    assert "were there, 0 were scored" in out
    assert "4 records scored again: largest difference" in out
    assert "records are in the store; 0 tokens to score" in error

    report = as_json(fusedpo("inspect", refs, "--json"))
    records = report["records"]
    assert report["identity"]["scoring"]["dtype"] == "float32"
    text = fusedpo("inspect", refs)[1]
    assert f"{records} records" in text
    assert "scoring.autocast: None" in text

    assert as_json(fusedpo("verify", refs, "--json"))["ok"]
    assert "no problem" in fusedpo("verify", refs)[1]
    before = contents(refs)
    assert as_json(fusedpo("merge", refs, "--json"))["records"] == records
    assert contents(refs) == before

    some = write_pairs(tmp_path / "some.jsonl", make_pairs(20)[:5])
    code, out, error = fusedpo("prune", refs, "--data", some)
    assert code == 0, error
    pruned = contents(refs)
    assert 0 < len(pruned) <= 10 < records
    assert pruned.items() <= before.items()


def test_exported_values_come_back_by_import(
    inputs: Inputs, refs: pathlib.Path, tmp_path: pathlib.Path, fusedpo: Callable[..., Any]
) -> None:
    records = len(contents(refs))
    assert as_json(fusedpo("export", refs, "--output", tmp_path / "records.parquet", "--json")) == {
        "output": str(tmp_path / "records.parquet"),
        "rows": records,
    }
    for name in ("pairs.parquet", "pairs.jsonl"):
        file = tmp_path / name
        code, _, error = fusedpo("export", refs, "--data", inputs.data, "--output", file)
        assert code == 0, error
        rows = load_dataset(
            "json" if name.endswith("jsonl") else "parquet", data_files=str(file), split="train"
        )
        assert rows["chosen"] == [row["chosen"] for row in make_pairs(20)]
        imported = tmp_path / f"from {name}"
        code, out, error = fusedpo(
            "import", imported, "--model", inputs.model, "--data", file, "--autocast", "no"
        )
        assert code == 0, error
        assert "imported 40 values" in out
        assert contents(imported) == pytest.approx(contents(refs), rel=1e-13)
        assert RefStore(imported).identity == RefStore(refs).identity
    code, _, error = fusedpo("export", refs, "--data", inputs.data, "--output", tmp_path / "x.txt")
    assert code == 1
    assert ".parquet or .jsonl" in error


def test_failures_are_one_line_exit_code_1_and_json_where_asked(
    inputs: Inputs, refs: pathlib.Path, tmp_path: pathlib.Path, fusedpo: Callable[..., Any]
) -> None:
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a", "chosen"\n', encoding="utf-8")
    for arguments, message in (
        (precompute(inputs._replace(data=str(tmp_path / "broken.jsonl")), refs), "Error"),
        (("inspect", tmp_path / "nowhere"), "does not exist"),
        (("verify", tmp_path / "nowhere"), "does not exist"),
        (("merge", tmp_path), "holds no store: there is no identity.json"),
        (precompute(inputs._replace(data="nowhere.jsonl"), refs), "nowhere.jsonl"),
        (precompute(inputs, refs, "--dtype", "bfloat16"), "made with another identity"),
    ):
        code, out, error = fusedpo(*arguments, "--json")
        assert code == 1
        assert message in error
        assert message in json.loads(out)["error"]
        assert "Traceback" not in error


def test_a_terminal_that_lacks_characters_stops_nothing(tmp_path: pathlib.Path) -> None:
    row = {"prompt": "2+2?", "chosen": "4", "rejected": "5", "\u00e9\u4e2d": 1}
    (tmp_path / "a.jsonl").write_text(json.dumps(row), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "fusedpo", "convert", "a.jsonl", "b.jsonl", "--to", "kto"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "not carried over: ?? (1 row)" in done.stdout


@pytest.mark.parametrize("length", ["abc", "0", "1.5"])
def test_a_length_that_is_no_number_of_tokens_is_told(
    length: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["lint", "a.jsonl", "--max-length", length]) == 2
    assert 'must be a number of tokens, or "none"' in " ".join(capsys.readouterr().err.split())


def test_damage_is_exit_code_1_with_file_and_offset(
    refs: pathlib.Path, fusedpo: Callable[..., Any]
) -> None:
    (log,) = refs.glob("*.fdlog")
    data = bytearray(log.read_bytes())
    data[len(data) // 2] ^= 1
    log.write_bytes(data)
    code, out, _ = fusedpo("verify", refs, "--json")
    report = json.loads(out)
    assert code == 1
    assert not report["ok"]
    assert report["problems"][0]["file"] == log.name
    assert report["problems"][0]["offset"] > 0
    assert log.name in fusedpo("verify", refs)[1]


def test_missing_extras_are_told_with_the_remedy(
    inputs: Inputs,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    fusedpo: Callable[..., Any],
) -> None:
    monkeypatch.setattr(run_module, "find_spec", lambda name: None if name == "trl" else name)
    code, _, error = fusedpo(*precompute(inputs, tmp_path / "refs"))
    assert code == 1
    assert 'needs trl, which is not installed: pip install "fusedpo[all]"' in error


# The installed command in a process of its own --------------------------------------------------


def start(arguments: list[object], **options: Any) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [str(argument) for argument in arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        **options,
    )


def ignore_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as CI may start us


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_installed_command_and_nothing_scored_is_lost(
    number: signal.Signals, inputs: Inputs, tmp_path: pathlib.Path, fusedpo: Callable[..., Any]
) -> None:
    # So many small batches that it is still at work when the signal comes.
    data = write_pairs(
        tmp_path / "many.jsonl",
        [
            row | {"prompt": f"{row['prompt']} {'the cat ' * (i % 9)}{'a dog ' * (i // 9 % 9)}"}
            for i, row in enumerate(make_pairs(1500))
        ],
    )
    refs = tmp_path / "refs"
    arguments = precompute(inputs._replace(data=data), refs, "--max-tokens-per-batch", 1)
    process = start([SCRIPT, *arguments], preexec_fn=ignore_interrupts)
    deadline = time.monotonic() + 240
    while not [log for log in refs.glob("*.fdlog") if log.stat().st_size > 4000]:
        assert process.poll() is None, process.communicate()[1][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(number)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 128 + number, error[-3000:]
    assert f"stopped by {number.name}" in error
    assert "Traceback" not in error
    kept = RefStore(refs)
    (log,) = kept.files()
    assert log.closed
    assert 0 < len(kept) == log.records
    assert kept.verify().ok
    report = as_json(fusedpo(*precompute(inputs._replace(data=data), refs), "--json"))
    assert report["found"] == len(kept) < report["records"]
    assert report["found"] + report["scored"] == report["records"]


def test_a_disk_that_is_full_is_told_and_keeps_what_was_synced(
    inputs: Inputs, tmp_path: pathlib.Path, fusedpo: Callable[..., Any]
) -> None:
    refs = tmp_path / "refs"
    process = start([sys.executable, "-c", FULL_DISK, *precompute(inputs, refs)])
    out, error = process.communicate(timeout=240)
    assert process.returncode == 1, out + error[-3000:]
    assert "fusedpo precompute: " in error
    assert "Traceback" not in error
    store = RefStore(refs)
    assert store.verify().ok
    report = as_json(fusedpo(*precompute(inputs, refs), "--json"))
    assert 0 < len(store) == report["found"] < report["records"]
    assert report["found"] + report["scored"] == report["records"]


# A limit on the size of files fails writes as a full disk does (Python ignores its signal). It is
# in force with the first append: before that, the data set is cached on disk.
FULL_DISK = """
import resource, sys
import fusedpo._precompute.filling as filling
from fusedpo import cli
from fusedpo.store import StoreWriter

append = StoreWriter.append
filling.SYNC_SECONDS = 0.0

def limited(*arguments, **keywords):
    resource.setrlimit(resource.RLIMIT_FSIZE, (700, 700))
    return append(*arguments, **keywords)

StoreWriter.append = limited
sys.exit(cli.main(sys.argv[1:] + ["--max-tokens-per-batch", "60"]))
"""
