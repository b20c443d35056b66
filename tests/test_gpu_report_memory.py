"""test_gpu_report_memory.py: what the report of a GPU says of runs that save memory (techniques, streaming, budgets,
8-bit learning) when they fail, do not fit or have nothing to be compared with. The runs are made up here;
test_gpu_report.py has those of the dry run."""
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))
from gpu_measurements import learning, machine, render, streaming, techniques, training  # noqa: E402
from gpu_measurements.results import Results, read  # noqa: E402
from gpu_measurements.session import ItemFailed, Session  # noqa: E402
from gpu_measurements.sizes import DRY  # noqa: E402


@pytest.fixture
def session(tmp_path):
    machine_of = {"gpu": "Test GPU", "driver": "1", "memory": "", "nvcc": "13.0", "cpu": "1 x CPU"}
    one = Session(DRY, Results(tmp_path / "out/test.json", machine_of, True), dry_run=True, time_limit=None, data="",
                  llmc="", missing=False)
    yield one
    one.close()


def fake_runs(monkeypatch, losses=(5.0, 4.9), driver=None, allocated=100, output="", host_free=1 << 40):
    """Runs of 20 ms with a plan of 100 bytes; of several losses each run takes the next."""
    left = iter(losses) if losses and isinstance(losses[0], tuple) else None

    def train(session, flags, steps, **_):
        rows = [{"step": i, "loss": loss, "step_ms": 20.0, "device_bytes": allocated, "mfu": 0.5,
                 "tokens_per_second": 1e3} for i, loss in enumerate(next(left) if left else losses, 1)]
        header = {"options": {"tokens_per_step": 32}, "peak_flops": 1e12}
        return training.Training(Path("/nowhere"), header, rows, output), driver

    ladder = (("AdamW", "--optimizer adamw"), ("+ Flora", "--optimizer flora"), ("+ blocks", "--gradient-blocks embedding"),
              ("+ 8-bit", "--weight-dtype int8"), ("+ streaming", "--offload weights"))
    rows = [{"name": name, "adds": adds, "flags": " ".join(flags for _, flags in ladder[:i + 1])}
            for i, (name, adds) in enumerate(ladder)]
    plan = {"techniques": rows, "device_bytes": 100, "host_bytes": 10, "budget": {"bytes": 200}, "allocations": [
        {"name": f"{what}.0.host", "category": category, "bytes": size, "host": True} for what, category, size in (
            ("weights", "weights", 1000), ("state", "optimizer state", 100), ("residual", "activations", 10))]}
    monkeypatch.setattr(training, "train_beside_driver", train)
    monkeypatch.setattr(training, "whole_plan", lambda session, flags: plan)
    monkeypatch.setattr(training, "host_free", lambda: host_free)


def measured(session, part, items, wanted):
    session.run_part(part, [item for item in items if item.name in wanted])
    return read(session.results.path)["parts"][part]


def test_the_ladder_is_the_programs_and_says_what_is_compared(session, monkeypatch):
    fake_runs(monkeypatch)
    found = techniques.all_of(session)
    assert [(row.name, row.first, row.same_bits, row.near) for row in found] == [
        ("technique AdamW", False, "", False), ("technique + Flora", True, "", False),
        ("technique + blocks", False, "", True), ("technique + 8-bit", False, "", True),
        ("technique + streaming", False, "technique + 8-bit", False),
        *((f"technique + blocks, + offload {what}", False, "technique + blocks", False)
          for what in ("activations", "state", "weights,activations"))]
    assert found[4].flags == ["--optimizer", "adamw", "--optimizer", "flora", "--gradient-blocks", "embedding",
                              "--weight-dtype", "int8", "--offload", "weights"]


def test_offload_that_changes_a_loss_fails(session, monkeypatch):
    names = ["technique + Flora", "technique + blocks", "technique + blocks, + offload state",
             "technique + blocks, + offload weights,activations"]
    fake_runs(monkeypatch, losses=((5.0, 4.0), (5.0, 4.1), (5.0, 4.1), (5.0, 4.2)))
    entries = measured(session, "memory", techniques.items(session), names)
    assert entries["technique + blocks"]["status"] == "ok"
    assert entries["technique + blocks"]["values"]["relative_difference"] == pytest.approx(0.025)
    assert entries[names[2]]["values"]["equal"] is True
    assert entries[names[3]]["status"] == \
        "failed: the losses are not those of technique + blocks: step 2: 4.2 and 4.1"
    assert entries[names[3]]["values"]["equal"] is False


