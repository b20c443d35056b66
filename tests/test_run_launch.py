"""test_run_launch.py: the processes of a job as launchers start them: by torchrun's, Open MPI's, MPICH's and SLURM's
variables, by a real mpirun, by --devices, and over two network namespaces; and what is said when one is missing, refused,
different from the others, or lost."""
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
from program import PROGRAM, ROOT, TINY, losses, steps_saved

SETTINGS = [*TINY, "--dtype", "fp32", "--rank", 8, "--eval-every", 0, "--tokens-per-step", 768]
VARIABLES = re.compile(r"RANK$|^WORLD_SIZE|^LOCAL_|^MASTER_|^OMPI_|^PMI|^MPI_|^SLURM_|^TORCHELASTIC_|^TRAIN_GPT2_")
CLEAN = {name: value for name, value in os.environ.items() if not VARIABLES.search(name)}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(data, out, *flags, before=(), **variables):
    command = [*before, PROGRAM, "--data", data / "text_train_*.bin", *SETTINGS, "--out", out, *flags]
    return subprocess.Popen([str(part) for part in command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, stdin=subprocess.DEVNULL,
                            env=CLEAN | {name: str(value) for name, value in variables.items()})


def end(process):
    """(exit code, output, errors)"""
    output, errors = process.communicate(timeout=120)
    return process.returncode, output, errors


def torchrun(rank, port, size=2, run="a"):
    return {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port - 1, "TORCHELASTIC_RUN_ID": run}


def of_launcher(launcher, rank):
    job = str(os.getpid())
    return {"torchrun": torchrun(rank, 20000 + os.getpid() % 9000),
            "Open MPI": {"OMPI_COMM_WORLD_RANK": rank, "OMPI_COMM_WORLD_SIZE": 2, "OMPI_COMM_WORLD_LOCAL_RANK": rank,
                         "OMPI_COMM_WORLD_LOCAL_SIZE": 2, "PMIX_NAMESPACE": "a" + job},
            "MPICH": {"PMI_RANK": rank, "PMI_SIZE": 2, "MPI_LOCALRANKID": rank, "MPI_LOCALNRANKS": 2},
            "SLURM": {"SLURM_PROCID": rank, "SLURM_NTASKS": 2, "SLURM_LOCALID": rank, "SLURM_JOB_ID": job,
                      "SLURM_STEP_ID": 0, "SLURM_STEP_NODELIST": "localhost,localhost[1-3]"}}[launcher]


def children(process):
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def variables_of(pid):
    entries = Path(f"/proc/{pid}/environ").read_text().split("\0")
    return dict(entry.split("=", 1) for entry in entries if "=" in entry)


def ranks_of(process):
    """The processes that --devices has started, by rank."""
    return {int(variables_of(pid)["RANK"]): pid for pid in children(process)}


def wait_for_step(process):
    for line in process.stdout:
        if line.startswith("step 2/"):
            return
    raise AssertionError(process.communicate()[1])


def wait_until_gone(pids):
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline, "a rank has outlived its job"
        time.sleep(0.05)


@pytest.mark.parametrize("launcher", ["torchrun", "Open MPI", "MPICH", "SLURM"])
def test_variables_of_a_launcher_make_a_job(data, tmp_path, launcher):
    ranks = [start(data, tmp_path / "run", "--steps", 2, **of_launcher(launcher, rank)) for rank in (1, 0)]
    (silent_code, silent, silent_errors), (code, output, errors) = map(end, ranks)
    assert (code, errors) == (0, ""), errors
    assert "step 2/2" in output
    assert (silent_code, silent, silent_errors) == (0, "", "")
    assert list(losses(tmp_path / "run")) == [1, 2] and steps_saved(tmp_path / "run") == [2]


@pytest.mark.parametrize("launcher", ["mpirun", "torchrun"])
def test_a_real_launcher(data, tmp_path, launcher):
    if not shutil.which(launcher):
        pytest.skip(f"{launcher} is not installed")
    options = ["torchrun", "--standalone", "--no_python", "--nproc_per_node", "2"]
    if launcher == "mpirun":
        options = ["mpirun", "-np", "2"]
        if "Open MPI" in subprocess.run(["mpirun", "--version"], capture_output=True, text=True).stdout:
            options += ["--allow-run-as-root", "--oversubscribe"]
    if subprocess.run([*options, "true"], capture_output=True, env=CLEAN, timeout=120).returncode != 0:
        pytest.skip(f"{launcher} starts nothing here, not even true")
    code, output, errors = end(start(data, tmp_path / "run", "--steps", 2, before=options))
    assert code == 0, errors
    assert output.count("step 2/2") == 1 and steps_saved(tmp_path / "run") == [2]


def test_those_that_are_missing_are_named(data, tmp_path):
    port = free_port()
    code, _, errors = end(start(data, tmp_path / "run", "--rendezvous-timeout", 1, **torchrun(0, port, size=4)))
    assert code == 1 and errors == ("train_gpt2: ranks 1, 2, 3 of 4 have not come within 1 s (--rendezvous-timeout); rank 0 "
                                    f"waits at port {port}\n")
    code, _, errors = end(start(data, tmp_path / "run", "--rendezvous-timeout", 1, **torchrun(1, port)))
    assert code == 1 and errors == (f"train_gpt2: rank 1: rank 0 does not answer at 127.0.0.1 port {port} within 1 s "
                                    "(--rendezvous-timeout): Connection refused\n")
    assert not (tmp_path / "run").exists()


def test_another_job_is_refused_and_this_one_goes_on(data, tmp_path):
    port = free_port()
    rank0 = start(data, tmp_path / "run", "--steps", 2, **torchrun(0, port))
    code, _, errors = end(start(data, tmp_path / "run", "--steps", 2, **torchrun(1, port, run="b")))
    assert code == 1 and errors == (f"train_gpt2: rank 1: rank 0 at 127.0.0.1 port {port} does not let this process in: it is "
                                    "another job's\n")
    rank1 = start(data, tmp_path / "run", "--steps", 2, **torchrun(1, port))
    assert [end(rank)[0] for rank in (rank0, rank1)] == [0, 0]


def test_a_busy_port_is_named_with_the_flag(data, tmp_path):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        code, _, errors = end(start(data, tmp_path / "run", **torchrun(0, port)))
        assert code == 1 and len(errors.splitlines()) == 1
        assert f"port {port} is in use" in errors and "--rendezvous-port" in errors
        ranks = [start(data, tmp_path / "run", "--steps", 1, "--rendezvous-port", free, **torchrun(rank, port))
                 for free in [free_port()] for rank in (0, 1)]
        assert [end(rank)[0] for rank in ranks] == [0, 0]


def test_other_options_end_all_ranks(data, tmp_path):
    port = free_port()
    ranks = [start(data, tmp_path / "run", "--lr", 0.002 / (rank + 1), **torchrun(rank, port)) for rank in (0, 1)]
    said = "rank 1 has another --lr (0.001, rank 0: 0.002)\n"
    assert end(ranks[0]) == (2, "", f"train_gpt2: {said}")
    assert end(ranks[1]) == (2, "", f"train_gpt2: rank 1: {said}")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("variables, said", [
    ({"RANK": 1}, "RANK is set and WORLD_SIZE is not"),
    ({"RANK": 2, "WORLD_SIZE": 2, "MASTER_ADDR": "a"}, "RANK 2 is not below WORLD_SIZE 2"),
    ({"RANK": "first", "WORLD_SIZE": 2}, "RANK is 'first', no number"),
    ({"OMPI_COMM_WORLD_RANK": 0, "OMPI_COMM_WORLD_SIZE": 4, "OMPI_COMM_WORLD_LOCAL_SIZE": 2}, "mpirun -x MASTER_ADDR"),
])
def test_variables_that_make_no_job_are_one_line(data, tmp_path, variables, said):
    code, _, errors = end(start(data, tmp_path / "run", **variables))
    assert code == 2 and len(errors.splitlines()) == 1 and said in errors


def test_devices_beside_a_launcher_are_refused(data, tmp_path):
    code, _, errors = end(start(data, tmp_path / "run", "--devices", 2, **torchrun(0, free_port())))
    assert code == 2 and errors == ("train_gpt2: --devices 2 contradicts torchrun, which has started 2 processes: leave it "
                                    "out\n")
    # One process of a launcher is no job.
    assert end(start(data, tmp_path / "run", "--devices", 2, "--steps", 1, **torchrun(0, free_port(), size=1)))[0] == 0


@pytest.mark.parametrize("command", ["eval", "generate"])
def test_only_training_is_a_job(data, tmp_path, command):
    for rank, said in ((0, "train_gpt2: only training runs in several processes: start this without torchrun\n"), (1, "")):
        process = subprocess.run([PROGRAM, command, "--model", tmp_path], capture_output=True, text=True, timeout=60,
                                 env=CLEAN | {name: str(value) for name, value in torchrun(rank, free_port()).items()})
        assert (process.returncode, process.stdout, process.stderr) == (2, "", said)


def test_a_mistake_is_said_once_by_devices(data, tmp_path):
    for flags, code in ((["--lr", 0], 2), (["--model", "no_such_model"], 2), (["--resume", tmp_path / "none"], 1)):
        returned, output, errors = end(start(data, tmp_path / "run", "--devices", 3, *flags))
        assert (returned, output) == (code, ""), errors
        causes = {line.split("failed: ")[-1].removesuffix("; last checkpoint: none yet").removeprefix("train_gpt2: ")
                  for line in errors.splitlines()}
        assert len(causes) == 1, errors
    assert not (tmp_path / "run").exists()


def test_bytes_from_anybody_do_not_disturb_a_run(data, tmp_path):
    process = start(data, tmp_path / "run", "--devices", 2, "--steps", 60)
    wait_for_step(process)
    port = int(variables_of(children(process)[0])["TRAIN_GPT2_PORT"])
    noise = random.Random(3)
    for _ in range(50):
        try:
            with socket.create_connection(("127.0.0.1", port)) as connection:
                connection.sendall(noise.randbytes(noise.randint(0, 5000)))
        except OSError:
            pass  # refused in the middle, or the run is at its end
    code, _, errors = end(process)
    assert (code, errors) == (0, "") and steps_saved(tmp_path / "run") == [60]


@pytest.mark.parametrize("victim", (0, 1))
def test_a_stopped_rank_is_missed(data, tmp_path, victim):
    process = start(data, tmp_path / "run", "--devices", 3, "--steps", 1000000, "--comm-timeout", 5)
    wait_for_step(process)
    ranks = ranks_of(process)
    os.kill(ranks[victim], signal.SIGSTOP)
    code, _, errors = end(process)  # which kills the one that does not end
    assert code == 1
    said = [line for line in errors.splitlines() if f"rank {victim} (" in line and "last checkpoint: none yet" in line]
    assert len(said) == 2, errors
    wait_until_gone(ranks.values())


def test_ranks_do_not_outlive_the_program_that_started_them(data, tmp_path):
    process = start(data, tmp_path / "run", "--devices", 2, "--steps", 1000000)
    wait_for_step(process)
    ranks = ranks_of(process)
    process.kill()
    process.communicate(timeout=60)
    wait_until_gone(ranks.values())
    assert len(steps_saved(tmp_path / "run")) == 1  # they were asked to stop


def test_ranks_share_the_cores(data, tmp_path):
    def threads(name, *flags):
        arguments = [flag for flag in SETTINGS if flag not in ("--threads", "1")]
        command = [PROGRAM, "--data", data / "text_train_*.bin", *arguments, "--steps", 1, "--out", tmp_path / name, *flags]
        variables = {key: value for key, value in CLEAN.items() if key != "OMP_NUM_THREADS"}
        output = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=120, env=variables)
        assert output.returncode == 0, output.stderr
        return int(re.search(r", (\d+) thread", output.stdout)[1])

    assert threads("two", "--devices", 2) == max(1, threads("one") // 2)


@pytest.fixture
def namespaces():
    """Two network namespaces with a cable between them; skips where that cannot be had."""
    names = [f"gpt{os.getpid()}{end}" for end in "ab"]
    commands = [f"ip netns add {names[0]}", f"ip netns add {names[1]}",
                f"ip link add {names[0]} netns {names[0]} type veth peer name {names[1]} netns {names[1]}"]
    for name, address in zip(names, ("10.77.0.1", "10.77.0.2")):
        commands += [f"ip -n {name} addr add {address}/24 dev {name}", f"ip -n {name} link set {name} up",
                     f"ip -n {name} link set lo up"]
    try:
        for command in commands:
            made = subprocess.run(command.split(), capture_output=True, text=True)
            if made.returncode != 0:
                pytest.skip(f"no network namespaces here: {made.stderr.strip()}")
        yield names
    except FileNotFoundError:
        pytest.skip("no network namespaces here: ip is not installed")
    finally:
        if shutil.which("ip"):
            for name in names:
                subprocess.run(["ip", "netns", "del", name], capture_output=True)


def test_ranks_on_two_machines(data, tmp_path, namespaces):
    """As far as namespaces are that: each has a loopback interface of its own. Rank 1 is on rank 0's machine."""
    ranks = [start(data, tmp_path / "run", "--steps", 3, before=["ip", "netns", "exec", namespaces[machine]],
                   RANK=rank, WORLD_SIZE=3, LOCAL_RANK=local, MASTER_ADDR="10.77.0.1", MASTER_PORT=29500)
             for rank, (machine, local) in enumerate(((0, 0), (0, 1), (1, 0)))]
    assert [(code, errors) for code, _, errors in map(end, ranks)] == [(0, "")] * 3
    alone = start(data, tmp_path / "alone", "--steps", 3)
    assert end(alone)[0] == 0
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "alone"), rel=1e-5)
