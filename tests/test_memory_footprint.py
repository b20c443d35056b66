"""test_memory_footprint.py: scripts/memory_footprint.py at toy size: what is planned is what is allocated, nothing that
the program refuses or that fails is lost, and the picture shows the figures of the table."""
import csv
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from program import PROGRAM, ROOT

SCRIPT = ROOT / "scripts/memory_footprint.py"
TOY = ["--models", "tiny", "--device", "cpu", "--grid", "techniques", "--seq-len", "32", "--vocabulary", "257",
       "--rank", "16"]
COLUMNS = ("model parameters grid technique flags status message weights_bytes optimizer_state_bytes gradients_bytes "
           "activations_bytes workspace_bytes planned_device_bytes planned_host_bytes allocated_bytes "
           "allocated_difference_percent process_bytes process_difference_percent").split()
CATEGORIES = COLUMNS[7:12]
TECHNIQUES = 8

pytestmark = pytest.mark.skipif(not PROGRAM.exists(), reason="./train_gpt2 is not built (make)")

sys.path.insert(0, str(ROOT / "scripts"))
import memory_footprint  # noqa: E402


def run(*arguments, program=PROGRAM, code=0, environment=None):
    result = subprocess.run([sys.executable, str(SCRIPT), "--program", str(program), *map(str, arguments)],
                            capture_output=True, text=True, timeout=900, stdin=subprocess.DEVNULL,
                            env={**os.environ, **(environment or {})})
    assert result.returncode == code, result.stdout + result.stderr
    return result


def table(folder):
    with open(folder / "footprint.csv", newline="") as file:
        reader = csv.DictReader(file)
        assert reader.fieldnames == COLUMNS
        return list(reader)


def stand_in(path, script):
    """A program of a few lines around the real one."""
    path.write_text(f'#!/bin/sh\n{script}\nexec "{PROGRAM}" "$@"\n')
    path.chmod(0o755)
    return path


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("measured")
    run(*TOY, "--steps", 2, "--out", folder)
    return folder


def test_every_row_took_what_was_planned(measured):
    rows = table(measured)
    assert len(rows) == TECHNIQUES and len({row["technique"] for row in rows}) == TECHNIQUES
    for row in rows:
        assert row["status"] == "measured" and row["message"] == "", row
        assert int(row["allocated_bytes"]) == int(row["planned_device_bytes"]) > 0
        assert float(row["allocated_difference_percent"]) == 0
        assert sum(int(row[column]) for column in CATEGORIES) == int(row["planned_device_bytes"])
        both = int(row["planned_device_bytes"]) + int(row["planned_host_bytes"])
        assert both < int(row["process_bytes"]) < both + (200 << 20)
    planned = [int(row["planned_device_bytes"]) for row in rows]
    assert planned[-2] < 0.7 * planned[0], planned
    assert int(rows[-1]["planned_host_bytes"]) > int(rows[-2]["planned_host_bytes"]), "weights are on the host"


def test_the_page_names_machine_command_and_every_row(measured):
    page = (measured / "footprint.md").read_text()
    assert "Machine: " in page and "--grid techniques" in page
    lines = page.splitlines()
    for row in table(measured):
        line = next(line for line in lines if line.startswith(f"| tiny | {row['technique']} |"))
        assert line.count("+0.00%") == 1, "what was allocated is what was planned"
    assert "Refused" not in page and "Failed" not in page


def test_the_bars_add_up_to_the_table(measured):
    pytest.importorskip("matplotlib")
    assert (measured / "footprint.png").read_bytes().startswith(b"\x89PNG")
    assert "</svg>" in (measured / "footprint.svg").read_text()
    rows = table(measured)
    totals = [int(row["planned_device_bytes"]) / 2**30 for row in rows]
    bars = memory_footprint.bars(rows, "tiny")
    assert [name for name, *_ in bars] == [row["technique"] for row in rows]
    assert [sum(parts) for _, parts, _ in bars] == pytest.approx(totals)

    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = memory_footprint.draw(plt, rows, SimpleNamespace(micro_batch=2, seq_len=32))
    (axes,) = figure.axes
    widths = [[patch.get_width() for patch in container] for container in axes.containers]
    assert len(widths) == len(CATEGORIES)
    assert [sum(bar) for bar in zip(*widths)] == pytest.approx(totals)
    assert not axes.lines, "published figures stand beside 7B models only"
    for row in rows:
        row["parameters"] = 7_000_000_000
    figure = memory_footprint.draw(plt, rows, SimpleNamespace(micro_batch=2, seq_len=32))
    assert len(figure.axes[0].lines) == len(memory_footprint.PUBLISHED)
    assert "2306.09782" in figure._supxlabel.get_text()


def test_what_the_program_refuses_is_named(tmp_path):
    program = stand_in(tmp_path / "program", 'case "$*" in *"--optimizer flora"*) echo "train_gpt2: no" >&2; exit 2;; esac')
    run(*TOY, "--plan-only", "--out", tmp_path / "out", program=program)
    rows = table(tmp_path / "out")
    refused = [row for row in rows if "--optimizer flora" in row["flags"]]
    assert len(refused) == 4 and len(rows) == TECHNIQUES
    page = (tmp_path / "out/footprint.md").read_text()
    assert "## Refused by the program" in page
    for row in rows:
        if row not in refused:
            assert row["status"] == "planned"
            continue
        assert row["status"] == "refused" and row["message"] == "no"
        assert row["planned_device_bytes"] == row["allocated_bytes"] == ""
        assert f"`{row['flags']}`): no" in page


