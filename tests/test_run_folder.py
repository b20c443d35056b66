"""test_run_folder.py: a run's directory is one run's, holds what that run wrote, and can be gone on with from
anywhere."""
import os
import shutil
import signal
import subprocess

import pytest
from program import PROGRAM, TINY, call, fail, listing, losses, metrics, same_state, start, steps_saved, succeed

SHARDS = "text_train_*.bin"


def test_a_second_process_is_refused_while_the_first_one_lives(data, tmp_path):
    flags = ["--data", data / SHARDS, *TINY, "--rank", 16, "--eval-every", 0, "--checkpoint-every", 5]
    run = tmp_path / "run"
    process = start(*flags, "--steps", 100000, "--out", run)
    process.send_signal(signal.SIGSTOP)  # it must not end meanwhile, nor write
    os.waitpid(process.pid, os.WUNTRACED)  # stopped, not only told to
    try:
        before = listing(run)
        for arguments in ([*flags, "--steps", 3, "--out", run], ["--resume", run], ["--resume", run / "latest"]):
            line = fail(*arguments, code=1)
            assert "another run" in line and str(run) in line and f"process {process.pid} " in line
        assert listing(run) == before
        step = max(int(path.name.removeprefix("step_")) for path in run.glob("step_*"))
        succeed("--resume", run / f"step_{step:08}", "--steps", step + 1, "--out", tmp_path / "branch")
    finally:
        process.kill()
        process.communicate()
    # What its death left behind hinders nobody.
    succeed("--resume", run, "--steps", step + 2)
    assert steps_saved(run)[-1] == step + 2


def test_runs_that_start_together_without_a_name_have_one_each(data, tmp_path):
    command = [PROGRAM, "--data", data / SHARDS, *TINY, "--rank", 16, "--eval-every", 0, "--steps", 2]
    runs = [subprocess.Popen(list(map(str, command)), cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                             text=True) for _ in range(4)]
    outputs = [run.communicate(timeout=60) for run in runs]
    assert [(run.returncode, errors) for run, (_, errors) in zip(runs, outputs)] == [(0, "")] * 4
    named = {line.split()[1] for output, _ in outputs for line in output.splitlines() if line.startswith("output ")}
    assert named == {f"runs/{path.name}" for path in (tmp_path / "runs").iterdir()} and len(named) == 4
    assert all(steps_saved(tmp_path / name) == [2] for name in named)


