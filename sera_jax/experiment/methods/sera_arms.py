"""The arms of SeRA: the method, its ablations and its controls, each as what it changes."""

from __future__ import annotations

import dataclasses
from typing import Any

from sera_jax.config import SeraGroup
from sera_jax.evaluation import look
from sera_jax.evaluation.look import ArmLook
from sera_jax.experiment.method import Arm

# Candidates are ranked by their mean log-prob, whatever the group says of its ranking.
_BY_LIKELIHOOD: dict[str, Any] = {"judge": "policy", "likelihood_weight": 1.0, "ranking_reduction": "mean"}
# What we recommend: studies/embedded_plane.py and embedded_gentle.py say why.
RECOMMENDED: dict[str, Any] = {**_BY_LIKELIHOOD, "bootstrap_from": "policy"}
_NO_SELECTION: dict[str, Any] = {"selection": "none", "threshold": None}
_NO_BOOTSTRAP: dict[str, Any] = {"bootstrap_fraction": 0.0}
_PLAIN: dict[str, Any] = {**_NO_SELECTION, **_NO_BOOTSTRAP, "curriculum": "none"}
# A control whose judge is another keeps out of its pairs what reads the policy's own reward.
OF_THE_REWARD = ("min_margin", "agreement", "length_alpha")
DEFAULTS = SeraGroup()
_NO_REWARD = {field: getattr(DEFAULTS, field) for field in OF_THE_REWARD}
# Tol's muted, for arms beyond the palette
_WINE, _TEAL, _SAND, _INDIGO, _OLIVE = "#882255", "#44AA99", "#DDCC77", "#332288", "#999933"
SMOOTHING = 0.1  # of the noise-aware arms where nobody says how many labels are flipped
# An arm is `sera` with these fields of its group changed.
ARMS = {
    "sera": Arm("the method", ArmLook("SeRA", look.VERMILION, "o"), {}),
    "sera_recommended": Arm(
        "the method with the settings that we recommend", ArmLook("SeRA, recommended", look.BLACK, "X"), RECOMMENDED
    ),
    "sera_anchored": Arm(
        "`sera_recommended` with an NLL anchor in its loss", ArmLook("SeRA, anchored", _OLIVE, "8"), RECOMMENDED
    ),
    "daa": Arm(
        "the direct alignment loss alone, for as many updates",
        ArmLook("DAA alone", look.BLUE, "s"),
        _PLAIN,
    ),
    "cdpo": Arm(
        "DPO alone that expects the share of flipped labels, for as many updates",
        ArmLook("cDPO alone", _SAND, ">"),
        _PLAIN,
    ),
    "robust_dpo": Arm(
        "robust DPO alone, told the share of flipped labels, for as many updates",
        ArmLook("robust DPO alone", _INDIGO, "p"),
        _PLAIN,
    ),
    "curriculum": Arm(
        "all offline pairs, in later rounds from large margins to small",
        ArmLook("curriculum", look.BROWN, "h"),
        {**_NO_SELECTION, **_NO_BOOTSTRAP, "curriculum": "easy_to_hard"},
    ),
    "random": Arm(
        "the same pipeline with random choices of the same size",
        ArmLook("random selection", look.GREEN, "^"),
        {"selection": "random", "threshold": None},
    ),
    "random_pairing": Arm(
        "the method with chance as the judge of candidates",
        ArmLook("random pairing", look.SKY, "P"),
        {"judge": "chance", **_NO_REWARD},
    ),
    "oracle_pairing": Arm(
        "the method with the gold reward as the judge of candidates",
        ArmLook("oracle pairing", look.YELLOW, "*"),
        {"judge": "gold", **_NO_REWARD},
    ),
    "selection_only": Arm("no pairs of its own making", ArmLook("selection_only", look.PURPLE, "D"), _NO_BOOTSTRAP),
    "bootstrap_only": Arm("all offline pairs kept", ArmLook("bootstrap_only", look.ORANGE, "v"), _NO_SELECTION),
    "bootstrap_only_likelihood": Arm(
        "all offline pairs kept, candidates ranked by their mean log-prob",
        ArmLook("bootstrap_only, likelihood", _WINE, "<"),
        {**_NO_SELECTION, **_BY_LIKELIHOOD, "bootstrap_from": "policy"},
    ),
    "sft_likelier_of_4": Arm(
        "all offline pairs kept, and the likeliest against the least likely of four answers of the SFT model",
        ArmLook("SFT's likelier of 4", _TEAL, "d"),
        {**_NO_SELECTION, **_BY_LIKELIHOOD, "bootstrap_from": "sft", "num_samples": 4},
    ),
}

# Arms that have a loss of their own, with `label_smoothing`: the baselines that know of the noise.
NOISE_AWARE = {"cdpo": "dpo", "robust_dpo": "robust"}
# And those whose loss has an NLL anchor of this weight, where neither it nor the config gives one; for training that is
# not short: studies/embedded_anchor.py and embedded_anchor_gentle.py say why.
ANCHORED = {"sera_anchored": 0.2}


def settings_of(sera: SeraGroup, arm: str) -> SeraGroup:
    """The group as an arm has it."""
    return dataclasses.replace(sera, **ARMS[arm].how)
