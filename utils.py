"""The process group; below it, what makes the program robust (skip that at first)."""

import contextlib
import ctypes
import io
import os
import re
import signal
import socket
import sys
import tempfile
import time
import traceback
import zipfile
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TextIO

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# ---------------------------------------------------------------- the process group

# How long a rank waits for the others before it gives up. gloo's own default, half an hour,
# would let one frozen process block the whole job for that long.
TIMEOUT = timedelta(minutes=10)


class RankInfo(NamedTuple):
    """Which process this is, according to the launcher that started it.

    rank: its number among all processes, from 0.
    local_rank: its number among the processes on its machine, from 0.
    world_size: the number of all processes.
    local_world_size: the number of processes on its machine.
    init_method: where they meet: tcp://HOST:PORT, file://PATH, or "" for a single process
        (torch.distributed has the same name for it).
    """

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    init_method: str

    @property
    def is_single_machine(self) -> bool:
        """Whether all processes run on one machine."""
        return self.local_world_size == self.world_size


def join_process_group(info: RankInfo) -> torch.device:
    """Join the other ranks; return the device on which this rank trains.

    From then on, the ranks can call collectives, until each of them calls
    `dist.destroy_process_group`. Raises UserError if a rank does not come within TIMEOUT.

    In a script of your own, these lines are enough under torchrun, which sets the variable:

        local_rank = int(os.environ["LOCAL_RANK"])
        torch.cuda.set_device(local_rank)
        dist.init_process_group("nccl")
    """
    device = choose_device(info.local_rank)
    has_gpu = device.type == "cuda"
    use_the_cores_well(has_gpu)
    if info.is_single_machine:
        use_loopback_only()
    dist.init_process_group(
        # gloo connects CPUs, nccl connects NVIDIA GPUs. With a GPU, the group has both: nccl
        # sends tensors, and gloo sends Python objects (see `gather`).
        backend="cpu:gloo,cuda:nccl" if has_gpu else "gloo",
        # A table of keys and values in which the ranks find one another's addresses.
        store=open_store(info),
        rank=info.rank,
        world_size=info.world_size,
        timeout=TIMEOUT,
        # It lets nccl connect at once, instead of at the first message.
        device_id=device if has_gpu else None,
    )
    return device


def choose_device(local_rank: int) -> torch.device:
    """Return a GPU of this rank's own, or the CPU; raise UserError without enough GPUs."""
    gpus = count_gpus()
    if gpus == 0:
        return torch.device("cpu")
    # With too few GPUs, the first process that has none reports it, the others end silently.
    if local_rank > gpus:
        raise ReportedElsewhere
    if local_rank == gpus:
        problem = f"LOCAL_RANK is {local_rank}, but this process sees {gpus} GPU(s)"
        fix = "start one process per GPU, or set CUDA_VISIBLE_DEVICES= to use the CPU"
        raise UserError(f"{problem}: {fix}")
    # Without this line, every rank would put its tensors on GPU 0.
    torch.cuda.set_device(local_rank)
    make_gpus_repeatable()
    return torch.device("cuda", local_rank)


def count_gpus() -> int:
    """Return the number of usable GPUs.

    `device_count` alone also counts GPUs that the installed driver cannot use.
    """
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


class UserError(Exception):
    """A problem that the program recognised: it gets one line instead of a traceback.

    Once the ranks have joined, it is raised on all of them, and rank 0 prints it.
    """


class ReportedElsewhere(UserError):
    """A problem that another process on this machine reports."""


def print0(text: str) -> None:
    """Print a line on rank 0 only, as otherwise every rank would print it."""
    if dist.get_rank() == 0:
        print_line(text, sys.stdout)


def gather(item: Any) -> list[Any]:
    """Wait for all ranks; return the `item` of each of them, in the order of ranks."""
    items: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(items, item)
    return items


@contextlib.contextmanager
def raise_on_all_ranks() -> Iterator[None]:
    """Wait for all ranks at the end of the block, and raise a UserError of one on all.

    A rank that gave up alone would leave the others waiting in their next collective. Any
    other exception ends this rank with a traceback; the others then lose the connection to it.
    """
    problem = None
    try:
        # The caller's block runs here.
        yield
    except UserError as error:
        problem = str(error)
    for problem_of_rank in gather(problem):
        if problem_of_rank is not None:
            raise UserError(problem_of_rank)


