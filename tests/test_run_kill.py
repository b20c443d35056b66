"""test_run_kill.py: kill -9 at any moment leaves a run that goes on, and ends with the bits of one left alone."""
import random
import signal
import subprocess
import time

import pytest
from program import PROGRAM, TINY, metrics, same_state, succeed, with_defaults

KILLS = 20
STEPS = 250


def newest_step(run):
    return max((int(path.parent.name.removeprefix("step_")) for path in run.glob("step_*/trainer_state.json")), default=0)


@pytest.mark.slow
def test_twenty_kills_change_nothing(train, data, tmp_path):
    flags = ["--rank", 16, "--checkpoint-every", 1, "--keep-checkpoints", 2]
    began = time.monotonic()
    whole = train("whole", *flags, steps=STEPS)
    duration = time.monotonic() - began
    out = tmp_path / "killed"
    first = ["--data", data / "text_train_*.bin", *with_defaults(flags, TINY), "--eval-every", 0, "--steps", STEPS,
             "--out", out]
    generator = random.Random(1)
    kills, before_any_checkpoint = 0, 0
    while kills < KILLS:
        started = any(out.glob("step_*/trainer_state.json"))
        before_any_checkpoint += not started
        command = ["--resume", out] if started else first
        process = subprocess.Popen([str(part) for part in (PROGRAM, *command)], stdout=subprocess.DEVNULL,
                                   stderr=subprocess.PIPE, text=True)
        # The first two kills fall into the start of a run, the others somewhere behind steps that are spread over all of
        # it but its last tenth, however fast the machine is just now.
        target = 0 if kills < 2 else 1 + int(0.9 * STEPS * (kills - 2) / (KILLS - 2))
        while newest_step(out) < target and process.poll() is None:
            time.sleep(0.002)
        try:
            process.wait(timeout=generator.random() * (0.02 if kills < 2 else 3 * duration / STEPS))
            break  # it came to its end
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            kills += 1
        errors = process.communicate()[1]
        assert errors == "", errors
    if (out / "latest").resolve().name != f"step_{STEPS:08}":
        succeed("--resume", out)
    assert kills == KILLS, "the run ended before it was killed often enough"
    assert before_any_checkpoint >= 1
    assert same_state(whole, out)
    steps = [line["step"] for line in metrics(out)[1]]
    assert steps == list(range(1, STEPS + 1))
    leftovers = [path.name for path in out.iterdir() if path.name.startswith(".") or path.name.endswith(".tmp")]
    assert leftovers == []
