"""test_run_cuda.py: the program on the CUDA backend, through its flags, as a user runs it: what must not change a bit,
resuming, and the errors only a GPU has.

tests/run.py runs these with the program linked against tests/cuda_on_cpu (which simulates what a machine can lack
through environment variables) and, in the suite gpu, with ./train_gpt2 on a GPU.
"""
import json
import os
import signal
import socket
import subprocess

import pytest
from program import (PROGRAM, TINY, call, fail, language, losses, metrics, same_state, steps_saved, succeed,
                     write_shard)

pytestmark = pytest.mark.cuda

on_shim = pytest.mark.skipif("cuda_on_cpu" not in str(PROGRAM), reason="simulated by tests/cuda_on_cpu only")

RUNS = {
    "flora-bf16": ["--rank", 16],
    "flora-fp32": ["--rank", 16, "--dtype", "fp32"],
    "flora-kappa": ["--rank", 16, "--kappa", 4, "--projection", "gaussian", "--transfer", "rescale"],
    "flora-residual": ["--rank", 16, "--kappa", 4, "--projection", "cosine", "--residual"],
    "flora-compressed": ["--rank", 16, "--gradients", "compressed", "--tokens-per-step", 128],
    "adamw-int8": ["--optimizer", "adamw", "--state-dtype", "int8"],
    "adamw-master": ["--optimizer", "adamw", "--master-weights", "fp32"],
    "adafactor": ["--optimizer", "adafactor"],
    "flora-8-bit-offload": ["--rank", 16, "--weight-dtype", "int8", "--state-dtype", "int8", "--recompute", "block",
                            "--offload", "weights,activations", "--gradient-blocks", "all"],
    "sgd-clipped": ["--optimizer", "sgd", "--beta1", 0.9, "--gradients", "fused", "--clip-norm", 1],
}


@pytest.fixture
def model(tmp_path):
    """A model with heads of 64, so that attention in bf16 runs on tensor cores."""
    path = tmp_path / "model.json"
    path.write_text(json.dumps({"vocab_size": 257, "n_positions": 64, "n_embd": 128, "n_layer": 2, "n_head": 2}))
    return ["--model", path, "--device", "cuda", "--no-autotune", "--no-self-check"]


def with_environment(**variables):
    return {**os.environ, **{name: str(value) for name, value in variables.items()}}


def test_the_banner_names_the_gpu(data, tmp_path):
    text = succeed("--data", data / "text_train_*.bin", *TINY, "--steps", 1, "--out", tmp_path / "run")
    (device,) = [line for line in text.splitlines() if line.startswith("device")]
    assert "sm_" in device and "CUDA" in device and "(auto: a GPU is there)" in device
    header, _ = metrics(tmp_path / "run")
    assert header["options"]["dtype"] == "bf16"  # the default on a GPU


@pytest.mark.parametrize("name", RUNS)
def test_two_runs_agree(train, model, name):
    a = train("a", *model, *RUNS[name], steps=6)
    b = train("b", *model, *RUNS[name], "--no-cuda-graph", "--no-update-overlap", steps=6)
    assert same_state(a, b) and losses(a) == losses(b)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("optimizer", ["flora", "adamw"])
def test_fused_is_dense(train, model, optimizer, dtype):
    rank = ["--rank", 16] if optimizer == "flora" else []
    flags = [*model, "--optimizer", optimizer, *rank, "--dtype", dtype, "--clip-norm", 0]
    dense = train("dense", *flags, "--gradients", "dense", steps=4)
    fused = train("fused", *flags, "--gradients", "fused", steps=4)
    assert same_state(dense, fused) and losses(dense) == losses(fused)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_recompute_levels_agree(train, model, dtype):
    flags = [*model, "--rank", 16, "--dtype", dtype, "--tokens-per-step", 128]
    reference = train("none", *flags, steps=3)
    for level in ("gelu", "norms+gelu", "attention", "block"):
        assert same_state(reference, train(level, *flags, "--recompute", level, steps=3)), level


@pytest.mark.parametrize("name", RUNS)
def test_an_interrupted_run_goes_on_exactly(train, model, tmp_path, name):
    flags = [*model, *RUNS[name], "--checkpoint-every", 4, "--keep-checkpoints", 0]
    whole = train("whole", *flags, steps=8)
    assert steps_saved(whole) == [4, 8]
    succeed("--resume", whole / "step_00000004", "--out", tmp_path / "rest")
    assert same_state(whole, tmp_path / "rest")
    assert losses(whole) == losses(tmp_path / "rest")


