"""run.py: runs every test there is, C++ and Python, and counts them.

    .venv/bin/python tests/run.py [--suite cpu,cuda-on-cpu,gpu] [--filter SUBSTRING] [--fast]

Suites: cpu is everything on the CPU backend: the GoogleTest binaries build/tests/test_*, then pytest on tests/.
cuda-on-cpu is the CUDA backend without a GPU (tests/cuda_on_cpu/): the tests of operations under the sanitizers and with
several seeds, the tests of the model and the trainer, and the end-to-end tests, with the trainer linked against the
shim. gpu is the same on a real GPU; with --compute-sanitizer its C++ tests run under NVIDIA's compute-sanitizer. The
default is cpu and cuda-on-cpu.

One line per binary and per Python file, failures in full as they happen. A crash, a time-out or a binary that fails
without a failed test counts as one failure.
Reports go to build/tests/ (JSON of GoogleTest, JUnit XML of pytest, summary.json). The last line is
"N passed, N failed" or "N passed, N failed, N skipped"; the exit code is 1 when anything failed or nothing ran.

Slow tests, left out by --fast, have "Slow" in their GoogleTest name or pytest's mark `slow`.
"""
import argparse
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REPORTS = ROOT / "build" / "tests"

SHIM_SEEDS = (1, 2, 3)

GTEST_EVENT = re.compile(r"\[( RUN      |       OK |  FAILED  |  SKIPPED )\] ([^\s,(]+)")
PYTEST_EVENT = re.compile(r"^(\S+\.py)::.* (PASSED|FAILED|SKIPPED|ERROR|XFAIL|XPASS)\b")


class Counts:
    """What happened in one binary, one Python file, or in all."""

    def __init__(self, name):
        self.name, self.passed, self.failed, self.skipped = name, 0, [], []  # skipped: (test, reason)

    def add(self, other):
        self.passed += other.passed
        self.failed += other.failed
        self.skipped += other.skipped

    def total(self):
        return self.passed + len(self.failed) + len(self.skipped)

    def line(self):
        text = f"{self.passed} passed, {len(self.failed)} failed"
        return text + (f", {len(self.skipped)} skipped" if self.skipped else "")


def say(text=""):
    print(text, flush=True)


def report(counts, seconds):
    say(f"{'FAIL' if counts.failed else 'ok  '}  {counts.name:<36} {counts.line()}  ({seconds:.1f} s)")


def start(command, timeout, environment=None):
    """The process with its merged output, ended after `timeout` seconds. Call the returned function when it is done: it
    says whether time ran out."""
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, text=True,
        errors="replace", start_new_session=True, env={**os.environ, "PYTHONUNBUFFERED": "1", **(environment or {})},
    )
    expired = threading.Event()

    def stop():
        expired.set()
        try:
            os.killpg(process.pid, signal.SIGKILL)  # the test and whatever it started
        except ProcessLookupError:
            pass

    timer = threading.Timer(timeout, stop)
    timer.start()

    def finish():
        process.wait()
        timer.cancel()
        return expired.is_set()

    return process, finish


def exit_text(code, expired, timeout):
    if expired:
        return f"was stopped after {timeout:.0f} s"
    if code < 0:
        return f"was ended by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"


def skip_reason(block):
    """GoogleTest prints 'file:line: Skipped' and the message after it."""
    lines = [line.strip() for line in block if line.strip()]
    while lines and not lines[0].endswith("Skipped"):
        lines.pop(0)
    return " ".join(lines[1:]) or "no reason given"


def run_binary(path, arguments, environment=None, note="", prefix=()):
    name = f"{path.name}{note}"
    counts = Counts(name)
    report_path = REPORTS / (name.replace(" ", "_") + ".json")
    command = [*prefix, str(path), f"--gtest_output=json:{report_path}", "--gtest_color=no"]
    wanted = "*"
    if arguments.filter and arguments.filter not in path.name:
        wanted = f"*{arguments.filter}*"
    command.append(f"--gtest_filter={wanted}" + ("-*Slow*" if arguments.fast else ""))
    began = time.monotonic()
    process, finish = start(command, arguments.timeout, environment)
    current, block, tail = None, [], []
    for line in process.stdout:
        line = line.rstrip("\n")
        tail = tail[-40:] + [line]
        event = GTEST_EVENT.search(line)
        if not event:
            block.append(line)
            continue
        kind, test = event.group(1).strip(), event.group(2)
        if kind == "RUN":
            current, block = test, []
        elif current:  # the closing summary repeats names; only the first report of a test counts
            if kind == "OK":
                counts.passed += 1
            elif kind == "FAILED":
                counts.failed.append(f"{name}: {test}")
                say("\n".join([f"---- {name}: {test}", *block, line]))
            else:
                counts.skipped.append((f"{name}: {test}", skip_reason(block)))
            current, block = None, []
    expired = finish()
    if expired or process.returncode not in (0, 1) or (process.returncode == 1 and not counts.failed) or current:
        where = f" in {current}" if current else ""
        problem = f"{name} {exit_text(process.returncode, expired, arguments.timeout)}{where}"
        counts.failed.append(problem)
        say("\n".join([f"---- {problem}", *(block if current else tail)]))
    if counts.total() or not arguments.filter:
        report(counts, time.monotonic() - began)
    return counts


