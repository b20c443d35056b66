"""machine.py: what was measured on and what was measured: the GPU, the driver, the commit of the working tree."""
import hashlib
import os
import re
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
SOURCES = ("kernels", "flora", "model", "train", "data", "bench")


def text_of(*command):
    """What a command prints, stripped; empty where it is missing or fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def query_gpu(field):
    """One field of nvidia-smi for the GPU that CUDA takes first, or an empty text."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0]
    return text_of("nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits", "-i", visible or "0")


def memory_used():
    """Bytes in use on the GPU by all processes, as the driver says; None where there is no nvidia-smi."""
    value = query_gpu("memory.used")
    return int(value) << 20 if value.isdigit() else None


def memory_free():
    value = query_gpu("memory.free")
    return int(value) << 20 if value.isdigit() else None


def cpu_name():
    try:
        names = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        return "unknown CPU"
    return f"{len(names)} x {names[0]}" if names else "unknown CPU"


def describe(dry_run):
    """{"gpu", "driver", "nvcc", "cpu", "memory"}; the GPU's name is empty where there is none."""
    name = "CUDA on CPU (dry run)" if dry_run else query_gpu("name")
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    release = re.search(r"release (\S+),", text_of(nvcc, "--version"))
    return {
        "gpu": name,
        "driver": "" if dry_run else query_gpu("driver_version"),
        "memory": "" if dry_run else query_gpu("memory.total") + " MiB",
        "nvcc": release.group(1) if release else "",
        "cpu": cpu_name(),
    }


def one_line(machine):
    parts = [machine["gpu"], machine["driver"] and f"driver {machine['driver']}",
             machine["nvcc"] and f"nvcc {machine['nvcc']}", machine["cpu"]]
    return ", ".join(part for part in parts if part)


def file_name(gpu):
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")


def commit():
    """The commit of the working tree, "+changes" where it differs; without git a digest of the sources."""
    head = text_of("git", "--no-optional-locks", "rev-parse", "--short=12", "HEAD")
    if head:
        changed = text_of("git", "--no-optional-locks", "status", "--porcelain", "--untracked-files=no")
        return head + ("+changes" if changed else "")
    digest = hashlib.sha256()
    for folder in SOURCES:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.is_file() and path.suffix in (".cpp", ".h", ".cu", ".cuh"):
                digest.update(path.read_bytes())
    return "no git, sources " + digest.hexdigest()[:12]
