"""The command line of train.py: an experiment file, the name of a run, and a flag for every key."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any, get_args

from runtime.cli import Parser, UserError
from runtime.config import KEYS, OPTIMIZERS, SECTIONS, Config, nearest
from runtime.experiment import as_text, load_experiment

DESCRIPTION = """Train one run of an experiment file.

    python train.py configs/quickstart.toml --run=sophia-g
    torchrun --standalone --nproc_per_node=8 -- train.py configs/gpt2_125m.toml --run=sophia-g

Keys that the file leaves out have the defaults below; a key given here overrides the file's."""
# A variation of a run, such as adamw,lr=0.001,seed=2.
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.,=+-]*")


def parse_command_line(argv: list[str]) -> tuple[Config, argparse.Namespace]:
    """Return the resolved run and the flags of train.py's command line.

    Raises:
        UserError: for anything that cannot be read or does not fit the schema.
    """
    flags, rest = _parser().parse_known_args(argv)
    if rest:
        known = [*KEYS, "resume", "branch-from", "name", "run"]
        name, _, value = rest[0].lstrip("-").partition("=")
        if name == "scale":  # until the scales became files
            file = f"configs/{value}/{Path(flags.experiment).name}"
            raise UserError(f"{rest[0]}: scales are files now; use {file} instead")
        raise UserError(f"unknown argument {rest[0]}{nearest(name, known)}; see train.py --help")

    overrides = {key: getattr(flags, key) for key in KEYS if getattr(flags, key) is not None}
    config = load_experiment(Path(flags.experiment), flags.run, overrides)
    if flags.name is None:
        return config, flags
    if not NAME.fullmatch(flags.name):
        raise UserError(
            f"--name={flags.name!r} cannot name a folder; "
            f"use letters, digits and any of _ . , = + -"
        )
    return config.model_copy(update={"run": flags.name}), flags


def _parser() -> Parser:
    usage = "train.py EXPERIMENT.toml --run=NAME [--resume] [--dry-run] [--SECTION.KEY=VALUE …]"
    parser = Parser(DESCRIPTION, prog="train.py", usage=usage)
    add = parser.add_argument
    add("experiment", metavar="EXPERIMENT.toml", help="experiment file, see configs/")
    add("--run", metavar="NAME", help="which of the file's runs, such as sophia-g")
    add("--name", metavar="NAME", help="the run's folder and wandb name (default: that of --run)")
    add("--resume", action="store_true", help="continue from the newest checkpoint, if any")
    add(
        "--branch-from",
        metavar="RUN@STEP",
        help="continue a run of the same experiment with another horizon, from a checkpoint of its "
        "stable phase (train.schedule=wsd)",
    )
    add("--dry-run", action="store_true", help="print sizes, steps and memory, then exit")

    groups = {}
    for section, schema in SECTIONS.items():
        groups[section] = parser.add_argument_group(f"[{section}]", _describe_section(schema))
    for key, field in KEYS.items():
        text = field.description or ""
        if not field.is_required() and field.default not in (None, ""):
            text += f" (default: {as_text(field.default)})"
        names = [f"--{key}"] + (["--init-from"] if key == "train.init_from" else [])
        kind = "|".join(OPTIMIZERS) if key == "optimizer.name" else _kind(field.annotation)
        group = groups[key.split(".")[0]]
        group.add_argument(*names, dest=key, metavar=kind, help=text.replace("%", "%%"))
    return parser


def _describe_section(schema: type) -> str:
    """Return a section's description; for the optimizer, with the keys of each."""
    if schema is not SECTIONS["optimizer"]:
        return schema.__doc__ or ""
    lines = ["One optimizer, chosen by its name. Each has its own keys:"]
    for name, optimizer in OPTIMIZERS.items():
        keys = [key for key in optimizer.model_fields if key != "name"]
        lines.append(f"  {name:16} {' '.join(keys)}")
    return "\n".join(lines)


def _kind(annotation: Any) -> str:
    """Return what --help calls a type: int, or the values of a Literal."""
    parts = [part for part in get_args(annotation) if part is not type(None)]
    if not parts:
        return annotation.__name__
    return "|".join(part if isinstance(part, str) else _kind(part) for part in parts)