def test_a_rank_that_the_program_refuses_is_one_line(tmp_path):
    result = run(*TOY, "--rank", 0, "--out", tmp_path, code=2)
    assert result.stderr == "memory_footprint: --rank must be at least 1\n" and list(tmp_path.iterdir()) == []


def test_plan_only_runs_nothing(tmp_path):
    program = stand_in(tmp_path / "program", f'echo "$*" >>"{tmp_path}/calls"')
    run("--models", "tiny", "--device", "cpu", "--plan-only", "--out", tmp_path / "out", program=program)
    calls = (tmp_path / "calls").read_text().splitlines()
    rows = table(tmp_path / "out")
    assert len(rows) == TECHNIQUES + 4 * 3 * 2 * 3 * 2 == len(calls) - 1, "one call asks for the ladder"
    assert all("--plan --json" in call for call in calls)
    assert {row["status"] for row in rows} <= {"planned", "refused"}
    assert all(row["process_bytes"] == row["allocated_bytes"] == "" for row in rows)
    assert {row["grid"] for row in rows} == {"techniques", "full"}
    assert not [path for path in (tmp_path / "out").iterdir() if path.is_dir()], "its data is gone"


def test_what_is_too_large_is_planned_and_not_run(tmp_path):
    run(*TOY, "--measure", "1KiB", "--out", tmp_path)
    for row in table(tmp_path):
        assert row["status"] == "too large" and "above --measure" in row["message"]
        assert row["planned_device_bytes"] and not row["allocated_bytes"]
    assert "## Planned, not run" in (tmp_path / "footprint.md").read_text()


def test_a_failed_run_is_a_row_and_an_exit_code(tmp_path):
    program = stand_in(tmp_path / "program", 'case "$*" in *--plan*) ;; *--offload*) echo "train_gpt2: no luck" >&2; '
                       "exit 1;; esac")
    run(*TOY, "--out", tmp_path / "out", program=program, code=1)
    rows = table(tmp_path / "out")
    assert [row["status"] for row in rows] == ["measured"] * (TECHNIQUES - 1) + ["failed"]
    assert rows[-1]["message"] == "no luck"
    assert "## Failed" in (tmp_path / "out/footprint.md").read_text()


def test_another_size_than_planned_is_an_error(tmp_path):
    program = stand_in(tmp_path / "program", f'case "$*" in *--plan*) "{PROGRAM}" "$@" | sed '
                       "'s/\"device_bytes\": /\"device_bytes\": 9/'; exit;; esac")
    result = run(*TOY, "--out", tmp_path / "out", program=program, code=1)
    assert len(result.stderr.splitlines()) == TECHNIQUES and "bytes planned" in result.stderr


@pytest.mark.slow
def test_a_run_has_a_time_limit(tmp_path):
    program = stand_in(tmp_path / "program", 'case "$*" in *--plan*) ;; *--offload*) exec sleep 100;; esac')
    run(*TOY, "--limit-seconds", 5, "--out", tmp_path / "out", program=program, code=1)
    last = table(tmp_path / "out")[-1]
    assert last["status"] == "failed" and last["message"] == "no 2 steps within 5 s"


@pytest.mark.parametrize("known", [True, False])
def test_on_a_gpu_the_driver_is_asked_for_the_process(tmp_path, known):
    """A stand-in for a GPU: the program computes on the CPU when told `cuda`, and an nvidia-smi knows its size or,
    as in a container, does not know the process."""
    program = stand_in(tmp_path / "program", f'echo $$ >"{tmp_path}/pid"\nfor word; do shift; [ "$word" = cuda ] && '
                       'word=cpu; set -- "$@" "$word"; done')
    smi = stand_in(tmp_path / "nvidia-smi", 'case "$*" in *memory.free*) echo 81000;; *query-gpu*) echo Test GPU;; '
                   f'*compute-apps*) echo "{"$(cat pid)" if known else 1}, 1234";; esac; exit')
    smi.write_text(smi.read_text().replace("cat pid", f"cat '{tmp_path}/pid'"))
    run(*[word if word != "cpu" else "auto" for word in TOY], "--out", tmp_path / "out", program=program,
        environment={"PATH": f"{tmp_path}:{os.environ['PATH']}", "CUDA_VISIBLE_DEVICES": ""})
    for row in table(tmp_path / "out"):
        assert row["status"] == "measured" and row["allocated_bytes"] == row["planned_device_bytes"]
        assert row["process_bytes"] == (str(1234 << 20) if known else "")
    page = (tmp_path / "out/footprint.md").read_text()
    assert "Machine: Test GPU, " in page and "| driver |" in page


@pytest.mark.parametrize("arguments, says", [
    (["--models", "nosuch"], "nosuch"),
    (["--models", "tiny", "--device", "gpu"], "gpu"),
    (["--models", "tiny", "--seq-len", "0"], "--seq-len"),
    (["--models", "tiny", "--measure", "much"], "much"),
    (["--models", "tiny", "--program", "/no/such/program"], "/no/such/program"),
    (["--models", "tiny", "--program", "/bin/true"], "/bin/true"),
])
def test_a_wrong_call_is_one_line(tmp_path, arguments, says):
    result = run("--device", "cpu", "--out", tmp_path, *arguments, code=2)
    assert result.stderr.count("\n") == 1 and result.stderr.startswith("memory_footprint: ") and says in result.stderr
    assert result.stdout == "" and list(Path(tmp_path).iterdir()) == []


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    result = run("--out", os.path.join(tmp_path, "file", "out"), "--plan-only", code=2)
    assert result.stderr.count("\n") == 1 and result.stderr.startswith("memory_footprint: ")
