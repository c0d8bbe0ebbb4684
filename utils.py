"""The process group, and what it takes to survive failures: a beginner may skip the latter."""

import contextlib
import ctypes
import errno
import io
import multiprocessing
import os
import re
import signal
import socket
import sys
import tempfile
import time
import uuid
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

# How long a rank waits for the others, at the start and in each collective. With torch's
# default of half an hour, one frozen process holds the whole job for that long.
TIMEOUT = timedelta(minutes=3)
LAUNCHER_VARIABLES = "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"


@contextlib.contextmanager
def process_group(store_path: str | None) -> Iterator[torch.device]:
    """Join the process group that RANK, WORLD_SIZE and the like describe; leave it at the end.

    The ranks of a self-spawned run meet in the file `store_path`; with None, at MASTER_ADDR.
    Yields the device of this rank. Raises what torch raises if the ranks cannot meet.
    """
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if not os.environ.get("OMP_NUM_THREADS"):
        # More threads wait for one another by spinning, and starve each other as soon as
        # anything else runs on the machine. To use more cores, start more ranks.
        torch.set_num_threads(1)
    device = choose_device(int(os.environ["LOCAL_RANK"]))
    if device.type == "cpu" and hasattr(os, "SCHED_BATCH"):
        # Otherwise Linux lets gloo's receiving thread push its sending one off the core while
        # that holds a lock: two ranks on two cores train a third slower.
        with contextlib.suppress(OSError):  # forbidden in some sandboxes
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
        # gloo would listen at the address of the hostname: reachable from the network, and an
        # error where that name does not resolve. A single machine needs loopback only.
        loopback = next(name for _, name in socket.if_nameindex() if name[:2] == "lo")
        os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = loopback
    dist.init_process_group(
        # One group for both: tensors on a GPU travel over nccl, Python objects over gloo.
        backend="cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=create_store(store_path, rank, world_size),
        rank=rank,
        world_size=world_size,
        timeout=TIMEOUT,
        device_id=device if device.type == "cuda" else None,
    )
    try:
        yield device
    except UserError:  # raised on every rank: none of them is left in a collective
        dist.destroy_process_group()
        raise
    # Not after other errors: it would wait for ranks that are still in a collective.
    dist.destroy_process_group()


def choose_device(local_rank: int) -> torch.device:
    """Return the GPU of this local rank if there is CUDA, otherwise the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.cuda.set_device(local_rank)  # otherwise every rank allocates memory on GPU 0
    # Two runs differ in their last bits if cuDNN may choose the fastest algorithm, or NCCL
    # sums in the switch (github.com/NVIDIA/nccl/issues/1497).
    torch.backends.cudnn.deterministic = True
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    return torch.device("cuda", local_rank)


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


def one_line(error: BaseException) -> str:
    """Return an error's message with its lines joined."""
    return " ".join(str(error).split()) or repr(error)