def test_a_resume_with_nothing_to_do_says_so(train, model):
    run = train("run", *model, *RUNS["flora-8-bit-offload"], steps=2)
    assert "nothing to do" in succeed("--resume", run)


def test_a_signal_leaves_a_checkpoint(data, model, tmp_path):
    command = [PROGRAM, "--data", data / "text_train_*.bin", *TINY[2:], *model, "--rank", 16, "--steps", 2000,
               "--eval-every", 0, "--out", tmp_path / "run"]
    process = subprocess.Popen([str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True)
    for line in process.stdout:
        if line.startswith("step 3/"):
            break
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 130 and "finishing step" in errors and "interrupted" in output
    assert len(steps_saved(tmp_path / "run")) == 1


def test_autotuning_is_remembered(train, model, tmp_path):
    """The algorithms chosen are part of the checkpoint, so that a resumed run gives the same bits. Products that come
    later, here those of a change of projection, are not measured in either run."""
    tuned = [flag for flag in model if flag != "--no-autotune"]
    whole = train("whole", *tuned, "--rank", 16, "--kappa", 5, "--checkpoint-every", 4, "--keep-checkpoints", 0,
                  steps=8)

    def tuning(run):
        return json.loads((run / "trainer_state.json").read_text())["tuning"]

    assert tuning(whole / "step_00000004")
    text = succeed("--resume", whole / "step_00000004", "--out", tmp_path / "rest")
    assert "chosen anew" not in text
    assert tuning(tmp_path / "rest/latest") == tuning(whole / "latest")
    assert same_state(whole, tmp_path / "rest")


@on_shim
def test_another_gpu_chooses_anew_and_says_so(train, model, tmp_path):
    tuned = [flag for flag in model if flag != "--no-autotune"]
    run = train("run", *tuned, "--rank", 16, "--checkpoint-every", 2, "--keep-checkpoints", 0, steps=3)
    text = succeed("--resume", run / "step_00000002", "--out", tmp_path / "rest",
                   env=with_environment(CUDA_ON_CPU_ARCH=80))
    assert "chosen anew" in text


def test_the_losses_are_those_of_the_cpu(train, model):
    flags = [*model, "--rank", 16, "--dtype", "fp32"]
    cuda, cpu = losses(train("cuda", *flags)), losses(train("cpu", *flags, "--device", "cpu"))
    assert cuda == pytest.approx(cpu, rel=1e-4)


def test_evaluation_samples_and_profile(data, model, tmp_path):
    text = succeed("--data", data / "text_train_*.bin", *TINY[2:], *model, "--rank", 16, "--steps", 3, "--eval-every",
                   1, "--eval-batches", 1, "--sample-every", 2, "--sample-tokens", 4, "--profile", "--out",
                   tmp_path / "run")
    assert text.count("validation loss") == 3 and "---- sample at step 2" in text
    for operation in ("attention_forward", "matmul", "apply_update", "classifier"):
        assert operation in text
    out = succeed("eval", "--model", tmp_path / "run/latest", "--val-data", data / "text_val_*.bin", "--micro-batch", 2,
                  "--seq-len", 32, "--eval-batches", 2, "--device", "cuda")
    assert out.startswith("validation loss")
    succeed("generate", "--model", tmp_path / "run/latest", "--prompt", "a", "--sample-tokens", 3, "--device", "cuda")


@pytest.mark.parametrize("offload", ["activations", "state", "weights,activations"])
def test_offload_changes_no_bit(train, model, offload):
    resident = train("resident", *model, "--rank", 16, "--recompute", "block", steps=6)
    streamed = train("streamed", *model, "--rank", 16, "--recompute", "block", "--offload", offload, steps=6)
    assert same_state(resident, streamed) and losses(resident) == losses(streamed)


@on_shim
def test_pinned_memory_that_is_refused_is_said_and_changes_no_bit(data, model, tmp_path):
    def run(name, **variables):
        result = call("--data", data / "text_train_*.bin", *model, *TINY[2:], "--rank", 16, "--offload", "weights",
                      "--steps", 3, "--eval-every", 0, "--out", tmp_path / name, env=with_environment(**variables))
        assert result.returncode == 0, result.stderr
        return result.stderr
    assert run("pinned") == ""
    warning = run("pageable", CUDA_ON_CPU_NO_PINNED=1)
    assert "warning" in warning and "pinned host memory was refused" in warning and "pageable" in warning
    assert same_state(tmp_path / "pinned", tmp_path / "pageable")


@on_shim
def test_a_budget_is_kept(data, model, tmp_path):
    for budget, memory in (("40MiB", 192 << 20), ("auto", 38 << 20)):
        out = tmp_path / budget
        text = succeed("--data", data / "text_train_*.bin", *model, "--seq-len", 32, "--peak-tflops", 0.2, "--rank", 16,
                       "--steps", 2, "--eval-every", 0, "--memory-budget", budget, "--out", out,
                       env=with_environment(CUDA_ON_CPU_MEMORY=memory))
        assert "chosen " in text and "runner-up " in text
        assert ("predicted" in text) == (budget != "auto")  # 38 MiB are too little to measure in
        (line,) = [line for line in text.splitlines() if line.startswith("budget")]
        _, steps = metrics(out)
        assert 0 < steps[0]["device_bytes"] <= min(memory, 40 << 20), line


def test_plan_is_what_is_allocated(train, model):
    run = train("run", *model, "--rank", 16, steps=1)
    plan = json.loads(succeed("--plan", "--json", *model, "--rank", 16, *TINY[2:], "--steps", 1))
    _, steps = metrics(run)
    assert steps[0]["device_bytes"] == plan["device_bytes"]


def refused(data, tmp_path, *flags, code, **variables):
    return fail("--data", data / "text_train_*.bin", *TINY, "--steps", 5, "--eval-every", 0, "--out", tmp_path / "run",
                *flags, code=code, env=with_environment(**variables))


@pytest.mark.parametrize("width, heads, demand", [(100, 2, "a multiple of 8"), (16392, 8, "at most 16384"),
                                                   (1024, 2, "at most 256")])
def test_a_model_that_only_the_cpu_computes(data, tmp_path, width, heads, demand):
    path = tmp_path / "model.json"
    path.write_text(json.dumps({"vocab_size": 257, "n_positions": 32, "n_embd": width, "n_layer": 1, "n_head": heads}))
    for flags in (["--device", "cuda"], ["--device", "cuda", "--plan"]):
        message = refused(data, tmp_path, *flags, "--model", path, code=2)
        assert demand in message and "--device cpu" in message
    if width == 100:
        succeed("--data", data / "text_train_*.bin", *TINY, "--model", path, "--steps", 1, "--device", "cpu", "--out",
                tmp_path / "run")


@on_shim
def test_each_rank_has_a_gpu_of_its_own(data, tmp_path):
    run = ["--device", "cuda", "--data", data / "text_train_*.bin", *TINY, "--dtype", "fp32", "--rank", 8, "--eval-every", 0,
           "--tokens-per-step", 128, "--steps", 3, "--no-autotune"]
    succeed(*run, "--devices", 2, "--out", tmp_path / "two", env=with_environment(CUDA_ON_CPU_DEVICES=2))
    succeed(*run, "--out", tmp_path / "one")
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    message = fail(*run, "--devices", 3, "--out", tmp_path / "three", code=2, env=with_environment(CUDA_ON_CPU_DEVICES=2))
    assert message == "train_gpt2: --devices 3: this machine has 2 GPUs; --device cpu takes any number"
    # A launcher that starts more processes than there are GPUs.
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = [subprocess.Popen([str(part) for part in (PROGRAM, *run, "--out", tmp_path / "shared", "--rendezvous-port", port)],
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                              env=with_environment(RANK=rank, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1"))
             for rank in (0, 1)]
    for rank in ranks:
        _, errors = rank.communicate(timeout=120)
        assert rank.returncode == 2 and "ranks 0 and 1 have one GPU" in errors
    assert not (tmp_path / "shared").exists()


@on_shim
def test_no_gpu(data, tmp_path):
    message = refused(data, tmp_path, "--device", "cuda", code=2, CUDA_ON_CPU_DEVICES=0)
    assert "no NVIDIA GPU was found" in message and "--device cpu" in message
    text = succeed("--data", data / "text_train_*.bin", *TINY, "--steps", 1, "--out", tmp_path / "run",
                   env=with_environment(CUDA_ON_CPU_DEVICES=0))
    assert "auto: no NVIDIA GPU was found" in text


@on_shim
def test_a_driver_that_is_too_old(data, tmp_path):
    message = refused(data, tmp_path, "--device", "cuda", code=2, CUDA_ON_CPU_DRIVER_TOO_OLD=1)
    assert "the NVIDIA driver supports CUDA 11.4 and is too old" in message and "update the driver" in message


@on_shim
def test_a_gpu_that_is_too_old(data, tmp_path):
    message = refused(data, tmp_path, "--device", "cuda", code=2, CUDA_ON_CPU_ARCH=75)
    assert "sm_75" in message and "sm_80" in message


@on_shim
def test_too_little_memory(data, tmp_path):
    memory = 40 << 20
    message = refused(data, tmp_path, "--device", "cuda", "--optimizer", "adamw", "--micro-batch", 64, code=1,
                      CUDA_ON_CPU_MEMORY=memory)
    assert "the plan is" in message and "are free" in message and "it needs" in message
    flags = message[message.index("; with") + len("; with"):message.index(" it needs")].split()
    succeed("--data", data / "text_train_*.bin", *TINY, "--steps", 1, "--out", tmp_path / "run", "--device", "cuda",
            "--optimizer", "adamw", "--micro-batch", 64, *flags, env=with_environment(CUDA_ON_CPU_MEMORY=memory))


@on_shim
def test_too_little_host_memory(data, tmp_path):
    """Known before the start: nothing is allocated."""
    message = refused(data, tmp_path, "--device", "cuda", "--model", "gpt3:c12288", "--micro-batch", 1, "--recompute",
                      "block", "--offload", "weights,activations", code=1, CUDA_ON_CPU_MEMORY=64 << 30)
    assert message.startswith("train_gpt2: out of host memory: the plan takes 3") and "are free" in message


@on_shim
def test_no_memory_at_all(data, tmp_path):
    message = refused(data, tmp_path, "--device", "cuda", code=1, CUDA_ON_CPU_MEMORY=1 << 20)
    assert "a smaller --model is needed" in message


@on_shim
@pytest.mark.parametrize("blocking, offload", [(False, "none"), (True, "none"), (False, "activations,state,weights")])
def test_an_error_in_the_middle_of_a_step(data, tmp_path, blocking, offload):
    flags = ["--device", "cuda", "--checkpoint-every", 2, "--no-cuda-graph", "--no-autotune", "--no-self-check",
             "--rank", 16, "--offload", offload]
    variables = {"CUDA_ON_CPU_FAIL_LAUNCH": "GeluGradient:9"}  # twice a step
    if blocking:
        variables["CUDA_LAUNCH_BLOCKING"] = "1"
    message = refused(data, tmp_path, *flags, code=1, **variables)
    assert "step 5: " in message and "illegal memory access" in message
    assert f"last checkpoint: {tmp_path / 'run'}/step_00000004" in message
    if blocking:
        assert "in kernel gelu_backward; " in message
    else:
        assert "CUDA_LAUNCH_BLOCKING=1" in message


@on_shim
def test_a_matmul_without_an_algorithm(data, tmp_path):
    message = refused(data, tmp_path, "--device", "cuda", "--rank", 16, code=1, FAKE_CUBLASLT_NO_ALGORITHM=1)
    assert "cuBLASLt" in message and "no algorithm" in message


@on_shim  # a GPU for each rank is more than most machines have
@pytest.mark.parametrize("ranks", (2, 3))
def test_ranks_train_as_one_process_does(train, model, monkeypatch, ranks):
    """Over the stand-in for NCCL, between processes."""
    monkeypatch.setenv("CUDA_ON_CPU_DEVICES", str(ranks))
    flags = [*model, "--dtype", "fp32", "--rank", 16, "--micro-batch", 1, "--tokens-per-step", 32 * ranks]
    one = train("one", *flags, steps=3)
    several, again = (train(name, *flags, "--devices", ranks, steps=3) for name in ("several", "again"))
    assert losses(several) == pytest.approx(losses(one), rel=1e-5)
    assert same_state(several, again)


@on_shim
@pytest.mark.parametrize("ranks, flags", [
    (2, ["--rank", 16, "--kappa", 2, "--sample-every", 2, "--sample-tokens", 3]),
    (3, ["--optimizer", "adamw", "--dtype", "bf16", "--master-weights", "fp32", "--gradients", "fused"]),
], ids=("flora", "adamw"))
def test_weights_spread_over_ranks_change_no_bit(train, tmp_path, data, monkeypatch, ranks, flags):
    """Four layers, of which two are whole at a time, gathered on a stream of its own."""
    monkeypatch.setenv("CUDA_ON_CPU_DEVICES", str(ranks))
    path = tmp_path / "model.json"
    path.write_text(json.dumps({"vocab_size": 257, "n_positions": 32, "n_embd": 64, "n_layer": 4, "n_head": 1}))
    flags = ["--model", path, "--device", "cuda", "--no-autotune", "--micro-batch", 1, "--devices", ranks, *flags,
             "--val-data", data / "text_val_*.bin", "--eval-every", 2, "--eval-batches", ranks + 1]
    whole, spread = train("whole", *flags, steps=3), train("spread", *flags, "--shard", "weights", steps=3)
    assert losses(spread) == losses(whole) and same_state(spread, whole)
    assert [m.get("val_loss") for m in metrics(spread)[1]] == [m.get("val_loss") for m in metrics(whole)[1]]


@on_shim
def test_an_old_nccl_is_refused_with_the_package(data, tmp_path, model):
    message = fail("--data", data / "text_train_*.bin", *TINY, *model, "--devices", 2, "--steps", 1, "--out", tmp_path / "run",
                   code=1, env=with_environment(CUDA_ON_CPU_NCCL=22703, CUDA_ON_CPU_DEVICES=2))
    assert "NCCL 2.28 or newer, and this one is 2.27" in message and "nvidia-nccl-cu13" in message


# ---- a GPU that computes something wrongly

FAULT = "CUDA_ON_CPU_LOSE_BLOCK"


def checked(tmp_path, *flags, cache="cache", **variables):
    """Two steps on a device that nobody has checked, or that passed what `cache` says, with faults planted in it."""
    out = tmp_path / f"run_{len(list(tmp_path.iterdir()))}"
    return call("--data", tmp_path / "*.bin", *TINY, "--device", "cuda", "--steps", 2, "--eval-every", 0, "--out", out,
                *flags, env=with_environment(XDG_CACHE_HOME=tmp_path / cache, **variables))


def checked_until(text, tmp_path, **variables):
    """A slow machine makes only some checks at each start, which is remembered, but at least one."""
    for _ in range(60):
        result = checked(tmp_path, **variables)
        if text in result.stdout + result.stderr:
            return result
    raise AssertionError(result.stdout + result.stderr)


@pytest.fixture
def shard(tmp_path):
    return write_shard(tmp_path / "text_train_0.bin", language(3000, 1))


@on_shim
def test_a_new_device_is_checked_once(tmp_path, shard):
    first = checked(tmp_path).stdout
    assert first.count("\nchecked ") == 1 and " of this device against their formulas (" in first
    for _ in range(60):
        text = checked(tmp_path).stdout
        if "\nchecked " not in text:
            break
    assert "\nchecked " not in text and "trained 2 steps" in text
    (tmp_path / "cache" / "train_gpt2" / "checked").unlink()
    assert "\nchecked " not in checked(tmp_path, "--no-self-check").stdout


@on_shim
def test_a_wrong_kernel_is_replaced_or_ends_the_run(tmp_path, shard):
    result = checked_until("attention_forward", tmp_path, cache="a", **{FAULT: "attention_forward_mma"})
    (line,) = [line for line in result.stderr.splitlines() if "attention_forward" in line]
    assert "[2,32,128] bf16 2 heads was wrong on this device (largest difference " in line
    assert line.endswith("computed by the plain kernels in this run")
    assert result.returncode == 0 and "trained 2 steps" in result.stdout

    result = checked_until("attention_backward", tmp_path, cache="b", **{FAULT: "attention_delta"})
    assert "attention_backward [2,32,128] bf16 2 heads is computed wrongly on CUDA on CPU" in result.stderr
    assert result.returncode == 1 and "selftest" in result.stderr and len(result.stderr.splitlines()) == 1
    assert checked(tmp_path, "--no-self-check", **{FAULT: "attention_delta"}).returncode == 0


@on_shim
def test_products_without_tensor_cores_are_said_after_the_first_step(tmp_path, shard):
    said = "matrix products that the plain kernel computed, which is slow: "
    assert said not in checked(tmp_path, "--tokens-per-step", 128, "--rank", 16).stdout
    # Found wrong, because a check of a product comes within the first starts.
    text = checked_until(said, tmp_path, cache="a", FAKE_CUBLASLT_WRONG_ALGORITHMS=99).stdout
    lines = [line for line in text.splitlines() if said in line]
    assert len(lines) == 1 and "cuBLASLt's results are wrong" in lines[0]


@on_shim
def test_selftest_finds_a_wrong_kernel(tmp_path):
    flags = ["selftest", "--device", "cuda", "--model", "tiny", "--seq-len", 32, "--micro-batch", 2]
    result = call(*flags, env=with_environment(**{FAULT: "layernorm_backward"}))
    wrong = [line for line in result.stdout.splitlines() if line.endswith("WRONG")]
    assert result.returncode == 1 and wrong and all(line.startswith("layernorm_backward ") for line in wrong)
    assert f", {len(wrong)} wrong" in result.stdout.splitlines()[-1]
