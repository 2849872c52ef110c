"""`import orpo_kernels` and the help of the command line do without torch; every public name is there all the same."""

from __future__ import annotations

import importlib

import pytest

from .processes import python

COMMANDS = ("", "inspect", "train", "evaluate", "sweep", "compare", "plan", "doctor")


def test_help_does_not_import_torch():
    pytest.importorskip("typer")
    code = f"""
import sys
from orpo_kernels.app.cli import main
for command in {COMMANDS}:
    assert main([*command.split(), "--help"]) == 0
    assert "torch" not in sys.modules, command
"""
    shown = python("-c", code)
    assert all(f"orpo-kernels {command}" in shown for command in COMMANDS)


def test_completion_does_not_import_torch():
    pytest.importorskip("typer")
    code = """
import sys
from orpo_kernels.app.cli import main
main()
assert "torch" not in sys.modules
"""
    line = {"COMP_WORDS": "orpo-kernels train --grad", "COMP_CWORD": "2"}
    shown = python("-c", code, _ORPO_KERNELS_COMPLETE="complete_bash", **line)
    assert shown.split() == ["--grad-accum", "--gradient-checkpointing"]


@pytest.mark.parametrize("first", ["", "import orpo_kernels.transformers"])
def test_every_public_name_is_there(first):
    """However the package is entered; `from ... import *` takes them and nothing else."""
    code = f"""
import sys
{first}
import orpo_kernels
assert {bool(first)} or "torch" not in sys.modules
assert set(orpo_kernels.__all__) <= set(dir(orpo_kernels))
assert orpo_kernels.token_logps.__module__ == "orpo_kernels.loss"
names = {{}}
exec("from orpo_kernels import *", names)
assert set(names) - {{"__builtins__"}} == set(orpo_kernels.__all__)
assert names["reference"].orpo_loss is not names["orpo_loss"]
assert not hasattr(orpo_kernels, "no_such_name")
"""
    python("-c", code)


# Names that users import, by where they import them from. One that goes or moves is a line of the CHANGELOG, and works
# for a release, with a warning.
PUBLIC = {
    "orpo_kernels": """ORPOLoss ORPOOutput Plan PreferenceOutput Rows Sparsity backends dialects measured_sparsity
        methods orpo_loss orpo_loss_from_rows plan preference_loss_from_rows reference rows_from_labels token_logps""",
    "orpo_kernels.methods": "CPO DPO Method ORPO SFT SimPO",
    "orpo_kernels.reference": "orpo_loss",
    "orpo_kernels.transformers": """CausalLMORPOOutput CausalLMPreferenceOutput EncoderDecoderCollator LMHead
        ORPOTrainer PackedPairs PreferenceCollator PreferenceTrainer Refusal ShiftRight TokenizedPair
        UnusablePair causal_lm_answers causal_lm_orpo_loss causal_lm_preference_loss freeze_vision
        refuses_shared_prompt resolve_lm_head tokenize_pair tokenize_pairs""",
    "orpo_kernels.transformers.trainer": "ORPOTrainer PreferenceLossMixin PreferenceTrainer",
    "orpo_kernels.trl": "ORPOConfig ORPOTrainer",
    "orpo_kernels.compat.liger": "LigerFusedLinearORPOLoss",
}


@pytest.mark.parametrize("module", PUBLIC)
def test_no_public_name_is_lost(module):
    if module == "orpo_kernels.trl":
        pytest.importorskip("trl.experimental.orpo")
    if ".transformers" in module:
        pytest.importorskip("transformers")
    found = importlib.import_module(module)
    assert not [name for name in PUBLIC[module].split() if not hasattr(found, name)]


# What README, docs, examples and CHANGELOG once gave in a place that it has left. All else that has moved was never in
# them.
MOVED = {
    "orpo_kernels.data": ("load_preferences", "orpo_kernels.app.data"),
    "orpo_kernels.transformers.trainer": ("run_inside", "orpo_kernels.transformers.engines"),
}


@pytest.mark.parametrize("module", MOVED)
def test_what_has_moved_is_found_with_a_warning(module):
    pytest.importorskip("accelerate")
    name, place = MOVED[module]
    with pytest.warns(DeprecationWarning, match=f"{module}.{name} has moved; import {name} from {place}") as seen:
        exec(f"from {module} import {name}", found := {})
    assert found[name] is getattr(importlib.import_module(place), name)
    assert not hasattr(importlib.import_module(module), "no_such_name")
    assert len(seen) == 1
