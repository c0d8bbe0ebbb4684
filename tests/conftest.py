"""What the tests share: the program as real processes, and what they have learned."""

import contextlib
import ctypes
import json
import os
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path
from unittest import mock

# Before torch is imported: the tests are about processes on a CPU, with one thread each.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ.pop("OMP_NUM_THREADS", None)
# A suite in the background ignores Ctrl-C, and under nohup a closed terminal. The programs under
# test would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

import pytest
import torch


def pytest_configure(config) -> None:
    config.addinivalue_line("markers", "slow: runs only if SLOW_TESTS is set")


def pytest_collection_modifyitems(items) -> None:
    for item in items:
        if item.get_closest_marker("slow") and not os.environ.get("SLOW_TESTS"):
            item.add_marker(pytest.mark.skip(reason="slow: set SLOW_TESTS=1"))


ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "train_ddp.py"
SAMPLE = ROOT / "tests" / "mnist_sample"
CPU = torch.device("cpu")
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "tools")]


def command(*flags: object, torchrun: int = 0, data: bool = True) -> list[str]:
    """The command line; with `torchrun`, started by torchrun with so many processes."""
    launcher = [sys.executable]
    if torchrun:
        launcher += ["-m", "torch.distributed.run", f"--nproc_per_node={torchrun}"]
    flags = [*flags, "--data_dir", SAMPLE] if data else [*flags]
    return [*launcher, str(SCRIPT), *map(str, flags)]


def run(cmd: list[str], cwd: Path, timeout: float = 300, **env: str):
    """Run to the end; the result has returncode, stdout and stderr."""
    env, captured = os.environ | env, {"capture_output": True, "text": True}
    done = subprocess.run(
        cmd, check=False, cwd=cwd, env=env, timeout=timeout, **captured
    )
    done.stdout = own(done.stdout)
    return done


def own(output: str) -> str:
    """What the program itself has printed: with torch 2.10, gloo reports its connections."""
    return re.sub(r"^(\[Gloo\] .*)?\n", "", output, flags=re.MULTILINE)


class Started:
    """A running command in a process group of its own, as a shell would start it."""

    def __init__(self, cmd: list[str], cwd: Path, **env: str) -> None:
        self.log = cwd / f"log-{time.monotonic_ns()}"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                cmd,
                cwd=cwd,
                env=os.environ | {"PYTHONUNBUFFERED": "1", "MARK": str(self.log)} | env,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def output(self) -> str:
        # Not through the child's handle: to seek would move where it writes next.
        return self.log.read_text()

    def wait_for(self, pattern: str, timeout: float = 120) -> re.Match:
        """Poll the output until it matches."""
        what = f"the output {pattern!r}"
        return wait_until(
            lambda: re.search(pattern, self.output()), what, self, timeout
        )

    def wait(self, timeout: float = 120) -> int:
        return self.process.wait(timeout)

    def has_ended(self) -> bool:
        return self.process.poll() is not None

    def workers(self) -> list[int]:
        """The pids of all processes below this one."""
        return descendants(self.process.pid)

    def everyone(self) -> list[int]:
        """The pids of all its living processes, orphans too."""
        return [pid for pid in all_pids() if alive(pid) and self.owns(pid)]

    def owns(self, pid: int) -> bool:
        """Whether a process belongs to it: by its session, or by the mark that it inherited."""
        try:
            if os.getsid(pid) == self.process.pid:
                return True
            environ = Path(f"/proc/{pid}/environ").read_bytes()
        except OSError:
            return False  # It has just ended, or is another user's.
        return f"MARK={self.log}\0".encode() in environ

    def kill(self) -> None:
        """Kill whatever is left of it, and fail if that does not end."""
        while pids := self.everyone():
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self.wait()


