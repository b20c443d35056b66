"""test_run_plan.py: --plan and the subcommand plan: a true account of memory, from the configuration alone."""
import json
import os
import subprocess

import pytest
from program import PROGRAM, TINY, metrics, succeed

CATEGORIES = {"weights", "optimizer state", "gradients", "activations", "workspace"}


def plan(*flags):
    return json.loads(succeed("plan", "--json", *flags))


def check(result):
    """What must hold for every plan."""
    assert set(result) == {"device_bytes", "host_bytes", "categories", "allocations", "settings", "techniques"}
    assert set(result["categories"]) == CATEGORIES
    assert sum(result["categories"].values()) == result["device_bytes"]
    on_device = [a for a in result["allocations"] if not a.get("host")]
    assert max(a["offset"] + a["bytes"] for a in on_device) == result["device_bytes"]
    names = [a["name"] for a in result["allocations"]]
    assert len(set(names)) == len(names)
    for allocation in on_device:
        assert {"name", "category", "bytes", "offset", "phases"} <= set(allocation)
        assert allocation["category"] in CATEGORIES


def alive(allocation):
    phases = allocation["phases"]
    return {"forward", "head", "backward", "update", "sample"} if phases == "always" else set(phases.split("+"))


def test_the_table_and_both_ways_to_ask(data):
    table = succeed("--plan", "--model", "tiny")
    for word in (*CATEGORIES, "total", "wte.weight"):
        assert word in table
    result = plan("--model", "tiny")
    check(result)
    assert json.loads(succeed("--plan", "--json", "--model", "tiny")) == result
    assert str(result["device_bytes"]) in table


def test_samples_of_a_run_are_planned(data, tmp_path):
    """Their keys and values lie where a step has activations, or they are counted as what they add."""
    flags = [*TINY, "--data", data / "text_train_*.bin", "--optimizer", "sgd", "--gradients", "fused", "--head-chunk", 8]
    for more in ([], ["--recompute", "block", "--offload", "activations", "--micro-batch", 1]):
        without, result = plan(*flags, *more), plan(*flags, *more, "--sample-every", 1)
        check(result)
        samples = [a for a in result["allocations"] if a["name"].startswith("sample.")]
        assert {a["phases"] for a in samples} == {"sample"}
        assert not any(a["name"].startswith("sample.") for a in without["allocations"])
        needed = sum(a["bytes"] for a in samples if not a["host"])
        assert without["device_bytes"] <= result["device_bytes"] < without["device_bytes"] + needed
        succeed(*flags, *more, "--steps", 2, "--sample-every", 1, "--sample-tokens", 50, "--out", tmp_path / str(len(more)))
        assert {step["device_bytes"] for step in metrics(tmp_path / str(len(more)))[1]} == {result["device_bytes"]}


@pytest.mark.parametrize("flags", [
    ["--optimizer", "flora", "--rank", 16],
    ["--optimizer", "adamw"],
    ["--optimizer", "flora", "--rank", 16, "--gradients", "compressed", "--tokens-per-step", 256],
    ["--dtype", "bf16", "--state-dtype", "int8", "--recompute", "block"],
    ["--sample-every", 5, "--weight-dtype", "int8", "--recompute", "block", "--offload", "activations,weights"],
])
def test_no_two_allocations_overlap_while_both_are_alive(data, flags):
    result = plan("--model", "tiny", "--seq-len", 32, "--micro-batch", 2, *flags)
    check(result)
    on_device = (a for a in result["allocations"] if a["bytes"] and not a["host"])
    allocations = sorted(on_device, key=lambda a: a["offset"])
    for i, first in enumerate(allocations):
        for second in allocations[i + 1:]:
            if second["offset"] >= first["offset"] + first["bytes"]:
                break
            assert not alive(first) & alive(second), (first, second)


@pytest.mark.parametrize("model", ["d48", "gpt3:c12288"])
def test_the_largest_models_are_planned_at_once(data, model):
    command = f"ulimit -v 1000000; exec '{PROGRAM}' plan --json --model {model} --dtype bf16 --threads 1"
    process = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=60,
                             env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert process.returncode == 0, f"in 1 GB of address space, much less than is planned: {process.stderr}"
    result = json.loads(process.stdout)
    assert result["device_bytes"] > 4e9
    check(result)
    # Weights in bf16, the embedding's rows padded to 50304.
    layers, channels, positions = {"d48": (48, 1600, 1024), "gpt3:c12288": (96, 12288, 2048)}[model]
    parameters = layers * (12 * channels**2 + 13 * channels) + (50304 + positions + 2) * channels
    assert result["categories"]["weights"] == 2 * parameters


@pytest.mark.parametrize("flags", [
    ["--rank", 16],
    ["--optimizer", "adamw", "--dtype", "bf16", "--master-weights", "fp32"],
    ["--optimizer", "adafactor", "--tokens-per-step", 192, "--recompute", "norms+gelu"],
    ["--rank", 16, "--gradients", "compressed", "--state-dtype", "int8", "--tokens-per-step", 128],
    ["--optimizer", "sgd", "--gradients", "fused", "--clip-norm", 1],
])
def test_a_run_takes_what_was_planned(data, tmp_path, flags):
    flags = ["--data", data / "text_train_*.bin", *TINY, *flags]
    planned = plan(*flags)
    check(planned)
    succeed(*flags, "--steps", 2, "--out", tmp_path / "run")
    for line in metrics(tmp_path / "run")[1]:
        assert line["device_bytes"] == planned["device_bytes"]


def test_each_idea_saves_memory(data):
    def bytes_of(*flags):
        return plan("--model", "d12", "--dtype", "bf16", "--micro-batch", 4, *flags)

    adamw = bytes_of("--optimizer", "adamw")
    flora = bytes_of("--optimizer", "flora", "--rank", 64)
    assert flora["categories"]["optimizer state"] < 0.4 * adamw["categories"]["optimizer state"]
    assert flora["categories"]["gradients"] < 0.5 * adamw["categories"]["gradients"]
    activations = [bytes_of("--recompute", level)["categories"]["activations"]
                   for level in ("none", "gelu", "norms+gelu", "attention", "block")]
    assert activations == sorted(activations, reverse=True) and activations[-1] < 0.4 * activations[0]
    accumulate = ["--tokens-per-step", 2 * 4 * 256]
    summed = bytes_of("--gradients", "fused", *accumulate)["categories"]["gradients"]
    projected = bytes_of("--gradients", "compressed", "--rank", 64, *accumulate)["categories"]["gradients"]
    assert projected < 0.8 * summed


def test_planning_writes_nothing(data, tmp_path):
    succeed("plan", "--model", "tiny", cwd=tmp_path)
    assert list(tmp_path.iterdir()) == []
