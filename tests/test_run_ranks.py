"""test_run_ranks.py: several ranks train as one process does, go on from each other's checkpoints, stop together, and end
together when one of them is lost."""
import os
import random
import re
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
from program import (PROGRAM, ROOT, TINY, call, language, losses, metrics, same_state, steps_saved, succeed,
                     write_shard)

# Twelve micro-batches of 64 tokens a step, whatever the ranks.
SHARED = ["--dtype", "fp32", "--tokens-per-step", 768, "--rank", 8, "--kappa", 3]


def ranks_of(process):
    """The processes that `--devices` has started, by rank."""
    found = {}
    for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        found[int(dict(entry.split(b"=", 1) for entry in environment if b"=" in entry)[b"RANK"])] = int(child)
    return found


def start_ranks(data, out, *flags, ranks=2, until="step 3/"):
    process = subprocess.Popen(
        [str(part) for part in (PROGRAM, "--devices", ranks, "--data", data / "text_train_*.bin", "--out", out, *TINY,
                                *SHARED, *flags)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL)
    for line in process.stdout:
        if line.startswith(until):
            return process
    raise AssertionError(process.communicate()[1])


WAYS = {"fused": [], "dense": ["--gradients", "dense"],
        "compressed": ["--gradients", "compressed"], "clipped": ["--clip-norm", 0.3]}


@pytest.mark.parametrize("way", WAYS)
def test_ranks_train_as_one_process_does(train, way):
    one = losses(train("one", *SHARED, *WAYS[way]))
    for ranks in (2, 4):
        several = train(f"of_{ranks}", *SHARED, *WAYS[way], "--devices", ranks, "--check-ranks", 1)
        assert losses(several) == pytest.approx(one, rel=1e-5)
        assert metrics(several)[0]["ranks"] == ranks
    again = train("again", *SHARED, *WAYS[way], "--devices", 2)
    assert same_state(train("of_2_without_checks", *SHARED, *WAYS[way], "--devices", 2), again)
    assert losses(again) == losses(Path(again).parent / "of_2")


def test_a_step_holds_one_micro_batch_of_each_rank_by_default(train):
    run = train("run", "--rank", 8, "--devices", 2)
    assert metrics(run)[1][0]["tokens"] == 2 * 64


def test_evaluation_is_divided_and_has_the_bits_of_one_process(train, data):
    """13 micro-batches of validation on 1, 2 and 3 ranks, and no step before it that could differ."""
    flags = ["--val-data", data / "text_val_*.bin", "--eval-every", 1, "--eval-batches", 13, "--lr", 1e-30]
    found = {ranks: metrics(train(f"of_{ranks}", "--rank", 8, "--tokens-per-step", 384, *flags, "--devices", ranks,
                                  steps=1))[1][0]["val_loss"] for ranks in (1, 2, 3)}
    assert found[2] == found[1] and found[3] == found[1]


def test_a_run_goes_on_with_another_number_of_ranks(train, data, tmp_path):
    whole = losses(train("whole", *SHARED, "--devices", 2, steps=12))
    for ranks in (1, 2, 4):
        out = train(f"on_{ranks}", *SHARED, "--devices", 2, "--checkpoint-every", 6, "--keep-checkpoints", 0, steps=12)
        succeed("--resume", out / "step_00000006", "--out", tmp_path / f"more_{ranks}", "--devices", ranks)
        assert losses(tmp_path / f"more_{ranks}") == pytest.approx(whole, rel=1e-5)
        if ranks == 2:
            assert losses(tmp_path / f"more_{ranks}") == whole
            assert same_state(tmp_path / f"more_{ranks}", out)


@pytest.mark.parametrize("at", (0, 1, None))
def test_a_signal_at_any_rank_stops_all_after_the_step(data, tmp_path, at):
    """At the program that was started, too, which passes it on."""
    process = start_ranks(data, tmp_path / "run", "--steps", 1000000, ranks=3, until="step 3/")
    os.kill(process.pid if at is None else ranks_of(process)[at], signal.SIGTERM)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    (step,) = steps_saved(tmp_path / "run")
    assert f"interrupted after step {step}" in output
    assert f"step {step}/" in output and f"--resume {tmp_path / 'run'}" in output
    succeed("--resume", tmp_path / "run", "--steps", step + 2)
    assert max(losses(tmp_path / "run")) == step + 2


@pytest.mark.slow
def test_when_a_rank_is_killed_all_end_and_the_run_goes_on(data, tmp_path):
    """In training, in evaluation, while a checkpoint is written: at any moment of a run that does all of it all the time."""
    moments = random.Random(7)
    flags = ["--steps", 1000000, "--checkpoint-every", 2, "--val-data", data / "text_val_*.bin", "--eval-every", 2,
             "--eval-batches", 3, "--sample-every", 3, "--sample-tokens", 4]
    for attempt in range(30):
        run = tmp_path / f"run_{attempt}"
        process = start_ranks(data, run, *flags, ranks=3, until=f"step {moments.randint(2, 6)}/")
        ranks = ranks_of(process)
        victim = moments.randrange(3)
        time.sleep(0.05 * moments.random())
        os.kill(ranks[victim], signal.SIGKILL)
        killed = time.monotonic()
        _, errors = process.communicate(timeout=60)
        assert time.monotonic() - killed < 10
        assert process.returncode != 0
        assert not any(Path(f"/proc/{pid}").exists() for pid in ranks.values())
        said = [line for line in errors.splitlines() if re.search(rf"rank {victim}\b", line)]
        assert len(said) >= 2 and all("last checkpoint" in line for line in said), errors
        if (run / "latest").exists():
            done = int((run / "latest").resolve().name.removeprefix("step_"))
            succeed("--resume", run, "--steps", done + 1, "--devices", moments.choice((1, 2)), "--sample-every", 0)


def test_tokens_of_a_step_must_be_divisible(data, tmp_path):
    result = call("--devices", 5, "--data", data / "text_train_*.bin", *TINY, *SHARED, "--out", tmp_path / "run")
    assert result.returncode != 0 and "--tokens-per-step 768 is not a multiple of 5 ranks" in result.stderr
    assert not (tmp_path / "run").exists()


def start_by_hand(rank, port, *flags):
    """One process of two, as torchrun would start it."""
    environment = os.environ | {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2",
                                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return subprocess.Popen([str(part) for part in (PROGRAM, *TINY, *SHARED, "--rendezvous-port", port, *flags)], cwd=ROOT,
                            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            stdin=subprocess.DEVNULL)


def test_ranks_with_other_shards_or_threads_end_in_one_line(data, tmp_path):
    write_shard(tmp_path / "other_train_0.bin", language(20000, seed=5))
    ours, other = ["--data", data / "text_train_*.bin"], ["--data", tmp_path / "other_train_0.bin"]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for mine, theirs, word in ((ours, other, "--data"), (ours, [*ours, "--threads", 2], "device")):
        both = [start_by_hand(0, port, "--out", tmp_path / "run", *mine),
                start_by_hand(1, port, "--out", tmp_path / "run", *theirs)]
        said = [process.communicate(timeout=120)[1] for process in both]
        assert all(process.returncode != 0 for process in both), said
        assert any(f"rank 1 has another {word}" in text for text in said), said
        assert steps_saved(tmp_path / "run") == [] if (tmp_path / "run").exists() else True
