"""test_gpu_report.py: scripts/gpu_report.py without a GPU: its dry run, and the promises it makes for the day there is
one: parts add up, a failure costs one item, time that is over is said, the page holds the figures of the file."""
import json
import os
import re
import shlex
import stat
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "scripts/gpu_report.py"
EMULATION = ROOT / "build/cuda_on_cpu/train_gpt2"

sys.path.insert(0, str(ROOT / "scripts"))
from gpu_measurements import (correctness, kernels, learning, machine, memory, peers, render, steps,  # noqa: E402
                              streaming, techniques, training)
from gpu_measurements.results import Results, read  # noqa: E402
from gpu_measurements.session import Item, ItemFailed, ItemSkipped, OutOfMemory, Session  # noqa: E402
from gpu_measurements.sizes import DRY, REAL  # noqa: E402

needs_emulation = pytest.mark.skipif(not EMULATION.exists(), reason="build/cuda_on_cpu/train_gpt2 is not built "
                                     "(make shim-tests)")
MACHINE = {"gpu": "Test GPU", "driver": "1", "memory": "", "nvcc": "13.0", "cpu": "1 x CPU"}
NAME = "cuda-on-cpu-dry-run"


def run(*arguments, environment=None):
    return subprocess.run([sys.executable, str(SCRIPT), *map(str, arguments)], capture_output=True, text=True,
                          timeout=900, stdin=subprocess.DEVNULL, env={**os.environ, **(environment or {})})


def dry_run(folder, *arguments):
    result = run("--dry-run", "--out", folder, *arguments)
    assert result.returncode in (0, 1) and result.stderr == "", result.stdout + result.stderr
    return result


def parts_in(folder):
    return json.loads((folder / f"{NAME}.json").read_text())["parts"]


def statuses(entries):
    return {item: entry["status"] for item, entry in entries.items()}


@pytest.fixture
def session(tmp_path):
    made = []

    def make(sizes=DRY, **options):
        results = Results(tmp_path / "out/test.json", MACHINE, True)
        defaults = {"dry_run": True, "time_limit": None, "data": "", "llmc": "", "missing": False}
        made.append(Session(sizes, results, **{**defaults, **options}))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture(scope="module")
def fake_llmc(tmp_path_factory):
    """A checkout whose trainer prints what llm.c's prints."""
    folder = tmp_path_factory.mktemp("llm.c")
    (folder / "llmc").mkdir()
    (folder / "llmc/cuda_utils.cuh").write_text("cudaMemAdviseSetPreferredLocation, cudaCpuDeviceId);\n")
    (folder / "llmc/mfu.h").write_text("#if __has_include(<nvml.h>)\n")
    (folder / "train_gpt2.cu").write_text(
        "#!/bin/sh\necho 'device memory usage: 512 MiB / 1024 MiB'\nfor i in 1 2 3; do\n"
        "echo \"step    $i/3 | loss 5.5 (+nanz)| norm 1.0 (+nanz)| lr 6.00e-04 | ${i}00.00 ms | 50.0% bf16 MFU | "
        "9 tok/s\"\n"
        "done\n")
    (folder / "Makefile").write_text("train_gpt2cu: train_gpt2.cu\n\tcp $< $@ && chmod +x $@ # -lnvidia-ml\n")
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory, fake_llmc):
    """One dry run of every part but the tests."""
    folder = tmp_path_factory.mktemp("report")
    result = dry_run(folder, "--parts", "right kernels steps memory streaming parallel learning", "--llmc", fake_llmc)
    return SimpleNamespace(folder=folder, parts=parts_in(folder), result=result,
                           page=(folder / f"{NAME}.md").read_text())


# ---- the dry run


@needs_emulation
@pytest.mark.slow
def test_a_dry_run_measures_every_part(whole):
    assert set(whole.parts) == {"right", "kernels", "steps-124M", "steps-6.7B", "memory", "streaming", "parallel", "learning"}
    for part in ("right", "steps-124M", "steps-6.7B", "memory", "streaming", "parallel", "learning"):
        for item, status in statuses(whole.parts[part]).items():
            lenient = "pytorch" in item and status.startswith("skipped: no Python here has PyTorch")
            assert status == "ok" or lenient, (part, item, status)
    for part in whole.parts.values():
        for item, entry in part.items():
            assert set(entry) == {"status", "command", "machine", "date", "commit", "seconds", "values"}, item
            assert entry["command"] or item == "picture" or "pytorch" in item, item


