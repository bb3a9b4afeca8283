"""Experiment files: a TOML file and the name of a run become one Config.

An experiment file has what its runs share, and one table per run, [runs.NAME], that overrides any
key. It can inherit with `base`: at the top, `base = [FILES]` merges those files first, one over the
other; in a run's table, `base = "RUN"` starts from another run. If a file lists runs, it has only
these; otherwise it has those of the first base that has any.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any, get_args

from runtime.cli import UserError, reason
from runtime.config import KEYS, SECTIONS, Config, nearest, validated

TABLE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")  # a run's table; becomes a folder's name
COMMON = "common"  # a file that others inherit from, and that is incomplete by itself
SCALES = ("cpu", "gpu")  # folders of configs/ with smaller versions of the experiments
Tree = dict[str, Any]


def load_experiment(path: Path, run: str | None, overrides: dict[str, str] | None = None) -> Config:
    """Return a run of an experiment file, with `overrides` (dotted key → text) applied."""
    shared, runs = read_experiment(path)
    if run is None or run not in runs:
        problem = f"no run named {run!r}." if run else "which run?"
        raise UserError(f"{path}: {problem} Add --run=NAME, NAME one of: {', '.join(runs)}")

    # Resolve all of them, so that a mistake in the last run is found before the first one starts.
    configs = {}
    for name, table in runs.items():
        tree = _merge(shared, {key: value for key, value in table.items() if key != "grid"})
        for key, text in (overrides or {}).items() if name == run else ():
            section, option = key.split(".")
            tree = _merge(tree, {section: {option: _parse_value(key, text)}})
        tree |= {"experiment": experiment_name(path), "run": name}
        configs[name] = validated(tree, f"{path}, run {name}")
    return configs[run]


def experiment_name(path: Path) -> str:
    """Return the experiment's name: configs/cpu/gpt2_30m.toml is "gpt2_30m-cpu"."""
    scale = path.resolve().parent.name
    return f"{path.stem}-{scale}" if scale in SCALES else path.stem


def run_names(path: Path) -> list[str]:
    """Return the names of the runs of an experiment file, in its order."""
    return list(read_experiment(path)[1])


def read_grid(path: Path, run: str) -> dict[str, list[str]]:
    """Return {dotted key: values to try, as text} from a run's table [runs.NAME.grid]."""
    grid = read_experiment(path)[1][run].get("grid", {})
    where = f"{path}, run {run}"
    if not _is_table_of_tables(grid):
        raise UserError(f"{where}: a grid looks like this: optimizer.lr = [1e-3, 2e-3]")

    axes = {}
    for section, table in grid.items():
        for name, values in table.items():
            key = f"{section}.{name}"
            if key not in KEYS:
                hint = nearest(key, list(KEYS))
                raise UserError(f"{where}: unknown key {key} in its grid{hint}")
            is_list = isinstance(values, list) and len(values) > 0
            if not is_list or not all(isinstance(value, int | float | str) for value in values):
                raise UserError(
                    f"{where}: {key} in its grid must be a list of values, such as [1e-3, 2e-3]"
                )
            axes[key] = [as_text(value) for value in values]
    return axes


def as_text(value: object) -> str:
    """Return a value as the command line takes it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def read_experiment(path: Path) -> tuple[Tree, dict[str, Tree]]:
    """Return what the runs of a file share, and each run's own table with its bases merged in."""
    tree, listed = _read_file(path, ())
    tables = tree.pop("runs", {})
    for key in tree:
        if key not in SECTIONS:
            raise UserError(f"{path}: unknown key {key}{nearest(key, list(KEYS))}")
    if path.stem == COMMON:
        raise UserError(f"{path}: is only a base for other files; use one of those in its folder")
    if not listed:
        raise UserError(f"{path}: no runs; add a table such as [runs.adamw.optimizer]")
    return tree, {name: _with_bases(path, tables, name, ()) for name in listed}


def _read_file(path: Path, above: tuple[Path, ...]) -> tuple[Tree, list[str]]:
    """Return the file merged over its bases, and the names of its runs."""
    try:
        own = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        hint = f"; it is a base of {above[-1]}" if above else "; see configs/"
        message = f"{path}: cannot read the experiment file ({reason(error)}){hint}"
        raise UserError(message) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid TOML: {reason(error)}") from error

    if not _is_table_of_tables(own.get("runs", {})):
        raise UserError(f"{path}: no runs; add a table such as [runs.adamw.optimizer]")
    bases = own.pop("base", [])
    tree: Tree = {}
    listed: list[str] = []
    if isinstance(bases, str):
        bases = [bases]
    if not isinstance(bases, list) or not all(isinstance(name, str) for name in bases):
        raise UserError(f"{path}: base must be a file or a list of files")
    for name in bases:
        base = path.parent / name
        if base in (*above, path):
            raise UserError(f"{path}: its base {base.name} inherits from this file")
        base_tree, base_runs = _read_file(base, (*above, path))
        tree = _merge(tree, base_tree)
        listed = listed or base_runs
    return _merge(tree, own), list(own.get("runs", listed))


def _with_bases(path: Path, tables: dict[str, Tree], run: str, above: tuple[str, ...]) -> Tree:
    """Return a run's table merged over the run that its key `base` names, if any."""
    if not TABLE_NAME.fullmatch(run):
        raise UserError(f"{path}: {run!r} cannot name a folder; use letters, digits, '-', '_', '.'")
    own: Tree = dict(tables[run])
    base: Any = own.pop("base", None)
    if base is None:
        return own
    if not isinstance(base, str) or base not in tables or base in (*above, run):
        raise UserError(f"{path}, run {run}: base = {base!r} is not another run to start from")
    return _merge(_with_bases(path, tables, base, (*above, run)), own)


def _is_table_of_tables(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(table, dict) for table in value.values())


def _merge(base: Tree, over: Tree) -> Tree:
    """Return `over` merged over `base`, table by table; a grid replaces another as a whole."""
    merged = dict(base)
    for key, value in over.items():
        old: Any = merged.get(key)
        both = isinstance(old, dict) and isinstance(value, dict) and key != "grid"
        merged[key] = _merge(old, value) if both else value
    return merged


def _parse_value(key: str, text: str) -> Any:
    """Return a command-line value as TOML would read it; text stays text.

    Python's True and False are understood too, and 1e3 as a whole number.
    """
    kind = KEYS[key].annotation
    if kind is str:
        return text
    if bool in (kind, *get_args(kind)):
        text = text.lower()
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    value = parsed["value"] if len(parsed) == 1 else text
    if int in (kind, *get_args(kind)) and isinstance(value, float) and value.is_integer():
        return int(value)
    return value