def test_a_technique_without_one_to_compare_with_says_nothing_of_its_losses(session, monkeypatch):
    fake_runs(monkeypatch)
    entries = measured(session, "memory", techniques.items(session), ["technique + streaming"])
    assert entries["technique + streaming"]["values"]["equal"] is None
    assert "| 0.02 | - | - | - |  |" in render.techniques_table(entries, True, DRY).text()


def test_a_program_without_a_ladder_costs_its_rows_only(session, monkeypatch):
    def refuse(*_):
        raise ItemFailed("no plan")
    monkeypatch.setattr(training, "whole_plan", refuse)
    (item,) = techniques.items(session)
    assert measured(session, "memory", [item], [item.name])[item.name]["status"] == "failed: no plan"


@pytest.mark.parametrize("host_free, device_free, words", [
    (1 << 40, 50, "on the device"), (5, None, "on the host"),
])
def test_what_does_not_fit_is_skipped(session, monkeypatch, host_free, device_free, words):
    fake_runs(monkeypatch, host_free=host_free)
    monkeypatch.setattr(machine, "memory_free", lambda: device_free)
    status = measured(session, "memory", techniques.items(session), ["technique AdamW"])["technique AdamW"]["status"]
    assert status.startswith("skipped: plans 0.00 GiB") and words in status


def test_streaming_where_the_resident_model_does_not_fit(session, monkeypatch):
    fake_runs(monkeypatch)
    fits = iter(["", "plans too much"])
    monkeypatch.setattr(training, "why_it_does_not_fit", lambda *_: next(fits))
    entries = measured(session, "streaming", streaming.items(session), ["overlap 1"])
    values = entries["overlap 1"]["values"]
    assert entries["overlap 1"]["status"] == "ok" and values["resident"] is None and values["time_ratio"] is None
    assert values["moved_bytes"] == 3 * 1000 + 2 * 100 + 2 * 10
    assert "* micro-batch 1, resident: skipped: plans too much" in render.streaming(entries, True, DRY)


def test_a_budget_that_is_exceeded_fails(session, monkeypatch):
    output = ("budget      200 B (--memory-budget 200), 100 B of it set aside for the runtime, 100 B for the plan\n"
              "chosen      --micro-batch 4 --offload none: 100 B and 10 B of host memory, predicted 1.5e+03 ms per "
              "step, 416.4 tokens/s\nrunner-up   nothing else fits\n")
    for driver, allocated, failure in ((200, 100, ""), (201, 100, "the driver counts 201 bytes, the budget is 200"),
                                       (150, 99, "planned 100 bytes, allocated 99")):
        fake_runs(monkeypatch, driver=driver, allocated=allocated, output=output)
        size = DRY.budgets[0]
        entry = measured(session, "streaming", streaming.items(session), [f"budget {size}"])[f"budget {size}"]
        assert entry["status"] == (f"failed: {failure}" if failure else "ok")
        assert entry["values"]["chosen"]["predicted_ms"] == 1500 and entry["values"]["chosen"]["step_ms"] == 20
        assert entry["values"]["runner_up"] is None and entry["values"]["choice_was_faster"] is None


def test_settings_of_a_device_that_was_not_measured():
    assert streaming.settings_in("chosen      --micro-batch 2 --offload none: 1.00 GiB\n"
                                 "runner-up   --micro-batch 1 --offload none: 1.00 GiB, predicted 2 ms per step, 3 t\n"
                                 ) == {"chosen": ("--micro-batch 2 --offload none", None),
                                       "runner-up": ("--micro-batch 1 --offload none", 2.0)}


@pytest.mark.parametrize("reference, failure", [
    (5.0, None), (4.91, None), (4.5, "the final loss is 1.1111 of that of flora"),
    (float("nan"), "the final loss is nan"), (None, "there is no run flora"),
])
def test_a_loss_in_8_bits_far_from_that_in_bf16_fails(session, reference, failure):
    runs = learning.Learning(session)
    if reference is not None:
        runs.final_losses["flora"] = reference
    values = runs.compared("flora 8-bit", 5.0)
    assert values.get("failed", "").startswith(failure or "") and bool(values.get("failed")) == bool(failure)
    assert runs.compared("flora", 5.0) == {}
