from __future__ import annotations

import json
from pathlib import Path

import pytest

from config import KEYS, load_experiment, parse_command_line, run_names
from errors import UserError
from tests.conftest import OPTIMIZERS, ROOT

EXPERIMENTS = sorted((ROOT / "configs").glob("*.toml"))


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
@pytest.mark.parametrize("run", OPTIMIZERS)
def test_every_experiment_file_passes_dry_run(path: Path, run: str, run_train, capsys, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    before = set(ROOT.iterdir())
    run_train(path, f"--run={run}", "--dry-run")
    printed = capsys.readouterr().out
    for row in ("parameters", "tokens a step", "accumulation", "memory a rank", "checkpoint", "length"):
        assert row in printed
    assert set(ROOT.iterdir()) == before


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_the_runs_of_a_file_differ_in_the_optimizer_alone(path: Path) -> None:
    configs = [load_experiment(path, run).model_dump(exclude={"run", "optimizer"}) for run in run_names(path)]
    assert run_names(path) == list(OPTIMIZERS)
    assert all(config == configs[0] for config in configs)
    if path.stem.startswith("gpt2_"):
        assert configs[0]["train"]["batch_size"] * configs[0]["model"]["block_size"] == 491_520
        assert f"train.py configs/{path.name} --run=" in path.read_text()


def test_the_command_line_overrides_the_run_and_the_run_the_file(experiment: Path) -> None:
    config, flags = parse_command_line([str(experiment), "--run=sophia-g"])
    assert (config.train.batch_size, config.optimizer.rho, flags.resume) == (8, 0.05, False)
    arguments = [str(experiment), "--run=sophia-g", "--optimizer.rho=1e-3", "--train.max_steps=1_000", "--resume"]
    config, flags = parse_command_line([*arguments, "--train.compile=true", "--data.path=123"])
    assert (config.optimizer.rho, config.train.max_steps, flags.resume) == (1e-3, 1000, True)
    assert (config.train.compile, config.data.path) == (True, "123")
    assert json.loads(config.model_dump_json())["optimizer"]["name"] == "sophia-g"


def test_help_lists_every_key_with_its_default(capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_command_line(["--help"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert all(f"--{key} " in printed for key in KEYS)
    assert "bfloat16|float16|float32" in printed
    assert "(default: 480)" in printed


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], r"which run\? Add --run=NAME, NAME one of: adamw, lion, sophia-g, sophia-h"),
        (["--run=sofia"], "no run named 'sofia'"),
        (["--run=adamw", "--train.max_step=3"], r"unknown argument .*did you mean train.max_steps\?"),
        (["--run=adamw", "--resum"], r"unknown argument --resum; did you mean resume\?"),
        (["--run=adamw", "--train.max_steps=many"], "train.max_steps = 'many' should be a valid integer"),
        (["--run=adamw", "--train.max_steps=2.5"], "train.max_steps = 2.5 should be a valid integer"),
        (["--run=adamw", "--train.compile=1"], "train.compile = 1 should be a valid boolean"),
        (["--run=adamw", "--optimizer.lr=-1"], "optimizer.lr = -1 should be greater than 0"),
        (["--run=adamw", "--optimizer.lr=nan"], "optimizer.lr = nan should be a finite number"),
        (["--run=adamw", "--train.dtype=int8"], "train.dtype = 'int8' should be 'bfloat16', 'float16' or 'float32'"),
        (["--run=adamw", "--train.max_steps=3\nfoo=1"], "should be a valid integer"),
        (["--run=adamw", "--train.batch_size=1000000000001"], "should be less than or equal to 1000000"),
        (["--run=adamw", "--train.out_dir=a\0b"], "out_dir"),
        (["--run=adamw", "--optimizer.rho=0.1"], "optimizer: rho is no key of adamw"),
        (["--run=adamw", "--optimizer.name=lion"], "optimizer: eps is no key of lion"),
        (["--run=adamw", "--model.n_head=3"], "n_embd 16 is no multiple of n_head 3"),
        (["--run=sophia-g", "--optimizer.hessian_batch_size=9"], "larger than train.batch_size"),
    ],
)
def test_bad_arguments_end_in_one_line(experiment: Path, run_train, capsys, arguments: list[str], says: str) -> None:
    with pytest.raises(SystemExit) as ended:
        run_train(experiment, *arguments)
    assert ended.value.code == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert printed.count("\n") == 1
    with pytest.raises(UserError, match=says):
        parse_command_line([str(experiment), *arguments])


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("max_steps = 12", "max_stepz = 12", r"unknown key train.max_stepz; did you mean train.max_steps\?"),
        ("[data]", "[date]", "unknown key date"),
        ("max_steps = 12", 'max_steps = "12"', "train.max_steps = '12' should be a valid integer"),
        ("max_steps = 12", "", "train.max_steps is missing"),
        ("max_steps = 12", "max_steps = = 12", "not valid TOML"),
        ('name = "lion"\nlr = 1e-3', 'name = "lion"', "run lion: optimizer.lr is missing"),
        ('name = "lion"', 'name = "tiger"', "optimizer.name = 'tiger' should be 'adamw', 'lion'"),
        ("[runs.", "[walks.", "no runs"),
        ("[model]", 'experiment = "x"\n[model]', "unknown key experiment"),
        ("[runs.lion.", '[runs."../lion".', "cannot name a run's folder"),
        ("max_steps = 12", "max_steps = " + 5000 * "9", "not valid TOML"),
        ("[model]\n", "", "unknown key n_layer"),
    ],
)
def test_bad_experiment_files_are_refused(experiment: Path, old: str, new: str, says: str) -> None:
    text = experiment.read_text()
    assert old in text
    experiment.write_text(text.replace(old, new))
    with pytest.raises(UserError, match=says) as error:
        load_experiment(experiment, "adamw")
    assert str(experiment) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_or_unreadable_experiment_file(tmp_path: Path) -> None:
    for path in (tmp_path / "none.toml", tmp_path):
        with pytest.raises(UserError, match="cannot read the experiment file"):
            load_experiment(path, "adamw")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not valid TOML"):
        load_experiment(tmp_path / "binary.toml", "adamw")
