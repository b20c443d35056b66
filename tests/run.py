"""run.py: runs every test there is, C++ and Python, and counts them.

    .venv/bin/python tests/run.py [--suite cpu,cuda-on-cpu,ptx,gpu] [--filter SUBSTRING] [--fast] [--jobs N]

Suites: cpu is everything on the CPU backend: the GoogleTest binaries build/tests/test_*, then pytest on tests/.
cuda-on-cpu is the CUDA backend without a GPU (tests/cuda_on_cpu/): the tests of operations under the sanitizers and with
another seed without, the tests of the model and the trainer, and the end-to-end tests, with the trainer linked against the
shim. ptx is the tests of operations on what nvcc makes of the kernels, and the interpreter's own (tests/ptx/). gpu is the
same on a real GPU; with --compute-sanitizer its C++ tests run under NVIDIA's compute-sanitizer. The
default is cpu and cuda-on-cpu.

One line per binary and per Python file when it has ended: how many there are, and the time so far; failures in full as
they happen. As many run at a time as there are cores (--jobs), those that took longest the last time first. A crash, a
time-out or a binary that fails without a failed test counts as one failure.
Counts go to tests/summary.json in build/, or in what the environment variable BUILD names. The last line is
"N passed, N failed" or "N passed, N failed, N skipped"; the exit code is 1 when anything failed or nothing ran.

Slow tests, left out by --fast, have "Slow" in their GoogleTest name or pytest's mark `slow`.
"""
import argparse
import concurrent.futures
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / os.environ.get("BUILD", "build")
REPORTS = BUILD / "tests"

SHIM_SEEDS = (2,)  # of the tests of operations, beside 1 under the sanitizers

# On a GPU with 100 KB of shared memory in a multiprocessor, attention in bf16 has other tiles.
PTX_SETTINGS = {"test_attention": [(", 99 KB", {"PTXSIM_SHARED_KIB": "99"}, "*bf16")]}

GTEST_EVENT = re.compile(r"\[( RUN      |       OK |  FAILED  |  SKIPPED )\] ([^\s,(]+)")

# What takes longest where nothing is known of an earlier run, in seconds on two cores.
LONGEST = {"test_run_cuda.py": 110, "test_gpu_report.py": 110, "test_offload": 70, "test_training": 60, "test_attention": 50,
           "test_overlap": 40, "test_spread": 40, "test_job": 30, "test_run_resume.py": 30, "test_run_ranks.py": 30}
JOB_MEMORY = 2 << 30  # bytes that a job may take: where there is less, fewer run at a time


class Counts:
    """What happened in one binary, one Python file, or in all."""

    def __init__(self, name):
        self.name, self.passed, self.failed, self.skipped = name, 0, [], []  # skipped: (test, reason)
        self.text = []  # lines about what failed

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


# Threads that wait spin for a moment only, as in the program (kernels/cpu/library_settings.h): other jobs need the cores.
# GCC's AddressSanitizer, where it looks for uses after return, which GCC 13 does unless told otherwise, aligns frames to 32 bytes
# and code for AVX-512 expects 64 (GCC bug 110027).
ENVIRONMENT = {"PYTHONUNBUFFERED": "1", "GOMP_SPINCOUNT": "1000", "KMP_BLOCKTIME": "0",
               "ASAN_OPTIONS": "detect_stack_use_after_return=0"}


def start(command, timeout, environment=None):
    """The process with its merged output, ended after `timeout` seconds. Call the returned function when it is done: it
    says whether time ran out."""
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, text=True,
        errors="replace", start_new_session=True, env={**ENVIRONMENT, **os.environ, **(environment or {})},
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


def job_of_binary(path, arguments, environment=None, note="", prefix=(), tests="*"):
    """A function that runs a GoogleTest binary, or those of its tests that match, and returns its counts."""
    name = f"{path.name}{note}"
    command = [*prefix, str(path), "--gtest_color=no"]
    wanted = tests
    if arguments.filter and arguments.filter not in path.name:
        wanted = f"*{arguments.filter}*"
    command.append(f"--gtest_filter={wanted}" + ("-*Slow*" if arguments.fast else ""))

    def run():
        counts = Counts(name)
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
                    counts.text += [f"---- {name}: {test}", *block, line]
                else:
                    counts.skipped.append((f"{name}: {test}", skip_reason(block)))
                current, block = None, []
        expired = finish()
        if expired or process.returncode not in (0, 1) or (process.returncode == 1 and not counts.failed) or current:
            where = f" in {current}" if current else ""
            problem = f"{name} {exit_text(process.returncode, expired, arguments.timeout)}{where}"
            counts.failed.append(problem)
            counts.text += [f"---- {problem}", *(block if current else tail)]
        return counts

    return name, run


