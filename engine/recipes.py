"""Recipes: defaults of the settings of trainings beneath what the user sets, and numbers for what is left to `auto`.

A recipe applies where flags are parsed, so that the command `config` shows its values and every flag overrides them.
Epochs and batch size may be 0 for auto: they depend on the number of images, which is known once a worker has read the
data. A run folder holds only numbers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any, Literal

from engine.config import (
    Recipe,
    SearchConfig,
    config_from_dict,
    config_to_dict,
    flatten,
    is_library_model,
    left_to_auto,
)
from engine.spaces.load import load_space

# What differs from the defaults of SearchConfig, which are the recipe `scratch`; dotted names as in flags.
FINETUNE: dict[str, Any] = {
    "teacher_epochs": 0,
    "batch_size": 0,
    "low.fraction": Fraction(1, 3),
    "low.epochs": 0,
    "high.epochs": 0,
    "high.kd_loss": "kd",
    "label_smoothing": 0.1,
    "optimizer": "adamw",
    "lr": 1e-3,
    "weight_decay": 0.05,
    "warmup_fraction": 0.1,
    "min_crop_area": 0.35,
}
DEFAULTS: dict[Recipe, dict[str, Any]] = {"scratch": {}, "finetune": FINETUNE}
# Epochs of fine-tuning on REFERENCE images. On n images it takes sqrt(REFERENCE / n) times as many, within a factor of
# LIMIT: fewer images need more passes, but fewer steps.
FINETUNE_EPOCHS = {"teacher": 15, "low": 2, "high": 8}
REFERENCE, LIMIT = 800, 4.0
# Epochs of the last training of the winner, relative to those of full fidelity.
FINAL: dict[Recipe, float] = {"scratch": 2.0, "finetune": 2.5}
# The largest batches that are chosen, and the least number of batches in an epoch.
BATCH_SIZE: dict[Recipe, int] = {"scratch": 64, "finetune": 32}
MIN_STEPS: dict[Recipe, int] = {"scratch": 1, "finetune": 4}


def recipe_of(config: SearchConfig) -> Literal["finetune", "scratch"]:
    """The recipe in effect: auto is finetune where networks inherit pretrained weights."""
    if config.recipe != "auto":
        return config.recipe
    return "finetune" if load_space(config.space).start is not None else "scratch"


def recipe_values(config: SearchConfig) -> dict[str, Any]:
    """What the recipe in effect makes of the defaults of SearchConfig; dotted names as in flags.

    The epochs of a teacher that is fine-tuned are left to auto, whatever the recipe of the students.
    """
    return {**({"teacher_epochs": 0} if fine_tunes_teacher(config) else {}), **DEFAULTS[recipe_of(config)]}


def default_config(config: SearchConfig) -> SearchConfig:
    """The configuration that has the default of every setting that a recipe may change, given those that decide it."""
    values = _with(config_to_dict(SearchConfig()), recipe_values(config))
    return config_from_dict({**values, "space": config.space, "recipe": config.recipe})


def fine_tunes_teacher(config: SearchConfig) -> bool:
    """Whether the teacher of a run starts from pretrained weights."""
    largest_is_pretrained = config.teacher == "auto" and load_space(config.space).start is not None
    return not config.from_scratch and (is_library_model(config.teacher) or largest_is_pretrained)


def teacher_config(config: SearchConfig, fine_tuned: bool) -> SearchConfig:
    """The configuration that a teacher is trained with: that of the students, unless only the teacher is fine-tuned.

    The number of epochs is the same in both.
    """
    if not fine_tuned or recipe_of(config) == "finetune":
        return config
    own = {name: value for name, value in FINETUNE.items() if "." not in name and value != 0}
    return dataclasses.replace(config, **own, batch_size=min(config.batch_size, BATCH_SIZE["finetune"]))


def resolve(config: SearchConfig, images: int, recorded: Mapping[str, Any] | None = None) -> SearchConfig:
    """The configuration with a number in place of each 0 for auto, given the number of training images.

    `recorded` is the configuration of an earlier call for the same run, as in its config.yaml; its numbers win.
    """
    before, values = dict(flatten(dict(recorded or {}))), config_to_dict(config)
    found, auto = _automatic(config, images), left_to_auto(config)
    return config_from_dict(_with(values, {name: before.get(name) or found[name] for name in auto}))


def _automatic(config: SearchConfig, images: int) -> dict[str, int]:
    """Numbers for all settings that may be auto, by dotted name."""
    recipe = recipe_of(config)
    teacher: Recipe = "finetune" if recipe == "finetune" or fine_tunes_teacher(config) else "scratch"
    high = config.high.epochs or _epochs("high", recipe, images)
    return {
        "teacher_epochs": _epochs("teacher", teacher, images),
        "low.epochs": _epochs("low", recipe, images),
        "high.epochs": high,
        "final.epochs": round(FINAL[recipe] * high),
        "batch_size": min(BATCH_SIZE[recipe], 2 ** int(math.log2(max(2, images // MIN_STEPS[recipe])))),
    }


def _epochs(name: str, recipe: Recipe, images: int) -> int:
    if recipe == "finetune":
        share = min(max(math.sqrt(REFERENCE / images), 1 / LIMIT), LIMIT)
        return max(1, round(share * FINETUNE_EPOCHS[name]))
    plain = SearchConfig()
    return {"teacher": plain.teacher_epochs, "low": plain.low.epochs, "high": plain.high.epochs}[name]


def _with(values: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Nested values with those of dotted names replaced."""
    changed = {key: dict(value) if isinstance(value, dict) else value for key, value in values.items()}
    for name, value in changes.items():
        section, dot, key = name.rpartition(".")
        (changed[section] if dot else changed)[key] = value
    return changed
