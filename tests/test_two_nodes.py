"""Test two nodes: two torchrun agents that meet, on this host or in two network namespaces."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.conftest import ROOT, read_lines

TORCHRUN = [sys.executable, str(ROOT / "scripts/torchrun.py")]
SHARED = "all nodes need the same command, code, versions and data"


def free_port() -> int:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return unused.getsockname()[1]


def start_node(
    endpoint: str, *arguments: object, launcher: tuple[str, ...] = ()
) -> subprocess.Popen:
    """Start a node's torchrun with one rank."""
    command = [*launcher, *TORCHRUN, "--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d"]
    command += [f"--rdzv_endpoint={endpoint}", *map(str, arguments)]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def run_nodes(first: list[object], second: list[object]) -> list[tuple[int, str]]:
    """Run train.py on two nodes with these arguments; return each one's status and messages."""
    endpoint = f"127.0.0.1:{free_port()}"
    nodes = []
    for arguments in (first, second):
        nodes.append(start_node(endpoint, "--", ROOT / "train.py", *arguments))
    results = []
    for node in nodes:
        output, errors = node.communicate(timeout=120)
        results.append((node.returncode, errors if node.returncode else output))
    return results


def refused(first: list[object], second: list[object]) -> str:
    """Check that both nodes end with status 2, and return the one line that they print."""
    results = run_nodes(first, second)
    assert [status for status, _ in results] == [2, 2], results
    errors = "".join(text for _, text in results)
    assert errors.count("\n") == 1, errors
    return errors


def test_nodes_with_other_settings_are_refused(experiment: Path, tmp_path: Path) -> None:
    same: list[object] = [experiment, "--run=lion", "--train.micro_batch_size=4"]
    line = refused(same, [*same, "--optimizer.lr=0.5"])
    host = socket.gethostname()
    difference = f"rank 1 on {host} has optimizer.lr = 0.5, rank 0 on {host} has 0.001; {SHARED}"
    opposite = f"rank 1 on {host} has optimizer.lr = 0.001, rank 0 on {host} has 0.5; {SHARED}"
    assert difference in line or opposite in line  # either node can become rank 0
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_nodes_with_other_data_are_refused(
    experiment: Path, tiny_data: Path, tmp_path: Path
) -> None:
    same: list[object] = [experiment, "--run=lion", "--train.micro_batch_size=4"]
    other = tmp_path / "data"
    shutil.copytree(tiny_data, other)
    content = bytearray((other / "train.bin").read_bytes())
    content[100] ^= 1
    (other / "train.bin").write_bytes(content)
    assert "has train.bin = " in refused(same, [*same, f"--data.path={other}"])
    assert not (tmp_path / "out").exists()

    # The same data in another folder are accepted.
    shutil.copytree(tiny_data, tmp_path / "copy")
    results = run_nodes(same, [*same, f"--data.path={tmp_path / 'copy'}"])
    assert [status for status, _ in results] == [0, 0], results


@pytest.mark.slow
def test_output_folder_that_is_not_shared_is_refused(experiment: Path, tmp_path: Path) -> None:
    """One node has a checkpoint, the other one has not, also after waiting for the listing."""
    same: list[object] = [experiment, "--run=lion", "--train.micro_batch_size=4"]
    assert [status for status, _ in run_nodes(same, same)] == [0, 0]
    (tmp_path / "out/tiny/lion/step_00000012.pt").unlink()
    unshared = [*same, f"--train.out_dir={tmp_path / 'unshared'}", "--resume"]
    assert "has the step to start from = " in refused([*same, "--resume"], unshared)


@pytest.mark.slow
def test_error_of_one_node_ends_both_and_is_printed(experiment: Path, tmp_path: Path) -> None:
    same: list[object] = [experiment, "--run=lion", "--train.micro_batch_size=4"]
    for mistake, message in (
        ([*same, f"--data.path={tmp_path / 'none'}"], "no such file"),
        ([tmp_path / "none.toml", "--run=lion"], "cannot read the experiment file"),
    ):
        line = refused(same, mistake)
        assert line.startswith("error: ")
        assert message in line


def test_node_whose_rank_ends_later_still_says_how_it_ended(tmp_path: Path) -> None:
    """The first node keeps the store of both, and its rank ends first."""
    script = tmp_path / "end.py"
    script.write_text("import sys, time\ntime.sleep(float(sys.argv[1]))\nsys.exit(2)\n")
    endpoint = f"127.0.0.1:{free_port()}"
    first = start_node(endpoint, "--rdzv_conf=is_host=1", "--", script, 0)
    second = start_node(endpoint, "--rdzv_conf=is_host=0", "--", script, 2)
    for node in (first, second):
        _, errors = node.communicate(timeout=60)
        assert (node.returncode, errors) == (2, "")


@pytest.mark.slow
def test_bad_weights_to_start_from_end_both(experiment: Path, tmp_path: Path) -> None:
    """Only rank 0 reads them, while the other one waits for them."""
    same: list[object] = [experiment, "--run=lion", "--train.micro_batch_size=4"]
    line = refused(*2 * [[*same, f"--init-from={tmp_path / 'none'}"]])
    assert str(tmp_path / "none") in line


