"""training.py: one run of the program under a stopwatch: random tokens for it, its metrics, its plan."""
import array
import json
import os
import random
import re
import shutil
import statistics
from dataclasses import dataclass
from pathlib import Path

from . import machine
from .session import ItemFailed, ItemSkipped, OutOfMemory

CONTEXT_BYTES = 1 << 30  # more than CUDA and its libraries take beside the plan
NO_EXTRAS = ("--eval-every", "0", "--checkpoint-every", "0", "--log-every", "1000")


def write_shard(path, tokens, vocabulary):
    """A shard of random tokens in llm.c's format (docs/data.md)."""
    numbers = array.array("H")
    generator = random.Random(7)
    while len(numbers) < tokens:
        some = array.array("H", generator.randbytes(2 * 65536))
        numbers.extend(token % vocabulary for token in some[:tokens - len(numbers)])
    header = array.array("i", [20240520, 1, tokens, vocabulary] + [0] * 252)
    with open(path, "wb") as file:
        header.tofile(file)
        numbers.tofile(file)


def shard(session):
    path = session.folder / "random.bin"
    if not path.exists():
        write_shard(path, session.sizes.shard_tokens, session.sizes.vocabulary)
    return path


@dataclass
class Training:
    folder: Path
    header: dict
    rows: list
    output: str

    def losses(self):
        return {row["step"]: row["loss"] for row in self.rows}

    def checkpoint(self, name):
        return (self.folder / "latest" / name).read_bytes()


def read_metrics(folder):
    """The header and the rows of metrics.jsonl; what is not there yet is missing."""
    try:
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").rstrip().split("\n")
    except OSError:
        return {}, []
    entries = []
    for line in lines:
        try:
            entries.append(json.loads(line))
        except ValueError:
            break  # being written
    return (entries[0] if entries else {}), entries[1:]


def command(session, flags, out=None, data=None):
    """A call of the program; flags that are there twice count as given last."""
    parts = [session.sizes.program if "/" in session.sizes.program else "./" + session.sizes.program]
    defaults = ["--data", data or shard(session), "--device", "cuda", *session.sizes.common, *NO_EXTRAS]
    flags = [str(flag) for flag in flags]
    for name, value in pairs(defaults):
        if name not in flags:
            parts += [name] if value is None else [name, str(value)]
    return [*parts, *flags, *(["--out", str(out)] if out else [])]


def pairs(flags):
    """(flag, value or None) of a list of flags."""
    found = []
    for flag in map(str, flags):
        if flag.startswith("--"):
            found.append((flag, None))
        else:
            found[-1] = (found[-1][0], flag)
    return found


def complain(session, finished, steps, rows):
    if len(rows) < steps:
        if "out of memory" in finished.output or "cannot allocate" in finished.output:
            raise OutOfMemory(finished.last_line())
        finished.require("train_gpt2")
        raise ItemFailed(f"train_gpt2 ended after {len(rows)} of {steps} steps: {finished.last_line()}")


def train(session, name, flags, steps, *, data=None, environment=None):
    """A whole run with its checkpoint at the end, in a folder of this call."""
    out = session.folder / name
    shutil.rmtree(out, ignore_errors=True)
    finished = session.execute(command(session, [*flags, "--steps", steps], out, data), environment=environment)
    header, rows = read_metrics(out)
    complain(session, finished, 1, rows)
    finished.require("train_gpt2")
    return Training(out, header, rows, finished.output)


def train_without_end(session, flags, steps, *, at_the_end=None, environment=None, data=None):
    """The first steps of a run that is killed before it writes its checkpoint, which for a large model takes longer
    than the steps. `at_the_end()` is called while the run still holds its memory."""
    out = session.folder / "endless"
    shutil.rmtree(out, ignore_errors=True)
    metrics = out / "metrics.jsonl"
    size = -1

    def enough():
        nonlocal size
        now = os.path.getsize(metrics) if metrics.exists() else -1
        if now == size:
            return False
        size = now
        if len(read_metrics(out)[1]) < steps:
            return False
        if at_the_end:
            at_the_end()
        return True

    more = 1000 if at_the_end else 1
    finished = session.execute(command(session, [*flags, "--steps", steps + more], out, data), watch=enough,
                               environment=environment)
    header, rows = read_metrics(out)
    complain(session, finished, steps, rows)
    shutil.rmtree(out, ignore_errors=True)
    return Training(out, header, rows[:steps], finished.output)


def whole_plan(session, flags):
    """What `--plan --json` prints, without running anything."""
    finished = session.execute(command(session, [*flags, "--plan", "--json"]), timeout=60, record=False)
    finished.require("train_gpt2 --plan")
    return json.loads(finished.output[finished.output.index("{"):])


def plan(session, flags):
    """Bytes on the device."""
    return whole_plan(session, flags)["device_bytes"]


def host_free():
    match = re.search(r"^MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text(), re.M)
    return int(match[1]) << 10 if match else None


def why_it_does_not_fit(session, planned):
    """An empty text where a run of this plan may be tried."""
    device, host = session.device_memory(), host_free()
    for where, needed, free, usable in (
            ("device", planned["device_bytes"], device, device and device - CONTEXT_BYTES),
            ("host", planned["host_bytes"], host, host and int(0.9 * host))):
        if free is not None and needed > usable:
            return f"plans {needed / 2**30:.2f} GiB on the {where}, which has {free / 2**30:.2f} GiB free"
    return ""


def fitting_plan(session, flags):
    """The plan; the item is skipped where it does not fit into this machine."""
    planned = whole_plan(session, flags)
    if reason := why_it_does_not_fit(session, planned):
        raise ItemSkipped(reason)
    return planned


def train_beside_driver(session, flags, steps):
    """The first steps of a run, and the driver's figure: the GPU's use while the run is there, less what it was before,
    which is the plan, and what CUDA and its libraries take; None where there is no nvidia-smi."""
    before, during = machine.memory_used(), []
    run = train_without_end(session, flags, steps, at_the_end=lambda: during.append(machine.memory_used()))
    return run, during[-1] - before if before is not None and during and during[-1] is not None else None


def memory_values(planned, run, driver):
    """Planned, allocated and used bytes of a run, which failed where it took other than its plan."""
    allocated = run.rows[-1]["device_bytes"]
    values = {"planned_bytes": planned["device_bytes"], "allocated_bytes": allocated,
              "host_bytes": planned["host_bytes"], "driver_bytes": driver}
    if values["planned_bytes"] != allocated:
        values["failed"] = f"planned {values['planned_bytes']} bytes, allocated {allocated}"
    return values


def speed(run, warmup):
    """Tokens per second, seconds and share of the peak of the median step, the first `warmup` steps not counted."""
    rows = run.rows[warmup:]
    milliseconds = statistics.median(row["step_ms"] for row in rows)
    middle = min(rows, key=lambda row: abs(row["step_ms"] - milliseconds))
    return {
        "tokens_per_second": 1e3 * run.header["options"]["tokens_per_step"] / milliseconds,
        "step_seconds": milliseconds / 1e3,
        "slowest_step_seconds": max(row["step_ms"] for row in rows) / 1e3,
        "mfu": middle["mfu"] * middle["step_ms"] / milliseconds,
        "flops_per_token": middle["mfu"] * run.header["peak_flops"] / middle["tokens_per_second"],
        "peak_tflops": run.header["peak_flops"] / 1e12,
        "allocated_bytes": middle["device_bytes"],
    }