def job_of_python(path, arguments, environment=None, note="", marker=""):
    """A function that runs pytest on a file, or those of its tests that have a marker, and returns its counts."""
    name = f"{path.name}{note}"
    xml = Path(arguments.scratch) / f"{name}.xml"
    command = [sys.executable, "-m", "pytest", str(path.relative_to(ROOT)), "--tb=short", "--color=no", "-q", "-rN",
               "-p", "no:cacheprovider", f"--junitxml={xml}"]
    if arguments.filter and arguments.filter not in path.name:
        command += ["-k", arguments.filter]
    markers = [marker] if marker else []
    if arguments.fast:
        markers.append("not slow")
    if markers:
        command += ["-m", " and ".join(markers)]

    def run():
        counts = Counts(name)
        process, finish = start(command, arguments.timeout, environment)
        output = [line.rstrip("\n") for line in process.stdout]
        expired = finish()
        if xml.exists():
            read_junit(xml, counts, note)
        code = process.returncode
        if expired or code not in (0, 1, 5) or (code == 1 and not counts.failed) or (code != 5 and not xml.exists()):
            problem = f"{name} {exit_text(code, expired, arguments.timeout)}"
            counts.failed.append(problem)
            counts.text += [f"---- {problem}"]
        if counts.failed:
            first = next((i for i, line in enumerate(output) if re.match(r"=+ (FAILURES|ERRORS) =+", line)), 0)
            counts.text += output[first:]
        return counts

    return name, run


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
        say(f"no test binary in {folder}; `make tests` builds them")
    return paths


def python_jobs(arguments, environment=None, note="", marker=""):
    """The files of which pytest would run something (a file without the marker's name has no such test)."""
    paths = sorted((ROOT / "tests").glob("test_*.py"))
    if not marker.startswith("not "):
        paths = [path for path in paths if f"mark.{marker}" in path.read_text(encoding="utf-8")]
    return [job_of_python(path, arguments, environment, note, marker) for path in paths]


def cpu_jobs(arguments):
    jobs = [job_of_binary(path, arguments, {"TEST_BACKENDS": "cpu"}) for path in binaries_in(REPORTS)]
    return jobs + python_jobs(arguments, marker="not cuda")


def cuda_on_cpu_jobs(arguments):
    cuda = {"TEST_BACKENDS": "cuda", "CUDA_ON_CPU_THREADS": "2"}  # blocks race each other, on any number of cores
    jobs = []
    sanitized = binaries_in(BUILD / "cuda_on_cpu_sanitized/tests")
    for path in sanitized:
        jobs.append(job_of_binary(path, arguments, {**cuda, "CUDA_ON_CPU_SEED": "1"}, " (shim, sanitizers)"))
    for path in binaries_in(BUILD / "cuda_on_cpu/tests"):
        if path.name not in {other.name for other in sanitized}:
            jobs.append(job_of_binary(path, arguments, cuda, " (shim)"))
            continue
        for seed in SHIM_SEEDS[:0 if arguments.fast else None]:
            environment = {**cuda, "CUDA_ON_CPU_SEED": str(seed)}
            jobs.append(job_of_binary(path, arguments, environment, f" (shim, seed {seed})"))
    program = str(BUILD / "cuda_on_cpu/train_gpt2")
    return jobs + python_jobs(arguments, {"TRAIN_GPT2": program, **cuda}, " (shim)", "cuda")


def ptx_jobs(arguments):
    coverage = BUILD / "ptx/coverage"
    if not arguments.filter:
        shutil.rmtree(coverage, ignore_errors=True)
    coverage.mkdir(parents=True, exist_ok=True)
    jobs = []
    for path in binaries_in(BUILD / "ptx/tests"):
        for note, settings, tests in [("", {}, "*"), *PTX_SETTINGS.get(path.name, ())]:
            environment = {"TEST_BACKENDS": "cuda", "PTXSIM_COVERAGE": str(coverage / f"{path.name}{note}"), **settings}
            jobs.append(job_of_binary(path, arguments, environment, f" (PTX{note})", tests=tests))
    return jobs