@needs_emulation
@pytest.mark.slow
def test_the_items_hold_what_the_issue_asks_for(whole):
    right, memory_items, learned = (whole.parts[part] for part in ("right", "memory", "learning"))
    assert right["losses: CUDA against CPU, fp32"]["values"]["largest_relative_difference"] < 1e-4
    assert {"two runs agree, bf16", "CUDA graphs on == off, bf16", "fused == dense, Flora, bf16",
            "recompute levels agree, bf16", "resumed == whole, bf16"} <= set(right)
    row = whole.parts["steps-124M"]["flora 16K"]["values"]
    assert row["tokens_per_second"] > 0 and 0 < row["mfu"] < 1
    assert row["allocated_bytes"] == row["planned_bytes"] > 0
    assert {"classifier", "attention_forward", "matmul"} <= {
        entry["operation"] for entry in whole.parts["steps-124M"]["profile flora"]["values"]["rows"]}
    for optimizer in ("adamw", "adafactor", "sgd", "flora"):
        values = memory_items[f"{optimizer} 124M"]["values"]
        assert values["planned_bytes"] == values["allocated_bytes"]
    largest = memory_items["largest flora"]["values"]
    assert len(largest["losses"]) == 2 and largest["allocated_bytes"] <= largest["free_bytes"]
    assert largest["parameters"] > memory_items["largest adamw"]["values"]["parameters"]
    curves = {name: learned[name]["values"] for name in ("adamw", "flora", "flora 8-bit")}
    assert curves["adamw"]["tokens"] == curves["flora"]["tokens"] == curves["flora 8-bit"]["tokens"] > 0
    assert 0.98 < curves["flora 8-bit"]["loss_ratio"] < 1.02 and "loss_ratio" not in curves["flora"]
    assert curves["flora 8-bit"]["final_loss"] != curves["flora"]["final_loss"]
    assert len(curves["flora"]["curve"]) == curves["flora"]["steps"]
    assert (whole.folder / learned["picture"]["values"]["file"]).stat().st_size > 500


@needs_emulation
@pytest.mark.slow
def test_techniques_one_added_at_a_time(whole):
    entries = {name: entry for name, entry in whole.parts["memory"].items() if name.startswith(techniques.PREFIX)}
    assert len(entries) == 8 + 3
    kinds = {}
    for name, entry in entries.items():
        row = entry["values"]
        assert row["planned_bytes"] == row["allocated_bytes"] > 0 and row["driver_bytes"] is None
        assert (row["host_bytes"] > 4096) == ("--offload" in entry["command"])
        assert row["equal"] is not False and not (row["equal"] and row["relative_difference"] is not None)
        assert f"| {name.removeprefix(techniques.PREFIX)} | " in whole.page
        kinds[name] = (row["first"], row["equal"], row["relative_difference"] is not None)
    ladder, offloads = list(kinds.values())[:8], list(kinds.values())[8:]
    assert ladder[:4] == [(False, None, False)] * 4 and ladder[4] == (True, None, False)
    assert ladder[5:7] == [(False, None, True)] * 2 and ladder[7] == (False, True, False)
    assert offloads == [(False, True, False)] * 3
    planned = [entry["values"]["planned_bytes"] for entry in entries.values()][:7]  # two layers in flight of two
    assert planned == sorted(planned, reverse=True) and len(set(planned)) == 7
    assert entries["technique + 8-bit weights and states"]["values"]["relative_difference"] > 0


@needs_emulation
@pytest.mark.slow
def test_streamed_beside_resident(whole):
    for micro_batch in DRY.overlap_micro_batches:
        values = whole.parts["streaming"][f"overlap {micro_batch}"]["values"]
        resident, streamed = values["resident"], values["streamed"]
        assert values["equal"] is True and streamed["host_bytes"] > resident["host_bytes"]
        assert values["time_ratio"] == pytest.approx(streamed["step_seconds"] / resident["step_seconds"])
        assert values["hidden"] == (values["extra_gb_per_second"] is None) == (values["time_ratio"] <= streaming.HIDDEN)
        # Three times the weights of tiny's blocks (bf16), and some for states and residual stream.
        weights = 2 * 2 * (12 * 128 * 128 + 13 * 128)
        assert 3 * weights < values["moved_bytes"] < 4 * weights


