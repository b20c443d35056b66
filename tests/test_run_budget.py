"""test_run_budget.py: --memory-budget: what is chosen fits, is the most that fits, and is what a run then takes; what
to do when nothing fits; and `plan` for devices and models that are not here."""
import json
import os
import random
import re

import pytest
from program import TINY, call, fail, metrics, succeed

CHOSEN = ("micro_batch", "recompute", "head_chunk", "gradient_blocks", "offload")
TINY_RUN = [*TINY[:4], *TINY[6:], "--eval-every", 0]  # without the micro-batch
NO_GPU = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}


def plan(*flags, **options):
    return json.loads(succeed("plan", "--json", "--device", "cpu", *flags, **options))


def as_flags(settings):
    return [part for name in CHOSEN for part in ("--" + name.replace("_", "-"), settings[name])]


def set_aside():
    """What this program takes beside its plan; differs from call to call by some pages."""
    return plan("--model", "tiny", "--memory-budget", "1GiB")["budget"]["set_aside"]


def larger_micro_batch(settings, seq_len, tokens_per_step):
    """The next candidate above the chosen one, or None at the end."""
    size = settings["micro_batch"]
    if tokens_per_step == 0:
        return 2 * size if size < 4 else None
    sequences = tokens_per_step // seq_len
    return next((n for n in range(size + 1, sequences + 1) if sequences % n == 0), None)


@pytest.mark.parametrize("seed", range(20))
def test_what_is_chosen_fits_and_a_larger_micro_batch_does_not(data, seed):
    choose = random.Random(seed)
    seq_len = choose.choice([16, 32, 96])
    tokens = choose.choice([0, 0, 6 * seq_len, 8 * seq_len])
    flags = ["--model", choose.choice(["tiny", "mini"]), "--data", data / "text_train_*.bin", "--seq-len", seq_len,
             "--threads", 1, *choose.choice([["--rank", 16], ["--rank", 8, "--state-dtype", "int8"],
                                             ["--optimizer", "adamw"], ["--optimizer", "adafactor"],
                                             ["--rank", 16, "--weight-dtype", "int8"]])]
    if tokens:
        flags += ["--tokens-per-step", tokens]
    usual = plan(*flags, "--micro-batch", 2)["device_bytes"]
    chosen, share = None, choose.uniform(0.5, 1.3)
    while chosen is None:
        budget = set_aside() + int(usual * share)
        result = call("plan", "--json", "--device", "cpu", *flags, "--memory-budget", budget)
        if result.returncode == 0:
            chosen = json.loads(result.stdout)
        else:
            assert "the smallest setting needs" in result.stderr
            share *= 1.1
    limit, settings = chosen["budget"]["for_plan"], chosen["settings"]
    assert limit + chosen["budget"]["set_aside"] == budget
    assert chosen["device_bytes"] == chosen["budget"]["chosen"]["device_bytes"] <= limit
    assert plan(*flags, *as_flags(settings))["device_bytes"] == chosen["device_bytes"]
    larger = larger_micro_batch(settings, seq_len, tokens)
    if larger:
        other = {**settings, "micro_batch": larger}
        assert plan(*flags, *as_flags(other))["device_bytes"] > limit


def test_every_budget_makes_it_smaller(data):
    """From plenty to too little, device bytes fall, and something is given up for it."""
    flags = ["--model", "mini", "--threads", 1, "--rank", 32]
    base, seen = set_aside(), []
    for share in (2.0, 1.0, 0.8, 0.7, 0.6):
        result = call("plan", "--json", "--device", "cpu", *flags, "--memory-budget", base + int(2.5e8 * share))
        if result.returncode == 0:
            seen.append(json.loads(result.stdout))
    sizes = [result["device_bytes"] for result in seen]
    assert len(sizes) >= 3 and sizes == sorted(sizes, reverse=True)
    assert len({json.dumps(result["settings"]) for result in seen}) >= 2


