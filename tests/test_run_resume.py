"""test_run_resume.py: a run that is interrupted and goes on ends with the bits of one that was not.

A resumed run is always given the --steps of the whole, because the learning rate's schedule depends on them; so the
interruptions here are signals, which come when the run is some way along.
"""
import json
import shutil
import signal

import pytest
from program import (TINY, call, fail, losses, metrics, same_state, samples, start_training, steps_saved, stop, succeed,
                     write_state)

STEPS = 150

RUNS = {
    "flora": ["--rank", 16],
    "flora-int8": ["--rank", 16, "--state-dtype", "int8"],
    "flora-bf16": ["--rank", 16, "--dtype", "bf16", "--recompute", "block"],
    "flora-kappa": ["--rank", 16, "--kappa", 7, "--projection", "gaussian", "--transfer", "rescale"],
    "flora-residual": ["--rank", 16, "--kappa", 7, "--projection", "cosine", "--residual", "--half-life", 5000],
    "flora-compressed": ["--rank", 16, "--gradients", "compressed", "--tokens-per-step", 128],
    "adamw": ["--optimizer", "adamw"],
    "adamw-int8": ["--optimizer", "adamw", "--state-dtype", "int8"],
    "adamw-master": ["--optimizer", "adamw", "--dtype", "bf16", "--master-weights", "fp32"],
    "adafactor": ["--optimizer", "adafactor", "--no-factored"],
    "sgd": ["--optimizer", "sgd", "--beta1", 0.9, "--gradients", "fused", "--clip-norm", 1],
    "flora-blocks": ["--rank", 16, "--gradient-blocks", "all"],
    "flora-offload": ["--rank", 16, "--offload", "activations,state,weights", "--recompute", "block"],
    "adamw-offload": ["--optimizer", "adamw", "--dtype", "bf16", "--master-weights", "fp32", "--offload", "weights"],
    "flora-8-bit": ["--rank", 16, "--dtype", "bf16", "--weight-dtype", "int8", "--state-dtype", "int8"],
    "flora-8-bit-offload": ["--rank", 16, "--dtype", "bf16", "--weight-dtype", "int8", "--state-dtype", "int8",
                            "--offload", "weights,activations", "--gradient-blocks", "embedding"],
}


@pytest.mark.parametrize("name", RUNS)
def test_an_interrupted_run_goes_on_exactly(train, data, tmp_path, name):
    whole = train("whole", *RUNS[name], steps=STEPS)
    process = start_training(data, tmp_path / "parts", *RUNS[name], steps=STEPS)
    code, output, _ = stop(process, signal.SIGINT)
    assert code == 130
    (step,) = steps_saved(tmp_path / "parts")
    assert 10 <= step < STEPS, "the signal came too late to test anything"
    text = succeed("--resume", tmp_path / "parts")
    assert f"step {step + 1}/{STEPS}" in text and f"step {step}/" not in text
    assert same_state(whole, tmp_path / "parts")
    assert losses(whole) == losses(tmp_path / "parts")
    _, lines = metrics(tmp_path / "parts")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))


def test_what_is_offloaded_may_change_on_resume_and_changes_no_bit(train, data, tmp_path):
    whole = train("whole", "--rank", 16, steps=STEPS)
    process = start_training(data, tmp_path / "parts", "--rank", 16, "--offload", "weights,activations", steps=STEPS)
    stop(process, signal.SIGINT)
    succeed("--resume", tmp_path / "parts", "--offload", "state", "--layers-in-flight", 3)
    assert same_state(whole, tmp_path / "parts") and losses(whole) == losses(tmp_path / "parts")
    assert metrics(tmp_path / "parts")[0]["options"]["offload"]


