"""program.py: ./train_gpt2 as its users call it: data for it, a call with a time limit, and what a run left behind.

The program is ./train_gpt2 in the repository's root, or what the environment variable TRAIN_GPT2 names.
"""
import json
import os
import re
import subprocess
import zlib
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = Path(os.environ.get("TRAIN_GPT2", ROOT / "train_gpt2")).resolve()
VOCABULARY = 257

# What a GPU was checked for is remembered in the user's cache; tests have one of their own.
os.environ["XDG_CACHE_HOME"] = str(ROOT / "build" / "cache")

# A run of milliseconds per step, without the measurement of the machine's peak.
TINY = ["--model", "tiny", "--seq-len", "32", "--micro-batch", "2", "--peak-tflops", "0.2", "--threads", "1"]


def write_shard(path, tokens, vocabulary=VOCABULARY, magic=20240520, version=1, count=None):
    """A token shard in llm.c's format (docs/data.md)."""
    header = np.zeros(256, np.int32)
    header[:4] = magic, version, len(tokens) if count is None else count, vocabulary
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header.tobytes() + np.asarray(tokens, np.uint16).tobytes())
    return path


def language(count, seed):
    """Byte tokens with something to learn: a random walk over a few letters, with an end-of-text now and then."""
    random = np.random.default_rng(seed)
    tokens = 97 + np.cumsum(random.integers(0, 3, count)) % 26
    tokens[random.random(count) < 0.01] = VOCABULARY - 1
    return tokens


def call(*arguments, cwd=None, timeout=300, **options):
    """Runs the program to its end."""
    return subprocess.run([str(PROGRAM), *map(str, arguments)], cwd=cwd or ROOT, capture_output=True, text=True,
                          errors="replace",  # a sample may be any bytes
                          timeout=timeout, stdin=subprocess.DEVNULL, **options)


def start(*arguments, until="step 10/", cwd=None, **options):
    """The program in the background, when it has printed a line that begins so."""
    process = subprocess.Popen([str(PROGRAM), *map(str, arguments)], cwd=cwd or ROOT, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL, **options)
    for line in process.stdout:
        if line.startswith(until):
            return process
    raise AssertionError(process.communicate()[1])


def start_training(data, out, *flags, steps, **options):
    """A tiny run in the background, some steps along."""
    return start("--data", data / "text_train_*.bin", "--steps", steps, "--out", out,
                 *with_defaults(flags, [*TINY, "--eval-every", 0]), **options)


def stop(process, *signals):
    """Sends the signals and waits for the end. Returns exit code, output and errors."""
    for sent in signals:
        process.send_signal(sent)
    output, errors = process.communicate(timeout=300)
    return process.returncode, output, errors


def succeed(*arguments, **options):
    """Runs the program and expects exit code 0; returns what it printed."""
    result = call(*arguments, **options)
    assert result.returncode == 0, f"exit code {result.returncode}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def fail(*arguments, code, **options):
    """Runs the program and expects this exit code with one line of explanation, which is returned."""
    result = call(*arguments, **options)
    assert result.returncode == code, f"exit code {result.returncode}\n{result.stdout}\n{result.stderr}"
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("train_gpt2: "), result.stderr
    assert len(lines[0]) < 600, lines[0]
    return lines[0]


def with_defaults(flags, defaults):
    """The flags, and of the defaults (pairs of flag and value) those that they do not set."""
    flags = [str(flag) for flag in flags]
    pairs = zip(defaults[::2], defaults[1::2])
    return [str(part) for flag, value in pairs if flag not in flags for part in (flag, value)] + flags


def tensors(checkpoint, name="model.safetensors"):
    """The bytes of a checkpoint's file, for comparisons that must be exact."""
    return (Path(checkpoint) / name).read_bytes()


def same_state(run_a, run_b):
    """Whether two runs ended with the same weights and the same optimizer state, bit for bit."""
    return all(tensors(Path(run_a) / "latest", name) == tensors(Path(run_b) / "latest", name)
               for name in ("model.safetensors", "optimizer.safetensors"))


def write_state(path, state):
    """A trainer_state.json with the checksum that its format asks for (docs/formats.md)."""
    state = {key: value for key, value in state.items() if key != "crc32"}
    text = json.dumps(state, indent=2).removesuffix("\n}") + ',\n  "crc32": '
    Path(path).write_text(f"{text}{zlib.crc32(text.encode())}\n}}\n")


def metrics(run):
    """The header of metrics.jsonl and the list of its steps."""
    lines = _lines(run)
    return lines[0], [line for line in lines[1:] if "sample" not in line]


def samples(run):
    """The texts of metrics.jsonl by step."""
    return {line["step"]: line["sample"] for line in _lines(run) if "sample" in line}


def _lines(run):
    return [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text(encoding="utf-8").split("\n") if line]


def validation_loss(output):
    """(loss, tokens) of what ./train_gpt2 eval printed."""
    found = re.search(r"^validation loss ([\d.]+) \((\d+) tokens\)$", output, re.MULTILINE)
    assert found, output
    return float(found[1]), int(found[2])


def losses(run):
    return {line["step"]: line["loss"] for line in metrics(run)[1]}


def steps_saved(run):
    """The steps of the checkpoints in a run's directory; nothing else may be there but latest, metrics, and the
    lock of a run that lives or was killed."""
    names = sorted(path.name for path in Path(run).iterdir())
    steps = [int(name.removeprefix("step_")) for name in names if name.startswith("step_")]
    others = {name for name in names if not name.startswith("step_")}
    assert others <= {"latest", "metrics.jsonl", ".lock"}, others
    return steps


def listing(directory):
    """Every file below a directory with its size: equal before and after means that nothing was written."""
    return {str(path): path.lstat().st_size for path in sorted(Path(directory).rglob("*"))}