def run_pytest(arguments, environment=None, note="", marker=""):
    """All of pytest's tests, or those with a marker."""
    counts = Counts("pytest" + note)
    xml = REPORTS / f"pytest{note.replace(' ', '_')}.xml"
    xml.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "tests", "-v", "--tb=short", "--color=no", f"--junitxml={xml}"]
    if arguments.filter:
        command += ["-k", arguments.filter]
    markers = [marker] if marker else []
    if arguments.fast:
        markers.append("not slow")
    if markers:
        command += ["-m", " and ".join(markers)]
    process, finish = start(command, arguments.timeout, environment)
    file, began, output, failing = None, time.monotonic(), [], False
    for line in process.stdout:
        line = line.rstrip("\n")
        output.append(line)
        failing = failing or re.match(r"=+ (FAILURES|ERRORS) =+", line) is not None
        if failing:
            say(line)
        event = PYTEST_EVENT.match(line)
        if not event:
            continue
        if file is None or file.name != event.group(1) + note:
            if file:
                report(file, time.monotonic() - began)
            file, began = Counts(event.group(1) + note), time.monotonic()
        if event.group(2) in ("PASSED", "XPASS"):
            file.passed += 1
        elif event.group(2) in ("FAILED", "ERROR"):
            file.failed.append(line)
        else:
            file.skipped.append((line, ""))
    expired = finish()
    if file:
        report(file, time.monotonic() - began)
    if xml.exists():
        read_junit(xml, counts, note)
    code = process.returncode
    if expired or code not in (0, 1, 5) or (code == 1 and not counts.failed) or (code != 5 and not xml.exists()):
        problem = f"pytest{note} {exit_text(code, expired, arguments.timeout)}"
        counts.failed.append(problem)
        say("\n".join([f"---- {problem}", *output[-40:]]))
    return counts


def read_junit(xml, counts, note):
    for case in ElementTree.parse(xml).iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}{note}"
        if case.find("failure") is not None or case.find("error") is not None:
            counts.failed.append(name)
        elif (skipped := case.find("skipped")) is not None:
            counts.skipped.append((name, skipped.get("message") or "no reason given"))
        else:
            counts.passed += 1


def binaries_in(folder):
    paths = [p for p in sorted(folder.glob("test_*")) if p.is_file() and os.access(p, os.X_OK)]
    if not paths:
        say(f"no test binary in {folder.relative_to(ROOT)}; `make tests` builds them")
    return paths


def run_cpu(arguments, total):
    for path in binaries_in(REPORTS):
        total.add(run_binary(path, arguments, {"TEST_BACKENDS": "cpu"}))
    total.add(run_pytest(arguments, marker="not cuda"))


def run_cuda_on_cpu(arguments, total):
    cuda = {"TEST_BACKENDS": "cuda"}
    for path in binaries_in(ROOT / "build/cuda_on_cpu_sanitized/tests"):
        for seed in SHIM_SEEDS[:1] if arguments.fast else SHIM_SEEDS:
            total.add(run_binary(path, arguments, {**cuda, "CUDA_ON_CPU_SEED": str(seed)}, f" (shim, seed {seed})"))
    for path in binaries_in(ROOT / "build/cuda_on_cpu/tests"):
        total.add(run_binary(path, arguments, cuda, " (shim)"))
    program = str(ROOT / "build/cuda_on_cpu/train_gpt2")
    total.add(run_pytest(arguments, {"TRAIN_GPT2": program, **cuda}, " (shim)", "cuda"))


def run_gpu(arguments, total):
    prefix = ("compute-sanitizer", "--error-exitcode", "99") if arguments.compute_sanitizer else ()
    for path in binaries_in(REPORTS):
        total.add(run_binary(path, arguments, {"TEST_BACKENDS": "cuda"}, " (gpu)", prefix))
    if arguments.compute_sanitizer:
        return
    missing = [name for name in ("pytest", "numpy") if importlib.util.find_spec(name) is None]
    if missing:
        total.skipped.append(("the end-to-end tests (gpu)", f"{' and '.join(missing)} not installed"))
        return
    total.add(run_pytest(arguments, {"TEST_BACKENDS": "cuda"}, " (gpu)", "cuda"))


def write_summary(total, seconds):
    summary = {
        "passed": total.passed,
        "failed": total.failed,
        "skipped": [{"test": test, "reason": reason} for test, reason in total.skipped],
        "seconds": round(seconds, 1),
    }
    (REPORTS / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")


def main():
    parser = argparse.ArgumentParser(description="Runs every test and counts them.")
    parser.add_argument("--suite", default="cpu,cuda-on-cpu", metavar="NAMES", help="of cpu, cuda-on-cpu and gpu")
    parser.add_argument("--compute-sanitizer", action="store_true", help="with the gpu suite")
    parser.add_argument("--filter", default="", metavar="SUBSTRING", help="only tests whose name contains this")
    parser.add_argument("--fast", action="store_true", help="leave out the tests marked slow")
    parser.add_argument("--timeout", type=float, default=1200, metavar="SECONDS",
                        help="for each binary, and for pytest (default: 1200)")
    arguments = parser.parse_args()
    REPORTS.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    total = Counts("all")
    suites = {"cpu": run_cpu, "cuda-on-cpu": run_cuda_on_cpu, "gpu": run_gpu}
    names = arguments.suite.split(",")
    if unknown := [name for name in names if name not in suites]:
        parser.error(f"no suite {unknown[0]!r}; there are {', '.join(suites)}")
    for name in names:
        suites[name](arguments, total)
    write_summary(total, time.monotonic() - began)
    say()
    for test, reason in total.skipped:
        say(f"skipped: {test}: {reason}")
    for test in total.failed:
        say(f"failed: {test}")
    if not total.total():
        say(f"no test has {arguments.filter!r} in its name" if arguments.filter else "no test ran")
    say(f"all of it took {time.monotonic() - began:.0f} s")
    say(total.line())
    return 1 if total.failed or not total.total() else 0


if __name__ == "__main__":
    sys.exit(main())
