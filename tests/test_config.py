"""The schema of a run, and configs that earlier versions have stored."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from runtime.checkpoint import check_same_config
from runtime.cli import UserError
from runtime.config import KEYS, OPTIMIZERS, from_stored
from runtime.experiment import load_experiment
from tests.conftest import OPTIMIZERS as RUNS

# The keys of all optimizers, which earlier versions stored for each of them.
OPTIMIZER_KEYS = [key.split(".")[1] for key in KEYS if key.startswith("optimizer.")]


@pytest.mark.parametrize("run", RUNS)
def test_configs_of_earlier_versions_are_read(run: str, experiment: Path) -> None:
    config = load_experiment(experiment, run)
    stored = config.model_dump()
    stored["optimizer"] = dict.fromkeys(OPTIMIZER_KEYS) | stored["optimizer"]

    assert from_stored(stored) == config
    check_same_config(config, stored)  # a run of an earlier version can be resumed

    stored["optimizer"]["beta1"] = 0.123
    with pytest.raises(UserError, match=r"was started with optimizer.beta1 = 0.123"):
        check_same_config(config, stored)


def test_a_stored_config_with_an_unknown_key_is_refused(experiment: Path) -> None:
    stored = load_experiment(experiment, "lion").model_dump()
    stored["optimizer"]["speed"] = 1.0
    with pytest.raises(ValidationError, match="speed"):
        from_stored(stored)


def test_each_optimizer_has_a_class_with_described_keys() -> None:
    assert set(RUNS) <= OPTIMIZERS.keys()
    assert all(field.description for field in KEYS.values())
    assert "rho" in OPTIMIZERS["sophia-g"].model_fields
    assert "rho" not in OPTIMIZERS["adamw"].model_fields


def test_numbers_that_follow_from_the_config(experiment: Path) -> None:
    adamw, sophia = load_experiment(experiment, "adamw"), load_experiment(experiment, "sophia-g")
    assert adamw.tokens_per_step == 8 * 16
    assert (adamw.hessian_interval, adamw.hessian_batch_size) == (None, 0)
    assert (sophia.hessian_interval, sophia.hessian_batch_size) == (3, 4)
