"""The process group, and what it takes to survive failures: a beginner may skip the latter."""

import contextlib
import ctypes
import errno
import io
import os
import signal
import socket
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import IO, Any, NoReturn

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

try:
    import fcntl
except ImportError:
    sys.exit("error: this program needs Linux or macOS (on Windows, use WSL)")

# ---------------------------------------------------------------- the process group

# How long a rank waits for the others. gloo's default is half an hour: for so long, one
# frozen process could block the whole job.
TIMEOUT = timedelta(minutes=3)


def join_process_group(init_method: str) -> torch.device:
    """Join the group of RANK, WORLD_SIZE and so on; set up and return this rank's device."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = choose_device(int(os.environ["LOCAL_RANK"]))
    if not os.environ.get("OMP_NUM_THREADS"):
        # Several threads wait for one another by spinning, and starve as soon as anything
        # else runs on the machine. To use more cores, start more ranks.
        torch.set_num_threads(1)
    store, _, _ = next(dist.rendezvous(init_method, rank, world_size, timeout=TIMEOUT))
    store.set_timeout(TIMEOUT)  # that of a file has not been set
    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
        # A single machine needs loopback only. gloo would listen at the address of the
        # hostname: reachable from the network, and an error if that does not resolve.
        loopback = next(name for _, name in socket.if_nameindex() if name[:2] == "lo")
        os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = loopback
        # torchrun keeps one store over all restarts: gloo would find addresses of dead ranks.
        # Machines may count differently (github.com/pytorch/pytorch/issues/135712).
        store = dist.PrefixStore(os.getenv("TORCHELASTIC_RESTART_COUNT", "0"), store)
    dist.init_process_group(
        # One group for both: tensors on a GPU travel over nccl, Python objects over gloo.
        backend="cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=TIMEOUT,
        device_id=device if device.type == "cuda" else None,
    )
    return device


def choose_device(local_rank: int) -> torch.device:
    """Return the GPU of this local rank if there is CUDA, otherwise the CPU."""
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)  # otherwise all ranks would use GPU 0
        # Two runs differ in their last bits if cuDNN may add up in any order, or NCCL in the
        # NVLink switch (github.com/NVIDIA/nccl/issues/1497).
        torch.backends.cudnn.deterministic = True
        os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
        return torch.device("cuda", local_rank)
    # Otherwise Linux lets gloo's receiving thread push its sending one off the core while that
    # holds a lock: two ranks on two cores train a third slower.
    with contextlib.suppress(AttributeError, OSError):  # on macOS, or in a sandbox
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    return torch.device("cpu")


# ---------------------------------------------------------------- talking


class UserError(Exception):
    """A problem that the program recognised: one line, no traceback, exit code 1."""


def print0(text: str) -> None:
    """Print from rank 0 only."""
    if dist.get_rank() == 0:
        print(text, flush=True)


def warn(text: str) -> None:
    """Print a warning to stderr, from whichever rank calls."""
    print(f"warning: {text}", file=sys.stderr, flush=True)


def gather(item: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Return the `item` of every rank, in the order of ranks, on every rank."""
    items = [None] * dist.get_world_size()
    dist.all_gather_object(items, item, group)
    return items