@pytest.mark.parametrize("share, flags", [
    (3.0, []), (1.0, ["--tokens-per-step", 256]), (0.8, ["--optimizer", "adamw", "--gradients", "fused"]),
])
def test_a_run_takes_what_was_chosen(data, tmp_path, share, flags):
    flags = [*TINY_RUN, "--rank", 16, "--data", data / "text_train_*.bin", *flags]
    if "adamw" in flags:
        del flags[flags.index("--rank"):flags.index("--rank") + 2]
    usual = plan(*flags, "--micro-batch", 4)["device_bytes"]
    budget = 3 * set_aside() + int(usual * share)  # a process that trains has touched more of itself
    output = succeed(*flags, "--device", "cpu", "--steps", 2, "--out", tmp_path / "run", "--memory-budget", budget)
    header, steps = metrics(tmp_path / "run")
    options = header["options"]
    planned = plan(*flags, *as_flags(options))["device_bytes"]
    assert all(step["device_bytes"] == planned for step in steps)
    assert planned <= budget
    for line in ("budget ", "chosen ", "runner-up "):
        assert line in output
    assert f"chosen      --micro-batch {options['micro_batch']} --recompute {options['recompute']}" in output
    assert re.search(r"chosen .* predicted [0-9.e+-]+ ms per step, [0-9.e+-]+ tokens/s", output)


def test_auto_takes_what_is_there_and_given_flags_stay(data, tmp_path):
    output = succeed(*TINY_RUN, "--rank", 16, "--data", data / "text_train_*.bin", "--steps", 1, "--out",
                     tmp_path / "run", "--memory-budget", "auto", "--recompute", "norms+gelu", "--head-chunk", 24)
    options = metrics(tmp_path / "run")[0]["options"]
    assert options["recompute"] == "norms+gelu" and options["head_chunk"] == 24
    assert options["micro_batch"] >= 4 and options["offload"] == "none" and options["tokens_per_step"] >= 128
    assert "auto" in output


def test_a_resumed_run_repeats_or_chooses_only_what_it_may(data, tmp_path):
    run = tmp_path / "run"
    succeed(*TINY_RUN, "--rank", 16, "--data", data / "text_train_*.bin", "--steps", 2, "--out", run,
            "--micro-batch", 2, "--recompute", "block", "--memory-budget", "1GiB", "--head-chunk", 64,
            "--gradient-blocks", "embedding")
    kept = ["micro_batch", "head_chunk", "gradient_blocks", "recompute", "offload"]
    first = {key: metrics(run)[0]["options"][key] for key in kept}
    assert "budget " not in succeed("--resume", run, "--steps", 3)
    assert {key: metrics(run)[0]["options"][key] for key in kept} == first
    output = succeed("--resume", run, "--steps", 4, "--memory-budget", "1GiB")
    # There is room to recompute nothing, which changes no number.
    assert "chosen      --micro-batch 2 --recompute none --head-chunk 64 --gradient-blocks embedding" in output


def test_recompute_chosen_on_resume_changes_no_bit(data, tmp_path):
    """A resumed run with a budget ends with the weights of one without."""
    flags = [*TINY_RUN, "--rank", 16, "--data", data / "text_train_*.bin", "--micro-batch", 2, "--steps", 4]
    first = tmp_path / "first"
    succeed(*flags, "--checkpoint-every", 2, "--keep-checkpoints", 0, "--recompute", "block", "--out", first)
    succeed("--resume", first / "step_00000002", "--out", tmp_path / "again", "--memory-budget", "1GiB")
    last = "step_00000004/model.safetensors"
    assert (first / last).read_bytes() == (tmp_path / "again" / last).read_bytes()
    assert metrics(tmp_path / "again")[0]["options"]["recompute"] == "none"


