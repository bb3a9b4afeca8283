"""Prepare the source code of Python's standard library: about 12 MB that every machine already has.

    python data/stdlib/prepare.py        # no download; a few seconds

Each module is one document. Its bytes are the tokens, ended by end-of-text (256). They differ from
one Python version to the next, so compare only runs on the same folder.
"""

from __future__ import annotations

import platform
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data.write_tokens import write_dataset
from runtime.cli import Parser, UserError, run_main

LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"}


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument(
        "--out", metavar="DIR", type=Path, default=Path(__file__).parent, help="where to write"
    )
    out = parser.parse_args().out.expanduser()

    modules = find_modules()
    source = {
        "standard library of Python": platform.python_version(),
        "modules": len(modules),
    }
    # 2 % of the modules are held out; 1 in 2,000, as for OpenWebText, would be a single module.
    shards = [lambda: read_modules(modules)]
    meta = write_dataset(out, shards, len(modules), "bytes", source, val_fraction=0.02)
    for split, facts in meta["splits"].items():
        print(f"{split}: {facts['tokens']:,} tokens in {facts['documents']:,} modules")
    print(f"wrote {out}/train.bin, {out}/val.bin, {out}/meta.json")


def find_modules() -> list[Path]:
    """Return the library's .py files, sorted by name, without tests and installed packages.

    Raises:
        UserError: if this Python came without its library's source.
    """
    root = Path(sysconfig.get_path("stdlib"))
    modules = []
    for path in sorted(root.rglob("*.py")):
        if not LEFT_OUT & set(path.relative_to(root).parts):
            modules.append(path)
    if len(modules) < 100:
        raise UserError(
            f"{root}: has only {len(modules)} modules; this Python came without its library"
        )
    return modules


def read_modules(modules: list[Path]) -> Iterator[str]:
    for path in modules:
        yield path.read_text(encoding="utf-8", errors="replace")


if __name__ == "__main__":
    run_main(main)
