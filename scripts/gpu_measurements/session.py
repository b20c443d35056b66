"""session.py: one call of the report: its clock, its items and what becomes of them.

A part is a function that yields items; an item is a name, an estimate of its seconds and a function that measures. What
an item returns is its values; what it raises is its failure; nothing it does stops the next one.
"""
import datetime
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

from . import machine

ROOT = machine.ROOT
PART_SECONDS = 530  # nine minutes, less ten seconds to end in
PATH = os.environ.get("PATH", "") + ":/usr/local/cuda/bin"  # for nvcc and compute-sanitizer


# Set by SIGTERM, whose handler must not interrupt what starts a command or writes the results.
asked_to_end = threading.Event()


def end_if_asked():
    """Ends the program with 143, as SIGTERM would, if that came."""
    if asked_to_end.is_set():
        raise SystemExit(143)


class ItemFailed(Exception):
    """Why an item has no value, one line."""


class ItemSkipped(Exception):
    """Why an item was not tried, one line."""


class OutOfMemory(ItemFailed):
    """The device is too small for it."""


@dataclass
class Item:
    name: str
    seconds: float  # needed at most, as far as one can say before
    measure: Callable


@dataclass
class Finished:
    code: int
    output: str  # stdout and stderr
    expired: bool

    def last_line(self):
        lines = [line for line in self.output.splitlines() if line.strip()]
        return lines[-1][:300] if lines else "no output"

    def require(self, what):
        if self.expired:
            raise ItemFailed(f"{what} was stopped when its time was over")
        if self.code != 0:
            how = f"was ended by signal {-self.code}" if self.code < 0 else f"ended with exit code {self.code}"
            raise ItemFailed(f"{what} {how}: {self.last_line()}")
        return self


def say(text):
    print(text, flush=True)


class Session:
    def __init__(self, sizes, results, *, dry_run, time_limit, data, llmc, missing, spent=0.0,
                 part_seconds=PART_SECONDS):
        """spent: seconds that the build before this call has taken of the time limit and of the first part's time."""
        self.sizes, self.results, self.dry_run = sizes, results, dry_run
        self.data, self.llmc, self.missing, self.part_seconds = data, llmc, missing, part_seconds
        self.spent = spent
        self.end = time.monotonic() + time_limit - spent if time_limit else float("inf")
        self.part_end = time.monotonic() + part_seconds - spent
        self.commit = machine.commit()
        self.folder = Path(tempfile.mkdtemp(prefix="gpu_report."))
        self.commands = []  # of the item that is being measured
        self.failed = False
        self.pythons = {}
        self.most_free = None

    def close(self):
        for _ in range(20):  # what was killed may end, and write, a moment later
            shutil.rmtree(self.folder, ignore_errors=True)
            if not self.folder.exists():
                break
            time.sleep(0.1)

    def device_memory(self):
        """Bytes free on the device when nothing of ours runs: the most it ever said in this call, since the driver may
        take a moment to free what a killed run had. None where it says nothing."""
        free = machine.memory_free()
        self.most_free = max(filter(None, (free, self.most_free)), default=None)
        return self.most_free

    def left(self):
        return min(self.end, self.part_end) - time.monotonic()

    def run_part(self, part, items):
        """Measures a part's items one after the other, each within what is left of the part's and the call's time."""
        self.part_end = time.monotonic() + self.part_seconds - self.spent
        self.spent = 0.0
        say(f"== {part}")
        for item in items:
            before = self.results.get(part, item.name)
            if self.missing and before and before["status"] == "ok" and before["commit"] == self.commit \
                    and not self.commit.endswith("+changes"):
                say(f"   {item.name}: kept, measured at this commit")
                continue
            self.run_item(part, item)

    def run_item(self, part, item):
        end_if_asked()
        began = time.monotonic()
        self.commands, values = [], {}
        try:
            if self.left() < item.seconds:
                raise ItemSkipped(f"needs about {item.seconds:.0f} s, {max(0, self.left()):.0f} s are left")
            values = item.measure() or {}
            status = "failed: " + values.pop("failed") if values.get("failed") else "ok"
        except ItemSkipped as reason:
            status = f"skipped: {reason}"
        except ItemFailed as reason:
            status = f"failed: {reason}"
        except Exception as error:  # a mistake of this script, or of a program's output, costs one item
            status = f"failed: {type(error).__name__}: {error}"
        seconds = time.monotonic() - began
        self.failed = self.failed or status.startswith("failed")
        self.results.put(part, item.name, {
            "status": " ".join(status.split()),
            "command": "; ".join(dict.fromkeys(self.commands)),
            "machine": machine.one_line(self.results.content["machine"]),
            "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
            "commit": self.commit, "seconds": round(seconds, 1), "values": values,
        })
        say(f"   {item.name}: {status} ({seconds:.1f} s)")

    # ---- commands

    def readable(self, command):
        """The command as a reader would type it: paths below the repository, files of this call by their names."""
        return self.shortened(shlex.join(str(part) for part in command))

    def shortened(self, text):
        return text.replace(f"{self.folder}/", "/tmp/").replace(f"{ROOT}/", "")

    def execute(self, command, *, timeout=None, environment=None, watch=None, record=True):
        """Runs a command to its end, or until `watch` (called every 20 ms) returns true, or until the time is over;
        then it and whatever it started are killed."""
        end_if_asked()
        command = [str(part) for part in command]
        if record:
            prefix = "".join(f"{name}={value} " for name, value in (environment or {}).items())
            self.commands.append(self.shortened(prefix) + self.readable(command))
        limit = time.monotonic() + min(self.left(), timeout or float("inf"))
        try:
            process = subprocess.Popen(
                command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                text=True, errors="replace", start_new_session=True,
                env={**os.environ, "PATH": PATH, **(environment or {})})
        except OSError as error:
            missing = not (ROOT / command[0]).exists() and not shutil.which(command[0])
            reason = "is not built" if missing else error.strerror
            raise ItemFailed(f"{self.readable(command[:1])} {reason}") from None
        lines = []

        def read():
            for line in process.stdout:
                lines.append(line)

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        expired = False
        try:
            while process.poll() is None and not (watch and watch()):
                end_if_asked()
                expired = time.monotonic() > limit
                if expired:
                    break
                time.sleep(0.02)
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            process.wait()
            reader.join(timeout=5)
        return Finished(process.returncode, "".join(lines), expired)

    def python_with(self, *modules):
        """A Python that can import these modules, or None: this one, the repository's, the one on the path."""
        if modules not in self.pythons:
            candidates = [sys.executable, str(ROOT / ".venv/bin/python"), shutil.which("python3") or ""]
            test = "import " + ", ".join(modules)
            self.pythons[modules] = next(
                (python for python in dict.fromkeys(candidates) if python and Path(python).exists()
                 and self.execute([python, "-c", test], timeout=60, record=False).code == 0), None)
        return self.pythons[modules]

    def python_with_torch(self):
        python = self.python_with("torch")
        if not python:
            raise ItemSkipped("no Python here has PyTorch")
        return python