def is_first_on_machine() -> bool:
    """Wait for all ranks; return whether this is the lowest rank on its machine.

    LOCAL_RANK does not show it: with `torchrun --virtual-local-rank` it is always 0.
    """
    name = machine_name()
    return gather(name).index(name) == dist.get_rank()


def machine_name() -> str:
    """Return a name that no other machine has."""
    name = socket.gethostname()
    # The host name alone may be "localhost" on all machines. Linux also has a number for
    # each start of a machine.
    boot_id = Path("/proc/sys/kernel/random/boot_id")
    if boot_id.exists():
        name += boot_id.read_text()
    return name


# ================================================================ surviving failures
# A beginner can stop here: nothing below is needed to understand DDP.

# ---------------------------------------------------------------- a robust process group


def use_the_cores_well(has_gpu: bool) -> None:
    """Set the number of threads, and how Linux schedules them."""
    if not os.environ.get("OMP_NUM_THREADS"):
        # Several threads wait for one another by spinning, and starve as soon as anything
        # else runs on the machine. To use more cores, start more ranks.
        torch.set_num_threads(1)
    if not has_gpu:
        # Otherwise Linux lets gloo's receiving thread push its sending thread off the core
        # while that holds a lock: two ranks on two cores reach 0.54 of the speed of steps
        # without DDP, instead of 0.85. macOS lacks the call, and a sandbox may refuse it.
        with contextlib.suppress(AttributeError, OSError):
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def make_gpus_repeatable() -> None:
    """Have cuDNN and NCCL repeat their results to the last bit.

    Other operations of a model of your own may need torch.use_deterministic_algorithms(True).
    """
    # Otherwise cuDNN may choose algorithms that add numbers in any order.
    torch.backends.cudnn.deterministic = True
    # Otherwise an NVLink switch may do so (github.com/NVIDIA/nccl/issues/1497).
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")


def use_loopback_only() -> None:
    """Keep the ranks of a single machine off the network.

    gloo would listen at the address of the host name, where others could reach it; without
    such an address it would warn.
    """
    names = [name for _, name in socket.if_nameindex()]
    loopback = next(name for name in names if name.startswith("lo"))
    os.environ["GLOO_SOCKET_IFNAME"] = loopback
    os.environ["NCCL_SOCKET_IFNAME"] = loopback


def open_store(info: RankInfo) -> dist.Store:
    """Return the key-value store in which the ranks leave their addresses for one another.

    `dist.init_process_group` can open one by itself. This one also tells for which rank it
    waits, can be interrupted with Ctrl-C meanwhile, and survives restarts by torchrun.

    Raises UserError if a rank does not come within TIMEOUT.
    """
    if not info.init_method:
        return dist.HashStore()
    if info.init_method.startswith("file://"):
        path = info.init_method.removeprefix("file://")
        file_store = dist.FileStore(path, info.world_size)
        file_store.set_timeout(TIMEOUT)
        return file_store
    store: dist.Store = open_tcp_store(info)
    if info.is_single_machine:
        # torchrun keeps its store over all restarts: without a prefix of its own, a restarted
        # rank would find the addresses of dead ones. Several machines may count differently
        # (github.com/pytorch/pytorch/issues/135712).
        restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.PrefixStore(restarts, store)
    wait_for_all_ranks(store, info)
    return store


def open_tcp_store(info: RankInfo) -> dist.TCPStore:
    """Return the store that torchrun hosts, otherwise rank 0; raises UserError."""
    host, port = info.init_method.removeprefix("tcp://").rsplit(":", 1)
    is_host = info.rank == 0 and not torchrun_hosts_the_store()
    if not is_host:
        other = "torchrun" if torchrun_hosts_the_store() else "rank 0"
        waiting = f"rank {info.rank} waits for {other} at {host}:{port}"
        wait_until(lambda: answers(host, int(port)), lambda: waiting)
    try:
        # torch's own way would be to wait in here for all ranks, deaf to Ctrl-C and silent.
        return dist.TCPStore(
            host,
            int(port),
            is_master=is_host,
            timeout=TIMEOUT,
            wait_for_workers=False,
        )
    except dist.DistNetworkError as error:
        problem = f"cannot use {host}:{port} ({first_line(error)})"
        raise UserError(f"{problem}: choose another MASTER_PORT")


