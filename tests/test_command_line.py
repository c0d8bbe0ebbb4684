"""Every way to start the program: what it prints, what it refuses, and who says so."""

import os
import re
import runpy
import signal
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from conftest import (
    SAMPLE,
    SCRIPT,
    Started,
    checkpoints,
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
def no_launcher(monkeypatch):
    """The tests themselves may run in a job of Slurm."""
    for name in filter(LAUNCHERS.match, [*os.environ]):
        monkeypatch.delenv(name)


@pytest.fixture
def setenv(monkeypatch):
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


def in_child(function, *args) -> None:
    """Call function(0, *args) in a process of its own."""
    start = torch.multiprocessing.start_processes
    start(function, args, nprocs=1, start_method="forkserver")


# Flags


@pytest.mark.parametrize(
    "flags",
    [
        *("--epochs 0", "--epochs -1", "--epochs 1.5", "--epochs", "--epochs 100000"),
        *("--batch_size 0", "--batch_size many", "--world_size 0", "--world_size -2"),
        *("--save_every 0", "--keep 0", "--lr 0", "--lr nan", "--lr inf", "--lr -0.1"),
        *("--seed x", "--seed -1", f"--seed {2**62}", "--data_dir", "--unknown 1"),
        *("--epoch 3", "stray"),
    ],
)
def test_wrong_flags_get_one_line_that_names_them(refused, flags):
    assert flags.split()[0] in refused(*flags.split())


def test_flags_and_their_defaults(parse, capsys):
    args = parse()
    assert (args.epochs, args.batch_size, args.world_size, args.seed) == (3, 64, 1, 0)
    assert (str(args.data_dir), str(args.checkpoint_dir)) == ("data", "checkpoints")
    assert (args.lr, args.save_every, args.keep) == (None, None, 3)
    with pytest.raises(SystemExit) as caught:
        parse("--help")
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert {*re.findall("--([a-z_-]+)", shown)} == {
        *vars(args),
        "help",
        "nproc_per_node",
    }
    for default in "(3)", "(64)", "(0)", "(data)", "(checkpoints)":
        assert default in shown


@pytest.mark.parametrize("spelling", ["--local-rank=1", "--local_rank=1"])
def test_the_local_rank_that_old_launchers_pass_is_ignored(parse, spelling):
    assert parse(spelling) == parse()


def test_a_folder_may_begin_with_a_tilde(parse, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    args = parse("--checkpoint_dir=~/runs", "--data_dir", "~")
    assert args.checkpoint_dir == Path("/home/someone/runs")
    assert args.data_dir == Path("/home/someone")


@pytest.mark.parametrize("flag", ["--checkpoint_dir", "--data_dir"])
def test_what_is_no_folder_is_refused(refused, flag):
    """It would become a folder called gs:, or the current one if a variable is not set."""
    for folder in "gs://bucket/x", "", "~nobody-of-this-name/x":
        error = refused(flag, folder)
        assert flag in error and folder in error


# What launchers leave in the environment


def test_torchrun_and_hands_tell_each_rank_who_it_is(setenv):
    assert utils.read_rank_info() is None
    setenv(RANK=5, WORLD_SIZE=8, MASTER_ADDR="::1", MASTER_PORT=9)
    assert utils.read_rank_info() == (5, 0, 8, 1, "tcp://::1:9")
    setenv(LOCAL_RANK=1, LOCAL_WORLD_SIZE=4)
    assert utils.read_rank_info() == (5, 1, 8, 4, "tcp://::1:9")


@pytest.mark.parametrize(
    "given, missing, fix",
    [
        (["WORLD_SIZE"], ["RANK", "MASTER_ADDR", "MASTER_PORT"], "unset WORLD_SIZE,"),
        (["RANK"], ["WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"], "unset RANK,"),
        (
            ["RANK", "WORLD_SIZE"],
            ["MASTER_ADDR", "MASTER_PORT"],
            "RANK and WORLD_SIZE,",
        ),
        (["RANK", "WORLD_SIZE", "MASTER_ADDR"], ["MASTER_PORT"], "unset RANK and"),
    ],
)
def test_left_over_variables_are_to_be_unset(setenv, refused, given, missing, fix):
    setenv(**dict.fromkeys(given, 0))
    error = refused()
    assert f"without {', '.join(missing)} in" in error
    assert fix in error
    assert "torchrun" not in error


@pytest.mark.parametrize(
    "wrong", [{"RANK": "x"}, {"MASTER_PORT": "x"}, {"RANK": "2"}, {"RANK": "-1"}]
)
def test_variables_that_cannot_be_true_are_refused(setenv, refused, wrong):
    setenv(**hand_set(2)[0] | wrong)
    [(name, value)] = wrong.items()
    error = refused()
    assert name in error and value in error


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
    for rank, speaks in {4: True, 5: False}.items():
        for local_rank in {0, rank % 4}:  # 0 in all with --virtual-local-rank
            numbers = {"RANK": rank, "LOCAL_RANK": local_rank}
            setenv(**TORCHRUN, WORLD_SIZE=8, LOCAL_WORLD_SIZE=4, **numbers)
            assert bool(refused("--epochs", "0")) == speaks


def test_a_rank_that_was_started_by_hand_reports_its_own_mistakes(setenv, refused):
    setenv(**hand_set(2)[1], LOCAL_RANK=1)
    assert "--epochs" in refused("--epochs", "0")


def test_the_world_size_is_that_of_the_launcher(setenv, parse, refused):
    setenv(**hand_set(4)[0], LOCAL_WORLD_SIZE=4)
    assert parse().world_size == 4
    assert parse("--world_size", "4").world_size == 4
    assert "--world_size 3, but WORLD_SIZE is 4" in refused("--world_size", "3")
    setenv(**TORCHRUN)
    assert "--world_size 1, but torchrun runs 4" in refused("--world_size=1")


def test_restarts_on_several_machines_need_a_store_for_each(setenv, parse, refused):
    """In a shared store, the ranks would find addresses of dead ones, and hang."""

    def start(machines: int, restarts: int, shared: bool) -> None:
        setenv(**TORCHRUN, WORLD_SIZE=2 * machines, RANK=0, LOCAL_WORLD_SIZE=2)
        setenv(TORCHELASTIC_MAX_RESTARTS=restarts, TORCHELASTIC_USE_AGENT_STORE=shared)

    for machines, restarts, shared in (2, 0, True), (2, 3, False), (1, 3, True):
        start(machines, restarts, shared)
        assert parse().world_size == 2 * machines
    start(2, 3, True)
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


def test_gpus_that_the_driver_cannot_use_are_none(parse, gpus):
    chosen = gpus(2, usable=False)
    assert parse().world_size == 1
    assert parse("--world_size", "3").world_size == 3
    assert utils.choose_device(1) == torch.device("cpu")
    assert chosen == []


def test_a_rank_without_a_gpu_of_its_own_is_refused_by_one_process(gpus):
    """Where each process sees one GPU only, as its own, LOCAL_RANK is 0 in all of them."""
    chosen = gpus(1)
    assert utils.choose_device(0) == torch.device("cuda", 0)
    with pytest.raises(utils.UserError, match="LOCAL_RANK is 1, but .* sees 1 GPU"):
        utils.choose_device(1)
    with pytest.raises(utils.ReportedElsewhere):
        utils.choose_device(2)
    assert chosen == [0]


@pytest.mark.parametrize("machines", [1, 2])
@pytest.mark.parametrize("has_gpu", [False, True])
def test_the_process_group(monkeypatch, setenv, gpus, has_gpu, machines):
    """On one machine it keeps to loopback; on more, the user's choice of interface stays.

    With CUDA, each local rank takes its own GPU, and repeats its results bit by bit.
    """
    groups = []
    chosen = gpus(2 if has_gpu else 0, usable=has_gpu)
    monkeypatch.setattr(os, "sched_setscheduler", lambda *_: None, raising=False)
    monkeypatch.setattr(dist, "init_process_group", lambda **kw: groups.append(kw))
    setenv(GLOO_SOCKET_IFNAME="eth7", NCCL_SOCKET_IFNAME="eth7")
    monkeypatch.setattr(utils, "open_store", lambda info: "store")
    info = utils.RankInfo(3, 1, 4 * machines, 4, "tcp://::1:9")
    device = utils.join_process_group(info)
    assert device == torch.device("cuda:1" if has_gpu else "cpu")
    assert groups == [
        {
            "backend": "cpu:gloo,cuda:nccl" if has_gpu else "gloo",
            "store": "store",
            "rank": 3,
            "world_size": 4 * machines,
            "timeout": utils.TIMEOUT,
            "device_id": device if has_gpu else None,
        }
    ]
    for name in "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME":
        assert os.environ[name].startswith("lo" if machines == 1 else "eth7")
    assert chosen == ([1] if has_gpu else [])
    assert torch.backends.cudnn.deterministic == has_gpu
    assert os.environ.get("NCCL_NVLS_ENABLE") == ("0" if has_gpu else None)


@pytest.mark.parametrize("threads", [None, "3"])
def test_a_rank_has_one_thread_unless_the_user_sets_another_number(
    monkeypatch, setenv, threads
):
    chosen = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    if threads:
        setenv(OMP_NUM_THREADS=threads)
    utils.use_the_cores_well(has_gpu=True)
    assert chosen == ([] if threads else [1])


# Whole runs

FLAGS = "--epochs", 1, "--batch_size", 20  # 250 steps of two ranks
TRANSCRIPT = r"""processes  2 on cpu, 1 thread\(s\) each, {cores} CPU core\(s\) for them
data       {data}
training   20 images per rank and step, peak lr 0.00559
start      from scratch, nothing in checkpoints
step 200  train loss \d\.\d{{4}}
epoch 1/1  train loss {train_loss:.4f}  test loss {test_loss:.4f}  \
accuracy {test_accuracy:.2%}  {images_per_second:,.0f} images/s  {seconds:.1f} s  \
checkpoints/epoch00001-image000000000.pt
""".replace("\\\n", "")


# The ranks all get the same core; and the default way to start a process is that of Python 3.14.
ON_ONE_CORE = {
    "OMP_PROC_BIND": "true",
    **fault(utils="mp.set_start_method('forkserver', force=True)"),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Finished runs of two ranks, started at the same time; each in a folder of its own."""
    jobs = {}
    for name, torchrun, env in [
        ("spawned", 0, {}),
        (
            "torchrun",
            2,
            {"OMP_NUM_THREADS": "1"},
        ),  # so torchrun prints nothing about it
        ("on one core", 0, ON_ONE_CORE),
    ]:
        cmd = command(*FLAGS, "--world_size", 2, torchrun=torchrun)
        jobs[name] = Started(cmd, tmp_path_factory.mktemp(name), **env)
    yield {name: (job, job.wait(), job.log.parent) for name, job in jobs.items()}
    for job in jobs.values():
        job.kill()


def test_a_run_prints_one_transcript_under_each_launcher(runs):
    """One rank speaks; torchrun adds nothing. The numbers are those in the checkpoint."""
    cores = len(os.sched_getaffinity(0))
    for name, (job, code, folder) in runs.items():
        assert code == 0, job.output()
        [record] = newest(folder / "checkpoints")["progress"]["history"]
        record["data"] = re.escape(record["data"])
        fixed = {"cores": 1 if name == "on one core" else cores}
        pattern = TRANSCRIPT.format(**record, **fixed)
        assert re.fullmatch(pattern, job.output()), (pattern, job.output())
        assert (record["epoch"], record["step"]) == (1, 250)
        speed = record["images_per_second"] * record["seconds"]
        assert speed == pytest.approx(10000)


def test_each_launcher_gives_the_same_result(runs):
    """Also two runs at once, and with another default way to start a process."""
    assert (
        len({checksum(folder / "checkpoints") for _, _, folder in runs.values()}) == 1
    )


def test_ranks_started_by_hand_train_together(runs, fork, tmp_path):
    """Without LOCAL_RANK and LOCAL_WORLD_SIZE, as in some clusters."""
    ranks = [fork(*FLAGS, **env) for env in hand_set(2)]
    assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].output()
    assert ranks[0].output().startswith("processes  2 on cpu")
    assert ranks[1].output() == ""
    _, _, folder = runs["spawned"]
    assert checksum(tmp_path / "checkpoints") == checksum(folder / "checkpoints")


def test_a_rerun_of_a_finished_run_says_with_what_it_was_trained(runs, fork):
    _, _, folder = runs["spawned"]
    [path] = checkpoints(folder / "checkpoints")
    [record] = newest(path.parent)["progress"]["history"]
    before = path.read_bytes()
    job = fork("--epochs", 1, "--world_size", 1, cwd=folder)
    assert job.wait() == 0
    *lines, start, finished = job.output().splitlines()
    assert [line for line in lines if line.startswith("changed")] == [
        "changed    batch_size from 20 to 64",
        "changed    world_size from 2 to 1",
        f"changed    lr from {record['lr']} to {0.01 * 0.5**0.5}",
    ]
    assert start == "start      checkpoints/epoch00001-image000000000.pt"
    flags = f"seed 0, epochs 1, batch_size 20, world_size 2, lr {record['lr']}"
    accuracy = f"test accuracy {record['test_accuracy']:.2%}"
    nothing = "finished   nothing left to train; trained before with"
    assert finished == f"{nothing} {flags}: {accuracy}"
    assert checkpoints(path.parent) == [path] and path.read_bytes() == before


def test_without_a_network_it_trains_on_the_sample_far_from_the_repository(
    fork, tmp_path
):
    folder = tmp_path / "mit Leerzeichen und Umläuten äöü"
    folder.mkdir()
    proxies = ["http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"]
    offline = dict.fromkeys(proxies, "http://127.0.0.1:9")
    flags = "--epochs", 1, "--batch_size", 100
    job = fork(*flags, cwd=folder, data=False, **offline)
    assert job.wait() == 0, job.output()
    [record] = newest(folder / "checkpoints")["progress"]["history"]
    assert record["data"].startswith("MNIST 10000+2000 images")
    assert record["test_accuracy"] > 0.9
    for text in "could not be downloaded", "BUNDLED SAMPLE", "in data/MNIST/raw":
        assert job.output().count(text) == 1
    assert "Traceback" not in job.output()


OTHER_DATA = """
def load_data(*args, original=load_data, **kwargs):
    name, *sets = original(*args, **kwargs)
    return ("other digits", *sets)
"""
ONE_IMAGE = """
def load_data(*args, original=load_data, **kwargs):
    name, train_set, test_set = original(*args, **kwargs)
    return name, torch.utils.data.Subset(train_set, [0]), test_set
"""


def test_ranks_that_were_started_differently_end_with_one_error(fork):
    first, second = hand_set(2)
    ranks = [
        fork(*FLAGS, "--keep", 4, **first),
        fork(*FLAGS, "--keep", 5, **second, **fault(data=OTHER_DATA)),
    ]
    assert [rank.wait() for rank in ranks] == [1, 1]
    differences = "data MNIST .*, data other digits, keep 4, keep 5"
    error = f"error: start all ranks alike, not with {differences}\n"
    assert re.fullmatch(error, ranks[0].output())
    assert ranks[1].output() == ""


def test_more_ranks_than_images_end_with_one_error(fork):
    ranks = [fork(**env, **fault(data=ONE_IMAGE)) for env in hand_set(2)]
    assert [rank.wait() for rank in ranks] == [1, 1]
    error = "error: 2 ranks, but 1 training images: start fewer\n"
    assert [rank.output() for rank in ranks] == [error, ""]


def test_a_port_that_is_taken_is_named(fork):
    first, _ = hand_set(2)
    with socket.create_server(("127.0.0.1", int(first["MASTER_PORT"]))):
        rank = fork(**first)
        assert rank.wait() == 1
    error = f"error: cannot use 127.0.0.1:{first['MASTER_PORT']} .*MASTER_PORT\n"
    assert re.fullmatch(error, rank.output())


def run_twice(_: int, folder: Path) -> None:
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    os.chdir(folder)
    for epochs in "1", "2":
        sys.argv = [*command("--epochs", epochs, "--batch_size", 500)[1:]]
        with pytest.raises(SystemExit) as caught:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        assert caught.value.code == 0
        assert handlers == {n: signal.getsignal(n) for n in signal.valid_signals()}
        assert not [*filter(LAUNCHERS.match, os.environ)]
        assert not dist.is_initialized()


def test_a_second_run_in_one_python_process_is_as_good_as_the_first(tmp_path):
    """As with %run in a notebook. Each leaves signal handlers and variables as they were."""
    in_child(run_twice, tmp_path)
    records = newest(tmp_path / "checkpoints")["progress"]["history"]
    assert [record["epoch"] for record in records] == [1, 2]


def test_in_a_notebook_a_stop_does_not_end_the_interpreter(monkeypatch):
    monkeypatch.setattr(sys, "ps1", "In [1]: ", raising=False)
    monkeypatch.setattr(signal, "raise_signal", lambda _: pytest.fail("it ends"))
    with pytest.raises(SystemExit) as caught:
        utils.exit_like(128 + signal.SIGTERM)
    assert caught.value.code == 128 + signal.SIGTERM


def load_without_fcntl(_: int) -> None:
    for name in "data", "model", "utils":
        sys.modules.pop(name, None)
    sys.modules["fcntl"] = None
    import data
    import model

    data.load_data(SAMPLE, download=False)
    model.ConvNet()


def test_on_windows_the_program_refuses_but_its_modules_work(monkeypatch, refused):
    """A model that was trained elsewhere can be used there."""
    monkeypatch.setattr(train_ddp, "os", SimpleNamespace(name="nt"))
    assert "Windows" in refused()
    in_child(load_without_fcntl)
