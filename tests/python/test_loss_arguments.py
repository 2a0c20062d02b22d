"""What the loss functions refuse, by name, and that the documents list every loss as it is."""

from __future__ import annotations

import math
import pathlib
import re

import fusedpo
import pytest
import torch
from fusedpo import reference
from loss_cases import F_DIVERGENCES, PAIRED, TYPES, UNPAIRED, inputs_of, options_of

# ---- errors -------------------------------------------------------------------------------------


def test_unknown_names_are_answered_with_all_names():
    logps, _ = inputs_of(2)
    with pytest.raises(ValueError, match="got 'dpo'") as caught:
        fusedpo.preference_loss(*logps, loss_type="dpo")
    assert all(name in str(caught.value) for name in PAIRED)
    with pytest.raises(ValueError, match="got 'sigmoid'") as caught:
        fusedpo.unpaired_loss(*logps[:2], torch.tensor([True, False]), loss_type="sigmoid")
    assert all(name in str(caught.value) for name in UNPAIRED)


@pytest.mark.parametrize("module", [fusedpo, reference])
@pytest.mark.parametrize("name", PAIRED)
def test_missing_needs_are_named(name, module):
    logps, needs = inputs_of(2)
    given = {"ref_chosen_logps": logps[2], "ref_rejected_logps": logps[3], **needs}
    for need in TYPES[name].needs:
        others = {k: v for k, v in given.items() if k != need}
        with pytest.raises(ValueError, match=f"{need} must be given with loss_type '{name}'"):
            module.preference_loss(*logps[:2], **others, **options_of(name))
    # and what is not needed may be there
    module.preference_loss(*logps[:2], **given, **options_of(name))


OFF_DEFAULT = {
    "label_smoothing": 0.2,
    "f_divergence_type": "js_divergence",
    "f_alpha_divergence_coef": 0.7,
    "discopop_tau": 0.1,
    "cpo_alpha": 0.3,
    "simpo_gamma": 1.0,
    "alpha": 0.1,
}


@pytest.mark.parametrize("option", OFF_DEFAULT)
@pytest.mark.parametrize("name", PAIRED)
def test_options_are_used_or_refused_by_name(name, option):
    logps, needs = inputs_of(2)
    options = {"loss_type": name, option: OFF_DEFAULT[option]}
    if name == "exo_pair":
        options.setdefault("label_smoothing", 0.1)
    if option == "f_alpha_divergence_coef" and option in TYPES[name].options:
        with pytest.raises(ValueError, match=option):
            fusedpo.preference_loss(*logps, **options, **needs)
        options["f_divergence_type"] = "alpha_divergence"
    if option not in TYPES[name].options:
        with pytest.raises(ValueError, match=f"{option} must be left at"):
            fusedpo.preference_loss(*logps, **options, **needs)
        return
    plain = {k: v for k, v in options.items() if k != option}
    if name == "exo_pair" and option == "label_smoothing":
        plain[option] = 0.1
    got = fusedpo.preference_loss(*logps, **options, **needs).loss
    want = fusedpo.preference_loss(*logps, **plain, **needs).loss
    assert name == "sft" or not torch.equal(got, want)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "robust", "label_smoothing": 0.5}, r"label_smoothing must be in \[0, 0.5\)"),
        ({"loss_type": "exo_pair"}, r"label_smoothing must be in \(0, 1\)"),
        ({"loss_type": "cdpo", "label_smoothing": 1.5}, r"label_smoothing must be in \[0, 1\]"),
        ({"beta": 0.0}, "beta must be > 0"),
        ({"beta": math.inf}, "beta must be finite"),
        ({"loss_type": "discopop", "discopop_tau": -1.0}, "discopop_tau must be > 0"),
        ({"loss_type": []}, "at least one loss"),
        ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]}, "one weight for each"),
        ({"loss_weights": [math.nan]}, "loss_weights must be finite"),
        ({"reduction": "avg"}, "reduction must be one of mean, sum, none"),
        ({"f_divergence_type": "kl"}, "f_divergence_type must be one of"),
        ({"loss_type": "aot", "pair_weights": torch.ones(2).double()}, "pair_weights must be None"),
        ({"pair_weights": torch.ones(3).double()}, r"pair_weights must have shape \[2\]"),
        ({"loss_type": ["sigmoid", "cpo"], "f_divergence_type": "forward_kl"}, "'cpo'"),
    ],
)
def test_values_out_of_range_are_refused(options, message):
    logps, needs = inputs_of(2)
    for module in (fusedpo, reference):
        with pytest.raises(ValueError, match=message):
            module.preference_loss(*logps, **options, **needs)


