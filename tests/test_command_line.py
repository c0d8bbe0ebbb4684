"""Every way to start the program: what it prints, what it refuses, and who says so."""

import contextlib
import io
import itertools
import os
import re
import runpy
import signal
import socket
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist
from conftest import (
    SCRIPT,
    Forked,
    Started,
    checksum,
    command,
    fault,
    hand_set,
    newest,
)

import train_ddp
import utils

LAUNCHERS = re.compile("RANK|WORLD_SIZE|LOCAL|MASTER|TORCHELASTIC|OMPI|PMI|MPI|SLURM")
TORCHRUN = {"TORCHELASTIC_RUN_ID": "x", "MASTER_ADDR": "::1", "MASTER_PORT": "9"}


@pytest.fixture(autouse=True)
def setenv(monkeypatch):
    """Set variables. Those of launchers are gone: the tests may run in a job of Slurm."""
    for name in filter(LAUNCHERS.match, [*os.environ]):
        monkeypatch.delenv(name)

    def set_all(**variables: object) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, str(value))

    return set_all


@pytest.fixture
def parse(monkeypatch):
    """Parse flags as main does it."""

    def parse_flags(*flags: str):
        monkeypatch.setattr(sys, "argv", ["train_ddp.py", *flags])
        return train_ddp.parse_args(utils.read_rank_info())

    return parse_flags


@pytest.fixture
def refused(monkeypatch, capsys, tmp_path):
    """Run main, which must end with 2 and touch no file; return the line it prints."""
    monkeypatch.chdir(tmp_path)
    trains = "the command line was accepted"
    monkeypatch.setattr(train_ddp, "run_rank", lambda *_: pytest.fail(trains))

    def run_main(*flags: str) -> str:
        monkeypatch.setattr(sys, "argv", ["train_ddp.py", *flags])
        with pytest.raises(SystemExit) as caught:
            train_ddp.main()
        assert caught.value.code == 2
        output = capsys.readouterr()
        assert output.out == ""
        assert re.fullmatch("(error: .*\n)?", output.err)
        assert [*tmp_path.iterdir()] == []
        return output.err

    return run_main


# Flags

# Folders: they would become one called gs:, or the current one if a variable is not set.
WRONG_FLAGS = f"""
--epochs 0; --epochs 1.5; --epochs 100000; --epochs; --batch_size 0; --world_size -2; --keep 0;
--save_every 0; --lr 0; --lr nan; --seed -1; --seed {2**62}; --unknown 1; --epoch 3; stray;
--data_dir gs://x/y; --checkpoint_dir gs://x/y; --data_dir=; --data_dir ~nobody-of-this-name/x
"""


@pytest.mark.parametrize("flags", re.split(";\\s", WRONG_FLAGS.strip()))
def test_wrong_flags_get_one_line_that_names_them(refused, flags):
    error = refused(*flags.split())
    assert all(word in error for word in re.split("[ =]", flags))


def test_flags_and_their_defaults(parse, setenv, capsys):
    setenv(HOME="/home/someone")
    args = parse()
    assert (args.epochs, args.batch_size, args.world_size, args.seed) == (3, 64, 1, 0)
    assert (args.lr, args.save_every, args.keep) == (None, None, 3)
    assert (str(args.data_dir), str(args.checkpoint_dir)) == ("data", "checkpoints")
    assert parse("--checkpoint_dir=~/x").checkpoint_dir == Path("/home/someone/x")
    for old_launcher in "--local-rank=1", "--local_rank=1":
        assert parse(old_launcher) == args
    with pytest.raises(SystemExit) as caught:
        parse("--help")
    assert caught.value.code == 0
    defaults = re.findall(r"\((\w+)\)$", capsys.readouterr().out, re.MULTILINE)
    assert defaults == ["3", "64", "0", "3", "data", "checkpoints"]


# What launchers leave in the environment


def test_torchrun_and_hands_tell_each_rank_who_it_is(setenv):
    assert utils.read_rank_info() is None
    setenv(RANK=5, WORLD_SIZE=8, MASTER_ADDR="::1", MASTER_PORT=9)
    assert utils.read_rank_info() == (5, 0, 8, 1, "tcp://::1:9")
    setenv(LOCAL_RANK=1, LOCAL_WORLD_SIZE=4)
    assert utils.read_rank_info() == (5, 1, 8, 4, "tcp://::1:9")


