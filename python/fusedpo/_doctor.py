"""What was built, what is loaded, which path each device and dtype takes; a remedy for each no.

`examine` gathers facts into one JSON-able dict, `render` turns it into text. Needs torch and numpy
only; TRL and its friends are looked up by their metadata, never imported.
"""

from __future__ import annotations

import json
import platform
import sys
from importlib import metadata
from typing import Any

import torch

import fusedpo
from fusedpo import _load
from fusedpo._bf16 import slow_bf16

_DTYPES = {
    "fp32": torch.float32,
    "fp64": torch.float64,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
# Public functions by the operator that serves them; None: plain torch on every device.
_FUNCTIONS: dict[str, str | None] = {
    "token_logps": "token_logps",
    "linear_token_logps": "linear_token_logps",
    "pair_logps": None,
    "preference_loss": "preference_loss",
    "unpaired_loss": "unpaired_loss",
}
_CRC_CHECK = (b"123456789", 0xE3069283)  # the check value that defines CRC-32C
_REFERENCE = "torch reference"


def examine() -> dict[str, Any]:
    """Gathers everything the report shows."""
    versions = _versions()
    report: dict[str, Any] = {
        "fusedpo": fusedpo.__version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "built": _load.BUILD or None,
        "loaded": {kind: _load.native(kind) for kind in ("cpu", "cuda")},
        "why_not": {kind: _load.why_not(kind) for kind in ("cpu", "cuda")},
        "cpu": _cpu_info(),
        "cuda": _load.cuda_versions(),
        "devices": _devices(),
        "paths": _paths(),
        "checks": _checks(),
        "versions": versions,
    }
    report["broken"] = _broken(report)
    report["remedies"] = _remedies(report)
    return report


def _cpu_info() -> dict[str, str] | None:
    if not _load.native("cpu"):
        return None
    info: dict[str, str] = json.loads(torch.ops.fusedpo.cpu_info())
    return info


def _devices() -> list[dict[str, str]]:
    devices = [{"device": "cpu", "name": platform.processor() or platform.machine()}]
    if torch.cuda.is_available():
        devices += [
            {"device": f"cuda:{i}", "name": torch.cuda.get_device_name(i)}
            for i in range(torch.cuda.device_count())
        ]
    return devices


def _paths() -> list[dict[str, str]]:
    """One row for each device and dtype: what serves each public function there."""
    cpu = _cpu_info()
    rows = []
    for device in _devices():
        kind = device["device"].split(":")[0]
        for dtype in _DTYPES:
            row = {"device": device["device"], "dtype": dtype}
            for function, operator in _FUNCTIONS.items():
                row[function] = _path(operator, kind, dtype, cpu)
            rows.append(row)
    return rows


def _path(operator: str | None, kind: str, dtype: str, cpu: dict[str, str] | None) -> str:
    if operator is None or not _load.native(kind):
        return _REFERENCE
    if kind == "cuda":
        return "CUDA"
    # Where the GEMM has no fast path for a half type, its tiles are widened to fp32 first.
    widened = {"fp16", "bf16"} if cpu and cpu["bf16_gemm"] == "widened" else {"fp16"}
    if operator == "linear_token_logps" and dtype in widened:
        return "C++, widened tiles"
    return "C++"


def _checks() -> dict[str, str]:
    """Runs what is loaded on a tiny input: "ok", or what went wrong."""
    checks: dict[str, str] = {}
    if not _load.native("cpu"):
        return checks
    from fusedpo import _store

    data, expected = _CRC_CHECK
    found = _store.crc32c(data)
    checks["_store.crc32c"] = "ok" if found == expected else f"got {found:#x}, not {expected:#x}"
    kinds = {"cpu": "operators"}
    if torch.cuda.is_available() and _load.native("cuda"):
        kinds["cuda"] = "CUDA operators"
    for kind, operators in kinds.items():
        for name, dtype in _DTYPES.items():
            try:
                checks[f"{operators} {name}"] = _compare_with_reference(kind, dtype)
            except Exception as e:
                checks[f"{operators} {name}"] = f"{type(e).__name__}: {e}"
    return checks


def _compare_with_reference(kind: str, dtype: torch.dtype) -> str:
    """Both log-prob functions on 4 rows, against the fp64 reference."""
    hidden = torch.linspace(-1.0, 1.0, 12, device=kind).reshape(4, 3).to(dtype)
    weight = torch.linspace(-2.0, 2.0, 21, device=kind).reshape(7, 3).to(dtype)
    labels = torch.tensor([0, 6, -100, 3], device=kind)
    logits = hidden.double() @ weight.double().T
    exact = fusedpo.reference.token_logps(logits, labels).logps
    rounded = fusedpo.reference.token_logps(logits.to(dtype).double(), labels).logps
    difference = max(
        (fusedpo.linear_token_logps(hidden, weight, labels).logps - exact).abs().max().item(),
        (fusedpo.token_logps(logits.to(dtype), labels).logps - rounded).abs().max().item(),
    )
    # Logits of size 4 rounded once to the dtype, then summed: a few units of its precision.
    bound = 16 * torch.finfo(dtype).eps
    return "ok" if difference <= bound else f"off by {difference:.2g}, more than {bound:.2g}"


def _version_of(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _versions() -> list[dict[str, str | None]]:
    """Installed packages; `problem` is None for a supported version."""
    # The package fusedpo.trl imports no TRL; imported here because `import fusedpo` needs it not.
    from fusedpo.trl import versions as trl_versions

    torch_problem = None
    if _load.torch_too_old():
        torch_problem = f"torch {torch.__version__} is too old. Upgrade: pip install 'torch>=2.10'"
    rows: list[dict[str, str | None]] = [
        {
            "package": "torch",
            "version": torch.__version__,
            "supported": ">= 2.10",
            "problem": torch_problem,
        }
    ]
    trl = _version_of("trl")
    missing = "TRL is not installed; fusedpo.trl needs it: pip install 'fusedpo[trl]'"
    if sys.version_info < (3, 11):
        missing = "TRL is not installed, and it needs Python 3.11: use a newer Python"
    supports = {"trl": trl_versions.TRAINER, "trl, for patch_trl": trl_versions.PATCH}
    for package, support in supports.items() if trl else [("trl", trl_versions.TRAINER)]:
        problem = support.problem(trl) or trl_versions.untested(trl) if trl else missing
        rows.append(
            {"package": package, "version": trl, "supported": support.text, "problem": problem}
        )
    rows += [
        {"package": name, "version": _version_of(name), "supported": None, "problem": None}
        for name in ("transformers", "accelerate", "peft", "numpy")
    ]
    return rows


def _broken(report: dict[str, Any]) -> list[str]:
    """What was built but does not work. Something that was never built is not broken."""
    broken = [f"{name}: {result}" for name, result in report["checks"].items() if result != "ok"]
    reason = _load.broken()
    return ([reason] if reason is not None else []) + broken


def _remedies(report: dict[str, Any]) -> list[str]:
    """One sentence for each no: what is missing and what to do about it."""
    remedies = [f"{kind}: {why}" for kind, why in report["why_not"].items() if why is not None]
    remedies += [
        f"{row['package']}: {row['problem']}" for row in report["versions"] if row["problem"]
    ]
    slow = None if _load.torch_too_old() else slow_bf16()
    if slow is not None:
        remedies.append(f"bf16: {slow}; TRL's configurations have it on by default: bf16=False")
    return remedies


def render(report: dict[str, Any]) -> str:
    """The report as text, at most 100 columns wide where nothing forces more."""
    lines = [f"fusedpo {report['fusedpo']}, Python {report['python']}, {report['platform']}", ""]
    lines += [*_render_build(report), "", *_render_paths(report), "", *_render_versions(report), ""]
    if report["broken"]:
        lines += ["broken:"] + [f"  {line}" for line in report["broken"]]
    if report["remedies"]:
        lines += ["what is not there, and what to do:"]
        lines += [f"  {line}" for line in report["remedies"]]
    if not report["broken"]:
        lines += ["nothing is broken"]
    return "\n".join(lines)


def _render_build(report: dict[str, Any]) -> list[str]:
    built = report["built"]
    lines = ["built:   nothing (pure Python)"]
    if built is not None:
        archs = ", ".join(built["cuda_archs"])
        cuda = f"yes, {archs}" if built["cuda"] else f"no ({built['cuda_reason']})"
        lines = [
            f"built:   {built['compiler']}, {built['build_type']}, torch {built['torch_headers']} "
            f"headers, instruction sets {' '.join(built['isas'])}",
            f"         CUDA operators: {cuda}",
        ]
    for kind, loaded in report["loaded"].items():
        lines.append(f"loaded:  {kind + ' operators:':16}{'yes' if loaded else 'no'}")
    if report["cpu"] is not None:
        cpu = report["cpu"]
        lines.append(f"cpu:     instruction set {cpu['isa']}, bf16 GEMM {cpu['bf16_gemm']}")
    if report["cuda"] is not None:
        runtime, driver = (_load.cuda_text(report["cuda"][x]) for x in ("runtime", "driver"))
        serves = f"the driver serves {driver}" if report["cuda"]["driver"] else "no driver"
        lines.append(f"cuda:    runtime {runtime} linked in, {serves}")
    for name, result in report["checks"].items():
        lines.append(f"checked: {name}: {result}")
    return lines


def _render_paths(report: dict[str, Any]) -> list[str]:
    names = ["device", "dtype", *_FUNCTIONS]
    return _table([names, *([row[name] for name in names] for row in report["paths"])])


def _render_versions(report: dict[str, Any]) -> list[str]:
    rows = [["package", "found", "supported", ""]]
    for row in report["versions"]:
        verdict = "no" if row["problem"] else ("yes" if row["supported"] else "")
        supported = row["supported"] or "as TRL asks"
        rows.append([row["package"], row["version"] or "not found", supported, verdict])
    return _table(rows)


def _table(rows: list[list[str]]) -> list[str]:
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