def test_resume_takes_the_run_or_one_of_its_checkpoints(train, tmp_path):
    whole = train("whole", "--rank", 16, "--checkpoint-every", 3, "--keep-checkpoints", 0)
    assert steps_saved(whole) == [3, 6, 9, 12]
    # What a kill between the checkpoint of step 6 and that of step 9 leaves.
    killed = tmp_path / "killed"
    killed.mkdir()
    shutil.copytree(whole / "step_00000006", killed / "step_00000006")
    (killed / "latest").symlink_to("step_00000006")
    lines = (whole / "metrics.jsonl").read_text().splitlines(keepends=True)
    (killed / "metrics.jsonl").write_text("".join(lines[:9]) + lines[9][:20])
    shutil.copytree(killed, tmp_path / "other", symlinks=True)
    for run, argument in ((killed, killed), (tmp_path / "other", tmp_path / "other/step_00000006")):
        text = succeed("--resume", argument)
        assert "step 7/12" in text and "step 6/12" not in text
        assert same_state(whole, run) and losses(whole) == losses(run)
        assert [line["step"] for line in metrics(run)[1]] == list(range(1, 13))
        assert (run / "latest").resolve().name == "step_00000012"


def test_resume_into_another_directory_leaves_the_first_alone(train, tmp_path):
    whole = train("whole", "--rank", 16, "--checkpoint-every", 6)
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    succeed("--resume", whole / "step_00000006", "--out", tmp_path / "branch")
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == before
    assert same_state(whole, tmp_path / "branch")
    header, lines = metrics(tmp_path / "branch")  # the other run's to the checkpoint, then its own
    assert header["options"]["out"] == str(tmp_path / "branch")
    assert [line["step"] for line in lines] == list(range(1, 13)) and losses(whole) == losses(tmp_path / "branch")


def test_samples_are_there_once_after_a_resume(train, tmp_path):
    whole = train("whole", "--rank", 16, "--checkpoint-every", 5, "--keep-checkpoints", 0, "--sample-every", 3,
                  "--sample-tokens", 4)
    assert list(samples(whole)) == [0, 3, 6, 9, 12]
    succeed("--resume", whole / "step_00000005", "--out", tmp_path / "branch")
    assert samples(tmp_path / "branch") == samples(whole) and losses(tmp_path / "branch") == losses(whole)


def test_going_back_to_an_older_checkpoint_needs_another_folder(train, tmp_path):
    run = train("run", "--rank", 16, "--checkpoint-every", 4, "--keep-checkpoints", 0)
    message = fail("--resume", run / "step_00000004", "--checkpoint-every", 1, code=2)
    assert "--out" in message and "step_00000004" in message
    assert steps_saved(run) == [4, 8, 12] and len(metrics(run)[1]) == 12
    succeed("--resume", run / "step_00000004", "--checkpoint-every", 0, "--out", tmp_path / "branch")
    assert same_state(run, tmp_path / "branch")


def test_a_run_can_be_moved(train, tmp_path):
    whole = train("whole", "--rank", 16, "--checkpoint-every", 6)
    shutil.copytree(whole, tmp_path / "kept", symlinks=True)
    moved = whole.rename(tmp_path / "moved")
    shutil.rmtree(moved / "step_00000012")
    (moved / "latest").unlink()
    (moved / "latest").symlink_to("step_00000006")
    succeed("--resume", moved)
    assert same_state(moved, tmp_path / "kept")


def test_the_data_can_be_moved(train, data, tmp_path):
    run = train("run", "--rank", 16, "--checkpoint-every", 6)
    shutil.copytree(data, tmp_path / "elsewhere")
    succeed("--resume", run / "step_00000006", "--data", tmp_path / "elsewhere/text_train_*.bin", "--out",
            tmp_path / "b")
    assert same_state(run, tmp_path / "b")


def test_a_run_that_started_from_a_model_goes_on_without_it(train, tmp_path):
    first = train("first", "--rank", 16)
    model = tmp_path / "model"
    shutil.copytree(first / "latest", model)
    run = train("run", "--rank", 16, "--model", model, "--checkpoint-every", 6)
    shutil.rmtree(model)
    succeed("--resume", run / "step_00000006", "--out", tmp_path / "b")
    assert same_state(run, tmp_path / "b")