@pytest.mark.parametrize("given", [["WORLD_SIZE"], ["RANK"], ["RANK", "WORLD_SIZE"]])
def test_left_over_variables_are_to_be_unset(setenv, refused, given):
    setenv(**dict.fromkeys(given, 0))
    needed = "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"
    missing = ", ".join(name for name in needed if name not in given)
    found = " and ".join(given)
    problem = f"{found} without {missing} in the environment"
    assert f"{problem}: unset {found}, or set all four" in refused()


def test_variables_that_cannot_be_true_are_refused(setenv, refused):
    rank = hand_set(2)[0]
    for name, value in ("RANK", "x"), ("MASTER_PORT", "x"), ("RANK", 2), ("RANK", -1):
        setenv(**rank | {name: value})
        error = refused()
        assert name in error and str(value) in error


@pytest.mark.parametrize("size, local_rank", utils.OTHER_LAUNCHERS.items())
def test_several_processes_that_know_nothing_of_each_other_are_refused(
    setenv, refused, parse, size, local_rank
):
    """mpirun and srun start them; each would train alone. One of them on a machine says so."""
    setenv(**{size: 1, local_rank: 0})
    assert parse().world_size == 1
    setenv(**{size: 2})
    assert f"{size} is 2, but RANK is not set" in refused()
    setenv(**{local_rank: 1})
    assert refused() == ""
    setenv(**hand_set(2)[1])
    assert parse().world_size == 2


def test_one_process_per_machine_reports_what_all_could_report(setenv, refused):
    """A rank that was started by hand may be the only one with a mistake."""
    setenv(**hand_set(2)[1], LOCAL_RANK=1)
    assert "--epochs" in refused("--epochs", "0")
    for rank, speaks in {4: True, 5: False}.items():
        for local_rank in {0, rank % 4}:  # 0 in all with --virtual-local-rank
            numbers = {"RANK": rank, "LOCAL_RANK": local_rank}
            setenv(**TORCHRUN, WORLD_SIZE=8, LOCAL_WORLD_SIZE=4, **numbers)
            assert bool(refused("--epochs", "0")) == speaks


def test_the_world_size_is_that_of_the_launcher(setenv, parse, refused):
    setenv(**hand_set(4)[0])
    assert parse().world_size == 4
    assert parse("--world_size", "4").world_size == 4
    assert "--world_size 3, but WORLD_SIZE is 4" in refused("--world_size", "3")
    setenv(**TORCHRUN)
    assert "--world_size 1, but torchrun runs 4" in refused("--world_size=1")


def test_restarts_on_several_machines_need_a_store_for_each(setenv, parse, refused):
    """In a shared store, the ranks would find addresses of dead ones, and hang."""
    setenv(**TORCHRUN, WORLD_SIZE=4, RANK=0)
    for per_machine, restarts, shared in (2, 0, True), (2, 3, False), (4, 3, True):
        setenv(LOCAL_WORLD_SIZE=per_machine, TORCHELASTIC_MAX_RESTARTS=restarts)
        setenv(TORCHELASTIC_USE_AGENT_STORE=shared)
        assert parse().world_size == 4
    setenv(LOCAL_WORLD_SIZE=2)
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in refused()


# Devices, and the process group