def gather(item: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Return the `item` of every rank, in the order of ranks, on every rank."""
    items = [None] * dist.get_world_size()
    dist.all_gather_object(items, item, group)
    return items


@contextlib.contextmanager
def shared_errors(group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """Wait for all ranks at the end of the block; raise one rank's UserError on all of them.

    A rank that gave up alone would leave the others waiting in their next collective.
    """
    problem = None
    try:
        yield
    except UserError as error:
        problem = str(error)
    for message in filter(None, gather(problem, group)):
        raise UserError(message)


def is_lost_rank(error: Exception) -> bool:
    """Return whether `error` is a collective of gloo in which another rank took no part."""
    words = "Connection closed|Connection reset|Broken pipe|Timed out waiting"
    return "gloo" in str(error) and bool(re.search(words, str(error)))


# ---------------------------------------------------------------- stopping


def on_stop_signal(handler: Callable[[int, Any], None]) -> None:
    """Call `handler` for Ctrl-C, SIGTERM and a closed terminal; not if ignored, as by nohup."""
    for signum in signal.SIGINT, signal.SIGTERM, signal.SIGHUP:
        if signal.getsignal(signum) is not signal.SIG_IGN:
            signal.signal(signum, handler)


class StopRequest:
    """Remembers the first stop signal, so that the ranks can agree on a step to stop after.

    A second Ctrl-C ends the process at once. Other signals can arrive twice, from a launcher
    and from a service manager, and mean no more than once.
    """

    def __init__(self) -> None:
        self.signum = 0
        on_stop_signal(self._receive)

    def _receive(self, signum: int, frame: object) -> None:
        if self.signum and signum == signal.SIGINT:
            os._exit(128 + signum)
        self.signum = self.signum or signum


# ---------------------------------------------------------------- checkpoint files

CHECKPOINT_NAME = re.compile(r"epoch\d{5}-image\d{9}\.pt")
NO_LOCKS = errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP  # some network file systems


def claim_folder(folder: Path) -> IO[str]:
    """Lock a checkpoint folder for as long as the returned file is open, or raise UserError.

    The kernel drops this lock when its holder dies. A file whose mere existence is the lock
    would survive a crash and block the rerun.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("a")  # not "w": it could be a link to a file
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            warn(f"{folder} is on a disk without locks: do not start two runs in it")
        for leftover in folder.glob(".tmp-*"):  # of a save that was killed
            leftover.unlink()
    except BlockingIOError:
        raise UserError(f"another run uses {folder}: choose another --checkpoint_dir")
    except OSError as error:
        raise UserError(f"cannot write to the checkpoint folder: {error}")
    return lock


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that it is there whole or not at all, even after a power cut.

    What `path` held before stays until the new content is safely on the disk. Raises OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{path.name}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # otherwise the new name can reach the disk first
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    # Without this, the deletion of older files can reach the disk before the new name.
    directory = os.open(path.parent, os.O_RDONLY)
    os.fsync(directory)
    os.close(directory)


def checkpoint_paths(folder: Path) -> list[Path]:
    """List the checkpoints, oldest first; files with other names are the user's own."""
    return sorted(p for p in folder.glob("*.pt") if CHECKPOINT_NAME.fullmatch(p.name))


def encode_checkpoint(state: dict[str, Any]) -> bytes:
    """Return the content of a checkpoint file."""
    torch.save(state, buffer := io.BytesIO())
    return buffer.getvalue()


def save_checkpoint(path: Path, state: dict[str, Any], metrics: str, keep: int) -> None:
    """Write both, then delete all but the `keep` newest checkpoints; raise UserError."""
    older = [p for p in checkpoint_paths(path.parent) if p.name < path.name]
    # Decoded once, its tensors are on the CPU: what a GPU wrote must load on a laptop.
    content = encode_checkpoint(decode_checkpoint(encode_checkpoint(state)))
    try:
        write_atomically(path, content)
        write_atomically(path.with_name("metrics.jsonl"), metrics.encode())
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
    if not {"model", "optimizer", "progress", "settings"} <= set(state):
        raise ValueError("not written by this version of the program")
    return state


def newest_checkpoint(folder: Path) -> tuple[str, bytes]:
    """Return name and content of the newest sound checkpoint, or two empty ones.

    Warns of each damaged one. Raises UserError if there are some and none is sound.
    """
    paths = checkpoint_paths(folder)
    for path in reversed(paths):
        try:
            content = path.read_bytes()
            decode_checkpoint(content)
            return path.name, content
        except Exception as error:  # noqa: BLE001 (damage can raise anything)
            warn(f"{path} is damaged, trying the one before: {one_line(error)}")
    if paths:
        fix = "restore one, or delete them to start from scratch"
        raise UserError(f"no checkpoint of {len(paths)} in {folder} loads: {fix}")
    return "", b""


# ---------------------------------------------------------------- launching


def launch(worker: Callable[..., NoReturn], args: Any, world_size: int) -> NoReturn:
    """Run worker(rank, args, store_path) in `world_size` processes, and exit as they do.

    They meet in a file: no port for a second run to collide with, and nothing that another
    machine can reach. The exit code is that of the first worker to fail.
    """
    received: list[int] = []

    def pass_on(signum: int, frame: object) -> None:
        received.append(signum)
        insisting = len(received) > 1 and signum == signal.SIGINT
        for process in mp.active_children():
            process.kill() if insisting else process.terminate()

    with tempfile.TemporaryDirectory(prefix="train_ddp-") as folder:
        store_path = os.path.join(folder, "store")
        if world_size == 1:
            worker(0, args, store_path)
        on_stop_signal(pass_on)
        context = mp.spawn(worker, (args, store_path), nprocs=world_size, join=False)
        if received:  # before all workers were there to be told
            pass_on(signal.SIGTERM, None)
        try:
            # After a failure the others get 3 s to end, and as long after a SIGTERM.
            while not context.join(grace_period=3):
                pass
        except mp.ProcessExitedException as error:
            if received:
                sys.exit(128 + received[0])
            code, rank = error.exit_code, error.error_index
            # 1 is for an error that is on the screen already, 143 for a polite stop.
            if code not in (1, 128 + signal.SIGTERM):
                killed = f"was killed by {error.signal_name}"
                how = killed if code < 0 else f"exited with code {code}"
                print(f"error: rank {rank} {how}; rerun to resume", file=sys.stderr)
            sys.exit(code if code > 0 else 128 - code)
    sys.exit(0)


def end_with_launcher() -> None:
    """Have the kernel send SIGTERM to this worker when its launcher dies (Linux only).

    torchrun's workers would train on as orphans: they live in sessions of their own. mp.spawn
    has asked for SIGINT instead, which its workers ignore: `launch` tells them of a Ctrl-C.
    """
    launcher = multiprocessing.parent_process()
    if launcher:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux" and (launcher or "TORCHELASTIC_RUN_ID" in os.environ):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG, see prctl(2)
    if launcher and not launcher.is_alive():  # it died before the line above
        sys.exit(1)


# ---------------------------------------------------------------- torchrun's store


def create_store(store_path: str | None, rank: int, world_size: int) -> dist.Store:
    """Return the key-value store in which the ranks find one another's addresses.

    torchrun keeps one store over all its restarts, in which gloo would find the addresses of
    dead ranks (github.com/pytorch/pytorch/issues/135712). So rank 0 chooses a new prefix, and
    the others ask for it with a question that is new each time.
    """
    if store_path:
        return dist.FileStore(store_path, world_size)
    store, _, _ = next(dist.rendezvous("env://", timeout=TIMEOUT))
    prefix = uuid.uuid4().hex
    if rank != 0:
        store.set(f"question{rank}", prefix)
        prefix = store.get(f"answer to {prefix}").decode()
        store.add(f"{prefix} known", 1)
    deadline = time.monotonic() + TIMEOUT.total_seconds()
    while rank == 0 and store.add(f"{prefix} known", 0) < world_size - 1:
        if time.monotonic() > deadline:
            raise dist.DistStoreError("not all ranks have reached the store in time")
        for other in range(1, world_size):
            if store.check([f"question{other}"]):
                question = store.get(f"question{other}").decode()
                store.set(f"answer to {question}", prefix)
        time.sleep(0.01)
    return dist.PrefixStore(prefix, store)