@contextlib.contextmanager
def shared_errors(group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """Wait for all ranks at the end of the block, and raise one rank's UserError on all."""
    problem = None
    try:
        yield
    except UserError as error:
        problem = str(error)
    # A rank that gave up alone would leave the others waiting in their next collective.
    if problems := [text for text in gather(problem, group) if text]:
        raise UserError(problems[0])


# ---------------------------------------------------------------- stopping


def catch_stop_signals(in_launcher: bool = False) -> list[int]:
    """Return a list to which Ctrl-C, SIGTERM and a closed terminal will add their numbers."""
    received: list[int] = []

    def receive(signum: int, frame: object) -> None:
        # Other signals may come twice, from a launcher and from a service manager.
        insisting = len(received) > 0 and signum == signal.SIGINT
        received.append(signum)
        if insisting and not in_launcher:
            os._exit(128 + signum)
        for worker in mp.active_children() if in_launcher else []:
            worker.kill() if insisting else worker.terminate()

    for signum in signal.SIGINT, signal.SIGTERM, signal.SIGHUP:
        if signal.getsignal(signum) is not signal.SIG_IGN:  # as nohup has it
            signal.signal(signum, receive)
    return received


# ---------------------------------------------------------------- checkpoint files

CHECKPOINT_NAME = f"epoch{'[0-9]' * 5}-image{'[0-9]' * 9}.pt"
NO_LOCKS = errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP  # some network file systems


def claim_folder(folder: Path) -> IO[str]:
    """Lock a checkpoint folder for as long as the returned file is open, or raise UserError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("a")  # not "w": it could be a link to a file
        # The kernel drops this lock when its holder dies: a crash never blocks a rerun.
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for leftover in folder.glob(".tmp-*"):  # of a save that failed or was killed
            leftover.unlink()
    except BlockingIOError:
        raise UserError(f"another run uses {folder}: choose another --checkpoint_dir")
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise UserError(f"cannot write to the checkpoint folder: {error}")
        warn(f"{folder} is on a disk without locks: do not start two runs in it")
    return lock


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, even if the power fails; raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{path.name}")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())  # otherwise the new name can reach the disk first
    temporary.replace(path)
    # Without this, the deletion of older files can reach the disk before the new name.
    directory = os.open(path.parent, os.O_RDONLY)
    with contextlib.suppress(OSError):  # some network file systems refuse
        os.fsync(directory)
    os.close(directory)


def save_checkpoint(path: Path, state: dict[str, Any], keep: int) -> None:
    """Write a checkpoint, then delete all but the `keep` newest; raise UserError."""
    older = [p for p in sorted(path.parent.glob(CHECKPOINT_NAME)) if p.name < path.name]
    torch.save(state, buffer := io.BytesIO())
    # Loaded once, its tensors are on the CPU: what a GPU wrote must load on a laptop.
    torch.save(decode_checkpoint(buffer.getvalue()), buffer := io.BytesIO())
    try:
        write_atomically(path, buffer.getvalue())
        for outdated in older[::-1][keep - 1 :]:
            outdated.unlink(missing_ok=True)
    except OSError as error:
        good = older[-1] if older else "none"
        raise UserError(f"cannot save {path}: {error}; last good checkpoint: {good}")


def decode_checkpoint(content: bytes) -> dict[str, Any]:
    """Return the content of a checkpoint file, tensors on the CPU; raise if it is damaged."""
    # torch.load skips the zip's checksums: it would load a flipped bit without a word.
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        if damaged := archive.testzip():
            raise ValueError(f"wrong checksum of {damaged}")
    # weights_only: an unrestricted pickle can run any code while it is loaded.
    state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    if not {"args", "model", "optimizer", "epoch", "images", "history"} <= set(state):
        raise ValueError("not written by this version of the program")
    return state


def newest_checkpoint(folder: Path) -> tuple[str, bytes]:
    """Return name and content of the newest sound checkpoint, or "" and b"" without any."""
    for path in reversed(paths := sorted(folder.glob(CHECKPOINT_NAME))):
        try:
            decode_checkpoint(content := path.read_bytes())
            return path.name, content
        except Exception as error:  # noqa: BLE001 (damage can raise anything)
            warn(f"{path} is damaged, trying the one before: {error!r}")
    if paths:
        raise UserError(f"no checkpoint in {folder} loads: restore one, or delete them")
    return "", b""


# ---------------------------------------------------------------- launching

LAUNCHER_VARIABLES = "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"


def refuse(message: str) -> NoReturn:
    """Exit with code 2 and one line, from one rank per machine."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"error: {message} (--help lists the flags)", file=sys.stderr)
    sys.exit(2)


def find_world_size(requested: int | None) -> int:
    """Return how many processes train, or refuse to."""
    gpus = torch.cuda.device_count()
    world_size = here = requested or max(1, gpus)
    missing = [name for name in LAUNCHER_VARIABLES if name not in os.environ]
    if missing and ("RANK" in os.environ or "WORLD_SIZE" in os.environ):
        refuse(f"RANK or WORLD_SIZE is set, but not {', '.join(missing)}: use torchrun")
    if not missing:
        world_size = int(os.environ["WORLD_SIZE"])
        here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if requested not in (None, world_size):
            refuse(f"--world_size {requested}, but torchrun runs {world_size}")
        restarts = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"
        shared_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        if restarts and shared_store and here < world_size:
            fix = "--rdzv_backend=c10d and TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"
            refuse(f"--max-restarts on several machines needs {fix}")
    if 0 < gpus < here:
        fix = f"start at most {gpus}, or set CUDA_VISIBLE_DEVICES= to use the CPU"
        refuse(f"{here} processes on this machine, but {gpus} GPUs: {fix}")
    return world_size


def launch(worker: Callable[..., NoReturn], args: Any, world_size: int) -> None:
    """Run worker(rank, args, init_method) in `world_size` processes, and exit as they do."""
    os.environ["WORLD_SIZE"] = os.environ["LOCAL_WORLD_SIZE"] = str(world_size)
    with tempfile.TemporaryDirectory(prefix="train_ddp-") as folder:
        # A file has no port for a second run to collide with, or for others to reach.
        init_method = f"file://{folder}/store"
        if world_size == 1:
            worker(0, args, init_method)
        received = catch_stop_signals(in_launcher=True)
        context = mp.spawn(worker, (args, init_method), nprocs=world_size, join=False)
        for process in context.processes if received else []:
            process.terminate()  # it was not there yet to be told
        try:
            # After a failure the others get 3 s to end, and as long after a SIGTERM.
            while not context.join(grace_period=3):
                pass
        except mp.ProcessExitedException as error:
            code = error.exit_code
            if len(received) > 1 or (received and code in (129, 130, 143, -15)):
                sys.exit(128 + received[0])  # as requested, politely or at once
            # 1 is for an error that is on the screen already, 143 for a polite stop.
            if code not in (1, 143):
                print(f"error: {error}; rerun to resume", file=sys.stderr)
            sys.exit(code if code > 0 else 128 - code)


def end_with_launcher() -> None:
    """Have the kernel send SIGTERM to this worker when its launcher dies (Linux only)."""
    launcher = mp.parent_process()
    if launcher:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # `launch` tells of a Ctrl-C
    # torchrun's workers live in sessions of their own; mp.spawn has asked for SIGINT.
    if sys.platform == "linux" and (launcher or "TORCHELASTIC_RUN_ID" in os.environ):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG, see prctl(2)
    if launcher and not launcher.is_alive():  # it died before the line above
        sys.exit(1)
