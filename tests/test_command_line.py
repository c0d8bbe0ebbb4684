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

import pytest
import torch
import torch.distributed as dist
from conftest import (
    SCRIPT,
    Forked,
    Started,
    assert_same_result,
    command,
    fault,
    hand_set,
    newest,
)

import train_ddp
import utils

LAUNCHERS = re.compile("RANK|WORLD_SIZE|LOCAL|MASTER|TORCHELASTIC|TRAIN_DDP_STORE")


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
    def parse_flags(*flags: str):
        monkeypatch.setattr(sys, "argv", ["train_ddp.py", *flags])
        return train_ddp.parse_args()

    return parse_flags


@pytest.fixture
def refused(monkeypatch, capsys, tmp_path):
    """Run main, which must end with 2 and touch no file; return the line it prints."""
    monkeypatch.chdir(tmp_path)
    trains = "the command line was accepted"
    monkeypatch.setattr(utils, "run_rank", lambda *_: pytest.fail(trains))

    def run_main(*flags: str) -> str:
        monkeypatch.setattr(sys, "argv", ["train_ddp.py", *flags])
        with pytest.raises(SystemExit) as caught:
            train_ddp.main()
        assert caught.value.code == 2
        output = capsys.readouterr()
        assert output.out == ""
        assert re.fullmatch("train_ddp.py: error: .*\n", output.err)
        assert [*tmp_path.iterdir()] == []
        return output.err

    return run_main


# Flags and variables

WRONG_FLAGS = """
--epochs 0; --epochs 1.5; --epochs 100000; --epochs; --batch_size 0; --world_size -2; --keep 0;
--save_every 0; --lr 0; --lr nan; --seed x; --unknown 1; stray
"""


@pytest.mark.parametrize("flags", re.split(";\\s", WRONG_FLAGS.strip()))
def test_wrong_flags_get_one_line_that_names_them(refused, flags):
    error = refused(*flags.split())
    assert all(word in error for word in re.split("[ =]", flags))


def test_flags_and_their_defaults(parse):
    args = parse()
    assert (args.epochs, args.batch_size, args.world_size, args.seed) == (3, 64, 1, 0)
    assert (args.lr, args.save_every, args.keep) == (None, None, 3)
    assert (args.data_dir, args.checkpoint_dir) == (Path("data"), Path("checkpoints"))


def test_the_world_size_is_that_of_the_launcher(setenv, parse, refused):
    setenv(**hand_set(4)[0])
    assert parse().world_size == 4
    assert parse("--world_size", "4").world_size == 4
    assert "--world_size 3, but WORLD_SIZE is 4" in refused("--world_size", "3")


