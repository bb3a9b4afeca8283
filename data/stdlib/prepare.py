"""Prepare the source code of Python's standard library: about 12 MB that every machine already has.

    python data/stdlib/prepare.py        # bytes, to data/stdlib; no download, a few seconds
    python data/stdlib/prepare.py --bpe  # 1,024 byte pairs, to data/stdlib/bpe

Each module is one document, ended by end-of-text. Modules differ from one Python version to the
next, so compare only runs on the same folder.
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
    add = parser.add_argument
    add("--bpe", action="store_true", help="tokens from merges.txt instead of bytes")
    add("--out", metavar="DIR", type=Path, help="where to write (default: data/stdlib[/bpe])")
    arguments = parser.parse_args()
    tokenizer = "stdlib" if arguments.bpe else "bytes"
    default = Path(__file__).parent / ("bpe" if arguments.bpe else "")
    out = (arguments.out or default).expanduser()

    modules = find_modules()
    source = {
        "standard library of Python": platform.python_version(),
        "modules": len(modules),
    }
    # 2 % of the modules are held out; 1 in 2,000, as for OpenWebText, would be a single module.
    shards = [lambda: read_modules(modules)]
    meta = write_dataset(out, shards, len(modules), tokenizer, source, val_fraction=0.02)
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