@pytest.fixture
def gpus(monkeypatch):
    """Pretend that there are so many GPUs; return those that are chosen."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    monkeypatch.setenv("NCCL_NVLS_ENABLE", "")  # so that it is restored
    monkeypatch.delenv("NCCL_NVLS_ENABLE")

    def pretend(count: int, usable: bool = True) -> list[int]:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: usable)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        return chosen

    return pretend


def test_one_process_per_gpu_and_no_more(parse, refused, gpus):
    gpus(2)
    assert parse().world_size == 2
    assert parse("--world_size", "1").world_size == 1
    assert "3 processes, but 2 GPU(s)" in refused("--world_size", "3")
    gpus(2, usable=False)  # The driver is too old, for example.
    assert parse().world_size == 1
    assert parse("--world_size", "3").world_size == 3


def test_a_rank_without_a_gpu_of_its_own_is_refused_by_one_process(gpus):
    """Where each process sees one GPU only, as its own, LOCAL_RANK is 0 in all of them."""
    chosen = gpus(1)
    assert utils.choose_device(0) == torch.device("cuda", 0)
    with pytest.raises(utils.UserError, match="LOCAL_RANK is 1, but .* sees 1 GPU"):
        utils.choose_device(1)
    with pytest.raises(utils.ReportedElsewhere):
        utils.choose_device(2)
    assert chosen == [0]


def test_the_process_group(monkeypatch, setenv, gpus):
    """On one machine it keeps to loopback; on more, the user's choice of interface stays.

    Each local rank takes its own GPU, and repeats its results bit by bit.
    """
    chosen = gpus(2)
    init = Mock()
    monkeypatch.setattr(dist, "init_process_group", init)
    for machines, interface in (2, "eth7"), (1, "lo"):
        setenv(GLOO_SOCKET_IFNAME="eth7", NCCL_SOCKET_IFNAME="eth7")
        info = utils.RankInfo(3, 1, 4 * machines, 4, "")
        assert utils.join_process_group(info) == torch.device("cuda", 1)
        assert os.environ["GLOO_SOCKET_IFNAME"].startswith(interface)
        assert os.environ["NCCL_SOCKET_IFNAME"].startswith(interface)
    assert chosen == [1, 1]
    assert init.call_args.kwargs["device_id"] == torch.device("cuda", 1)
    assert init.call_args.kwargs["backend"] == "cpu:gloo,cuda:nccl"
    assert torch.backends.cudnn.deterministic
    assert os.environ["NCCL_NVLS_ENABLE"] == "0"


def test_the_user_may_set_another_number_of_threads(monkeypatch, setenv):
    setenv(OMP_NUM_THREADS=3)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: pytest.fail("it is set"))
    utils.use_the_cores_well(has_gpu=True)


# Whole runs

FLAGS = "--epochs", 1, "--batch_size", 25  # 200 steps of two ranks
TRANSCRIPT = r"""processes  2 on cpu, 1 thread\(s\) each, {cores} CPU core\(s\) for them
data       {data}
training   25 images per rank and step, peak lr 0.00625
start      from scratch, nothing in checkpoints
step 200  train loss {train_loss:.4f}
epoch 1/1  train loss {train_loss:.4f}  test loss {test_loss:.4f}  \
accuracy {test_accuracy:.2%}  {images_per_second:,.0f} images/s  {seconds:.1f} s  \
checkpoints/epoch00001-image000000000.pt
""".replace("\\\n", "")
# It chooses a port itself, and prints nothing if the number of threads is set.
TORCHRUN_ALONE = {"PET_STANDALONE": "1", "OMP_NUM_THREADS": "1"}
# The default way to start a process, from Python 3.14 on.
FORKSERVER = fault(utils="mp.set_start_method('forkserver', force=True)")
# As OMP_PROC_BIND and taskset can do it, the ranks all get the same core.
ONE_CORE = fault("import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Three runs of two ranks at the same time: for each, its folder and its jobs.

    The port that most programs use is taken. The ranks that are started by hand do without
    LOCAL_RANK and LOCAL_WORLD_SIZE.
    """
    torchrun, spawned, hand = map(tmp_path_factory.mktemp, ("torchrun", "self", "hand"))
    flags = command(*FLAGS)[2:]
    with socket.socket() as port:
        with contextlib.suppress(OSError):  # Somebody has it already.
            port.bind(("127.0.0.1", 29500))
        jobs = {
            torchrun: [
                Started(command(*FLAGS, torchrun=2), torchrun, **TORCHRUN_ALONE)
            ],
            spawned: [Forked([*flags, "--world_size=2"], spawned, **FORKSERVER)],
            hand: [Forked(flags, hand, **env, **ONE_CORE) for env in hand_set(2)],
        }
        yield jobs
    for job in itertools.chain(*jobs.values()):
        job.kill()


def test_a_run_prints_one_transcript_under_each_launcher(runs):
    """One rank speaks; torchrun adds nothing. The numbers are those in the checkpoint."""
    all_cores = len(os.sched_getaffinity(0))
    for folder, (first, *others) in runs.items():
        assert first.wait() == 0, first.output()
        assert [(other.wait(), other.output()) for other in others] in ([], [(0, "")])
        [record] = newest(folder / "checkpoints")["progress"]["history"]
        record["data"] = re.escape(record["data"])
        pattern = TRANSCRIPT.format(**record, cores=1 if others else all_cores)
        assert re.fullmatch(pattern, first.output()), (pattern, first.output())
        assert (record["epoch"], record["step"]) == (1, 200)
        speed = record["images_per_second"] * record["seconds"]
        assert speed == pytest.approx(10000)