def gpu_jobs(arguments):
    prefix = ("compute-sanitizer", "--error-exitcode", "99") if arguments.compute_sanitizer else ()
    cuda = {"TEST_BACKENDS": "cuda"}
    jobs = [job_of_binary(path, arguments, cuda, " (gpu)", prefix) for path in binaries_in(REPORTS)]
    if arguments.compute_sanitizer:
        return jobs
    missing = [name for name in ("pytest", "numpy") if importlib.util.find_spec(name) is None]
    if missing:
        left_out = Counts("the end-to-end tests (gpu)")
        left_out.skipped.append((left_out.name, f"{' and '.join(missing)} not installed"))
        return [*jobs, (left_out.name, lambda: left_out)]
    return jobs + python_jobs(arguments, cuda, " (gpu)", "cuda")


def jobs_at_a_time():
    """One per core that this process may use, and one for the time in which others wait, as long as there is memory for
    them."""
    available = re.search(r"^MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text(), re.M)
    room = int(available[1]) * 1024 // JOB_MEMORY if available else 1
    return max(1, min(len(os.sched_getaffinity(0)) + 1, room))


def earlier_seconds():
    try:
        return json.loads((REPORTS / "seconds.json").read_text())
    except (OSError, ValueError):
        return {}


def run_jobs(jobs, arguments, began, total):
    """Runs them, a few at a time, and reports each when it has ended."""
    earlier = earlier_seconds()
    jobs.sort(key=lambda job: -earlier.get(job[0], LONGEST.get(job[0].split(" ")[0], 0)))
    seconds = dict(earlier)

    def timed(job):
        start_of_job = time.monotonic()
        counts = job[1]()
        seconds[job[0]] = round(time.monotonic() - start_of_job, 1)
        return counts

    with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
        running = [pool.submit(timed, job) for job in jobs]
        for ended, future in enumerate(concurrent.futures.as_completed(running), 1):
            counts = future.result()
            total.add(counts)
            if counts.text:
                say("\n".join(counts.text))
            if counts.total():
                so_far = int(time.time() - began)
                say(f"{'FAIL' if counts.failed else 'ok  '}  {counts.name:<42} {counts.line():<24} "
                    f"{seconds[counts.name]:6.1f} s   [{ended} of {len(jobs)}, {so_far // 60}m{so_far % 60:02}s]")
    (REPORTS / "seconds.json").write_text(json.dumps(seconds, indent=1) + "\n")


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
    parser.add_argument("--suite", default="cpu,cuda-on-cpu", metavar="NAMES", help="of cpu, cuda-on-cpu, ptx and gpu")
    parser.add_argument("--compute-sanitizer", action="store_true", help="with the gpu suite")
    parser.add_argument("--filter", default="", metavar="SUBSTRING", help="only tests whose name contains this")
    parser.add_argument("--fast", action="store_true", help="leave out the tests marked slow")
    parser.add_argument("--jobs", type=int, metavar="N",
                        help="binaries and files that run at a time (default: one per core and one more, on a GPU one)")
    parser.add_argument("--timeout", type=float, default=1200, metavar="SECONDS",
                        help="for each binary and each Python file (default: 1200)")
    parser.add_argument("--began", type=float, default=time.time(), metavar="TIME",
                        help="when the time began that is shown (seconds since 1970; default: now)")
    arguments = parser.parse_args()
    REPORTS.mkdir(parents=True, exist_ok=True)
    total = Counts("all")
    suites = {"cpu": cpu_jobs, "cuda-on-cpu": cuda_on_cpu_jobs, "ptx": ptx_jobs, "gpu": gpu_jobs}
    names = arguments.suite.split(",")
    if unknown := [name for name in names if name not in suites]:
        parser.error(f"no suite {unknown[0]!r}; there are {', '.join(suites)}")
    arguments.jobs = arguments.jobs or (1 if "gpu" in names else jobs_at_a_time())
    with tempfile.TemporaryDirectory() as arguments.scratch:
        jobs = [job for name in names for job in suites[name](arguments)]
        say(f"{len(jobs)} binaries and files, {arguments.jobs} at a time")
        run_jobs(jobs, arguments, arguments.began, total)
    write_summary(total, time.time() - arguments.began)
    say()
    for test, reason in total.skipped:
        say(f"skipped: {test}: {reason}")
    for test in total.failed:
        say(f"failed: {test}")
    if not total.total():
        say(f"no test has {arguments.filter!r} in its name" if arguments.filter else "no test ran")
    say(f"all of it took {time.time() - arguments.began:.0f} s")
    say(total.line())
    return 1 if total.failed or not total.total() else 0


if __name__ == "__main__":
    sys.exit(main())