def test_more_steps_can_be_asked_for(train):
    run = train("run", "--rank", 16, "--schedule", "constant", steps=6)
    whole = train("whole", "--rank", 16, "--schedule", "constant", "--warmup-steps", 1, steps=12)
    succeed("--resume", run, "--steps", 12)
    assert same_state(run, whole)


def test_what_may_change_changes_nothing(train, tmp_path):
    run = train("run", "--rank", 16, "--checkpoint-every", 6)
    flags = ["--recompute", "block", "--log-every", 3, "--checkpoint-every", 2, "--eval-every", 4, "--device", "cpu"]
    succeed("--resume", run / "step_00000006", "--out", tmp_path / "b", *flags)
    assert same_state(run, tmp_path / "b")
    options = json.loads((tmp_path / "b/latest/trainer_state.json").read_text())["options"]
    assert options["recompute"] == "block" and options["log_every"] == 3


def test_a_run_from_before_the_option_keeps_its_embedding_momentum(train, tmp_path):
    run = train("run", "--rank", 16, "--embedding-momentum", "--steps", 4)
    state = run / "latest/trainer_state.json"
    written = json.loads(state.read_text())
    del written["options"]["embedding_momentum"]
    write_state(state, written)
    succeed("--resume", run, "--out", tmp_path / "more", "--steps", 6)
    assert json.loads((tmp_path / "more/latest/trainer_state.json").read_text())["options"]["embedding_momentum"]


def test_what_is_learned_may_change_when_asked_for(train, tmp_path):
    """Each change is said; the data goes on where it was, in portions of another size."""
    run = train("run", "--rank", 16, "--tokens-per-step", 192, "--checkpoint-every", 5, "--keep-checkpoints", 0)
    text = succeed("--resume", run / "step_00000005", "--out", tmp_path / "b", "--micro-batch", 3, "--lr", 1e-3,
                   "--schedule", "constant", "--weight-decay", 0)
    for line in ("micro-batch was 2, is now 3", "lr was 0.0078125, is now 0.001", "weight-decay was 0.1, is now 0.0",
                 'schedule was "cosine", is now "constant"'):
        assert f"changed     {line}\n" in text
    assert text.count("changed  ") == 4
    lines = [line for line in metrics(tmp_path / "b")[1] if line["step"] > 5]
    assert len(lines) == 7 and all(line["lr"] == pytest.approx(1e-3, rel=1e-6) for line in lines)
    # The same sequences: the loss before the first changed update is the run's own but for rounding.
    assert losses(tmp_path / "b")[6] == pytest.approx(losses(run)[6], rel=1e-5)
    options = json.loads((tmp_path / "b/latest/trainer_state.json").read_text())["options"]
    assert options["micro_batch"] == 3 and options["tokens_per_step"] == 192 and options["lr"] == 1e-3

    # 12 x 6 sequences are no multiple of the new micro-batch.
    text = succeed("--resume", tmp_path / "b", "--out", tmp_path / "c", "--micro-batch", 5, "--tokens-per-step", 160,
                   "--steps", 14)
    assert "tokens-per-step was 192, is now 160" in text
    assert [line["tokens"] for line in metrics(tmp_path / "c")[1]][12:] == [12 * 192 + 160, 12 * 192 + 320]
    line = fail("--resume", tmp_path / "b", "--out", tmp_path / "d", "--micro-batch", 4, "--steps", 14, code=2)
    assert "--tokens-per-step 192" in line
    assert "cannot change" in fail("--resume", tmp_path / "b", "--seq-len", 16, code=2)


def test_a_second_run_into_the_same_directory_is_refused(train, data):
    run = train("run", "--rank", 16)
    before = same_state(run, run), (run / "metrics.jsonl").read_text()
    line = fail("--data", data / "text_train_*.bin", *TINY, "--steps", 2, "--out", run, code=2)
    assert "--resume" in line
    assert (same_state(run, run), (run / "metrics.jsonl").read_text()) == before
