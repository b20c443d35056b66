"""test_run_kill.py: kill -9 at any moment leaves a run that goes on, and ends with the bits of one left alone."""
import random
import signal
import subprocess
import time

import pytest
from program import PROGRAM, TINY, metrics, same_state, succeed, with_defaults

KILLS = 20
STEPS = 250


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
        try:
            # The first two kills fall into the start of a run, the others anywhere in what is left of it.
            pause = 0.02 * generator.random() if kills < 2 else generator.uniform(0.01, duration / KILLS)
            process.wait(timeout=pause)
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
