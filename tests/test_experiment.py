from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from runtime.cli import UserError
from runtime.config import KEYS
from runtime.experiment import load_experiment, parse_command_line, read_grid, run_names
from tests.conftest import OPTIMIZERS, ROOT

EXPERIMENTS = sorted((ROOT / "configs").glob("*.toml"))
FOUR = [path for path in EXPERIMENTS if path.stem.startswith(("gpt2_", "quickstart"))]


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
@pytest.mark.parametrize("scale", ["paper", "gpu", "cpu"])
def test_every_run_of_every_file_passes_dry_run(path: Path, scale: str, run_train, capsys, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    if scale != "paper" and path.stem == "quickstart":
        pytest.skip("the quickstart has one scale")
    before = set(ROOT.iterdir())
    for run in run_names(path, scale):
        run_train(path, f"--run={run}", f"--scale={scale}", "--dry-run")
        printed = capsys.readouterr().out
        for row in ("parameters", "tokens a step", "accumulation", "memory a rank", "checkpoint", "length"):
            assert row in printed
        assert all(len(values) > 1 for values in read_grid(path, run, scale).values())
    assert set(ROOT.iterdir()) == before


@pytest.mark.parametrize("path", FOUR, ids=lambda path: path.stem)
def test_the_runs_of_a_file_differ_in_the_optimizer_alone(path: Path) -> None:
    configs = [load_experiment(path, run).model_dump(exclude={"run", "optimizer"}) for run in run_names(path)]
    assert run_names(path) == list(OPTIMIZERS)
    assert all(config == configs[0] for config in configs)
    if path.stem.startswith("gpt2_"):
        assert configs[0]["train"]["batch_size"] * configs[0]["model"]["block_size"] == 491_520
        assert f"train.py configs/{path.name} --run=" in path.read_text()


OVER = """
base = "tiny.toml"
[train]
max_steps = 24
[runs.lion]
[runs.small]
base = "sophia-g"
optimizer.rho = 0.1
[runs.small.grid]
optimizer.lr = [1e-3, 2e-3]
[scales.cpu.train]
max_steps = 6
[scales.cpu.runs.small]
optimizer.lr = 5e-3
"""


def test_a_file_stands_on_its_base_and_a_scale_on_both(experiment: Path) -> None:
    text = experiment.read_text() + "[runs.lion.grid]\noptimizer.lr = [1.0]\n[scales.cpu.train]\nwarmup_steps = 1\n"
    experiment.write_text(text + "[scales.cpu.runs.sophia-g.optimizer]\nbeta1 = 0.5\n")
    over = experiment.with_name("over.toml")
    over.write_text(OVER)
    assert run_names(over) == ["lion", "small"]
    paper, cpu = (load_experiment(over, "small", None, scale) for scale in ("paper", "cpu"))
    assert (paper.experiment, cpu.experiment) == ("over", "over-cpu")
    assert (paper.train.max_steps, paper.train.warmup_steps, paper.optimizer.beta1) == (24, 2, 0.96)
    assert (cpu.train.max_steps, cpu.train.warmup_steps, cpu.optimizer.beta1) == (6, 1, 0.5)
    assert (paper.optimizer.rho, paper.optimizer.lr, cpu.optimizer.rho, cpu.optimizer.lr) == (0.1, 1e-3, 0.1, 5e-3)
    assert read_grid(over, "small") == {"optimizer.lr": ["0.001", "0.002"]}
    assert read_grid(over, "lion") == {}  # a grid belongs to its file
    top = experiment.with_name("top.toml")
    top.write_text('base = "over.toml"\n[runs.small]\n')
    assert load_experiment(top, "small").optimizer.rho == 0.1


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('base = "none.toml"\n[runs.lion]', "its base .*none.toml is not there"),
        ('base = "over.toml"\n[runs.lion]', "stands on this file itself"),
        ('base = "tiny.toml"\n[runs.lion]\nbase = "tiger"', "base = 'tiger' is no run of the base file"),
        ('base = "tiny.toml"', "no runs"),
        ('base = "tiny.toml"\n[runs]\nlion = 3', "no runs"),
        ('base = "tiny.toml"\nscales = 3\n[runs.lion]', "scales must be tables"),
        (
            'base = "tiny.toml"\n[runs.lion.grid]\noptimizer.lrr = [1]',
            r"unknown key optimizer.lrr in its grid; did you",
        ),
        ('base = "tiny.toml"\n[runs.lion.grid]\noptimizer.lr = 1', "must be a list of values"),
        ('base = "tiny.toml"\n[runs.lion.grid]\noptimizer.lr = []', "must be a list of values"),
        ('base = "tiny.toml"\n[runs.lion]\ngrid = 3', "a grid looks like this"),
    ],
)
def test_bad_bases_scales_and_grids_are_refused(experiment: Path, text: str, says: str) -> None:
    over = experiment.with_name("over.toml")
    over.write_text(text)

    def load() -> None:
        load_experiment(over, "lion")
        read_grid(over, "lion")

    with pytest.raises(UserError, match=says) as error:
        load()
    assert "\n" not in str(error.value)


def test_a_run_may_have_another_name_and_an_unknown_scale_is_refused(experiment: Path) -> None:
    config, _ = parse_command_line([str(experiment), "--run=lion", "--name=lion,seed=2"])
    assert config.run_dir.name == "lion,seed=2"
    for wrong in ("../x", "", "a/b"):
        with pytest.raises(UserError, match="cannot name a folder"):
            parse_command_line([str(experiment), "--run=lion", f"--name={wrong}"])
    with pytest.raises(UserError, match="has no scale 'gpu'; use one of: paper"):
        parse_command_line([str(experiment), "--run=lion", "--scale=gpu"])


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
    assert all(re.search(rf"--{key}[ ,]", printed) for key in KEYS)
    assert "--train.dtype bfloat16|float16|float32" in printed
    assert "--optimizer.update clip|divide|normalize" in printed
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
        (["--run=sophia-g", "--optimizer.estimator=gnb"], "optimizer: estimator is no key of sophia-g"),
        (["--run=sophia-g", "--optimizer.name=sophia-ablation"], "sophia-ablation needs estimator"),
        (["--run=adamw", "--optimizer.name=adahessian"], "adahessian needs hessian_interval"),
        (["--run=adamw", "--optimizer.name=muon", "--train.shard_optimizer=true"], "cannot share out muon"),
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
        ("[runs.", "[walks.", "unknown key walks"),
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