def wait_for_all_ranks(store: dist.Store, info: RankInfo) -> None:
    """Return when all ranks have opened the store; report for whom this rank waits."""
    keys = [f"rank {rank} is here" for rank in range(info.world_size)]
    store.set(keys[info.rank], "")

    def waiting() -> str:
        missing = [str(rank) for rank, key in enumerate(keys) if not store.check([key])]
        place = info.init_method.removeprefix("tcp://")
        return f"rank {info.rank} waits for rank {', '.join(missing)} at {place}"

    wait_until(lambda: store.check(keys), waiting)


def answers(host: str, port: int) -> bool:
    """Return whether anybody listens there."""
    try:
        socket.create_connection((host, port), timeout=1).close()
    except OSError:
        return False
    return True


def wait_until(condition: Callable[[], bool], waiting: Callable[[], str]) -> None:
    """Poll a condition; report `waiting` after 10 s, and raise it after TIMEOUT."""
    started = time.monotonic()
    reported = False
    while not condition():
        seconds = time.monotonic() - started
        if seconds > TIMEOUT.total_seconds():
            if speaks_for_machine():
                raise UserError(f"{waiting()}; gave up after {TIMEOUT}")
            raise ReportedElsewhere
        if seconds > 10 and not reported:
            reported = True
            if speaks_for_machine():
                warn(f"{waiting()}, for 10 seconds now")
        time.sleep(0.05)


# ---------------------------------------------------------------- printing


def print_line(text: str, stream: TextIO) -> None:
    """Print a line, if the stream still works: output must never cost a training.

    Its reader may have ended (`| head`, or `| tee` after Ctrl-C), the terminal may be closed,
    the disk full.
    """
    # A name of a folder may have letters that the stream does not know.
    encoding = getattr(stream, "encoding", None) or "utf-8"
    printable = text.encode(encoding, errors="backslashreplace").decode(encoding)
    with contextlib.suppress(OSError):
        print(printable, file=stream, flush=True)


