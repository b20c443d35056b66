"""test_run_shard.py: --shard weights changes not a bit of a run of several ranks, nor of its checkpoints, which go on with
and without it; what cannot be meant is refused; and a plan knows the ranks."""
import json

import pytest
from program import fail, losses, metrics, same_state, succeed

SHARED = ["--tokens-per-step", 768, "--rank", 8, "--kappa", 3, "--recompute", "block"]
WAYS = {
    "flora": [],
    "adamw": ["--optimizer", "adamw", "--gradients", "dense"],
    "adamw-bf16-masters": ["--optimizer", "adamw", "--dtype", "bf16", "--master-weights", "fp32"],
    "sgd-int8-momentum": ["--optimizer", "sgd", "--beta1", 0.9, "--state-dtype", "int8", "--gradients", "fused"],
    "flora-int8": ["--weight-dtype", "int8", "--state-dtype", "int8", "--offload", "activations"],
}


def flags_of(way):
    return SHARED[:2] + SHARED[6:] + WAYS[way] if "--optimizer" in WAYS[way] else SHARED + WAYS[way]


@pytest.mark.parametrize("ranks", (2, 3))
@pytest.mark.parametrize("way", WAYS)
def test_no_bit_changes(train, data, way, ranks):
    """With evaluations and samples on the way, and checkpoints that rank 0 writes of what all keep: 7 micro-batches of
    validation leave a rank without one at the end."""
    flags = [*flags_of(way), "--devices", ranks, "--val-data", data / "text_val_*.bin", "--eval-every", 2,
             "--eval-batches", 7, "--sample-every", 3, "--sample-tokens", 5, "--check-ranks", 2]
    whole, spread = train("whole", *flags, steps=4), train("spread", *flags, "--shard", "weights", steps=4)
    assert losses(spread) == losses(whole)
    assert same_state(spread, whole)
    assert [m.get("val_loss") for m in metrics(spread)[1]] == [m.get("val_loss") for m in metrics(whole)[1]]


def test_a_checkpoint_goes_on_with_and_without(train, tmp_path):
    whole = train("whole", *SHARED, "--devices", 2, steps=6)
    half = train("half", *SHARED, "--devices", 2, "--shard", "weights", "--checkpoint-every", 3, "--keep-checkpoints", 0,
                 steps=6)
    for name, flags in {"with": [], "without": ["--shard", "none"]}.items():
        succeed("--resume", half / "step_00000003", "--out", tmp_path / name, "--devices", 2, *flags)
        assert same_state(tmp_path / name, whole)
    succeed("--resume", half / "step_00000003", "--out", tmp_path / "alone")
    assert losses(tmp_path / "alone") == pytest.approx(losses(whole), rel=1e-5)


def test_a_budget_that_only_the_ranks_together_meet(train, data):
    """The planner spreads the weights where nothing else fits, and is chosen by all ranks alike."""
    model = ["--device", "cuda", "--model", "gpt2:d36", "--devices", 8, "--tokens-per-step", 8192, "--seq-len", 1024]

    def planned(*flags):
        return json.loads(succeed("plan", "--json", *model, *flags))

    limit = planned("--memory-budget", "2GiB", "--offload", "none")
    assert limit["settings"]["shard"] == "weights" and limit["settings"]["ranks"] == 8
    assert limit["device_bytes"] <= limit["budget"]["for_plan"]
    assert planned("--memory-budget", "24GiB")["settings"]["shard"] == "none"
    assert fail("plan", *model, "--memory-budget", "2GiB", "--offload", "none", "--shard", "none", code=1)


def test_what_several_devices_train_is_planned():
    """More devices train a larger model, and its plan is the one that a run of it would have."""
    largest = {}
    for devices in (1, 8):
        plan = json.loads(succeed("plan", "--json", "--device", "cuda", "--devices", devices, "--memory-budget",
                                  "24GiB"))
        largest[devices] = max((row for row in plan["largest"]["widths"]), key=lambda row: row["parameters"])
        again = [word for word in largest[devices]["flags"].split() if word != "config.json"]
        assert ("--shard" in again) == (devices > 1)
    assert largest[8]["parameters"] > 4 * largest[1]["parameters"]


def test_what_cannot_be_is_fail(data, tmp_path):
    out = ["--data", data / "text_train_*.bin", "--out", tmp_path / "run"]
    assert "--devices 2" in fail(*out, "--shard", "weights", code=2)
    assert "--offload activations" in fail(*out, "--devices", 2, "--shard", "weights", "--offload", "weights", code=2)


def test_ranks_choose_the_same_within_a_budget(train):
    """By what the first of them measures; three would otherwise wait for each other."""
    run = train("run", *SHARED[:2], "--rank", 8, "--devices", 3, "--memory-budget", "500MB", steps=2)
    options = metrics(run)[0]["options"]
    assert 768 % (3 * 32 * options["micro_batch"]) == 0 and options["shard"] in ("none", "weights")
