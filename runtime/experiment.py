"""Experiment files and the command line: a TOML file, the name of a run and flags → one run's Config.

An experiment file holds what all its runs share, then one table a run that overrides any key. A scale, [scales.cpu]
say, is such a file within the file: it overrides what is shared and the runs it names. The command line overrides
both. A file may stand on another, its base, and then holds what differs. Whatever is unknown, of the wrong type or out
of range is refused before anything else happens.
"""

from __future__ import annotations

import argparse
import difflib
import re
import tomllib
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError

from runtime.cli import Parser, UserError, reason
from runtime.config import KEYS, SECTIONS, Config

TABLE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")  # a run's table; becomes a folder's name
RUN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.,=+-]*")  # one of its variations: adamw,lr=0.001,seed=2
PAPER = "paper"  # the scale that the file itself is
DESCRIPTION = """Train one run of an experiment file.

    python train.py configs/quickstart.toml --run=sophia-g
    torchrun --standalone --nproc_per_node=8 -- train.py configs/gpt2_125m.toml --run=sophia-g --resume

Keys that the file leaves out have the defaults below; a key given here comes before the file's."""
SHORT = {"init_from": ["--init-from"]}  # beside --train.init_from


def parse_command_line(argv: list[str]) -> tuple[Config, argparse.Namespace]:
    """`EXPERIMENT.toml --run=NAME [--scale=S] [--resume] [--section.key=value …]` → the resolved run and the flags.

    Raises UserError for anything that cannot be read or does not fit the schema.
    """
    flags, rest = _parser().parse_known_args(argv)
    overrides = {key: getattr(flags, key) for key in KEYS if getattr(flags, key) is not None}
    if rest:
        raise UserError(f"unknown argument {rest[0]}{_nearest(rest[0].lstrip('-').split('=')[0])}; see train.py --help")
    config = load_experiment(Path(flags.experiment), flags.run, overrides, flags.scale)
    if flags.name is None:
        return config, flags
    if not RUN_NAME.fullmatch(flags.name):
        raise UserError(f"--name={flags.name!r} cannot name a folder; use letters, digits and any of _ . , = + -")
    return config.model_copy(update={"run": flags.name}), flags


def load_experiment(path: Path, run: str | None, overrides: dict[str, str] | None = None, scale: str = PAPER) -> Config:
    """The run named `run` of the experiment file at `path`, with `overrides` (dotted key → text) on top."""
    shared, runs = read_experiment(path, scale)
    if run is None or run not in runs:
        asked = f"no run named {run!r}." if run else "which run?"
        raise UserError(f"{path}: {asked} Add --run=NAME, NAME one of: {', '.join(runs)}")
    experiment = path.stem if scale == PAPER else f"{path.stem}-{scale}"
    given = {run: overrides or {}}
    trees = {name: _merge(shared, table) for name, table in runs.items()}
    # All of them, so that a mistake in the last run's table is found before the first run begins.
    return {name: _resolve(path, experiment, name, tree, given.get(name, {})) for name, tree in trees.items()}[run]


def read_experiment(path: Path, scale: str = PAPER) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """What the runs of the file share, and each run's own table without its grid, at a scale."""
    shared = _at_scale(path, scale)
    runs = shared.pop("runs", None)
    for key in shared:
        if key not in SECTIONS:
            raise UserError(f"{path}: unknown key {key}{_nearest(key)}")
    if not isinstance(runs, dict) or not runs or not all(isinstance(table, dict) for table in runs.values()):
        raise UserError(f"{path}: no runs; add a table such as [runs.adamw.optimizer]")
    if wrong := [name for name in runs if not TABLE_NAME.fullmatch(name)]:
        raise UserError(f"{path}: {wrong[0]!r} cannot name a run's folder; use letters, digits, '-', '_' and '.'")
    return shared, {name: _without(table, "grid") for name, table in runs.items()}