class Forked(Started):
    """The program, or another script, in a process forked from one that has imported torch.

    It starts in a tenth of the time of a new interpreter.
    """

    def __init__(
        self, flags: list[str], cwd: Path, script: Path = SCRIPT, **env: str
    ) -> None:
        self.log = cwd / f"log-{time.monotonic_ns()}"
        self.log.touch()
        context = torch.multiprocessing.get_context("forkserver")
        env = os.environ | {"MARK": str(self.log)} | env
        arguments = script, flags, cwd, self.log, dict(env)
        self.process = context.Process(target=_run_program, args=arguments)
        self.process.start()

    def wait(self, timeout: float = 120) -> int:
        self.process.join(timeout)
        assert self.has_ended(), self.output()
        return self.process.exitcode

    def has_ended(self) -> bool:
        return self.process.exitcode is not None


def _run_program(
    script: Path, flags: list[str], cwd: Path, log: Path, env: dict[str, str]
) -> None:
    os.setsid()
    # If the suite is killed, the program must not train on for ever.
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG, see prctl(2)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    tempfile.tempdir = None  # TMPDIR may be another one now
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = [str(script), *flags]
    sys.path.insert(0, str(script.parent))
    if "FAULT" in env:
        runpy.run_path(str(ROOT / "tests" / "faults" / "sitecustomize.py"))
    runpy.run_path(str(script), run_name="__main__")


def all_pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def descendants(pid: int) -> list[int]:
    """All processes below `pid`, from /proc."""
    parents = {}
    for other in all_pids():
        try:
            stat = Path(f"/proc/{other}/stat").read_text()
        except OSError:
            continue  # It has just ended.
        state, parent, *_ = stat.rsplit(")", 1)[1].split()
        if state != "Z":
            parents[other] = int(parent)
    found, grown = {pid}, True
    while grown:
        more = {child for child, parent in parents.items() if parent in found} - found
        found |= more
        grown = bool(more)
    return sorted(found - {pid})


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def runs(pid: int, word: str) -> bool:
    """Whether the command line of a process contains `word`."""
    try:
        return word.encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False  # it has just ended


def wait_until(
    condition,
    what: str,
    started: Started | None = None,
    timeout: float = 120,
):
    """Poll `condition` until it is true, and return its value; fail with the log after `timeout`."""
    end = time.monotonic() + timeout
    while not (value := condition()):
        if time.monotonic() > end or (started and started.has_ended()):
            if value := condition():
                break
            reason = f"{what} did not happen within {timeout} s"
            if started and started.has_ended():
                reason = f"the program has ended before {what}"
            log = started.output() if started else ""
            raise AssertionError(f"{reason}; the log:\n{log}")
        time.sleep(0.005)
    return value


def hand_set(world_size: int) -> list[dict[str, str]]:
    """For each rank, what somebody may set by hand who starts the ranks without a launcher."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    shared = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1"}
    shared |= {"MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    return [shared | {"RANK": str(rank)} for rank in range(world_size)]


def fault(at_start: str = "", **code: str) -> dict[str, str]:
    """The environment of a run in which `code` is added to the modules that it names."""
    folder = str(ROOT / "tests" / "faults")
    return {"PYTHONPATH": folder, "FAULT": json.dumps({"": at_start, **code})}


def fault_in_step(
    rank: int, code: str, step: int = 6, at_start: str = ""
) -> dict[str, str]:
    """The environment of a run in which a rank leaves ./fault, and then executes `code`."""
    return fault(
        at_start,
        model=f"""
import os, signal, shutil
forward = ConvNet.forward
steps = []

def forward_with_fault(self, images):
    steps.extend([1] * self.training)
    if self.training and len(steps) == {step} and torch.distributed.get_rank() == {rank}:
        open("fault", "w").close()
        {code}
    return forward(self, images)