# ---- Two network namespaces ----------------------------------------------------------------------

CAN_ISOLATE = os.geteuid() == 0 and shutil.which("ip") and shutil.which("unshare")
NEEDS_NAMESPACES = pytest.mark.skipif(not CAN_ISOLATE, reason="needs root, ip and unshare")
STEPS = 3000


def ip(*arguments: str, check: bool = True) -> None:
    subprocess.run(["ip", *arguments], check=check, capture_output=True)


@pytest.fixture
def namespaces() -> Iterator[None]:
    """Make the nodes test_a (10.77.0.1) and test_b (10.77.0.2), joined by a cable."""
    nodes = {"a": "10.77.0.1", "b": "10.77.0.2"}
    names = "127.0.0.1 localhost\n" + "".join(f"{at} node-{n}\n" for n, at in nodes.items())
    for node in nodes:
        ip("netns", "del", f"test_{node}", check=False)
        ip("netns", "add", f"test_{node}")
        Path(f"/etc/netns/test_{node}").mkdir(parents=True, exist_ok=True)
        Path(f"/etc/netns/test_{node}/hosts").write_text(names)
    cable = "link add va netns test_a type veth peer name vb netns test_b"
    ip(*cable.split())
    for node, address in nodes.items():
        ip("-n", f"test_{node}", "addr", "add", f"{address}/24", "dev", f"v{node}")
        ip("-n", f"test_{node}", "link", "set", "lo", "up")
        ip("-n", f"test_{node}", "link", "set", f"v{node}", "up")
    yield
    for node in nodes:
        ip("netns", "del", f"test_{node}")
        shutil.rmtree(f"/etc/netns/test_{node}")


def start_isolated(node: str, experiment: Path, out: Path) -> subprocess.Popen:
    """Start a node in its namespace as docs/multi_node.md says, with its log in a file."""
    name = f'hostname node-{node}; exec "$@"'
    launcher = ("ip", "netns", "exec", f"test_{node}", "unshare", "--uts", "sh", "-c", name, "_")
    command = [*launcher, *TORCHRUN, "--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d"]
    command += ["--rdzv_endpoint=node-a:29500", "--max-restarts=3", "--"]
    command += [str(ROOT / "train.py"), str(experiment), "--run=sophia-g", "--resume"]
    command += [f"--train.max_steps={STEPS}", "--train.checkpoint_interval=100"]
    command += ["--train.micro_batch_size=4", f"--train.out_dir={out}", "--train.eval_interval=500"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with open(f"{out}.{node}.log", "a") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment)


def wait_for_step(out: Path, step: int) -> None:
    for _ in range(600):
        logs = "".join(path.read_text() for path in out.parent.glob(f"{out.name}.?.log"))
        if f"step {step}/" in logs:
            return
        time.sleep(0.2)
    raise AssertionError(logs[-3000:])


def kill_all(process: subprocess.Popen) -> None:
    """Kill a node's agent and its rank."""
    family = psutil.Process(process.pid)
    for member in [*family.children(recursive=True), family]:
        member.send_signal(signal.SIGKILL)
    process.wait()


@pytest.mark.slow
@NEEDS_NAMESPACES
@pytest.mark.parametrize("fault", ["none", "link", "rank", "agent"])
def test_two_nodes_survive(
    fault: str, namespaces: None, experiment: Path, run_train: Callable[..., None], tmp_path: Path
) -> None:
    """Compare with an undisturbed run of two ranks on one machine."""
    out = tmp_path / fault
    nodes = {node: start_isolated(node, experiment, out) for node in "ab"}
    wait_for_step(out, 250)
    if fault == "link":
        ip(*["-n", "test_b", "link", "set", "vb", "down"])
        time.sleep(5)
        ip(*["-n", "test_b", "link", "set", "vb", "up"])
    if fault == "rank":
        children = psutil.Process(nodes["b"].pid).children(recursive=True)
        (rank,) = [child for child in children if "train.py" in " ".join(child.cmdline()[1:3])]
        rank.send_signal(signal.SIGKILL)
    if fault == "agent":
        kill_all(nodes["b"])
        time.sleep(5)
        nodes["b"] = start_isolated("b", experiment, out)
    try:
        for node in nodes.values():
            assert node.wait(timeout=240) == 0, Path(f"{out}.a.log").read_text()[-3000:]
    finally:
        for node in nodes.values():
            if node.poll() is None:
                kill_all(node)

    whole = tmp_path / "whole"
    command = [*TORCHRUN, "--standalone", "--nproc_per_node=2", "--", str(ROOT / "train.py")]
    command += [str(experiment), "--run=sophia-g", f"--train.max_steps={STEPS}"]
    command += ["--train.micro_batch_size=4", f"--train.out_dir={whole}"]
    command += ["--train.eval_interval=500"]
    subprocess.run(command, check=True, capture_output=True)
    for key in ("loss", "val_loss"):
        expected = read_lines(whole / "tiny/sophia-g", key)
        assert read_lines(out / "tiny/sophia-g", key) == expected
