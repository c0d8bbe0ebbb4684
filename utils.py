"""What DDP needs around a training loop; below `hardening`, what makes it survive failures."""

import contextlib
import fcntl
import io
import os
import pickle
import signal
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any, NoReturn, TextIO

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# How long a rank waits for the others before it gives up.
TIMEOUT = timedelta(minutes=10)


def init_distributed() -> torch.device:
    """Join the other ranks; return the device on which this rank trains.

    In a script of your own that torchrun starts on GPUs, these lines are enough:

        local_rank = int(os.environ["LOCAL_RANK"])
        torch.cuda.set_device(local_rank)
        dist.init_process_group("nccl")
    """
    # For speed and safety. DDP does not need it: skip it at first.
    prepare_process()
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank())
        # So that "cuda" without a number means this GPU, and not GPU 0 on every rank.
        torch.cuda.set_device(device)
        # nccl sends tensors that are on a GPU; gloo those on the CPU, and Python objects.
        backend = "cpu:gloo,cuda:nccl"
    else:
        device = torch.device("cpu")
        backend = "gloo"
    # The store is a table on a server, or in a file, in which the ranks write their addresses.
    # init_process_group can open it by itself; open_store is for restarts (skip it at first, too).
    store, rank, world_size = open_store()
    dist.init_process_group(
        backend,
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=TIMEOUT,
        # Lets nccl connect here, not in the first collective, so that a failure is easier to read.
        device_id=device if device.type == "cuda" else None,
    )
    return device


def has_launcher() -> bool:
    """Return whether torchrun, or `launch` below, has started this process as a rank."""
    return "RANK" in os.environ


