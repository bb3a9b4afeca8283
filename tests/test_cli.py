"""How errors end: one line and status 2 for a user, the whole cause with DEBUG=1."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from runtime.cli import SharedError, UserError, run_main


def fail_as_a_user() -> None:
    try:
        raise KeyError("inner")
    except KeyError as error:
        raise UserError("config.toml: no key x; add it") from error


def fail_on_the_disk() -> None:
    raise OSError(28, "No space left on device", "out/metrics.jsonl")


@pytest.mark.parametrize(
    ("main", "line"),
    [
        (fail_as_a_user, "error: config.toml: no key x; add it"),
        (
            fail_on_the_disk,
            "error: out/metrics.jsonl: the disk is full; free some space and run the same command "
            "again (train.py with --resume)",
        ),
    ],
)
def test_expected_errors_are_one_line(main: Callable[[], None], line: str, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        run_main(main)
    assert ended.value.code == 2
    assert capsys.readouterr().err == line + "\n"


def test_debug_prints_the_cause(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("DEBUG", "1")
    with pytest.raises(SystemExit) as ended:
        run_main(fail_as_a_user)
    assert ended.value.code == 2
    printed = capsys.readouterr().err
    assert "KeyError: 'inner'" in printed
    assert printed.endswith("error: config.toml: no key x; add it\n")


def test_bugs_are_not_disguised() -> None:
    def bug() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_main(bug)


def fail_on_all_ranks() -> None:
    raise SharedError("the same everywhere")


def test_ranks_report_their_own_errors_only(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """An error of all ranks was printed on rank 0 when it was raised."""
    for rank, own in (
        ("0", "error: config.toml: no key x; add it\n"),
        ("1", "error: rank 1: config.toml: no key x; add it\n"),
    ):
        monkeypatch.setenv("RANK", rank)
        for main, expected in ((fail_as_a_user, own), (fail_on_all_ranks, "")):
            with pytest.raises(SystemExit) as ended:
                run_main(main)
            assert ended.value.code == 2
            assert capsys.readouterr().err == expected