@needs_emulation
@pytest.mark.slow
def test_budgets_predicted_and_measured(whole):
    for size in DRY.budgets:
        entry = whole.parts["streaming"][f"budget {size}"]
        chosen, other = entry["values"]["chosen"], entry["values"]["runner_up"]
        for row in (chosen, other):
            assert row["predicted_ms"] > 0 and row["step_ms"] > 0 and row["flags"].startswith("--micro-batch ")
            assert row["planned_bytes"] == row["allocated_bytes"] <= entry["values"]["budget_bytes"]
        assert chosen["flags"] != other["flags"] and chosen["predicted_ms"] <= other["predicted_ms"]
        assert entry["values"]["choice_was_faster"] == (chosen["tokens_per_second"] > other["tokens_per_second"])
        assert f"--memory-budget {size}" in entry["command"] and other["flags"] in entry["command"]
        assert f"| {size} | `{chosen['flags']}` | " in whole.page
        assert f"| {size}, runner-up | `{other['flags']}` | " in whole.page


@needs_emulation
@pytest.mark.slow
def test_llmc_is_built_and_read(whole):
    values = whole.parts["steps-124M"]["llm.c 16K"]["values"]
    assert values["step_seconds"] == pytest.approx(0.25)  # of 100, 200 and 300 ms, the first not counted
    assert values["tokens_per_second"] == pytest.approx(DRY.micro_tokens / 0.25)
    assert values["driver_bytes"] == 512 << 20
    assert "train_gpt2cu -e tiny" in whole.parts["steps-124M"]["llm.c 16K"]["command"]


@needs_emulation
@pytest.mark.slow
def test_the_page_holds_the_figures(whole):
    steps_values = whole.parts["steps-124M"]["flora 16K"]["values"]
    assert render.number(steps_values["tokens_per_second"]) in whole.page
    assert whole.parts["steps-124M"]["flora 16K"]["command"] in whole.page
    for row in whole.parts["kernels"]["ours"]["values"].get("rows", []):
        assert f"| {row['operation']} (toy) | {row['shape']} | {render.number(row['milliseconds'])} |" in whole.page
    assert f"{whole.parts['learning']['flora']['values']['final_loss']:.4f}" in whole.page
    assert f"![loss over tokens]({NAME}-learning" in whole.page
    # Every table has its warning.
    lines = whole.page.splitlines()
    starts = [i for i, line in enumerate(lines) if line.startswith("| ---")]
    assert len(starts) > 8 and all(lines[i - 3].startswith("**DRY RUN") for i in starts)
    assert str(whole.folder) not in whole.page and "/tmp/gpu_report." not in whole.page


@needs_emulation
@pytest.mark.slow
def test_parts_add_to_the_same_file(whole):
    before = parts_in(whole.folder)
    dry_run(whole.folder, "--parts", "right", "--time-limit", "0.5")
    after = parts_in(whole.folder)
    assert {part: after[part] for part in after if part != "right"} == \
        {part: before[part] for part in before if part != "right"}
    skipped_now = [item for item in before["right"] if after["right"][item] == before["right"][item]]
    assert skipped_now  # what had no time this time keeps what was measured
    page = (whole.folder / f"{NAME}.md").read_text()
    (whole.folder / f"{NAME}.md").unlink()
    assert run("--render", "--out", whole.folder).returncode == 0
    assert (whole.folder / f"{NAME}.md").read_text() == page


@needs_emulation
@pytest.mark.slow
def test_the_tests_are_run_and_counted(tmp_path):
    if not (ROOT / "build/cuda_on_cpu_sanitized/tests/test_philox").exists():
        pytest.skip("build/cuda_on_cpu_sanitized/tests/test_philox is not built (make shim-tests)")
    dry_run(tmp_path, "--parts", "tests")
    (entry,) = parts_in(tmp_path)["tests"].values()
    assert entry["status"] == "ok" and entry["values"]["passed"] > 0 and "tests/run.py --suite" in entry["command"]


@needs_emulation
def test_the_time_limit_marks_what_was_skipped(tmp_path):
    result = dry_run(tmp_path, "--parts", "memory learning", "--time-limit", "0.2")
    assert result.returncode == 0
    found = statuses(parts_in(tmp_path)["memory"])
    assert found and all(re.match(r"skipped: needs about \d+ s, 0 s are left", status) for status in found.values())
    page = (tmp_path / f"{NAME}.md").read_text()
    assert "skipped: needs about" in page and "not measured" in page