def local_rank() -> int:
    """Return the index of this process on its machine, from its launcher, or 0."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def print0(text: str) -> None:
    """Print a line on rank 0 only, as otherwise every rank would print it."""
    if dist.get_rank() == 0:
        print_line(text, sys.stdout)


def print_line(text: str, stream: TextIO) -> None:
    """Print a line, if the stream still works: a failed print must not end the training.

    The program that reads it may have ended (`| head`), the terminal may be closed, the disk full.
    """
    with contextlib.suppress(OSError):
        print(text, file=stream, flush=True)


def warn(text: str) -> None:
    """Print a warning, from whichever rank calls."""
    print_line(f"warning: {text}", sys.stderr)


def gather(item: Any) -> list[Any]:
    """Wait for all ranks; return the `item` of each of them, in the order of ranks."""
    items: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(items, item)
    return items


def broadcast(item: Any, source: int = 0) -> Any:
    """Wait for the rank `source`; return its `item` on all ranks."""
    items = [item]
    # On the other ranks, this replaces the item in the list.
    dist.broadcast_object_list(items, src=source)
    return items[0]


def any_rank(condition: bool) -> bool:
    """Wait for all ranks; return whether the condition is true on any of them."""
    # The tensor is on the CPU, so gloo sends it, and nobody has to wait for a GPU.
    count = torch.tensor(int(condition))
    dist.all_reduce(count)
    return count.item() > 0


def call_on(is_chosen: bool, function: Callable[..., Any], *args: Any) -> Any:
    """Call function(*args) on the ranks for which is_chosen is true; all ranks wait for them.

    Returns what the function returns, and None on the other ranks. It prevents this mistake:

        if dist.get_rank() == 0:
            save(...)   # The disk is full: rank 0 exits here.
        dist.barrier()  # The others wait here, and then fail, each with a traceback.

    For problems that the user can fix, functions in these scripts raise SystemExit with a text. If
    one does so on any rank, rank 0 prints the text, and all ranks exit. After any other exception,
    that rank ends with a traceback, and its launcher ends the others.
    """
    result = None
    problem = None
    if is_chosen:
        try:
            result = function(*args)
        except SystemExit as error:
            problem = str(error)
    # In `gather` all ranks wait.
    for problem_of_rank in gather(problem):
        if problem_of_rank is not None:
            exit_together(problem_of_rank)
    return result


def exit_together(problem: str) -> NoReturn:
    """Exit, on all ranks, which must all call it; rank 0 prints one line before."""
    if dist.get_rank() == 0:
        print_line(f"error: {problem}", sys.stderr)
    # Wait until rank 0 has printed: as soon as one rank exits, torchrun ends the others.
    dist.barrier()
    sys.exit(1)


# ================================================================ hardening
# On a first reading, stop here: nothing below is needed to understand DDP. It is for programs that
# run for hours: results that can be repeated, checkpoints that stay whole, processes that start and
# end in order.
#
# A process can handle a signal by a function of its own; it can ignore it (SIG_IGN); or it can
# leave it to the system (SIG_DFL), which then ends the process. A blocked signal waits until it is
# unblocked. This is how a process ends when
#
#   the training is finished:           with exit code 0
#   the user has to fix something:      all ranks with exit code 1, after one line from rank 0
#   there is any other exception:       with its traceback, and 1; the launcher ends the others
#   a rank gets a stop signal:          all save after the same step, and end by a signal
#   Ctrl-C comes a second time:         at once, by SIGINT
#   the launcher is killed:             as after a stop signal, which Linux sends to each rank

# ---------------------------------------------------------------- setting up a process


def prepare_process() -> None:
    """Set up signals, threads, network and GPU of a rank."""
    # torchrun sets this variable. (`launch` has its own way.)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        stop_when_parent_dies()
    # Without this, Ctrl-C would not end a rank that waits for others in C++ code, as Python handles
    # signals between its own instructions only. (If a script starts a command with &, the shell
    # makes it ignore Ctrl-C, and that stays so.)
    if has_launcher() and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    # Without this, DDP would import the module later. Its functions have a default argument,
    # group=group.WORLD: nothing now, but later the process group, which they would keep. Then its
    # threads would still run when the process exits, and could make it crash.
    from torch.distributed import nn  # noqa: F401

    # Without this, several threads would waste cores by waiting for one another. To use more cores,
    # start more ranks.
    if not os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(1)
    # Without this, gloo would listen at the address of the host name, where other machines could
    # connect. The loopback interface (127.0.0.1) only leads back to this one.
    if is_single_machine():
        loopback = "lo" if sys.platform == "linux" else "lo0"
        os.environ["GLOO_SOCKET_IFNAME"] = loopback
        os.environ["NCCL_SOCKET_IFNAME"] = loopback
    if torch.cuda.is_available():
        prepare_gpu()
    else:
        # Without this, the threads of a process interrupt one another, and two ranks on two cores
        # take 1.5 times as long. (macOS lacks the call, and a sandbox may refuse it.)
        with contextlib.suppress(AttributeError, OSError):
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def stop_when_parent_dies() -> None:
    """Have Linux send this process SIGTERM when its launcher is killed: it must not train on."""
    mp._prctl_pr_set_pdeathsig(signal.SIGTERM)  # type: ignore[attr-defined]


def prepare_gpu() -> None:
    """Make the GPU repeat its results to the last bit; exit if there is none for this rank.

    Other operations of a model of your own may need torch.use_deterministic_algorithms(True).
    """
    gpus = torch.cuda.device_count()
    if local_rank() >= gpus:
        problem = f"error: LOCAL_RANK is {local_rank()}, but there are {gpus} GPU(s)"
        sys.exit(f"{problem}: start fewer, or set CUDA_VISIBLE_DEVICES= to use the CPU")
    # Otherwise cuDNN may choose algorithms that add numbers in a different order each time.
    torch.backends.cudnn.deterministic = True
    # Otherwise an NVLink switch may do so (github.com/NVIDIA/nccl/issues/1497).
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")


def is_single_machine() -> bool:
    """Return whether all ranks are on this machine; also if there is no launcher."""
    return os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")


def open_store() -> tuple[dist.Store, int, int]:
    """Return the store, the rank and the world size, from the launcher's variables.

    torch can do this by itself, except for restarts: torchrun can start all ranks again when one
    has failed, and its store then still has the addresses of the dead ones.
    """
    if not has_launcher():
        # One rank alone has the store in its own memory.
        return dist.HashStore(), 0, 1
    refuse_unsafe_restarts()
    # "env://" means MASTER_ADDR and MASTER_PORT, which torchrun sets. `launch` sets a file instead.
    init_method = os.environ.get("TRAIN_DDP_STORE", "env://")
    # rendezvous is a generator with a single item.
    store, rank, world_size = next(dist.rendezvous(init_method, timeout=TIMEOUT))
    if is_single_machine():
        # After a restart, each key begins with another number, so nobody finds the addresses of the
        # dead ranks. (Several machines may count differently: pytorch/pytorch issue 135712.)
        restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.PrefixStore(restarts, store)
    store.set_timeout(TIMEOUT)
    return store, rank, world_size


def refuse_unsafe_restarts() -> None:
    """Exit if restarted ranks on several machines would find the addresses of dead ones.

    They would if torchrun may restart ranks, and keeps one store for all restarts.
    """
    keeps_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    can_restart = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"
    if keeps_store and can_restart and not is_single_machine():
        fix = "--rdzv_backend=c10d and TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"
        problem = f"error: --max-restarts on several machines needs {fix}"
        sys.exit(problem if local_rank() == 0 else 1)


# ---------------------------------------------------------------- checkpoint files

# Files with other names in a checkpoint folder are yours, and left alone.
CHECKPOINT_PATTERN = "epoch[0-9]*-image[0-9]*.pt"


def lock_folder(folder: Path) -> None:
    """Keep other runs out of a checkpoint folder until this process ends.

    Raises SystemExit if another run uses it, or if it cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Not open(..., "w"): if .lock is a link, that would empty another file. It stays open
        # (Python closes no int), as closing it would end the lock.
        lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        fix = "delete a .lock of another user, or choose another --checkpoint_dir"
        raise SystemExit(f"cannot write to the checkpoint folder ({error}): {fix}")
    try:
        # LOCK_NB: do not wait for it. Not flock: loader workers would share that lock, and they can
        # outlive a rank that was killed.
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise SystemExit(f"another run uses {folder}: choose another --checkpoint_dir")
    except OSError:
        warn(f"{folder} is on a disk without locks: start no second run in it")


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, even if the power fails; raises OSError."""
    # The name is always the same, so the next save removes what a killed one has left.
    temporary = path.with_name(".tmp-checkpoint")
    # Not overwritten: if it is a link, that would overwrite another file.
    temporary.unlink(missing_ok=True)
    with temporary.open("xb") as file:
        file.write(content)
        file.flush()
        # Wait until the content is on the disk; otherwise the new name could be there before it.
        os.fsync(file.fileno())
    temporary.replace(path)
    # A new name is a change of the folder. Wait for that, too, before older files are deleted. Some
    # network file systems refuse.
    directory = os.open(path.parent, os.O_RDONLY)
    with contextlib.suppress(OSError):
        os.fsync(directory)
    os.close(directory)


def save_checkpoint(path: Path, state: dict[str, Any], keep: int) -> None:
    """Write a checkpoint, then delete all but the `keep` newest; raises SystemExit."""
    checkpoints = sorted(path.parent.glob(CHECKPOINT_PATTERN), reverse=True)
    # If there are newer ones, they are damaged: they do not count.
    older = [checkpoint for checkpoint in checkpoints if checkpoint.name < path.name]
    buffer = io.BytesIO()
    torch.save(state, buffer)
    try:
        # What cannot be loaded again must not replace what can.
        decode_checkpoint(buffer.getvalue())
        # The folder may have been deleted meanwhile.
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, buffer.getvalue())
    except pickle.UnpicklingError:
        buffer.seek(0)
        types = torch.serialization.get_unsafe_globals_in_checkpoint(buffer)
        problem = f"{', '.join(types)} could not be loaded again"
        raise SystemExit(f"cannot save {path}: {problem}: use float() or str()")
    except OSError as error:
        good = older[0] if older else "none"
        raise SystemExit(f"cannot save {path}: {error}; last good checkpoint: {good}")
    # The one that has just been written is the first of those to keep.
    for outdated in older[keep - 1 :]:
        outdated.unlink(missing_ok=True)


def decode_checkpoint(content: bytes) -> dict[str, Any]:
    """Return what a checkpoint file holds, with its tensors on the CPU.

    Raises pickle.UnpicklingError if it holds more than tensors and plain values, and anything
    at all if it is damaged.
    """
    # The file is a zip archive. torch.load does not compare its checksums: it would load a flipped
    # bit.
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"wrong checksum of {damaged}")
    # weights_only: an unrestricted pickle can run any code while it is loaded.
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def newest_checkpoint(folder: Path) -> tuple[str, dict[str, Any]] | None:
    """Return name and content of the newest undamaged checkpoint, or None without any.

    Raises SystemExit if there are checkpoints, but none can be loaded.
    """
    paths = sorted(folder.glob(CHECKPOINT_PATTERN), reverse=True)
    for path in paths:
        try:
            return path.name, decode_checkpoint(path.read_bytes())
        except (OSError, MemoryError) as error:
            # This is no damage: the file may be whole, and an older one would lose progress.
            raise SystemExit(f"cannot read {path} ({error!r}): rerun when that works")
        except Exception as error:  # noqa: BLE001 (damage can raise anything)
            reason = str(error).partition("\n")[0]
            warn(f"{path} is damaged, trying the one before: {reason}")
    if paths:
        raise SystemExit(f"no checkpoint in {folder} can be loaded: restore one")
    return None


# ---------------------------------------------------------------- stop signals

# Ctrl-C, the usual request to end, a closed terminal, and the warnings of cluster schedulers before
# the time is up: Slurm (sbatch --signal=USR1@120), SGE (SIGUSR2) and LSF (SIGXCPU).
STOP_NAMES = ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU"]
STOP_SIGNALS = [signal.Signals[name] for name in STOP_NAMES]


class StopRequest:
    """The first stop signal that this process has got, and when."""

    signum: int | None = None
    received_at = 0.0

    def is_requested(self) -> bool:
        return self.signum is not None

    def receive(self, signum: int, frame: Any) -> None:
        """Note the first signal; raise KeyboardInterrupt if Ctrl-C comes after it."""
        now = time.monotonic()
        if self.signum is None:
            self.signum = signum
            self.received_at = now
        # Within a second it is the same Ctrl-C, which terminals and `timeout` send twice.
        elif signum == signal.SIGINT and now - self.received_at > 1:
            raise KeyboardInterrupt


def catch_stop_signals() -> StopRequest:
    """From now on, have stop signals noted instead of ending this process."""
    stop = StopRequest()
    for signum in STOP_SIGNALS:
        # nohup, and & in a script, start programs with some signals ignored. Leave those so.
        if signal.getsignal(signum) != signal.SIG_IGN:
            signal.signal(signum, stop.receive)
    return stop


def ignore_stop_signals(worker_id: int) -> None:
    """In a loader worker, ignore stop signals, because its rank handles them.

    Terminals and launchers send them to a rank and to its workers. If a worker ended, its rank
    would fail before it could save.
    """
    for signum in STOP_SIGNALS:
        signal.signal(signum, signal.SIG_IGN)


def die_of(signum: int) -> NoReturn:
    """End this process by a signal, as other programs end when they are stopped.

    A shell then sees that it was stopped: Ctrl-C ends a `for` loop, not only the command in it.
    """
    # A notebook, or an interactive interpreter, has sys.ps1. The signal would end the notebook, so
    # there it is only an exit code, as shells write it.
    if not hasattr(sys, "ps1"):
        # What your own code has printed may still be in a buffer.
        with contextlib.suppress(OSError):
            print(end="", flush=True)
        # Without our own handler, the signal ends this process.
        signal.signal(signum, signal.SIG_DFL)
        signal.raise_signal(signum)
    sys.exit(128 + signum)


# ---------------------------------------------------------------- starting and ending ranks


def run_rank(train: Callable[[Any], int | None], args: Any) -> None:
    """Call train(args) in this process. If a signal has stopped it, end by that signal."""
    try:
        signum = train(args)
    except KeyboardInterrupt:
        # The second Ctrl-C. This ends the process at once, before `finally`.
        die_of(signal.SIGINT)
    except SystemExit as error:
        # From `exit_together`. Without its traceback, which keeps the variables of `train`: if DDP
        # is not freed before the process group, the threads of gloo stay (see prepare_process).
        raise error.with_traceback(None)
    except Exception as error:
        if not has_launcher():
            raise
        # Print the traceback, and end at once, too. `finally` could wait for other ranks, which may
        # wait for this one in a collective.
        sys.excepthook(type(error), error, error.__traceback__)
        os._exit(1)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if signum is not None:
        die_of(signum)


def launch(train: Callable[[Any], int | None], args: Any) -> None:
    """Call train(args) in args.world_size new processes, and wait until they have ended.

    If this process gets a stop signal, it passes that on to them, and then dies of it, too.
    """
    stop = catch_stop_signals()
    # The store of the ranks is a file. A port could be taken, or be reached by others.
    with tempfile.TemporaryDirectory(prefix="train_ddp-") as folder:
        # In each process, mp.spawn calls run_spawned_rank(rank, *arguments).
        arguments = (train, args, f"file://{folder}/store", os.getpid())
        # The terminal sends Ctrl-C to the ranks, too. But they inherit that it is blocked: this
        # process asks them to stop, by SIGTERM. Here, Ctrl-C waits until it is unblocked. To start
        # Python's resource tracker would unblock it, so that comes first.
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        context = mp.spawn(run_spawned_rank, arguments, args.world_size, join=False)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        wait_for_ranks(context, stop)
    if stop.signum is not None:
        die_of(stop.signum)


def wait_for_ranks(context: mp.ProcessContext, stop: StopRequest) -> None:
    """Wait until all ranks have ended; ask them to stop when this process is asked to.

    Exits with 1 if one has failed. Then the others get 3 s to end by themselves, and 3 s more
    after a SIGTERM, before they are killed.
    """
    have_been_asked = False
    try:
        # `join` returns True when all have ended. It raises if one has failed, after it has ended
        # the others.
        while not context.join(timeout=0.1, grace_period=3):
            if stop.is_requested() and not have_been_asked:
                have_been_asked = True
                for process in context.processes:
                    process.terminate()
    except KeyboardInterrupt:
        # A second Ctrl-C ends even a frozen rank.
        for process in context.processes:
            process.kill()
    except mp.ProcessExitedException as error:
        # A rank that has stopped, and saved, dies of a signal, as this process will. Then its exit
        # code is minus the number of the signal.
        if stop.is_requested() and -error.exit_code in STOP_SIGNALS:
            return
        # With 1, the rank has printed its error already.
        if error.exit_code != 1:
            print_line(f"error: {error}; rerun to resume", sys.stderr)
        sys.exit(1)


def run_spawned_rank(
    rank: int, train: Callable[[Any], int | None], args: Any, store: str, launcher: int
) -> None:
    """Be one of the processes that `launch` has started; `launcher` is its process id."""
    stop_when_parent_dies()
    if os.getppid() != launcher:
        # The launcher was killed before the line above, and this process has got another parent.
        sys.exit(1)
    # torchrun sets the same variables, except for the last one.
    os.environ["RANK"] = str(rank)
    os.environ["LOCAL_RANK"] = str(rank)
    os.environ["WORLD_SIZE"] = str(args.world_size)
    os.environ["LOCAL_WORLD_SIZE"] = str(args.world_size)
    os.environ["TRAIN_DDP_STORE"] = f"{store}?rank={rank}&world_size={args.world_size}"
    run_rank(train, args)
