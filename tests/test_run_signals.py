"""test_run_signals.py: what a run does when something outside of it goes wrong: signals, an output that nobody reads,
data that is cut while it is used, side jobs that fail, limits of the system. Nothing of it costs a finished step."""
import json
import os
import resource
import signal
import subprocess
import time

import numpy as np
import pytest
from program import (PROGRAM, TINY, VOCABULARY, call, fail, language, losses, metrics, same_state, start_training, steps_saved,
                     stop, succeed, write_shard)

ENDLESS = 1000000
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129, signal.SIGUSR1: 138}


@pytest.mark.parametrize("sent", CODES)
def test_a_signal_leaves_a_checkpoint_and_says_how_to_go_on(data, tmp_path, sent):
    code, output, errors = stop(start_training(data, tmp_path / "run", "--rank", 16, steps=ENDLESS), sent)
    assert code == CODES[sent]
    last = output.splitlines()[-1]
    (step,) = steps_saved(tmp_path / "run")
    assert "interrupted" in last and f"--resume {tmp_path / 'run'}" in last and str(step) in last
    assert metrics(tmp_path / "run")[1][-1]["step"] == step
    state = json.loads((tmp_path / "run/latest/trainer_state.json").read_text())
    assert state["step"] == step
    again = "; again to stop now" if sent in (signal.SIGINT, signal.SIGTERM) else ""
    assert errors == f"train_gpt2: finishing step {step}, then a checkpoint{again}\n"


def test_no_handler_can_run_on_a_thread_that_computes(data, tmp_path):
    """oneDNN computes with its stack pointer in the heap, where the frame of a handler would destroy what lies below."""
    process = start_training(data, tmp_path / "run", "--rank", 16, "--threads", 2, steps=ENDLESS)
    status = dict(line.split(":\t") for line in open(f"/proc/{process.pid}/status", encoding="utf-8") if ":\t" in line)
    caught = [sent for sent in range(1, 32) if int(status["SigCgt"], 16) >> (sent - 1) & 1]
    assert caught == [signal.SIGBUS]
    open_to_signals = 0  # the kernel shows the thread that waits for them so
    for task in os.listdir(f"/proc/{process.pid}/task"):
        lines = open(f"/proc/{process.pid}/task/{task}/status", encoding="utf-8").read()
        blocked = int(lines.split("SigBlk:\t")[1].split()[0], 16)
        open_to_signals += not all(blocked >> (sent - 1) & 1 for sent in CODES)
    assert open_to_signals <= 1
    assert stop(process, signal.SIGINT)[0] == 130


def test_a_second_ctrl_c_ends_at_once_and_names_the_last_checkpoint(data, tmp_path):
    # Steps of many seconds, so that the second signal comes before the end of one.
    process = start_training(data, tmp_path / "run", "--rank", 16, "--tokens-per-step", 64 * 20000, "--micro-batch", 2,
                    steps=ENDLESS, until="output")
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    assert process.stderr.readline() == "train_gpt2: finishing step 1, then a checkpoint; again to stop now\n"
    time.sleep(0.2)
    began = time.monotonic()
    code, _, errors = stop(process, signal.SIGINT)
    assert code == 130 and time.monotonic() - began < 5
    assert errors == "train_gpt2: stopped in step 1; last checkpoint: none yet\n"
    assert steps_saved(tmp_path / "run") == []


def test_a_signal_ends_an_evaluation_or_a_sample_in_progress(data, tmp_path):
    """Both of minutes, while whoever sent the signal may wait for seconds only. (At temperature 0 the young model writes
    one letter again and again; at another an end of text would come soon.)"""
    write_shard(tmp_path / "long_val_0.bin", np.tile(language(3000, seed=1), 300))
    for name, *flags in (("evaluation", "--eval-every", 1, "--eval-batches", 0, "--val-data", tmp_path / "long_val_0.bin"),
                         ("sample", "--sample-every", 1, "--sample-tokens", 1000000, "--prompt", "a", "--temperature", 0)):
        process = start_training(data, tmp_path / name, "--rank", 16, *flags, steps=ENDLESS,
                                 until="step 1/" if name == "evaluation" else "output ")  # a sample comes before step 1
        time.sleep(0.2)
        began = time.monotonic()
        code, _, errors = stop(process, signal.SIGTERM)
        assert code == 143 and time.monotonic() - began < 5
        assert ("stopped by a signal" in errors) == (name == "evaluation")
        assert steps_saved(tmp_path / name) == [1]


def test_signals_that_come_together_are_one_request(data, tmp_path):
    """As `timeout` and a closing terminal send them; a batch system sends SIGUSR1 before SIGTERM."""
    process = start_training(data, tmp_path / "run", "--rank", 16, steps=ENDLESS)
    code, output, _ = stop(process, signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM, signal.SIGHUP, signal.SIGHUP)
    assert code in (138, 143, 129) and "interrupted after step" in output.splitlines()[-1]
    assert len(steps_saved(tmp_path / "run")) == 1