def read_grid(path: Path, run: str, scale: str = PAPER) -> dict[str, list[str]]:
    """What to try of a run, {dotted key: values as text}: its table [runs.NAME.grid], optimizer.lr = [1e-3, 2e-3]."""
    grid = _at_scale(path, scale)["runs"][run].get("grid", {})
    if not isinstance(grid, dict) or not all(isinstance(table, dict) for table in grid.values()):
        raise UserError(f"{path}, run {run}: a grid looks like this: optimizer.lr = [1e-3, 2e-3]")
    axes = {f"{section}.{key}": values for section, table in grid.items() for key, values in table.items()}
    for key, values in axes.items():
        if key not in KEYS:
            raise UserError(f"{path}, run {run}: unknown key {key} in its grid{_nearest(key)}")
        if not isinstance(values, list) or not values or not all(isinstance(v, int | float | str) for v in values):
            raise UserError(f"{path}, run {run}: {key} in its grid must be a list of values, such as [1e-3, 2e-3]")
    return {key: [str(v).lower() if isinstance(v, bool) else str(v) for v in values] for key, values in axes.items()}


def _at_scale(path: Path, scale: str) -> dict[str, Any]:
    """The tree of the file with that of its scale laid upon it. The file itself is the paper's scale."""
    tree = _read_tree(path, [])
    scales = tree.pop("scales", {})
    if scale == PAPER:
        return tree
    if scale not in scales:
        raise UserError(f"{path}: has no scale {scale!r}; use one of: {', '.join([PAPER, *scales])}")
    return _merge(tree, scales[scale])


def _read_tree(path: Path, above: list[Path]) -> dict[str, Any]:
    """The file laid upon its base, which may have one itself; `above` are the files that led here."""
    tree = _read_toml(path)
    _check_tables(path, tree)
    if "base" not in tree:
        return tree
    below = path.parent / str(tree.pop("base"))
    if not below.is_file():
        raise UserError(f"{path}: its base {below} is not there")
    if below in above:
        raise UserError(f"{path}: its base {below.name} stands on this file itself")
    return _extend(path, _read_tree(below, [*above, path]), tree)


def _check_tables(path: Path, tree: dict[str, Any]) -> None:
    scales = tree.get("scales", {})
    if not isinstance(scales, dict) or not all(isinstance(table, dict) for table in scales.values()):
        raise UserError(f"{path}: scales must be tables, such as [scales.cpu.train]")
    for runs in (part.get("runs", {}) for part in (tree, *scales.values())):
        if not isinstance(runs, dict) or not all(isinstance(table, dict) for table in runs.values()):
            raise UserError(f"{path}: no runs; add a table such as [runs.adamw.optimizer]")