ConvNet.forward = forward_with_fault
""",
    )


def checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("epoch*.pt"))


def newest(folder: Path) -> dict:
    return torch.load(checkpoints(folder)[-1], weights_only=True)


def result(folder: Path) -> dict[str, dict]:
    """What a training has learned, by kind: from the newest checkpoint of `folder`."""
    state = newest(folder)
    keys = "epoch", "step", "train_loss", "test_loss", "test_accuracy"
    history = state["progress"]["history"]
    optimizer = {}
    for index, moments in state["optimizer"]["state"].items():
        for name, value in moments.items():
            optimizer[f"{name} of {index}"] = value
    return {
        "weights": state["model"],
        "optimizer": optimizer,
        "records": {record["epoch"]: [record[k] for k in keys] for record in history},
    }


def assert_same_result(folder: Path, other: Path) -> None:
    """Both trainings have the same weights, optimizer and losses, to the last bit."""
    theirs = result(other)
    for kind, ours in result(folder).items():
        assert ours.keys() == theirs[kind].keys(), f"other {kind}"
        differing = [name for name in ours if not same(ours[name], theirs[kind][name])]
        assert differing == [], f"{kind} that differ, of {len(ours)}"


def same(ours, theirs) -> bool:
    return torch.equal(ours, theirs) if torch.is_tensor(ours) else ours == theirs


def copies(tensors) -> list[torch.Tensor]:
    return [tensor.detach().clone() for tensor in tensors]


def equal(ours, theirs) -> bool:
    """Whether equally many tensors are equal to the last bit."""
    return all(a.equal(b) for a, b in zip(ours, theirs, strict=True))


@pytest.fixture
def start(tmp_path):
    """Start commands in tmp_path; whatever is left of them at the end is killed."""
    started = []

    def start_one(cmd: list[str], cwd: Path = tmp_path, **env: str) -> Started:
        started.append(Started(cmd, cwd, **env))
        return started[-1]

    yield start_one
    for one in started:
        one.kill()


@pytest.fixture
def fork(tmp_path):
    """Start the program in tmp_path as `Forked` does it; what is left at the end is killed."""
    forked = []

    def fork_one(
        *flags: object, cwd: Path = tmp_path, data: bool = True, **env: str
    ) -> Forked:
        forked.append(Forked(command(*flags, data=data)[2:], cwd, **env))
        return forked[-1]

    yield fork_one
    for one in forked:
        one.kill()


@pytest.fixture
def clone(tmp_path) -> Path:
    """The scripts in a folder of their own; with data, as to try to download some takes seconds."""
    for script in ROOT.glob("*.py"):
        shutil.copy(script, tmp_path)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "mnist_sample").symlink_to(SAMPLE)
    (tmp_path / "data").mkdir()
    for dataset in "MNIST", "FashionMNIST":
        (tmp_path / "data" / dataset).symlink_to(SAMPLE / "MNIST")
    return tmp_path


torch.set_num_threads(1)  # as the program does: more would spin and starve each other

# Forked from a process that has imported torch already, ranks start in no time.
torch.multiprocessing.get_context("forkserver").set_forkserver_preload(
    ["torch.distributed", "torch.nn.parallel", "torchvision.datasets"]
)


def train_as_rank(
    folder: Path, device=CPU, call=lambda train, args: train(args), **flags
):
    """Call `train` in a rank that has joined the others already; return what it returns."""
    import train_ddp

    args = {"epochs": 2, "save_every": None, "keep": 99, "data_dir": Path()}
    args |= {"world_size": torch.distributed.get_world_size(), **flags}
    with mock.patch("utils.init_distributed", lambda: device):
        return call(train_ddp.train, Namespace(checkpoint_dir=folder, **args))


def in_ranks(world_size: int, function, *args) -> list:
    """Call function(*args) in each rank of a gloo group; return the results by rank."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(
            _rank,
            (world_size, folder, function, args),
            world_size,
            start_method="forkserver",
        )
        files = [Path(folder, f"result{rank}") for rank in range(world_size)]
        return [torch.load(file, weights_only=False) for file in files]


def _rank(rank: int, world_size: int, folder: str, function, args: tuple) -> None:
    import utils

    def train(_) -> None:
        utils.init_distributed()
        torch.save(function(*args), f"{folder}/result{rank}")
        torch.distributed.destroy_process_group()

    flags = Namespace(world_size=world_size)
    store = f"file://{folder}/store"
    # An exception goes to the test.
    with mock.patch("utils.run_rank", lambda train, args: train(args)):
        utils.run_spawned_rank(rank, train, flags, store, os.getppid())