@pytest.mark.parametrize("flags", [
    ["--micro-batch", 4, "--recompute", "none", "--rank", 16, "--offload", "none"],
    ["--optimizer", "adamw", "--dtype", "fp32", "--offload", "none", "--gradient-blocks", "whole"],
    ["--optimizer", "adamw", "--tokens-per-step", 256, "--offload", "none"],
])
def test_too_small_a_budget_names_flags_that_work(data, flags):
    flags = ["--device", "cpu", "--model", "mini", "--seq-len", 32, "--data", data / "text_train_*.bin", *flags]
    loose = json.loads(succeed("plan", "--json", *flags, "--memory-budget", "2GiB"))
    # As if every setting that is free took the least: below that, flags that were given have to go.
    smallest = re.search(r"the smallest setting needs (\d+)",
                         fail("plan", *flags, "--memory-budget", loose["budget"]["set_aside"] + 3_000_000, code=1))
    budget = loose["budget"]["set_aside"] + int(int(smallest.group(1)) * 0.9)
    message = fail("plan", *flags, "--memory-budget", budget, code=1)
    limit, needed, missing = map(int, re.search(
        r"leaves (\d+) bytes for the plan; the smallest setting needs (\d+), (\d+) bytes more", message).groups())
    assert needed == int(smallest.group(1)) and missing == needed - limit
    advice = message[message.index("; with") + len("; with"):message.index(" it needs")].split()
    assert json.loads(succeed("plan", "--json", *flags, *advice))["device_bytes"] <= limit


def test_a_budget_for_nothing(data):
    message = fail("plan", "--device", "cpu", "--model", "d12", "--memory-budget", set_aside() + 10_000_000, code=1)
    assert "a smaller --model is needed" in message
    message = fail("plan", "--device", "cpu", "--model", "tiny", "--memory-budget", 10, code=1)
    assert "the runtime alone takes" in message


@pytest.mark.parametrize("budget", ["0", "12XB", "-3GiB", "much", "1e40", ""])
def test_an_amount_that_is_none(data, budget):
    message = fail("plan", "--model", "tiny", f"--memory-budget={budget}", code=2)
    assert "--memory-budget" in message and (budget == "" or "GiB" in message)


def test_blocks_of_gradients_need_one_micro_batch(data):
    flags = ["--device", "cpu", "--model", "tiny", "--seq-len", 32, "--gradient-blocks", "all"]
    message = fail("plan", *flags, "--micro-batch", 2, "--tokens-per-step", 128, code=2)
    assert "--gradient-blocks all" in message and "one micro-batch" in message
    assert "--gradients dense" in fail("plan", *flags, "--gradients", "dense", code=2)
    # The planner takes the one micro-batch with which it works.
    chosen = plan(*flags[2:], "--tokens-per-step", 128, "--memory-budget", "1GiB")
    assert chosen["settings"]["micro_batch"] == 4


def test_master_weights_contradict_8_bit_weights(data):
    message = fail("plan", "--weight-dtype", "int8", "--master-weights", "fp32", code=2)
    assert "--master-weights fp32" in message and "int8" in message


def test_a_plan_for_a_gpu_that_is_not_here(data):
    flags = ["plan", "--device", "cuda", "--model", "d12", "--micro-batch", 1]
    text = succeed(*flags, env=NO_GPU)
    assert "no GPU is used" in text.splitlines()[0]
    result = call(*flags, "--json", env=NO_GPU)
    assert result.returncode == 0 and result.stderr.startswith("no GPU is used")
    planned = json.loads(result.stdout)
    assert planned["settings"]["seq_len"] == 1024 and planned["categories"]["weights"] == 2 * 124475904
    budget = call(*flags[:-2], "--json", "--memory-budget", "3GiB", env=NO_GPU)
    chosen = json.loads(budget.stdout)
    assert chosen["device_bytes"] + chosen["budget"]["set_aside"] <= 3 << 30
    assert "predicted_ms" not in chosen["budget"]["chosen"]
    assert "a device that is not here" in fail(*flags, "--memory-budget", "auto", code=2, env=NO_GPU)