@needs_emulation
def test_the_time_of_the_build_belongs_to_the_first_part(tmp_path):
    """A part ends within nine minutes of the call of make."""
    dry_run(tmp_path, "--parts", "memory streaming", "--spent", "600")
    parts = parts_in(tmp_path)
    assert all(status.startswith("skipped: needs about") for status in statuses(parts["memory"]).values())
    assert "ok" in statuses(parts["streaming"]).values()


def names(cmdline, text):
    """Whether a process of /proc was called with this text; one that has ended meanwhile was not."""
    try:
        return text.encode() in cmdline.read_bytes()
    except OSError:
        return False


@needs_emulation
def test_a_signal_leaves_no_process_and_keeps_the_results(tmp_path):
    (tmp_path / "tmp").mkdir()
    process = subprocess.Popen([sys.executable, str(SCRIPT), "--dry-run", "--out", str(tmp_path), "--parts", "right"],
                               stdout=subprocess.PIPE, text=True, env={**os.environ, "TMPDIR": str(tmp_path / "tmp")})
    for line in process.stdout:
        if "two runs agree" in line:
            break
    time.sleep(0.1)
    process.terminate()
    assert "wrote " in process.stdout.read() and process.wait(timeout=300) == 143
    assert not list((tmp_path / "tmp").iterdir())
    assert not [path for path in Path("/proc").glob("[0-9]*/cmdline") if names(path, f"{tmp_path}/tmp")]
    assert parts_in(tmp_path)["right"]["two runs agree, bf16"]["status"] == "ok"
    assert (tmp_path / f"{NAME}.md").exists()


@needs_emulation
def test_the_flags_of_a_real_run_are_accepted(session, monkeypatch):
    """Every command of a real report but its peers, as a plan: the program accepts it, and it fits somewhere."""
    one = session(replace(REAL, program=DRY.program, common=DRY.common, search_memory=80 << 30), data="/data/x.bin")
    seen = []

    def planned(session, flags, steps=0, **_):
        seen.append((flags, training.plan(session, flags)))
        raise ItemSkipped("planned")

    monkeypatch.setattr(training, "train", lambda session, name, flags, steps, **_: planned(session, flags))
    monkeypatch.setattr(training, "train_without_end", planned)
    monkeypatch.setattr(machine, "memory_free", lambda: 80 << 30)
    monkeypatch.setattr(learning, "shards", lambda session: training.shard(session))
    for model in REAL.models:
        one.run_part("steps", [item for item in steps.items(one, model) if "pytorch" not in item.name])
    one.run_part("right", correctness.right(one))
    monkeypatch.setattr(training, "host_free", lambda: 64 << 30)
    one.run_part("memory", memory.items(one))
    one.run_part("streaming", streaming.items(one))
    one.run_part("learning", learning.items(one))
    for name in learning.RUNS:
        assert training.plan(one, learning.Learning(one).flags(name)) < 80 << 30
    parts = read(one.results.path)["parts"]
    for part in parts.values():
        assert all(status.startswith("skipped: ") for status in statuses(part).values()), statuses(part)
    assert len(seen) > 75 and all(0 < bytes_ < 80 << 30 for _, bytes_ in seen)
    largest = [bytes_ for flags, bytes_ in seen if str(flags[1]).endswith(".json")]
    assert len(largest) == 2 and all(bytes_ > 75 << 30 for bytes_ in largest)


# ---- wrong calls


@pytest.mark.parametrize("arguments, words", [
    (["--parts", "kernel"], "there is no part 'kernel'; there are tests"),
    (["--time-limit", "soon"], "--time-limit"),
    (["--time-limit", "0"], "above 0"),
    (["--frobnicate"], "--frobnicate"),
    (["--render"], "holds no result file"),
])
def test_bad_arguments(tmp_path, arguments, words):
    result = run("--dry-run", "--out", tmp_path, *arguments)
    assert result.returncode == 2 and result.stdout == ""
    assert len(result.stderr.splitlines()) == 1 and words in result.stderr
    assert not list(tmp_path.iterdir())


def test_a_dry_run_needs_a_folder():
    result = run("--dry-run")
    assert result.returncode == 2 and "--out" in result.stderr and len(result.stderr.splitlines()) == 1


def test_no_gpu(tmp_path):
    result = run("--out", tmp_path, "--parts", "right", environment={"PATH": str(tmp_path)})
    assert result.returncode == 2 and "nvidia-smi names no GPU" in result.stderr and "--dry-run" in result.stderr


