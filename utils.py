"""Processes and files: how ranks start, agree and stop, and what they leave on disk."""

import contextlib
import fcntl
import io
import os
import signal
import socket
import sys
import tempfile
import time
import uuid
import zipfile
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing import resource_tracker
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# How long a rank waits in a collective for the others. With torch's default of half an hour,
# one frozen process holds the whole job that long. During set-up, a download may take a while.
COLLECTIVE_TIMEOUT, SETUP_TIMEOUT = timedelta(seconds=60), timedelta(minutes=10)
# The last one comes from a terminal that is closed.
STOP_SIGNALS = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
REPEAT_SECONDS = 1.0  # one Ctrl-C can arrive twice: from terminal and launcher


class UserError(Exception):
    """Something the user can mend: one line from rank 0, no traceback, exit code 1."""


def say(text: str, passing: bool = False) -> None:
    """Print from rank 0; on a terminal, what comes next overwrites a `passing` line."""
    if dist.get_rank() == 0:
        terminal = sys.stdout.isatty()
        end = "" if terminal and passing else "\n"
        print(f"\r\x1b[K{text}" if terminal else text, end=end, flush=True)


def warn(*lines: str) -> None:
    """Print a warning to stderr that nobody overlooks."""
    print("\n".join(["!" * 80, *lines, "!" * 80]), file=sys.stderr, flush=True)


def last_line(error: BaseException) -> str:
    """Reduce the message of an error to its last line, which is the most telling one."""
    return (str(error).strip().splitlines() or [repr(error)])[-1]


def under_torchrun() -> bool:
    """Tell whether torchrun has started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def on_stop(handler: Callable[[int, Any], None]) -> None:
    """Have `handler` called for each of STOP_SIGNALS that is not ignored, as by nohup."""
    for signum in STOP_SIGNALS:
        if signal.getsignal(signum) is not signal.SIG_IGN:
            signal.signal(signum, handler)


def launch(worker: Callable[..., None], args: Any, world_size: int) -> None:
    """Run worker(rank, args, store_path) in `world_size` processes, and exit.

    They meet over a file in a private folder: no port for a second run to collide with, and
    nothing for another machine to reach. The exit code is that of the first one to fail.
    """
    signals: list[tuple[float, int]] = []

    def pass_on(signum: int, frame: object) -> None:
        signals.append((time.monotonic(), signum))
        insisting = signals[-1][0] - signals[0][0] > REPEAT_SECONDS
        for process in mp.active_children():
            os.kill(process.pid, signal.SIGKILL if insisting else signum)

    with tempfile.TemporaryDirectory(prefix="train_ddp-") as folder:
        store_path = os.path.join(folder, "store")
        if world_size == 1:
            worker(0, args, store_path)
        on_stop(pass_on)
        # Workers inherit this and wait with a Ctrl-C until they can end without a traceback.
        resource_tracker.ensure_running()  # or spawn starts it, which unblocks SIGINT
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        context = mp.spawn(worker, (args, store_path), nprocs=world_size, join=False)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        if signals:  # came too early to be passed on
            pass_on(signals[0][1], None)
        try:
            # After a failure the others get this long to end, and as long after a SIGTERM.
            while not context.join(grace_period=3):
                pass
        except mp.ProcessExitedException as error:
            code, killer = error.exit_code, error.signal_name
            # 1 is for an error that is on the screen already; the others, for being stopped.
            if not signals and code not in [1, *(128 + s for s in STOP_SIGNALS)]:
                how = f"was killed by {killer}" if killer else f"exits with {code}"
                print(
                    f"error: rank {error.error_index} {how}; rerun to resume",
                    file=sys.stderr,
                )
            sys.exit(code if code > 0 else 128 - code)


def is_lost_rank(error: RuntimeError) -> bool:
    """Tell whether a collective failed only because another rank died, froze or left."""
    traces = "gloo", "pair closure"  # of the plain RuntimeErrors that gloo raises
    return isinstance(error, dist.DistError) or any(t in str(error) for t in traces)


def fresh_store(store: dist.Store, rank: int, world_size: int) -> dist.Store:
    """Agree on a part of torchrun's store that no earlier attempt has written to.

    torchrun keeps one store over all restarts, and gloo would read the addresses of dead ranks.
    Rank 0 chooses a name; the others ask for it with a question that is new each time.
    """
    name = uuid.uuid4().hex
    if rank:
        store.set(f"question{rank}", name)
        name = store.get(f"answer to {name}").decode()
        store.add(f"{name} known", 1)
    end = time.monotonic() + COLLECTIVE_TIMEOUT.total_seconds()
    while rank == 0 and store.add(f"{name} known", 0) < world_size - 1:
        if time.monotonic() > end:
            raise dist.DistStoreError("not all ranks have come to the store")
        for other in range(1, world_size):
            if store.check([f"question{other}"]):
                question = store.get(f"question{other}").decode()
                store.set(f"answer to {question}", name)
        time.sleep(0.01)
    return dist.PrefixStore(name, store)


@contextlib.contextmanager
def process_group(store: dist.Store | None) -> Iterator[torch.device]:
    """Join the process group that torchrun's variables describe; at the end, leave it.

    `store` is where ranks meet that torchrun has not started. Yields this rank's device.
    """
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_world_size = int(os.environ["LOCAL_WORLD_SIZE"])
    set_threads(local_world_size)
    backend, device = choose_device(int(os.environ["LOCAL_RANK"]))
    if backend == "gloo" and hasattr(os, "SCHED_BATCH"):
        # Or Linux lets gloo's receiver push its sender off the core while that holds a lock,
        # for which the receiver then spins until the next tick: up to 4 ms per all-reduce.
        with contextlib.suppress(OSError):  # forbidden in some sandboxes: slower then
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    if world_size == local_world_size:
        # gloo would listen at the address of the hostname: open to the network, and an error
        # where that name does not resolve. A single machine needs no more than loopback.
        loopback = next(name for _, name in socket.if_nameindex() if name[:2] == "lo")
        os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = loopback
    if store is None:
        store, _, _ = next(dist.rendezvous("env://", timeout=COLLECTIVE_TIMEOUT))
        store = fresh_store(store, rank, world_size)
    dist.init_process_group(
        backend,
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=COLLECTIVE_TIMEOUT,
        device_id=device if backend == "nccl" else None,
    )
    yield device
    # Not after an error: NCCL would wait here for ranks that are still in a collective. Then
    # the end of the process closes the connections, and so ends the others too.
    dist.destroy_process_group()


def choose_device(local_rank: int) -> tuple[str, torch.device]:
    """Return nccl and the GPU of this local rank if there is CUDA, else gloo and the CPU."""
    if not torch.cuda.is_available():
        return "gloo", torch.device("cpu")
    torch.cuda.set_device(local_rank)  # or every rank would allocate on GPU 0
    # The fastest algorithm is not the same in every run, and would not give the same bits.
    torch.backends.cudnn.deterministic = True
    return "nccl", torch.device("cuda", local_rank)


def set_threads(local_world_size: int) -> None:
    """Share the usable cores out among the processes of this machine.

    Left alone, each rank uses all cores, or just one under torchrun, which sets
    OMP_NUM_THREADS=1. Any other number is the user's and stays.
    """
    wish = os.environ.get("OMP_NUM_THREADS", "")
    by_torchrun = wish == "1" and under_torchrun() and local_world_size > 1
    if by_torchrun or not wish.isdecimal() or int(wish) == 0:
        cores = os.cpu_count() or 1
        if hasattr(os, "sched_getaffinity"):  # not on macOS
            cores = len(os.sched_getaffinity(0))
        torch.set_num_threads(max(1, cores // local_world_size))


def gather(item: Any, group: dist.ProcessGroup) -> list[Any]:
    """Return the `item` of every rank, in the order of ranks, on every rank."""
    items = [None] * dist.get_world_size()
    dist.all_gather_object(items, item, group)
    return items


@contextlib.contextmanager
def shared_fate(group: dist.ProcessGroup) -> Iterator[None]:
    """Raise one rank's UserError on all ranks, so that none waits for one that gave up."""
    problem = None
    try:
        yield
    except UserError as error:
        problem = str(error)
    for found in filter(None, gather(problem, group)):
        raise UserError(found)