def test_updates_run_beside_the_backward_pass_where_there_is_room():
    """Their second buffers are in what was chosen, and never at the price of a setting."""
    def chosen(budget, *flags):
        result = call("plan", "--json", "--device", "cuda", "--model", "d12", "--memory-budget", budget, *flags, env=NO_GPU)
        planned = json.loads(result.stdout)
        assert planned["budget"]["chosen"]["device_bytes"] == planned["device_bytes"]
        return planned

    beside, in_turn = chosen("8GiB"), chosen("8GiB", "--no-update-overlap")
    second = {a["name"]: a["bytes"] for a in beside["allocations"] if a["name"] not in
              {b["name"] for b in in_turn["allocations"]}}
    assert set(second) == {"gradient.second_matrix", "gradient.second_vectors", "backend.update_workspace"}
    assert second["gradient.second_matrix"] == 4 * 768 * 768 * 2
    assert in_turn["device_bytes"] < beside["device_bytes"] <= in_turn["device_bytes"] + sum(second.values()) + 1024
    tight = chosen(in_turn["budget"]["set_aside"] + in_turn["device_bytes"])
    assert tight["device_bytes"] == in_turn["device_bytes"]
    assert beside["settings"] == in_turn["settings"] == tight["settings"]
    flags = beside["budget"]["chosen"]["flags"]
    assert "overlap" not in flags and tight["budget"]["chosen"]["flags"] == flags + " --no-update-overlap"


@pytest.mark.parametrize("shapes", [
    ["--device", "cuda", "--model", "gpt3:c4096", "--micro-batch", 1, "--seq-len", 1024],
    ["--device", "cpu", "--model", "mini", "--micro-batch", 2, "--seq-len", 96, "--threads", 2, "--head-chunk", 48],
])
def test_each_technique_saves_and_its_flags_give_its_bytes(data, shapes):
    def planned(*flags):
        return json.loads(call("plan", "--json", *shapes, *flags, env=NO_GPU).stdout)

    rank = 256 if "cuda" in shapes else 16
    rows = planned("--rank", rank, "--layers-in-flight", 3, "--offload", "state")["techniques"]
    assert [row["name"] for row in rows] == [
        "AdamW: bf16 weights, fp32 master weights and states", "+ activation checkpointing", "+ fused backward",
        "+ bf16 momentum, no master weights", f"+ Flora, rank {rank}", "+ the embedding's gradient in blocks",
        "+ 8-bit weights and states", "+ weights, states and activations streamed"]
    sizes = [row["device_bytes"] for row in rows]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == len(sizes)
    flags = ""
    for row in rows:
        flags = f"{flags} {row['adds']}".strip()
        assert row["flags"] == flags
        typed = planned(*flags.split())
        assert all(typed[key] == row[key] for key in ("device_bytes", "host_bytes", "categories")), row["name"]
    assert "--layers-in-flight 3" in flags
    assert rows[-1]["host_bytes"] > rows[0]["host_bytes"]
    # What the run itself would be changes no row.
    other = planned("--optimizer", "adamw", "--dtype", "fp32", "--tokens-per-step", 96 * 1024)["techniques"]
    assert [row["device_bytes"] for row in other[:4]] == sizes[:4]


@pytest.mark.parametrize("budget, parameters", [("24GiB", 10.5e9), ("80GiB", 38e9)])
def test_the_largest_models(data, tmp_path, budget, parameters):
    result = call("plan", "--device", "cuda", "--json", "--memory-budget", budget, env=NO_GPU)
    largest = json.loads(result.stdout)["largest"]
    assert largest["preset"]["parameters"] <= largest["streamed_preset"]["parameters"]
    best = max(largest["widths"], key=lambda model: model["parameters"])
    assert best["parameters"] >= parameters
    limit = (int(budget[:2]) << 30) - (896 << 20)
    assert best["device_bytes"] <= limit
    (tmp_path / "config.json").write_text(json.dumps(best["config"]))
    command = ["plan", "--json", *best["flags"].split()]
    planned = json.loads(call(*command, cwd=tmp_path, env=NO_GPU).stdout)
    assert planned["device_bytes"] == best["device_bytes"]
    deeper = {**best["config"], "n_layer": best["config"]["n_layer"] + 1}
    (tmp_path / "config.json").write_text(json.dumps(deeper))
    assert json.loads(call(*command, cwd=tmp_path, env=NO_GPU).stdout)["device_bytes"] > limit