def test_a_broken_result_file(tmp_path):
    (tmp_path / f"{NAME}.json").write_text("{")
    result = run("--dry-run", "--out", tmp_path, "--parts", "right")
    assert result.returncode == 2 and f"{NAME}.json" in result.stderr and len(result.stderr.splitlines()) == 1


# ---- items


def test_a_failing_item_does_not_stop_the_rest(session):
    def fail(error):
        raise error

    one = session()
    one.run_part("kernels", [
        Item("program", 0, lambda: one.execute(["build/no_such_program"])),
        Item("exit code", 0, lambda: one.execute(["sh", "-c", "echo last words; exit 7"]).require("it")),
        Item("mistake", 0, lambda: {}["missing"]),
        Item("half", 0, lambda: {"rows": [1], "failed": "the other half"}),
        Item("skipped", 0, lambda: fail(ItemSkipped("nothing to do"))),
        Item("good", 0, lambda: {"figure": 5}),
    ])
    entries = read(one.results.path)["parts"]["kernels"]
    found = statuses(entries)
    assert found["program"] == "failed: build/no_such_program is not built"
    assert found["exit code"] == "failed: it ended with exit code 7: last words"
    assert found["mistake"] == "failed: KeyError: 'missing'"
    assert found["half"] == "failed: the other half" and entries["half"]["values"] == {"rows": [1]}
    assert found["skipped"] == "skipped: nothing to do"
    assert found["good"] == "ok" and entries["good"]["values"] == {"figure": 5}
    assert one.failed


def test_a_command_ends_with_the_time(session):
    one = session(part_seconds=0.5)
    began = time.monotonic()
    one.run_part("right", [Item("slow", 0, lambda: one.execute(["sh", "-c", "echo a; sleep 60"]).require("it")),
                           Item("next", 0.1, lambda: {})])
    assert time.monotonic() - began < 50  # the command sleeps for 60 s
    found = statuses(read(one.results.path)["parts"]["right"])
    assert found["slow"] == "failed: it was stopped when its time was over"
    assert found["next"].startswith("skipped: needs about")


def test_missing_keeps_what_is_there(session, monkeypatch):
    monkeypatch.setattr(machine, "commit", lambda: "abc")
    one = session(missing=True)
    items = [Item("a", 0, lambda: {"n": 1}), Item("b", 0, lambda: 1 / 0)]
    one.run_part("right", items)
    items[0].measure = items[1].measure = lambda: {"n": 2}
    one.run_part("right", items)
    entries = read(one.results.path)["parts"]["right"]
    assert entries["a"]["values"] == {"n": 1} and entries["b"]["values"] == {"n": 2}


def test_half_a_micro_batch_where_the_device_is_too_small(session, monkeypatch):
    one, tried = session(), []
    monkeypatch.setattr(training, "plan", lambda session, flags: 100)

    def run(flags):
        tried.append(flags[flags.index("--micro-batch") + 1])
        if tried[-1] > 1:
            raise OutOfMemory("too small")
        return {"tokens_per_second": 1}

    values = steps.fitting(one, DRY.models[0], "flora", 32, run)
    assert tried == [2, 1] and values["micro_batch"] == 1 and values["planned_bytes"] == 100
    with pytest.raises(OutOfMemory):
        steps.fitting(one, DRY.models[0], "flora", 32, lambda flags: (_ for _ in ()).throw(OutOfMemory("never")))


@needs_emulation
def test_the_drivers_figure_is_what_the_run_adds(session, monkeypatch):
    figures = iter([1 << 30, 3 << 30])
    monkeypatch.setattr(machine, "memory_used", lambda: next(figures))
    values = memory.one(session(), DRY.models[0], "sgd")
    assert values["driver_bytes"] == 2 << 30 and values["planned_bytes"] == values["allocated_bytes"]


@needs_emulation
def test_too_little_memory_is_told_from_other_failures(session):
    one = session()
    flags = ["--model", "tiny", "--seq-len", 16, "--micro-batch", 2]
    with pytest.raises(OutOfMemory):
        training.train_without_end(one, flags, 1, environment={"CUDA_ON_CPU_MEMORY": str(1 << 20)})
    with pytest.raises(ItemFailed, match="exit code 2.*unknown model .giant.: "):
        training.train_without_end(one, ["--model", "giant"], 1)


