"""peers.py: the same training step in PyTorch (scripts/bench_pytorch_gpu.py) and in llm.c (the checkout LLMC)."""
import json
import re
import shutil
import statistics
from pathlib import Path

from . import machine, training
from .session import ItemFailed, ItemSkipped, OutOfMemory

# llm.c as of 2025 against CUDA 13, and without the driver's management library, which is not everywhere and only used
# to log the GPU's load. Nothing that runs in a step is touched.
LLMC_CHANGES = (
    ("llmc/cuda_utils.cuh", "cudaMemAdviseSetPreferredLocation, cudaCpuDeviceId)",
     "cudaMemAdviseSetPreferredLocation, cudaMemLocation{cudaMemLocationTypeHost, 0})", 13),
    ("llmc/mfu.h", "#if __has_include(<nvml.h>)", "#if 0", 0),
    ("Makefile", "-lnvidia-ml", "", 0),
)
LLMC_FLAGS = ("NO_MULTI_GPU=1", "NO_USE_MPI=1", "USE_CUDNN=0", "PRECISION=BF16")
LLMC_STEP = re.compile(r"^step +\d+/\d+ \|.*\| ([\d.]+) ms \|", re.M)


def pytorch(session, model, precision, token_counts, steps):
    """Both kinds of step in one process, so that torch.compile works once. The micro-batch is halved until it fits."""
    python = session.python_with_torch()
    micro_batch = session.sizes.micro_tokens // model.seq_len
    while True:
        finished = session.execute([
            python, machine.ROOT / "scripts/bench_pytorch_gpu.py", "--layers", model.layers, "--channels",
            model.channels, "--heads", model.heads, "--vocabulary", session.sizes.vocabulary, "--micro-batch",
            micro_batch, "--seq-len", model.seq_len, "--tokens-per-step", ",".join(map(str, token_counts)),
            "--warmup", ",".join(str(warmup) for warmup, _ in steps), "--steps",
            ",".join(str(counted) for _, counted in steps), "--precision", precision, "--device",
            session.sizes.device])
        if finished.code != 3 or micro_batch == 1:
            break
        micro_batch //= 2
    rows = [json.loads(line) for line in finished.output.splitlines() if line.startswith('{"tokens_per_step"')]
    values = {"rows": rows}
    if len(rows) < len(token_counts):
        finished_rows = f"{len(rows)} of {len(token_counts)} kinds of step; " if rows else ""
        reason = "time was over" if finished.expired else finished.last_line()
        values["failed"] = f"bench_pytorch_gpu.py: {finished_rows}{reason}"
    return values


def llmc_program(session):
    """Builds llm.c in a copy of its sources, once in a call."""
    if not session.llmc:
        raise ItemSkipped("LLMC names no checkout of llm.c")
    checkout, copy = Path(session.llmc), session.folder / "llm.c"
    program = copy / "train_gpt2cu"
    if program.exists():
        return program
    if not (checkout / "train_gpt2.cu").exists():
        raise ItemFailed(f"{checkout} is no checkout of llm.c: it has no train_gpt2.cu")
    shutil.rmtree(copy, ignore_errors=True)
    copy.mkdir()
    for name in ("Makefile", "train_gpt2.cu"):
        shutil.copy(checkout / name, copy)
    shutil.copytree(checkout / "llmc", copy / "llmc")
    toolkit = int((session.results.content["machine"].get("nvcc") or "0").split(".")[0])
    for name, before, after, since in LLMC_CHANGES:
        path = copy / name
        if toolkit >= since:
            path.write_text(path.read_text().replace(before, after))
    capability = machine.query_gpu("compute_cap").replace(".", "")
    session.execute(["make", "-C", copy, "train_gpt2cu", *LLMC_FLAGS,
                     *([f"GPU_COMPUTE_CAPABILITY={capability}"] if capability else [])],
                    record=False).require("building llm.c")
    session.commands.append(f"make -C {session.llmc} train_gpt2cu {' '.join(LLMC_FLAGS)} (in a copy, with LLMC_CHANGES "
                            "of scripts/gpu_measurements/peers.py)")
    return program


def llmc_bytes(model, micro_batch):
    """What llm.c allocates, about: 16 bytes per parameter, activations with the attention matrix of every layer."""
    C, T, L = model.channels, model.seq_len, model.layers
    parameters = 12 * L * C * C + 51328 * C
    per_token = L * (17 * C + model.heads * T) + max(50304, model.heads * T) + 8 * C
    return 16 * parameters + 2 * micro_batch * T * per_token


def llmc(session, model, tokens, steps):
    """llm.c's own trainer on the same shard, without recompute, fp32 states and master weights (its default); half the
    micro-batch where it does not fit."""
    program = llmc_program(session)
    data, (warmup, counted) = training.shard(session), steps
    micro_batch, free = session.sizes.micro_tokens // model.seq_len, session.device_memory()
    while free and micro_batch > 1 and llmc_bytes(model, micro_batch) > 0.97 * free:
        micro_batch //= 2
    while True:
        finished = session.execute([
            program, "-e", model.preset, "-i", data, "-j", data, "-b", micro_batch, "-t", model.seq_len, "-d", tokens,
            "-x", warmup + counted, "-r", 0, "-c", 0.1, "-l", 6e-4, "-v", 1000000, "-m", 1, "-s", 0, "-h", 0])
        if "out of memory" not in finished.output or micro_batch == 1:
            break
        micro_batch //= 2
    if "out of memory" in finished.output:
        raise OutOfMemory("llm.c: out of memory")
    if "Fell back to cudaMallocManaged" in finished.output:
        raise OutOfMemory("llm.c keeps a part of its states in host memory: the device is too small")
    times = [float(text) / 1e3 for text in LLMC_STEP.findall(finished.output)][warmup:]
    if not times:
        finished.require("llm.c")
        raise ItemFailed(f"llm.c printed no step: {finished.last_line()}")
    used = re.search(r"device memory usage: (\d+) MiB", finished.output)
    seconds = statistics.median(times)
    return {"tokens_per_second": tokens / seconds, "step_seconds": seconds, "micro_batch": micro_batch,
            "tokens_per_step": tokens, "driver_bytes": int(used.group(1)) << 20 if used else None}
