"""test_demo.py: scripts/demo.sh from text to picture, in a few steps, in a folder of its own with what it calls."""
import os
import re
import shutil
import subprocess
import sys

import pytest
from program import PROGRAM, ROOT, metrics

np = pytest.importorskip("numpy")
pytest.importorskip("matplotlib")
sys.path.insert(0, str(ROOT / "data"))

from token_files import read_shard  # noqa: E402

# Prints what the program of the package bible-kjv does: chapters of 20 verses.
BIBLE = """#!/bin/sh
[ "$*" = "-f Gen1:1-Rev22:21" ] || exit 1
for book in Ge 1Sm Rev; do
  for chapter in $(seq 40); do
    for verse in $(seq 20); do
      echo "$book$chapter:$verse And it came to pass at $verse:00, in the days of $book the ${chapter}th."
    done
  done
done
"""


@pytest.fixture
def demo(tmp_path):
    """demo(bible, **environment): the output of scripts/demo.sh where the program `bible` is this script."""
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "data").mkdir()
    for script in (ROOT / "data").glob("*.py"):
        shutil.copy(script, tmp_path / "data")
    (tmp_path / "train_gpt2").symlink_to(PROGRAM)

    def run(bible, **environment):
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin/bible").write_text(bible)
        (tmp_path / "bin/bible").chmod(0o755)
        environment = {"MODEL": "tiny", "PYTHON": sys.executable, **environment}
        result = subprocess.run([tmp_path / "scripts/demo.sh"], capture_output=True, text=True, errors="replace", timeout=600,
                                stdin=subprocess.DEVNULL,
                                env={**os.environ, **environment, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}"})
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    return run


def test_the_demo_learns_from_chapters_and_holds_whole_ones_out(demo, tmp_path):
    text = demo(BIBLE, STEPS="3")
    assert re.findall(r"^---- sample at step (\d+)\nAnd the LORD said", text, re.MULTILINE) == ["0", "2", "3"]
    assert "step 3: validation loss" in text and text.count("And the LORD said") >= 4  # and that of `generate`
    assert (tmp_path / "runs/demo/loss.png").read_bytes().startswith(b"\x89PNG")
    splits = {}
    for split in ("train", "val"):
        tokens, vocabulary = read_shard(tmp_path / f"data/demo/king_james_{split}_000000.bin")
        assert vocabulary == 257
        chapters = np.split(tokens, np.flatnonzero(tokens == 256))[1:]
        splits[split] = [bytes(chapter[1:].astype(np.uint8)).decode() for chapter in chapters]
    expected = ["\n".join(f"And it came to pass at {verse}:00, in the days of {book} the {chapter}th." for verse in range(1, 21))
                for book in ("Ge", "1Sm", "Rev") for chapter in range(1, 41)]
    assert sorted(chapter.rstrip("\n") for chapter in splits["train"] + splits["val"]) == sorted(expected)
    assert 0 < len(splits["val"]) < 20


def test_the_demo_makes_as_many_steps_as_there_is_time_for_and_does_without_its_text(demo, tmp_path):
    text = demo("#!/bin/sh\necho unknown", TRAIN_SECONDS="0.01")
    assert "going on with other text" in text and "data/system_text_train_000000.bin" in text
    assert "\n100 steps" in text and not (tmp_path / "runs/demo-speed").exists()  # the fewest
    options, rows = metrics(tmp_path / "runs/demo")
    assert len(rows) == 100 and "---- sample at step 0\nThe " in text