def test_counts_of_a_run_of_tests_that_was_stopped(session, monkeypatch):
    one = session()
    output = ("ok    test_a (gpu)      12 passed, 0 failed  (1.0 s)\n"
              "FAIL  test_b (gpu)   3 passed, 1 failed, 2 skipped  (2 s)\n")
    finished = SimpleNamespace(output=output, expired=True, code=-9, last_line=lambda: "")
    monkeypatch.setattr(one, "execute", lambda *_, **__: finished)
    monkeypatch.setattr(one, "python_with", lambda *_: sys.executable)
    (item,) = correctness.tests(one, ("--suite", "gpu"))
    values = item.measure()
    assert (values["passed"], values["failed_tests"], values["skipped"]) == (15, 1, 2)
    assert "time was over after 15 passed, 1 failed" in values["failed"]


def test_kernels_side_by_side(tmp_path):
    path = tmp_path / "kernels.json"
    row = {"operation": "attention_forward", "model": "124M", "shape": "B16 T1024 NH12 HD64 bf16", "milliseconds": 0.5,
           "gigabytes": 0.1, "tflop": 0.1, "percent": 25.0, "bound": "compute"}
    first = {"device": "GPU", "copy_gb_per_second": 4000, "matmul_tflops": 790}
    lines = [first, row, {"skipped": [{"operation": "x"}], "failed": []}]
    path.write_text("\n".join(map(json.dumps, lines)) + '\n{"operation": "cut')
    assert kernels.read_lines(path) == (first, [row], lines[2])
    entry = {"status": "ok", "command": "bench", "date": "2026-01-01", "commit": "c", "machine": "m"}
    page = render.kernels({"ours": {**entry, "values": {"device": first, "rows": [row]}},
                           "pytorch": {**entry, "values": {"rows": [{**row, "milliseconds": 0.6}]}}}, False, REAL)
    assert "| 0.5 | 200 | 200 | 25.0% | compute | 220, then 265 TFLOP/s | 0.6 | 1.20 | [1] |" in page


def test_a_page_of_a_real_run_names_what_was_not_measured():
    page = render.page({"machine": MACHINE, "dry_run": False, "parts": {}}, REAL, "test-gpu")
    assert "DRY RUN" not in page
    for row in ("AdamW, dense, 16K", "Flora, compressed accumulation, 0.5M", "llm.c, AdamW, fp32 states, 16K",
                "adafactor 774M", "largest flora", "resumed == whole, fp32", "micro-batch 16",
                "24GiB", "flora 8-bit"):
        assert f"| {row} | not measured |" in page
    for model in ("124M", "355M", "774M", "1558M", "6.7B"):
        assert f"## Steps: {model}\n" in page


def test_the_curve_without_matplotlib():
    rows = [{"tokens": 10 * i, "loss": 5 - i / 1000} for i in range(1, 1001)]
    curve = learning.thinned(rows)
    assert len(curve) == 200 and curve[-1][0] == 10000
    picture = learning.svg({"adamw": curve, "flora": curve})
    assert picture.startswith("<svg") and picture.count("<polyline") == 2 and "nan" not in picture


def test_the_shard_of_random_tokens(tmp_path):
    assert run("--write-shard", tmp_path / "random.bin", "--dry-run").returncode == 0
    content = (tmp_path / "random.bin").read_bytes()
    assert len(content) == 1024 + 2 * DRY.shard_tokens
    assert stat.S_ISREG((tmp_path / "random.bin").stat().st_mode)


def test_llmc_fits_by_its_own_arithmetic():
    xl = next(model for model in REAL.models if model.name == "1558M")
    assert 90e9 < peers.llmc_bytes(xl, 16) < 130e9 and peers.llmc_bytes(xl, 4) < 80e9


def test_make_passes_its_variables_on(tmp_path):
    """`make gpu-report` with every variable of the README, which would run the script with them."""
    result = subprocess.run(["make", "-n", "gpu-report", "PARTS=right kernels", "TIME_LIMIT=500", "DATA=a_*.bin,b",
                             f"LLMC={tmp_path}/llm c", "DRY_RUN=1", f"OUT={tmp_path}/out", f"BUILD={tmp_path}/build"],
                            cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    (command,) = [line for line in result.stdout.splitlines() if "scripts/gpu_report.py" in line]
    words = shlex.split(command)
    assert words[words.index("--parts") + 1] == "right kernels" and words[words.index("--time-limit") + 1] == "500"
    assert words[words.index("--data") + 1] == "a_*.bin,b" and words[words.index("--llmc") + 1] == f"{tmp_path}/llm c"
    assert words[words.index("--out") + 1] == f"{tmp_path}/out" and "--dry-run" in words and "--spent" in words