def warn(text: str) -> None:
    """Print a warning to stderr, from whichever rank calls."""
    print_line(f"warning: {text}", sys.stderr)


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, without the place in a C++ source."""
    lines = str(error).splitlines() or [repr(error)]
    return re.sub(r"^\[\S+\] ", "", lines[0])


# ---------------------------------------------------------------- checkpoint files

# Increase it when the content of a checkpoint changes.
VERSION = 1
# Files with other names in a checkpoint folder are yours, and left alone.
CHECKPOINT_PATTERN = f"epoch{'[0-9]' * 5}-image{'[0-9]' * 9}.pt"


def checkpoint_name(epoch: int, images_done: int) -> str:
    """Return the name of a checkpoint file. A later one comes later in the alphabet."""
    return f"epoch{epoch:05d}-image{images_done:09d}.pt"


class FolderLock:
    """Keeps a second run out of a checkpoint folder, until it is released or this one dies."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file: int | None = None  # Its descriptor.

    def claim(self) -> None:
        """Lock the folder, again if it was deleted meanwhile; raise UserError if it is taken."""
        import fcntl  # Windows lacks it, where a trained model can still be loaded.

        if self.is_held():
            return
        self.release()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # O_TRUNC would empty a file of somebody else, if .lock is a link to it. And some
            # network file systems refuse to append.
            self.file = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise UserError(f"cannot write to the checkpoint folder: {error}")
        try:
            # With flock, a forked loader worker would hold the lock as well, and keep it for
            # some seconds after its rank was killed. (While data.py holds its lock, no such
            # worker is started.)
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.release()
            fix = "choose another --checkpoint_dir"
            raise UserError(f"another run uses {self.folder}: {fix}")
        except OSError:
            warn(f"{self.folder} is on a disk without locks: start no second run in it")

    def is_held(self) -> bool:
        """Return whether the locked file is still the one in the folder."""
        if self.file is None:
            return False
        try:
            found = os.stat(self.folder / ".lock")
        except OSError:
            return False
        return os.path.samestat(found, os.fstat(self.file))

    def release(self) -> None:
        """Let other runs have the folder."""
        if self.file is not None:
            os.close(self.file)
            self.file = None


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, even if the power fails; raises OSError."""
    # The name is always the same, so that the next save replaces what a killed one has left.
    temporary = path.with_name(".tmp-checkpoint")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        # Otherwise the new name could reach the disk before the content.
        os.fsync(file.fileno())
    temporary.replace(path)
    # Otherwise the deletion of older files could reach the disk before the new name. Some
    # network file systems refuse it.
    directory = os.open(path.parent, os.O_RDONLY)
    with contextlib.suppress(OSError):
        os.fsync(directory)
    os.close(directory)


def save_checkpoint(path: Path, state: dict[str, Any], keep: int) -> None:
    """Write a checkpoint, then delete all but the `keep` newest; raises UserError."""
    # The newest comes first.
    checkpoints = sorted(path.parent.glob(CHECKPOINT_PATTERN), reverse=True)
    older = [checkpoint for checkpoint in checkpoints if checkpoint.name < path.name]
    buffer = io.BytesIO()
    torch.save(state, buffer)
    try:
        write_atomically(path, buffer.getvalue())
    except OSError as error:
        good = older[0] if older else "none"
        raise UserError(f"cannot save {path}: {error}; last good checkpoint: {good}")
    for outdated in older[keep - 1 :]:
        try:
            outdated.unlink(missing_ok=True)
        except OSError as error:
            warn(f"cannot delete {outdated}: {error}")


def decode_checkpoint(path: Path, content: bytes) -> dict[str, Any]:
    """Return what a checkpoint file holds, with its tensors on the CPU.

    Raises UserError if another version of this program has written it, and anything at all
    if it is damaged.
    """
    # torch.load does not compare the checksums in the file: it would load a flipped bit.
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"wrong checksum of {damaged}")
    # weights_only: an unrestricted pickle can run any code while it is loaded.
    state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    if "model" not in state:
        raise ValueError("not a checkpoint of this program")
    if state.get("version") != VERSION:
        problem = f"{path} was written by another version of this program"
        raise UserError(f"{problem}: choose another --checkpoint_dir")
    return state


def newest_checkpoint(folder: Path) -> tuple[str, bytes]:
    """Return name and content of the newest undamaged checkpoint, or "" and b"" without any.

    Raises UserError if there are checkpoints, but none can be loaded.
    """
    paths = sorted(folder.glob(CHECKPOINT_PATTERN), reverse=True)
    for path in paths:
        try:
            content = path.read_bytes()
            decode_checkpoint(path, content)
            return path.name, content
        except PermissionError as error:
            raise UserError(f"cannot read {path}: {error}")
        except UserError:
            raise
        except Exception as error:  # noqa: BLE001 (damage can raise anything)
            warn(f"{path} is damaged, trying the one before: {first_line(error)}")
    if paths:
        raise UserError(f"no checkpoint in {folder} can be loaded: restore one")
    return "", b""


# ---------------------------------------------------------------- stopping and failing

# Ctrl-C, the usual request to end, a closed terminal, and Slurm's warning before the time is
# up (sbatch --signal=USR1@120). Windows has only the first two.
STOP_NAMES = {"SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"}
STOP_SIGNALS = [number for number in signal.Signals if number.name in STOP_NAMES]


@contextlib.contextmanager
def stop_signals_to(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Have stop signals call a handler within the block."""
    previous = {}
    for number in STOP_SIGNALS:
        # nohup, and & in a script, start programs with some signals ignored. Those stay so.
        # None stands for a handler that is no Python function, and cannot be put back.
        if signal.getsignal(number) not in (signal.SIG_IGN, None):
            previous[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old_handler in previous.items():
            signal.signal(number, old_handler)


def let_interrupts_end_set_up() -> None:
    """Have Ctrl-C end this process at once, until there is something to save.

    Python's own handler would have to wait while C++ code waits for other ranks.
    """
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextlib.contextmanager
def catch_stop_signals() -> Iterator[list[int]]:
    """Provide a list, to which the stop signals that arrive within the block are added."""
    received_signals: list[int] = []
    # What Ctrl-C did before this block.
    interrupt_handler = signal.getsignal(signal.SIGINT)

    def receive(number: int, frame: Any) -> None:
        received_signals.append(number)
        if number == signal.SIGINT:
            # A second Ctrl-C ends the process at once, whatever it is doing.
            signal.signal(signal.SIGINT, interrupt_handler)

    with stop_signals_to(receive):
        yield received_signals


def code_of_stop(received_signals: list[int]) -> int:
    """Return the exit code of a rank that has stopped for a signal: 128 + its number."""
    # Without one, this rank stops because another rank got a signal.
    number = received_signals[0] if received_signals else signal.SIGTERM
    return 128 + number


def ignore_stop_signals(worker_id: int = 0) -> None:
    """Leave it to the rank to stop, in one of its loader workers.

    Launchers send signals to whole process groups. A loader worker that died of one would
    take its rank down with an exception, before that could save.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def abort(error: Exception, info: RankInfo) -> NoReturn:
    """End this rank because of an error that the other ranks do not share."""
    if info.world_size == 1:
        raise error
    # gloo raises a plain RuntimeError, which only the name of its source file gives away.
    lost_rank_pattern = "/gloo/transport/|ncclRemoteError"
    is_lost_rank = isinstance(error, dist.DistNetworkError | dist.DistStoreError)
    if isinstance(error, RuntimeError) and re.search(lost_rank_pattern, str(error)):
        is_lost_rank = True
    if is_lost_rank:
        sentence = first_line(error).split(". ")[0]
        problem = f"rank {info.rank} lost another rank ({sentence})"
        text = f"error: {problem}: see that rank's own message; rerun to resume"
    else:
        text = f"rank {info.rank} failed:\n{traceback.format_exc()}"
    print_line(text, sys.stderr)
    # A normal end would destroy the process group, which can wait for ranks in a collective.
    os._exit(1)


def exit_like(code: int) -> NoReturn:
    """Exit with a code; where it stands for a stop signal, die of that signal.

    Then a shell sees what it sees when other programs are stopped: $? is 128 + the number,
    and Ctrl-C ends a `for` loop, not only the command in it.
    """
    # In a notebook or an interactive interpreter, the signal would end the interpreter.
    if code - 128 in STOP_SIGNALS and not hasattr(sys, "ps1"):
        # With `>&-` in a shell, there is no stdout.
        with contextlib.suppress(OSError, AttributeError):
            sys.stdout.flush()
        signal.signal(code - 128, signal.SIG_DFL)
        signal.raise_signal(code - 128)
    sys.exit(code)


# ---------------------------------------------------------------- launching

# Set by launchers that start several processes, but do not tell torch about them.
OTHER_LAUNCHERS = {
    "OMPI_COMM_WORLD_SIZE": "OMPI_COMM_WORLD_LOCAL_RANK",
    "PMI_SIZE": "MPI_LOCALRANKID",
    "SLURM_STEP_NUM_TASKS": "SLURM_LOCALID",
}


def read_rank_info() -> RankInfo | None:
    """Return this process's place as torchrun, or a launcher like it, has set it; else None.

    Nothing else in the program reads these variables. Raises UserError if some are missing.
    """
    needed = ["RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"]
    missing = [name for name in needed if not os.environ.get(name)]
    if "RANK" in missing and "WORLD_SIZE" in missing:
        for size_name in OTHER_LAUNCHERS:
            if int(os.environ.get(size_name, "1")) > 1:
                problem = f"{size_name} is {os.environ[size_name]}, but RANK is not set"
                fix = "start one torchrun per machine instead of several processes"
                raise UserError(f"{problem}, so each process would train alone: {fix}")
        return None
    if missing:
        found = " and ".join(name for name in needed[:2] if name not in missing)
        problem = f"{found} without {', '.join(missing)}"
        raise UserError(f"{problem} in the environment: unset {found}, or set all four")
    try:
        info = RankInfo(
            rank=int(os.environ["RANK"]),
            local_rank=int(os.environ.get("LOCAL_RANK", "0")),
            world_size=int(os.environ["WORLD_SIZE"]),
            local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
            init_method=f"tcp://{os.environ['MASTER_ADDR']}:{int(os.environ['MASTER_PORT'])}",
        )
    except ValueError as error:
        raise UserError(f"RANK, WORLD_SIZE or MASTER_PORT is not a number: {error}")
    if not 0 <= info.rank < info.world_size:
        raise UserError(f"RANK is {info.rank}, but WORLD_SIZE is {info.world_size}")
    return info


def is_started_by_torchrun() -> bool:
    """Return whether torchrun has started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def torchrun_hosts_the_store() -> bool:
    """Return whether the store runs in torchrun; otherwise rank 0 hosts it."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def speaks_for_machine() -> bool:
    """Return whether this process prints what several on its machine could print.

    Before the ranks have joined, only the launcher's variables show it.
    """
    if is_started_by_torchrun():
        # Not LOCAL_RANK, which is 0 in every process with --virtual-local-rank.
        rank = int(os.environ.get("RANK", "0"))
        return rank % int(os.environ.get("LOCAL_WORLD_SIZE", "1")) == 0
    return all(os.environ.get(name, "0") == "0" for name in OTHER_LAUNCHERS.values())


def choose_world_size(requested: int | None, info: RankInfo | None) -> int:
    """Return how many processes train; raise UserError if that cannot work."""
    gpus = count_gpus()
    if info is None:
        world_size = requested or max(1, gpus)
        if 0 < gpus < world_size:
            fix = f"start at most {gpus}, or set CUDA_VISIBLE_DEVICES= to use the CPU"
            raise UserError(f"{world_size} processes, but {gpus} GPU(s): {fix}")
        return world_size
    if requested not in (None, info.world_size):
        launcher = "torchrun runs" if is_started_by_torchrun() else "WORLD_SIZE is"
        raise UserError(f"--world_size {requested}, but {launcher} {info.world_size}")
    restarts = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"
    if restarts and not info.is_single_machine and torchrun_hosts_the_store():
        fix = "--rdzv_backend=c10d and TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"
        raise UserError(f"--max-restarts on several machines needs {fix}")
    return info.world_size


def launch(run_rank: Callable[[RankInfo, Any], int], args: Any, world_size: int) -> int:
    """Call run_rank(info, args) in `world_size` processes of its own; return the exit code."""
    if world_size == 1:
        alone = RankInfo(
            rank=0, local_rank=0, world_size=1, local_world_size=1, init_method=""
        )
        return run_rank(alone, args)
    received_signals: list[int] = []

    def pass_on(number: int, frame: Any) -> None:
        is_second_interrupt = number == signal.SIGINT and len(received_signals) > 0
        received_signals.append(number)
        for process in mp.active_children():
            if is_second_interrupt:
                process.kill()
            else:
                process.terminate()

    # The ranks meet in a file. A port could be taken, or be reached by others.
    with (
        tempfile.TemporaryDirectory(prefix="train_ddp-") as folder,
        stop_signals_to(pass_on),
    ):
        arguments = (run_rank, args, world_size, f"file://{folder}/store")
        context = mp.spawn(run_spawned_rank, arguments, nprocs=world_size, join=False)
        if received_signals:
            # The handler could not reach a process that was not there yet.
            for process in context.processes:
                process.terminate()
        return wait_for_processes(context, received_signals)


def wait_for_processes(context: Any, received_signals: list[int]) -> int:
    """Wait until all spawned processes have ended; return the exit code for the shell."""
    try:
        # After a failure, the others get 3 s to end by themselves, and as long after a SIGTERM.
        while not context.join(grace_period=3):
            pass
    except mp.ProcessExitedException as error:
        # It was stopped by a signal, or has failed, or was killed.
        stop_codes = [128 + number for number in STOP_SIGNALS]
        has_stopped = error.exit_code in [*stop_codes, -signal.SIGTERM]
        if received_signals and (has_stopped or len(received_signals) > 1):
            return 128 + received_signals[0]
        # With 1, the process has printed its error already.
        if error.exit_code != 1 and not has_stopped:
            print_line(f"error: {error}; rerun to resume", sys.stderr)
        # A negative code is that of a signal, for which shells use 128 + its number.
        if error.exit_code < 0:
            return 128 - error.exit_code
        return error.exit_code
    return 0


def run_spawned_rank(
    rank: int,
    run_rank: Callable[[RankInfo, Any], int],
    args: Any,
    world_size: int,
    init_method: str,
) -> NoReturn:
    """Be one of the processes that `launch` has spawned."""
    # The terminal sends Ctrl-C to all processes; the launcher passes it on as SIGTERM.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_launcher()
    launcher = mp.parent_process()
    if launcher is not None and not launcher.is_alive():
        # It died before the line above could have an effect.
        sys.exit(1)
    info = RankInfo(
        rank=rank,
        local_rank=rank,
        world_size=world_size,
        local_world_size=world_size,
        init_method=init_method,
    )
    sys.exit(run_rank(info, args))


def end_with_launcher() -> None:
    """Have the kernel send this process SIGTERM when its launcher dies (on Linux only).

    Without it, a worker of a killed torchrun would train on alone, as nobody's child.
    """
    if sys.platform == "linux":
        pr_set_pdeathsig = 1  # See prctl(2).
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