def _extend(path: Path, base: dict[str, Any], tree: dict[str, Any]) -> dict[str, Any]:
    """`tree` laid upon `base`, with the runs that `tree` names alone, without the grids of the base.

    A run stands on the base's run of the same name, or on the one that its own key `base` names.
    """
    runs = tree.get("runs", {})
    origins = {name: table.get("base", name) for name, table in runs.items()}
    for name, table in runs.items():
        if "base" in table and str(table["base"]) not in base.get("runs", {}):
            raise UserError(f"{path}, run {name}: base = {table['base']!r} is no run of the base file")

    def runs_of(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
        lent = {name: dict(below.get("runs", {}).get(str(origin), {})) for name, origin in origins.items()}
        own = above.get("runs", {})
        return {name: _merge(_without(lent[name], "grid"), _without(own.get(name, {}), "base")) for name in origins}

    merged = _merge(base, tree) | {"runs": runs_of(base, tree)}
    below, above = base.get("scales", {}), tree.get("scales", {})
    for scale, table in above.items():
        if lost := table.get("runs", {}).keys() - runs.keys():
            raise UserError(f"{path}: [scales.{scale}.runs.{min(lost)}] is no run of this file; name it in [runs] too")
    for scale, table in merged.get("scales", {}).items():
        table["runs"] = runs_of(below.get(scale, {}), above.get(scale, {}))
    return merged


def _without(table: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in table.items() if name != key}


def run_names(path: Path, scale: str = PAPER) -> list[str]:
    """The names of the runs of an experiment file, in its order."""
    return list(read_experiment(path, scale)[1])


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot read the experiment file ({reason(error)}); see configs/") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid TOML: {reason(error)}") from None


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` laid upon `base`, table by table; neither is changed, no table is shared with `base`."""
    merged = {key: _merge(value, {}) if isinstance(value, dict) else value for key, value in base.items()}
    for key, value in over.items():
        both_tables = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both_tables else value
    return merged


def _resolve(path: Path, experiment: str, run: str, tree: dict[str, Any], overrides: dict[str, str]) -> Config:
    for key, text in overrides.items():
        section, name = key.split(".")
        tree = _merge(tree, {section: {name: _literal(key, text)}})
    try:
        return Config.model_validate({**tree, "experiment": experiment, "run": run})
    except ValidationError as error:
        raise UserError(f"{path}, run {run}: {_first_problem(error)}") from None


def _literal(key: str, text: str) -> Any:
    """A command-line value, read as TOML would read it; text stays text."""
    if KEYS[key].annotation is str:
        return text
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    return parsed["value"] if len(parsed) == 1 else text


def _first_problem(error: ValidationError) -> str:
    problem = min(error.errors(), key=lambda p: p["type"] != "extra_forbidden")  # a misspelt key, before it is missing
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return f"unknown key {key}{_nearest(key)}"
    if problem["type"] == "missing":
        return f"{key} is missing; add it to the file or to the command line"
    key = key or "this run"
    message = problem["msg"].removeprefix("Value error, ").removeprefix("Input ")
    if problem["type"] == "string_pattern_mismatch":
        message = "is empty, or has a character that cannot be in it"
    return f"{key} = {problem['input']!r} {message}" if not isinstance(problem["input"], dict) else f"{key}: {message}"


def _nearest(key: str) -> str:
    names = {known: known for known in KEYS} | {known.split(".")[1]: known for known in KEYS}
    names |= {flag: flag for flag in ("resume", "scale", "name")}
    close = difflib.get_close_matches(key, names, 1, 0.7) or difflib.get_close_matches(
        key.split(".")[-1], names, 1, 0.7
    )
    return f"; did you mean {names[close[0]]}?" if close else ""


def _parser() -> Parser:
    parser = Parser(
        DESCRIPTION,
        prog="train.py",
        usage="train.py EXPERIMENT.toml --run=NAME [--scale=NAME] [--resume] [--dry-run] [--SECTION.KEY=VALUE …]",
    )
    parser.add_argument("experiment", metavar="EXPERIMENT.toml", help="experiment file, e.g. configs/quickstart.toml")
    parser.add_argument("--run", metavar="NAME", help="which of the file's runs, e.g. sophia-g")
    parser.add_argument("--scale", metavar="NAME", default=PAPER, help="cpu, gpu or paper (default)")
    parser.add_argument("--name", metavar="NAME", help="folder and wandb name of the run (default: that of --run)")
    parser.add_argument("--resume", action="store_true", help="go on from the run's newest checkpoint, if it has one")
    parser.add_argument("--dry-run", action="store_true", help="print sizes, steps and memory, then exit")
    for section, schema in SECTIONS.items():
        group = parser.add_argument_group(f"[{section}]", schema.__doc__)
        for key, field in schema.model_fields.items():
            default = "" if field.is_required() or field.default in (None, "") else f" (default: {field.default})"
            text = f"{field.description}{default}".replace("True", "true").replace("False", "false").replace("%", "%%")
            group.add_argument(f"--{section}.{key}", *SHORT.get(key, ()), metavar=_kind(field.annotation), help=text)
    return parser


def _kind(annotation: Any) -> str:
    """What --help calls a type: int, or the values of a Literal; None stands for a key left out, and is not named."""
    parts = [part for part in get_args(annotation) if part is not type(None)]
    if not parts:
        return annotation.__name__
    return "|".join(part if isinstance(part, str) else _kind(part) for part in parts)