def test_each_launcher_gives_the_same_result(runs):
    """Also several runs at once, and with another default way to start a process."""
    assert {job.wait() for jobs in runs.values() for job in jobs} == {0}
    assert len({checksum(folder / "checkpoints") for folder in runs}) == 1


ONE_OF_ALL = {
    "different": (
        ["--keep", 4],
        'name = os.environ["RANK"]',
        "start all ranks alike, not with data 0, data 1, keep 3, keep 4",
    ),
    "a bad file": ([], 'if os.environ["RANK"] == "1": raise UserError("bad")', "bad"),
    "few": ([], "train_set = [0]", "2 ranks, but 1 training images: start fewer"),
    "no images to test with": ([], "test_set = []", "the test set is empty"),
}


@pytest.mark.parametrize("case", ONE_OF_ALL)
def test_ranks_that_cannot_train_together_end_with_one_error(fork, case):
    """Each machine has a command line and a disk of its own."""
    flags_of_rank_1, change, error = ONE_OF_ALL[case]
    code = f"""
def load_data(*args, original=load_data, **kwargs):
    name, train_set, test_set = original(*args, **kwargs)
    {change}
    return name, train_set, test_set
"""
    first, second = [env | fault(data=code) for env in hand_set(2)]
    ranks = fork(**first), fork(*flags_of_rank_1, **second)
    assert [rank.wait() for rank in ranks] == [1, 1]
    assert [rank.output() for rank in ranks] == [f"error: {error}\n", ""]


def test_a_port_that_is_taken_is_named(fork):
    first, _ = hand_set(2)
    with socket.create_server(("127.0.0.1", int(first["MASTER_PORT"]))):
        rank = fork(**first)
        assert rank.wait() == 1
    error = f"error: cannot use 127.0.0.1:{first['MASTER_PORT']} .*MASTER_PORT\n"
    assert re.fullmatch(error, rank.output())


def run_twice(_: int, folder: Path) -> None:
    os.chdir(folder)
    for name in "http_proxy", "https_proxy":
        os.environ[name] = "http://127.0.0.1:9"  # There is no network.
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    for epochs in "1", "2":
        sys.argv = ["train_ddp.py", "--epochs", epochs, "--batch_size", "100"]
        errors = io.StringIO()
        with contextlib.redirect_stderr(errors), pytest.raises(SystemExit) as caught:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        assert caught.value.code == 0
        for text in "could not be downloaded", "BUNDLED SAMPLE", "in data/MNIST/raw":
            assert errors.getvalue().count(text) == 1
        assert handlers == {n: signal.getsignal(n) for n in signal.valid_signals()}
        assert not [*filter(LAUNCHERS.match, os.environ)]
        assert not dist.is_initialized()


def test_a_second_run_in_one_python_process_is_as_good_as_the_first(tmp_path):
    """As with %run in a notebook. Each leaves signal handlers and variables as they were.

    Here they have no network, and are far from the repository.
    """
    folder = tmp_path / "mit Leerzeichen und Umläuten äöü"
    folder.mkdir()
    start = torch.multiprocessing.start_processes
    start(run_twice, (folder,), start_method="forkserver")
    first, second = newest(folder / "checkpoints")["progress"]["history"]
    assert (first["epoch"], second["epoch"]) == (1, 2)
    assert first["data"].startswith("MNIST 10000+2000 images")
    assert second["test_accuracy"] > 0.9


def test_in_a_notebook_a_stop_does_not_end_the_interpreter(monkeypatch):
    monkeypatch.setattr(sys, "ps1", "In [1]: ", raising=False)
    monkeypatch.setattr(signal, "raise_signal", lambda _: pytest.fail("it ends"))
    with pytest.raises(SystemExit) as caught:
        utils.exit_like(128 + signal.SIGTERM)
    assert caught.value.code == 128 + signal.SIGTERM


def test_on_windows_the_program_refuses_but_its_modules_work(monkeypatch, refused):
    """A model that was trained elsewhere can be used there."""
    monkeypatch.setattr(train_ddp, "os", SimpleNamespace(name="nt"))
    assert "Windows" in refused()
    monkeypatch.setitem(sys.modules, "fcntl", None)
    for name in "data.py", "model.py", "utils.py":
        runpy.run_path(str(SCRIPT.with_name(name)))