class StopRequest:
    """Notes one of STOP_SIGNALS, for the ranks to agree on a step at which to stop."""

    def __init__(self) -> None:
        self.signum, self.since = 0, 0.0
        on_stop(self._note)

    def _note(self, signum: int, frame: object) -> None:
        if self.signum and time.monotonic() - self.since > REPEAT_SECONDS:
            os._exit(128 + signum)
        if not self.signum:
            self.signum, self.since = signum, time.monotonic()


def lock_folder(folder: Path) -> IO[str]:
    """Claim a checkpoint folder for as long as the returned file is open, or raise UserError.

    The kernel drops this lock when its holder dies. A file whose mere existence is the lock
    would survive a crash and block the rerun.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for leftover in folder.glob(".tmp-*"):  # of a save that was killed
            leftover.unlink()
    except BlockingIOError:
        raise UserError(f"another run uses {folder}: choose another --checkpoint_dir")
    except OSError as error:
        raise UserError(f"cannot write to the checkpoint folder: {error}")
    return lock


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file that is there whole or not at all, even after a power cut, or raise OSError.

    What `path` held before stays until the new content is safely on the disk.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{path.name}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # or the new name could reach the disk first
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def checkpoint_paths(folder: Path) -> list[Path]:
    """List the checkpoints; their names sort by progress."""
    return sorted(folder.glob("epoch*.pt"))


def save_checkpoint(path: Path, state: dict[str, Any], keep: int) -> None:
    """Write `state` or raise OSError; then delete all but the `keep` newest up to this one."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomically(path, buffer.getvalue())
    older = [p for p in checkpoint_paths(path.parent) if p.name < path.name]
    for outdated in older[::-1][keep - 1 :]:
        outdated.unlink(missing_ok=True)


def decode_checkpoint(content: bytes) -> dict[str, Any]:
    """Return the content of a checkpoint, tensors on the CPU; raise if it is not sound."""
    # torch.load skips the zip's checksums: it would train on from a flipped bit.
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        if damaged := archive.testzip():
            raise ValueError(f"wrong checksum of {damaged}")
    # weights_only: a full pickle may run any code while it is loaded.
    state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    if not {"model", "optimizers", "progress", "settings"} <= set(state):
        raise ValueError("it was not written by this program")
    return state


def newest_checkpoint(folder: Path) -> tuple[str, bytes] | None:
    """Return path and content of the newest sound checkpoint, or None if there is none.

    Raises UserError if there are some and none is sound.
    """
    for path in reversed(paths := checkpoint_paths(folder)):
        try:
            content = path.read_bytes()
            decode_checkpoint(content)
            return str(path), content
        except Exception as error:  # noqa: BLE001 (damage can raise anything)
            warn(f"{path} is damaged, trying the one before: {last_line(error)}")
    if paths:
        cure = "restore one, or delete them to start afresh"
        raise UserError(
            f"none of the {len(paths)} checkpoints in {folder} is sound: {cure}"
        )
    return None