def test_a_start_that_fails_leaves_no_folder(tmp_path):
    fail("--data", "none_*.bin", *TINY, code=1, cwd=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_another_runs_folder_is_refused(train, tmp_path):
    a = train("a", "--rank", 16, "--checkpoint-every", 6)
    b = train("b", "--rank", 16, "--seed", 2, "--checkpoint-every", 3, "--keep-checkpoints", 0)
    before = listing(tmp_path)
    line = fail("--resume", a / "step_00000006", "--out", b, code=2)
    assert str(b) in line and "--out" in line and listing(tmp_path) == before
    for checkpoint in b.glob("step_*"):
        shutil.rmtree(checkpoint)
    before = listing(tmp_path)
    fail("--resume", a / "step_00000006", "--out", b, code=2)
    assert listing(tmp_path) == before
    # A branch that was killed before its first checkpoint may start again.
    branch = tmp_path / "branch"
    branch.mkdir()
    lines = (a / "metrics.jsonl").read_text().splitlines(keepends=True)
    (branch / "metrics.jsonl").write_text("".join(lines[:9]))
    succeed("--resume", a / "step_00000006", "--out", branch)
    assert same_state(a, branch) and losses(a) == losses(branch)
    assert [line["step"] for line in metrics(branch)[1]] == list(range(1, 13))


def test_a_complete_run_says_so_and_is_no_error(train, tmp_path):
    run = train("run", "--rank", 16, "--checkpoint-every", 6)
    (run / "latest").unlink()
    (run / "latest").symlink_to("step_00000006")  # a kill came before it moved
    before = listing(run)
    (run / ".tmp-removed-step_00000004").mkdir()
    for flags in ([], ["--steps", 12], ["--out", tmp_path / "other"]):
        result = call("--resume", run, *flags)
        (line,) = result.stdout.splitlines()
        assert result.returncode == 0 and result.stderr == "" and "complete" in line and "step 12 of 12" in line
    assert os.readlink(run / "latest") == "step_00000012"
    assert listing(run) == before and not (tmp_path / "other").exists()


def test_a_kill_before_latest_moved_costs_no_step(train, tmp_path):
    whole = train("whole", "--rank", 16, "--checkpoint-every", 4, "--keep-checkpoints", 0)
    run = tmp_path / "run"
    shutil.copytree(whole, run, symlinks=True)
    shutil.rmtree(run / "step_00000012")
    (run / "latest").unlink()
    (run / "latest").symlink_to("step_00000004")
    assert "step 9/12" in succeed("--resume", run, "--checkpoint-every", 0)
    assert same_state(whole, run) and os.readlink(run / "latest") == "step_00000012"


def test_names_and_links_of_the_users_stay(train, tmp_path):
    run = train("run", "--rank", 16, "--checkpoint-every", 4)
    kept = ["step_00000004_best", "step_best"]
    for name in kept:
        shutil.copytree(run / "step_00000008", run / name)
    (tmp_path / "disk").mkdir()
    moved = (run / "step_00000012").rename(tmp_path / "disk/step_00000012")
    (run / "step_00000012").symlink_to(moved)
    before = listing(tmp_path / "disk")
    succeed("--resume", run, "--steps", 15, "--checkpoint-every", 1, "--keep-checkpoints", 1)
    assert listing(tmp_path / "disk") == before
    assert sorted(path.name for path in run.iterdir()) == [
        "latest", "metrics.jsonl", "step_00000004_best", "step_00000012", "step_00000015", "step_best"]
    assert os.readlink(run / "latest") == "step_00000015"


@pytest.mark.parametrize("folder", ["plain", "with [brackets], and * and spaces"])
def test_a_run_goes_on_from_any_working_directory(data, tmp_path, folder):
    home = tmp_path / folder
    (home / "shards").mkdir(parents=True)
    for kind in ("train", "val"):
        shutil.copy(data / f"text_{kind}_000000.bin", home / "shards")
        shutil.copy(data / f"text_{kind}_000000.bin", home / f"more_{kind}_1.bin")
    flags = ["--data", f"shards/{SHARDS},more_train_?.bin", "--val-data", "shards/text_val_*.bin", *TINY, "--rank", 16]
    succeed(*flags, "--steps", 2, "--out", "run", cwd=home)
    succeed(*flags, "--steps", 3, "--schedule", "constant", "--out", "whole", cwd=home)
    output = succeed("--resume", home / "run", "--steps", 3, cwd="/")
    assert "2 shards" in output and "step 3: validation loss" in output
    assert steps_saved(home / "run") == [2, 3]
    # And from there again.
    succeed("--resume", "run", "--steps", 4, cwd=home)


def test_shards_that_were_moved_are_named_with_their_checkpoint(data, tmp_path):
    shutil.copytree(data, tmp_path / "shards")
    succeed("--data", f"~/shards/{SHARDS}", *TINY, "--rank", 16, "--steps", 2, "--out", "run", cwd=tmp_path,
            env={**os.environ, "HOME": str(tmp_path)})
    succeed("--data", f"shards/{SHARDS}", *TINY, "--rank", 16, "--steps", 2, "--out", "other", cwd=tmp_path)
    (tmp_path / "shards").rename(tmp_path / "moved")
    line = fail("--resume", "other", "--steps", 3, code=1, cwd=tmp_path)
    assert str(tmp_path / "shards") in line and "--data" in line and "step_00000002" in line
    succeed("--resume", "other", "--steps", 3, "--data", f"moved/{SHARDS}", cwd=tmp_path)
    home = tmp_path / "home"
    home.mkdir()
    (tmp_path / "moved").rename(home / "shards")
    succeed("--resume", tmp_path / "run", "--steps", 3, cwd="/", env={**os.environ, "HOME": str(home)})


def test_a_model_may_be_named_as_it_was(train, data, tmp_path):
    first = train("first", "--rank", 16, steps=2)
    flags = ["--data", data / SHARDS, *TINY[2:], "--rank", 16, "--model", "first/latest"]
    succeed(*flags, "--steps", 2, "--out", "run", cwd=tmp_path)
    succeed("--resume", "run", "--steps", 3, "--model", first / "latest", cwd=tmp_path)
