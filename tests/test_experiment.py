from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from runtime.arguments import parse_command_line
from runtime.cli import UserError
from runtime.config import KEYS
from runtime.config import OPTIMIZERS as SCHEMAS
from runtime.experiment import experiment_name, load_experiment, read_grid, run_names
from tests.conftest import OPTIMIZERS, ROOT

CONFIGS = ROOT / "configs"
EXPERIMENTS = sorted(path for path in CONFIGS.rglob("*.toml") if path.stem != "common")
FOUR = [path for path in EXPERIMENTS if path.stem.startswith(("gpt2_", "quickstart"))]


def name_of(path: Path) -> str:
    return str(path.relative_to(CONFIGS))


PLAN_ROWS = (
    "device",
    "number format",
    "parameters",
    "batch",
    "schedule",
    "memory per rank",
    "checkpoint",
    "data",
    "output",
    "code",
    "start",
)


@pytest.mark.parametrize("path", EXPERIMENTS, ids=name_of)
def test_every_run_of_every_file_passes_dry_run(path: Path, run_train, capsys, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    before = set(ROOT.iterdir())

    for run in run_names(path):
        run_train(path, f"--run={run}", "--dry-run")
        printed = capsys.readouterr().out
        for row in PLAN_ROWS:
            assert row in printed
        assert all(len(values) > 1 for values in read_grid(path, run).values())

    assert set(ROOT.iterdir()) == before


def test_smaller_versions_have_the_runs_of_the_full_size_experiment() -> None:
    for path in EXPERIMENTS:
        scale = path.parent.name
        if scale == "configs":
            assert experiment_name(path) == path.stem
        else:
            original = CONFIGS / path.name
            assert experiment_name(path) == f"{path.stem}-{scale}"
            assert run_names(path) == run_names(original)


@pytest.mark.parametrize("path", FOUR, ids=name_of)
def test_runs_of_a_file_differ_only_in_the_optimizer(path: Path) -> None:
    configs = []
    for run in run_names(path):
        configs.append(load_experiment(path, run).model_dump(exclude={"run", "optimizer"}))

    assert run_names(path) == list(OPTIMIZERS)
    assert all(config == configs[0] for config in configs)
    if path.parent == CONFIGS and path.stem.startswith("gpt2_"):
        assert configs[0]["train"]["batch_size"] * configs[0]["model"]["block_size"] == 491_520
        assert f"train.py configs/{path.name} --run=" in path.read_text()


# ---- Inheritance ---------------------------------------------------------------------------------

OVER = """
base = ["tiny.toml"]
[train]
max_steps = 24
[runs.lion]
[runs.small]
base = "sophia-g"
optimizer.rho = 0.1
[runs.small.grid]
optimizer.lr = [1e-3, 2e-3]
"""
COMMON = """
[train]
warmup_steps = 1
[runs.sophia-g.optimizer]
beta1 = 0.5
rho = 0.3
"""
CPU = """
base = ["../over.toml", "common.toml"]
[train]
max_steps = 6
[runs.small]
optimizer.lr = 5e-3
[runs.small.grid]
optimizer.rho = [1.0, 2.0]
"""


@pytest.fixture
def inherited(experiment: Path) -> Path:
    """Write a file with one base, and in cpu/ a file with two."""
    over = experiment.with_name("over.toml")
    over.write_text(OVER)
    (experiment.parent / "cpu").mkdir()
    (experiment.parent / "cpu/common.toml").write_text(COMMON)
    (experiment.parent / "cpu/over.toml").write_text(CPU)
    return over


def optimizer_of(path: Path, run: str) -> dict[str, Any]:
    return load_experiment(path, run).optimizer.model_dump()


def test_file_inherits_from_its_base(inherited: Path) -> None:
    assert run_names(inherited) == ["lion", "small"]  # only the runs that it lists

    config, optimizer = load_experiment(inherited, "small"), optimizer_of(inherited, "small")
    assert (config.experiment, config.train.max_steps, config.train.warmup_steps) == ("over", 24, 2)
    assert (optimizer["rho"], optimizer["lr"], optimizer["beta1"]) == (0.1, 1e-3, 0.96)
    assert read_grid(inherited, "small") == {"optimizer.lr": ["0.001", "0.002"]}
    assert read_grid(inherited, "lion") == {}


def test_later_bases_override_earlier_ones_and_the_file_overrides_both(inherited: Path) -> None:
    cpu = inherited.parent / "cpu/over.toml"
    assert run_names(cpu) == ["small"]
    config, optimizer = load_experiment(cpu, "small"), optimizer_of(cpu, "small")
    assert config.experiment == "over-cpu"
    assert (config.train.max_steps, config.train.warmup_steps) == (6, 1)
    # beta1 is from common.toml's sophia-g, the run's base; rho is from the run's own table.
    assert (optimizer["beta1"], optimizer["rho"], optimizer["lr"]) == (0.5, 0.1, 5e-3)
    # A grid replaces the inherited one as a whole.
    assert read_grid(cpu, "small") == {"optimizer.rho": ["1.0", "2.0"]}


def test_file_without_runs_has_those_of_its_first_base(inherited: Path) -> None:
    top = inherited.with_name("top.toml")
    top.write_text('base = ["over.toml", "cpu/common.toml"]')
    assert run_names(top) == ["lion", "small"]
    assert read_grid(top, "small") == {"optimizer.lr": ["0.001", "0.002"]}

    top.write_text('base = "over.toml"\n[runs.small]\n')  # a single base needs no list
    assert optimizer_of(top, "small")["rho"] == 0.1


# The text of over.toml and the message.
BAD_BASES = [
    ('base = "none.toml"\n[runs.lion]', "none.toml: cannot read .*; it is a base of .*over.toml"),
    ('base = "over.toml"\n[runs.lion]', "its base over.toml inherits from this file"),
    ('base = "tiny.toml"\n[runs.lion]\nbase = "tiger"', "base = 'tiger' is not another run"),
    ('base = "tiny.toml"\n[runs.lion]\nbase = "lion"', "base = 'lion' is not another run"),
    ('base = "tiny.toml"\n[runs.lion]\nbase = 3', "base = 3 is not another run"),
    ('base = "tiny.toml"\n[runs.lion]\nbase = [1]', "is not another run"),
    ('base = "tiny.toml"\n[runs]\nlion = 3', "no runs"),
    ('base = "tiny.toml"\n[runs]', "no runs"),
    ("base = 3", "base must be a file or a list of files"),
    ('base = "tiny.toml"\n[scales.cpu.train]\nmax_steps = 3', "unknown key scales"),
    (
        'base = "tiny.toml"\n[runs.lion.grid]\noptimizer.lrr = [1]',
        r"unknown key optimizer.lrr in its grid; did you mean optimizer.lr\?",
    ),
    ('base = "tiny.toml"\n[runs.lion.grid]\noptimizer.lr = 1', "must be a list of values"),
    ('base = "tiny.toml"\n[runs.lion.grid]\noptimizer.lr = []', "must be a list of values"),
    ('base = "tiny.toml"\n[runs.lion]\ngrid = 3', "a grid looks like this"),
]


@pytest.mark.parametrize(("text", "says"), BAD_BASES)
def test_bad_bases_and_grids_are_refused(experiment: Path, text: str, says: str) -> None:
    over = experiment.with_name("over.toml")
    over.write_text(text)

    def load() -> None:
        load_experiment(over, "lion")
        read_grid(over, "lion")

    with pytest.raises(UserError, match=says) as error:
        load()
    assert "\n" not in str(error.value)


# ---- The command line ----------------------------------------------------------------------------


def test_name_argument_sets_the_run_folder(experiment: Path) -> None:
    config, _ = parse_command_line([str(experiment), "--run=lion", "--name=lion,seed=2"])
    assert config.run_dir.name == "lion,seed=2"
    for wrong in ("../x", "", "a/b"):
        with pytest.raises(UserError, match="cannot name a folder"):
            parse_command_line([str(experiment), "--run=lion", f"--name={wrong}"])


def test_the_command_line_overrides_the_run_and_the_run_the_file(experiment: Path) -> None:
    command = [str(experiment), "--run=sophia-g"]
    config, flags = parse_command_line(command)
    assert config.train.batch_size == 8
    assert config.optimizer.model_dump()["rho"] == 0.05
    assert flags.resume is False

    arguments = "--optimizer.rho=1e-3 --train.max_steps=1_000 --train.compile=true --data.path=123"
    config, flags = parse_command_line([*command, *arguments.split(), "--resume"])
    assert config.optimizer.model_dump()["rho"] == 1e-3
    assert config.train.max_steps == 1000
    assert config.train.compile is True
    assert config.data.path == "123"
    assert flags.resume is True
    assert json.loads(config.model_dump_json())["optimizer"]["name"] == "sophia-g"


def test_help_lists_every_key_with_its_default(capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_command_line(["--help"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert all(re.search(rf"--{key}[ ,]", printed) for key in KEYS)
    assert "--train.dtype auto|bfloat16|float16|float32" in printed
    assert "--optimizer.update clip|divide|normalize" in printed
    assert "(default: 480)" in printed

    # The keys of each optimizer.
    for name, schema in SCHEMAS.items():
        keys = " ".join(key for key in schema.model_fields if key != "name")
        assert re.search(rf"^  *{name} +{keys}$", printed, re.MULTILINE)


# The arguments, separated by spaces, and the message.
BAD_ARGUMENTS = [
    ("", r"which run\? Add --run=NAME, NAME one of: adamw, lion, sophia-g, sophia-h"),
    ("--run=sofia", "no run named 'sofia'"),
    ("--run=adamw --train.max_step=3", r"unknown argument .*did you mean train.max_steps\?"),
    ("--run=adamw --optimizer.learning_rate=3", r"did you mean optimizer.lr\?"),
    ("--run=adamw --train.max_iters=3", r"did you mean train.max_steps\?"),
    ("--run=adamw --train.max_steps=1.5", "train.max_steps = 1.5 should be a valid integer"),
    ("--run=adamw --resum", r"unknown argument --resum; did you mean resume\?"),
    ("--run=adamw --train.max_steps=many", "train.max_steps = 'many' should be a valid integer"),
    ("--run=adamw --train.max_steps=2.5", "train.max_steps = 2.5 should be a valid integer"),
    ("--run=adamw --train.compile=1", "train.compile = 1 should be true, false or 'auto'"),
    ("--run=adamw --optimizer.lr=-1", "optimizer.lr = -1 should be greater than 0"),
    ("--run=adamw --optimizer.lr=nan", "optimizer.lr = nan should be a finite number"),
    (
        "--run=adamw --train.dtype=int8",
        "train.dtype = 'int8' should be 'auto', 'bfloat16', 'float16' or 'float32'",
    ),
    ("--run=adamw --train.max_steps=3\nfoo=1", "should be a valid integer"),
    ("--run=adamw --train.batch_size=1000000000001", "should be less than or equal to 1000000"),
    ("--run=adamw --train.out_dir=a\0b", "out_dir"),
    ("--run=adamw --optimizer.rho=0.1", "optimizer.rho is not a key of adamw; remove it"),
    ("--run=adamw --optimizer.name=lion", "optimizer.eps is not a key of lion"),
    ("--run=adamw --model.n_head=3", "n_embd 16 is not a multiple of n_head 3"),
    ("--run=sophia-g --optimizer.hessian_batch_size=9", "larger than train.batch_size"),
    ("--run=sophia-g --optimizer.estimator=gnb", "optimizer.estimator is not a key of sophia-g"),
    (
        "--run=sophia-g --optimizer.name=sophia-ablation",
        "optimizer.estimator, optimizer.average, optimizer.update are missing; add them",
    ),
    (
        "--run=adamw --optimizer.name=adahessian",
        "optimizer.hessian_interval, optimizer.hessian_batch_size are missing; add them",
    ),
]


@pytest.mark.parametrize(("arguments", "says"), BAD_ARGUMENTS)
def test_bad_arguments_give_one_line_and_status_2(
    experiment: Path, run_train, capsys, arguments: str, says: str
) -> None:
    split = arguments.split(" ") if arguments else []
    with pytest.raises(SystemExit) as ended:
        run_train(experiment, *split)
    assert ended.value.code == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert printed.count("\n") == 1

    with pytest.raises(UserError, match=says):
        parse_command_line([str(experiment), *split])


# A part of the tiny experiment, what replaces it, the message.
BAD_FILES = [
    (
        "max_steps = 12",
        "max_stepz = 12",
        r"unknown key train.max_stepz; did you mean train.max_steps\?",
    ),
    ("[data]", "[date]", "unknown key date"),
    ("max_steps = 12", 'max_steps = "12"', "train.max_steps = '12' should be a valid integer"),
    ("max_steps = 12", "", "train.max_steps is missing"),
    ("max_steps = 12", "max_steps = = 12", "not valid TOML"),
    ('name = "lion"\nlr = 1e-3', 'name = "lion"', "run lion: optimizer.lr is missing"),
    ('name = "lion"', 'name = "tiger"', "optimizer.name = 'tiger' should be one of adamw, lion"),
    ("[runs.", "[walks.", "unknown key walks"),
    ("[model]", 'experiment = "x"\n[model]', "unknown key experiment"),
    ("[runs.lion.", '[runs."../lion".', "cannot name a folder"),
    ("max_steps = 12", "max_steps = " + 5000 * "9", "not valid TOML"),
    ("[model]\n", "", "unknown key n_layer"),
]


@pytest.mark.parametrize(("old", "new", "says"), BAD_FILES)
def test_bad_experiment_files_are_refused(experiment: Path, old: str, new: str, says: str) -> None:
    text = experiment.read_text()
    assert old in text
    experiment.write_text(text.replace(old, new))

    with pytest.raises(UserError, match=says) as error:
        load_experiment(experiment, "adamw")
    assert str(experiment) in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_or_unreadable_experiment_files_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.toml", tmp_path):
        with pytest.raises(UserError, match="cannot read the experiment file"):
            load_experiment(path, "adamw")

    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not valid TOML"):
        load_experiment(tmp_path / "binary.toml", "adamw")


def test_python_spellings_are_understood(experiment: Path) -> None:
    overrides = {"train.compile": "True", "train.max_steps": "1e3", "train.tensorboard": "FALSE"}
    config = load_experiment(experiment, "sophia-h", overrides)
    assert config.train.compile is True
    assert config.train.tensorboard is False
    assert config.train.max_steps == 1000
    estimate = {"optimizer.hessian_micro_batch_size": "2.0"}
    config = load_experiment(experiment, "sophia-h", estimate)
    assert config.optimizer.hessian_micro_batch_size == 2  # type: ignore[union-attr]