def test_a_run_under_nohup_survives_its_terminal(data, tmp_path):
    process = start_training(data, tmp_path / "run", "--rank", 16, steps=ENDLESS,
                    preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    process.send_signal(signal.SIGHUP)
    for line in process.stdout:
        if line.startswith("step 30/"):
            break
    code, _, errors = stop(process, signal.SIGTERM)
    assert code == 143 and errors.count("finishing") == 1


def test_a_reader_that_goes_away_ends_nothing(data, tmp_path):
    process = start_training(data, tmp_path / "run", "--rank", 16, steps=60)
    process.stdout.close()
    assert process.wait(timeout=60) == 0 and process.stderr.read() == ""
    process.stderr.close()
    assert steps_saved(tmp_path / "run") == [60]


def test_what_is_printed_to_a_closed_output_goes_into_no_file(data, tmp_path):
    """The next file that is opened must not get the number of standard output."""
    command = [PROGRAM, "--data", data / "text_train_*.bin", *TINY, "--steps", 3, "--rank", 16, "--out",
               tmp_path / "run"]
    result = subprocess.run([str(part) for part in command], stderr=subprocess.DEVNULL, timeout=60,
                            preexec_fn=lambda: [os.close(descriptor) for descriptor in (0, 1)])
    assert result.returncode == 0 and [line["step"] for line in metrics(tmp_path / "run")[1]] == [1, 2, 3]
    succeed("eval", "--model", tmp_path / "run/latest", "--val-data", data / "text_val_*.bin", "--seq-len", 32)


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["plan", "--model", "tiny"],
                                       ["plan", "--model", "tiny", "--json"]], ids=" ".join)
def test_a_full_output_is_an_error(arguments):
    with open("/dev/full", "w") as full:
        result = subprocess.run([str(PROGRAM), *arguments], stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 1 and "standard output cannot be written" in result.stderr


def test_data_that_is_cut_under_a_run_leaves_a_checkpoint_of_the_last_step(train, data, tmp_path):
    own = tmp_path / "data"
    shard = write_shard(own / "text_train_000000.bin", language(20000, seed=1))
    contents = shard.read_bytes()
    flags = ["--rank", 16, "--tokens-per-step", 128]
    process = start_training(own, tmp_path / "run", *flags, steps=100, until="step 3/")
    os.truncate(shard, 1024)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and len(errors.splitlines()) == 1
    (step,) = steps_saved(tmp_path / "run")
    assert f"step {step + 1}: {shard}: was cut while it was in use" in errors and f"step_{step:08}" in errors
    shard.write_bytes(contents)
    succeed("--resume", tmp_path / "run")
    whole = train("whole", *flags, "--data", own / "text_train_*.bin", steps=100)
    assert same_state(whole, tmp_path / "run") and losses(whole) == losses(tmp_path / "run")


def test_a_validation_that_fails_is_a_warning(tmp_path):
    write_shard(tmp_path / "data/text_train_000000.bin", language(20000, seed=1))
    validation = write_shard(tmp_path / "data/text_val_000000.bin", language(2000, seed=2))
    process = start_training(tmp_path / "data", tmp_path / "run", "--rank", 16, "--eval-every", 60, steps=120)
    os.truncate(validation, 2000)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and steps_saved(tmp_path / "run") == [120]
    lines = errors.splitlines()
    assert [line.split(": no validation loss: ")[0] for line in lines] == [
        f"train_gpt2: warning: step {step}" for step in (60, 120)]
    assert all(str(validation) in line for line in lines)
    assert [line["step"] for line in metrics(tmp_path / "run")[1]] == list(range(1, 121))


def test_what_a_validation_or_a_sample_needs_is_looked_at_first(data, tmp_path):
    write_shard(tmp_path / "other_val_0.bin", language(2000, seed=2) % 100, vocabulary=100)
    bad = language(2000, seed=2)
    bad[700] = VOCABULARY + 3
    write_shard(tmp_path / "bad_val_0.bin", bad)
    run = ["--data", data / "text_train_*.bin", *TINY, "--steps", 5, "--out", tmp_path / "run"]
    line = fail(*run, "--val-data", tmp_path / "other_val_0.bin", code=2)
    assert "vocabulary of 100" in line and "257" in line
    line = fail(*run, "--val-data", tmp_path / "bad_val_0.bin", code=1)
    assert "bad_val_0.bin: token 260 at position 700" in line
    assert not (tmp_path / "run").exists()
    succeed(*run, "--val-data", tmp_path / "other_val_0.bin", "--eval-every", 0)


def test_a_limit_on_file_size_is_an_error_that_names_the_file(data, tmp_path):
    line = fail("--data", data / "text_train_*.bin", *TINY, "--steps", 3, "--rank", 16, "--out", tmp_path / "run",
                code=1, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50000, 50000)))
    assert "model.safetensors: cannot be written: File too large" in line and "step 3:" in line
    assert steps_saved(tmp_path / "run") == []


def test_more_shards_than_descriptors(tmp_path):
    tokens = language(50 * 65, seed=1)
    for i in range(50):
        write_shard(tmp_path / f"data/text_train_{i:06}.bin", tokens[65 * i:65 * (i + 1)])
    flags = ["--data", tmp_path / "data/text_train_*.bin", *TINY, "--steps", 20, "--eval-every", 0, "--rank", 16]
    succeed(*flags, "--out", tmp_path / "few",
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40)))
    succeed(*flags, "--out", tmp_path / "many")
    assert losses(tmp_path / "few") == losses(tmp_path / "many")


@pytest.mark.parametrize("limit", [resource.RLIMIT_AS, resource.RLIMIT_DATA])
def test_a_limit_on_what_is_mapped_is_an_error_and_no_wait(data, tmp_path, limit):
    """A product in a parallel loop could not report that it gets no memory."""
    line = fail("--data", data / "text_train_*.bin", *TINY, "--threads", 4, "--steps", 3, "--out", tmp_path / "run",
                code=1, preexec_fn=lambda: resource.setrlimit(limit, (300 << 20, 300 << 20)))
    assert "ulimit -v" in line and "--threads" in line
    assert not (tmp_path / "run").exists()


def test_threads_beyond_reason():
    assert "--threads must be at most" in fail("--threads", 100000, code=2)


def test_help_says_what_signals_do():
    text = call("--help").stdout
    assert "SIGUSR1" in text and "128 + signal" in text
