"""test_run_memory.py: what a CPU run has in memory, as the kernel counts it, is the plan and a constant.

The arena is resident in full. On top of it come the program with its heap (8 MiB of it to write a checkpoint) and what
oneDNN packs operands of products into. None of it depends on the size of the model, whichever instructions oneDNN finds on
the processor: a first run states the constant, and others, of other widths, optimizers and places of the weights, must keep to it. Bytes
on the host count as the device's do: on a CPU both are the process's.
"""
import json
import re
import shutil
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from program import PROGRAM, ROOT, fail, metrics, succeed, write_shard

MIB = 1 << 20
VOCABULARY = 50257
FLAGS = ["--seq-len", 256, "--micro-batch", 2, "--device", "cpu", "--threads", 2, "--peak-tflops", 0.2,
         "--eval-every", 0, "--checkpoint-every", 0, "--log-every", 1]

OFFLOAD = ["--gradients", "fused", "--recompute", "block", "--offload", "weights,activations"]
MASTER = ["--master-weights", "fp32", "--state-dtype", "fp32"]

# dtype: the run that states the constant, then those that must keep to it: (layers, width, flags).
RUNS = {
    "fp32": [(6, 384, ["--optimizer", "adamw"]),
             (5, 1024, ["--optimizer", "flora", "--rank", 64, *OFFLOAD])],
    "bf16": [(6, 384, ["--optimizer", "adamw", *MASTER]),
             (4, 768, ["--optimizer", "adamw", *MASTER])],
}


def skip_where_it_cannot_hold():
    if not PROGRAM.exists():
        pytest.skip("./train_gpt2 is not built (make)")
    libraries = subprocess.run(["ldd", str(PROGRAM)], capture_output=True, text=True).stdout
    if "dnnl" not in libraries:
        pytest.skip("built without oneDNN: its products take too long here")
    available = re.search(r"^MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text(), re.M)
    if not available or int(available[1]) < 3 << 20:
        pytest.skip("less than 3 GiB of memory are available")


def instruction_sets():
    """Values of ONEDNN_MAX_CPU_ISA that this processor can run, one of each kind of product's kernels."""
    words = set(Path("/proc/cpuinfo").read_text().split())
    needs = {"SSE41": "sse4_1", "AVX": "avx", "AVX2": "avx2", "AVX512_CORE": "avx512vl"}
    return [name for name, instructions in needs.items() if instructions in words]


def peak_resident(flags, out, whole):
    """Bytes of the largest resident set of a run of one step, as the kernel counts it for this program alone
    (getrusage() would begin with the size of the process that started it). Unless the run is to be whole, it is ended
    before it writes its checkpoint, which takes longer than the step; a whole one says itself what it was."""
    command = [str(part) for part in [PROGRAM, *flags, "--steps", 1 if whole else 2, "--out", out]]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
    if whole:
        output, _ = process.communicate()
        assert process.returncode == 0, command
        amount, unit = re.search(r"([0-9.]+) (MiB|GiB) resident", output).groups()
        peak = round(float(amount) * (MIB if unit == "MiB" else 1024 * MIB))
    else:
        file = out / "metrics.jsonl"
        while not file.exists() or file.read_text().count("\n") < 2:  # a header, a line per step
            assert process.poll() is None, command
            time.sleep(0.02)
        peak = int(re.search(r"VmHWM:\s*(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())[1]) << 10
        process.kill()
        process.communicate()
    assert [line["step"] for line in metrics(out)[1]][:1] == [1]
    shutil.rmtree(out)
    return peak


@pytest.mark.slow
@pytest.mark.parametrize("dtype", RUNS)
def test_the_resident_set_is_the_plan_and_a_constant(tmp_path, dtype):
    skip_where_it_cannot_hold()
    tokens = np.random.default_rng(1).integers(0, VOCABULARY, 4096)
    shard = write_shard(tmp_path / "random_train_000000.bin", tokens, VOCABULARY)
    constant = None
    for layers, width, flags in RUNS[dtype]:
        config, out = tmp_path / "config.json", tmp_path / "run"
        config.write_text(json.dumps({"vocab_size": VOCABULARY, "n_positions": 256, "n_layer": layers,
                                      "n_head": width // 64, "n_embd": width}))
        flags = ["--model", config, "--dtype", dtype, *flags, *FLAGS, "--data", shard]
        plan = json.loads(succeed("plan", "--json", *flags))
        planned = plan["device_bytes"] + plan["host_bytes"]
        resident = peak_resident(flags, out, whole=constant is None)
        name = f"{dtype}, {layers} x {width}: {planned / MIB:.1f} MiB planned, {resident / MIB:.1f} resident"
        if constant is None:
            constant = resident - planned
            print(f"\n{name}, constant {constant / MIB:.1f}")
            assert 0 < constant < 40 * MIB, name
            continue
        difference = resident - planned - constant
        print(f"{name}, {difference / planned:+.2%} beside the constant")
        assert 0.5 * 1024 * MIB < planned < 1.3 * 1024 * MIB, name
        assert ("--offload" in flags) == (plan["host_bytes"] > 0.1 * planned), name
        assert abs(difference) <= 0.03 * planned, f"{name}, constant {constant / MIB:.1f}"


@pytest.mark.slow
def test_products_keep_to_the_constant_whatever_the_processor(tmp_path, monkeypatch):
    """A narrow model with a large vocabulary: products of 25,000 rows a thread, which a library may pack whole."""
    skip_where_it_cannot_hold()
    tokens = np.random.default_rng(1).integers(0, VOCABULARY, 4096)
    shard = write_shard(tmp_path / "random_train_000000.bin", tokens, VOCABULARY)
    config, out = tmp_path / "config.json", tmp_path / "run"
    config.write_text(json.dumps({"vocab_size": VOCABULARY, "n_positions": 256, "n_layer": 1, "n_head": 3,
                                  "n_embd": 192}))
    flags = ["--model", config, "--optimizer", "sgd", *FLAGS, "--data", shard]
    plan = json.loads(succeed("plan", "--json", *flags))
    names = instruction_sets()
    if not names:
        pytest.skip("no x86-64 processor")
    for name in names:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", name)
        constant = peak_resident(flags, out, whole=False) - plan["device_bytes"]
        print(f"\n{name}: constant {constant / MIB:.1f} MiB")
        assert 0 < constant < 32 * MIB, name


def test_a_run_within_a_budget_stays_inside_to_the_last_byte_resident(tmp_path):
    """The budget is for the whole process: what is set aside for the runtime is enough, checkpoint included."""
    skip_where_it_cannot_hold()
    tokens = np.random.default_rng(1).integers(0, VOCABULARY, 8192)
    shard = write_shard(tmp_path / "random_train_000000.bin", tokens, VOCABULARY)
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"vocab_size": VOCABULARY, "n_positions": 256, "n_layer": 6, "n_head": 6,
                                  "n_embd": 384}))
    flags = ["--model", config, "--device", "cpu", "--threads", 2, "--peak-tflops", 0.2, "--eval-every", 0,
             "--data", shard]
    message = fail(*flags, "--steps", 1, "--out", tmp_path / "run", "--memory-budget", "150MiB", code=1)
    least = 150 * MIB + int(re.search(r"(\d+) bytes more", message)[1]) + 2 * MIB
    for budget in (least, 700 * MIB):
        resident = peak_resident([*flags, "--memory-budget", budget], tmp_path / "run", whole=True)
        print(f"\nbudget {budget / MIB:.1f} MiB, resident {resident / MIB:.1f} MiB")
        assert 0.6 * budget < resident <= budget