def test_wrong_types_are_refused():
    logps, _ = inputs_of(2)
    half = [x.bfloat16() for x in logps]
    with pytest.raises(TypeError, match="chosen_logps must be float32 or float64"):
        fusedpo.preference_loss(*half)
    with pytest.raises(TypeError, match="ref_chosen_logps must have the dtype"):
        fusedpo.preference_loss(logps[0], logps[1], logps[2].float(), logps[3])
    with pytest.raises(TypeError, match="beta must be a Python number"):
        fusedpo.preference_loss(*logps, beta=torch.tensor(0.1))
    with pytest.raises(TypeError, match="chosen_lengths must have an integer dtype"):
        fusedpo.preference_loss(*logps, chosen_lengths=torch.ones(2))
    with pytest.raises(TypeError, match="rejected_logps must be a"):
        fusedpo.preference_loss(logps[0], [1.0], *logps[2:])
    with pytest.raises(TypeError, match="labels must be bool"):
        fusedpo.unpaired_loss(*logps[:2], torch.tensor([1, 0]), kl=0.0)
    with pytest.raises(ValueError, match=r"shape \[B\]"):
        fusedpo.preference_loss(*(x[None] for x in logps))


def test_unpaired_options_are_used_or_refused():
    logps, _ = inputs_of(2)
    call = (*logps[:2], torch.tensor([True, False]))
    with pytest.raises(ValueError, match="kl must be given with loss_type 'kto'"):
        fusedpo.unpaired_loss(*call)
    with pytest.raises(ValueError, match="kl must be None with loss_type 'bco'"):
        fusedpo.unpaired_loss(*call, loss_type="bco", kl=0.0)
    with pytest.raises(ValueError, match=r"delta must be left at 0.0 with loss_type 'kto'"):
        fusedpo.unpaired_loss(*call, kl=0.0, delta=0.1)
    with pytest.raises(ValueError, match="kl must be one value"):
        fusedpo.unpaired_loss(*call, kl=torch.zeros(2))


# ---- documentation ------------------------------------------------------------------------------


def test_docs_and_docstrings_name_every_loss_with_its_formula():
    text = (pathlib.Path(__file__).parents[2] / "docs" / "losses.md").read_text(encoding="utf-8")
    rows = re.findall(
        r"^\| `(\w+)` \| `(.+?)` \| (.+?) \| (.+?) \|.* \| (.+?) \|$", text, re.MULTILINE
    )
    table = {name: row for name, *row in rows if name not in F_DIVERGENCES}
    assert list(table) == list(TYPES)
    for name, info in TYPES.items():
        formula, use, needs, source = (cell.replace("\\|", "|") for cell in table[name])
        assert (formula, use, source) == (info.formula, info.use, info.source)
        listed = set(re.findall(r"`(\w+)`", needs))
        assert listed == {need for need in info.needs if "ref_" not in need and need != "labels"}
        function = fusedpo.preference_loss if info.paired else fusedpo.unpaired_loss
        assert re.search(rf"^ +{name} ", function.__doc__ or "", re.MULTILINE), name


def test_loss_types_tell_formula_needs_source_and_use():
    for name, info in fusedpo.loss_types().items():
        assert info.formula, name
        assert info.source, name
        assert info.use, name
    assert TYPES["sft"].needs == ("ref_chosen_logps", "ref_rejected_logps", "chosen_nll")
    assert TYPES["simpo"].needs == ("chosen_lengths", "rejected_lengths")
    assert len(PAIRED) == 24
    assert len(UNPAIRED) == 3