def test_restarts_on_several_machines_need_a_store_for_each(monkeypatch, setenv):
    """In a shared store, the ranks would find addresses of dead ones, and hang."""
    monkeypatch.setattr(dist, "rendezvous", lambda *_, **__: iter(()))
    setenv(WORLD_SIZE=4, RANK=0)
    for per_machine, restarts, shared in (2, 0, True), (2, 3, False), (4, 3, True):
        setenv(LOCAL_WORLD_SIZE=per_machine, TORCHELASTIC_MAX_RESTARTS=restarts)
        setenv(TORCHELASTIC_USE_AGENT_STORE=shared)
        with pytest.raises(StopIteration):
            utils.open_store()
    setenv(LOCAL_WORLD_SIZE=2)
    with pytest.raises(SystemExit, match="TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        utils.open_store()


# Whole runs

FLAGS = "--epochs", 1, "--batch_size", 25  # 200 steps of two ranks
TRANSCRIPT = r"""processes  2 on cpu
data       MNIST, 10000 \+ 2000 items
training   25 images per rank and step, peak lr 0.00625
start      from scratch, nothing in checkpoints
(step \d+/200  train loss \d\.\d{{4}}  [\d,]+ images/s  \d:\d\d:\d\d left\n)*\
(evaluating batch \d+/40\n)*\
epoch 1/1  train loss {train_loss:.4f}  test loss {test_loss:.4f}  \
accuracy {test_accuracy:.2%}  {images_per_second:,.0f} images/s  {seconds:.1f} s  \
checkpoints/epoch00001-image000000000.pt
finished   1 epochs, test accuracy {test_accuracy:.2%}
""".replace("\\\n", "")
# Gloo's threads free tensors. One that does so while the interpreter ends makes it abort.
PRINTS_THREADS = fault("""
import atexit, pathlib
def print_threads():
    names = [path.read_text() for path in pathlib.Path("/proc/self/task").glob("*/comm")]
    print(*("left: " + name for name in names if "gloo" in name), end="")
atexit.register(print_threads)
""")
# It chooses a port itself, and prints nothing if the number of threads is set.
TORCHRUN_ALONE = {"PET_STANDALONE": "1", "OMP_NUM_THREADS": "1", **PRINTS_THREADS}
# The default way to start a process, from Python 3.14 on.
FORKSERVER = fault(utils="mp.set_start_method('forkserver', force=True)")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Three runs of two ranks at the same time: for each, its folder and its jobs.

    The port that most programs use is taken. The ranks that are started by hand do without
    LOCAL_RANK and LOCAL_WORLD_SIZE, and one of them has other flags: rank 0's count.
    """
    torchrun, spawned, hand = map(tmp_path_factory.mktemp, ("torchrun", "self", "hand"))
    flags = command(*FLAGS)[2:]
    hand_set_0, hand_set_1 = hand_set(2)
    with socket.socket() as port:
        with contextlib.suppress(OSError):  # Somebody has it already.
            port.bind(("127.0.0.1", 29500))
        jobs = {
            torchrun: [
                Started(command(*FLAGS, torchrun=2), torchrun, **TORCHRUN_ALONE)
            ],
            spawned: [Forked([*flags, "--world_size=2"], spawned, **FORKSERVER)],
            hand: [
                Forked(flags, hand, **hand_set_0),
                Forked([*flags, "--seed=5", "--epochs=9"], hand, **hand_set_1),
            ],
        }
        yield jobs
    for job in itertools.chain(*jobs.values()):
        job.kill()


def test_a_run_prints_one_transcript_under_each_launcher(runs):
    """One rank speaks; torchrun adds nothing. The numbers are those in the checkpoint.

    When a rank of torchrun exits, no thread of gloo is left, which could make it abort.
    """
    for folder, (first, *others) in runs.items():
        assert first.wait() == 0, first.output()
        assert [(other.wait(), other.output()) for other in others] in ([], [(0, "")])
        [record] = newest(folder / "checkpoints")["progress"]["history"]
        pattern = TRANSCRIPT.format(**record)
        assert re.fullmatch(pattern, first.output()), (pattern, first.output())
        assert (record["epoch"], record["step"]) == (1, 200)


def test_each_launcher_gives_the_same_result(runs):
    """Also several runs at once, and with another default way to start a process."""
    assert {job.wait() for jobs in runs.values() for job in jobs} == {0}
    first, *others = runs
    for other in others:
        assert_same_result(first / "checkpoints", other / "checkpoints")


def test_a_bad_file_on_one_machine_ends_all_ranks_with_one_line(fork):
    """Also before torchrun can end rank 0, as another rank has left."""
    bad = (
        'def load_data(*_):\n    if os.environ["RANK"] == "1": raise SystemExit("bad")'
    )
    ended = "dist.destroy_process_group = lambda: os.kill(os.getpid(), signal.SIGTERM)"
    env = fault(data=f"import os\n{bad}", utils=ended)
    ranks = [fork(**env, **rank) for rank in hand_set(2)]
    assert [rank.wait() for rank in ranks] == [-signal.SIGTERM] * 2
    assert [rank.output() for rank in ranks] == ["error: bad\n", ""]


def test_a_variable_that_is_missing_is_named(fork):
    env, _ = hand_set(2)
    del env["MASTER_PORT"]
    rank = fork(**env)
    assert rank.wait() == 1
    assert "MASTER_PORT expected, but not set" in rank.output()


def run_twice(_: int, folder: Path) -> None:
    os.chdir(folder)
    for name in "http_proxy", "https_proxy":
        os.environ[name] = "http://127.0.0.1:9"  # There is no network.
    for epochs in "1", "2":
        sys.argv = ["train_ddp.py", "--epochs", epochs, "--batch_size", "100"]
        errors = io.StringIO()
        with contextlib.redirect_stderr(errors):
            runpy.run_path(str(SCRIPT), run_name="__main__")
        for text in "could not be downloaded", "BUNDLED SAMPLE", "into data/MNIST/raw":
            assert errors.getvalue().count(text) == 1
        assert not [*filter(LAUNCHERS.match, os.environ)]
        assert not dist.is_initialized()


def test_a_second_run_in_one_python_process_is_as_good_as_the_first(tmp_path):
    """As with %run in a notebook. Each leaves variables as they were.

    Here they have no network, and are far from the repository.
    """
    folder = tmp_path / "mit Leerzeichen und Umläuten äöü"
    folder.mkdir()
    start = torch.multiprocessing.start_processes
    start(run_twice, (folder,), start_method="forkserver")
    first, second = newest(folder / "checkpoints")["progress"]["history"]
    assert (first["epoch"], second["epoch"]) == (1, 2)
    assert second["test_accuracy"] > 0.9


def test_in_a_notebook_a_stop_does_not_end_the_interpreter(monkeypatch):
    monkeypatch.setattr(sys, "ps1", "In [1]: ", raising=False)
    monkeypatch.setattr(signal, "raise_signal", lambda _: pytest.fail("it ends"))
    with pytest.raises(SystemExit) as caught:
        utils.die_of(signal.SIGTERM)
    assert caught.value.code == 128 + signal.SIGTERM
