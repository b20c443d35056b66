"""test_make.py: make builds what was asked for: other flags, compilers and folders are noticed, and nothing else."""
import os
import shutil
import subprocess

import pytest
from program import ROOT, call

ENVIRONMENT = {name: value for name, value in os.environ.items()
               if name not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "BUILD", "SANITIZE", "BLAS", "CXX", "CUDA")}


def make(*arguments, code=0):
    result = subprocess.run(["make", *map(str, arguments)], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True,
                            timeout=300)
    assert result.returncode == code, result.stdout + result.stderr
    return result.stdout


def test_make_has_nothing_to_do_after_make(data):
    result = subprocess.run(["make", "-q", "train_gpt2"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    if result.returncode == 1:
        pytest.skip("./train_gpt2 was built with other flags, or the sources have changed since")
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("other", ["SANITIZE=address", "BLAS=none", "CPU_ARCH=x86-64-v3", "CXX=clang++"])
def test_another_folder_is_built_from_nothing(tmp_path, other):
    if other == "CXX=clang++" and not shutil.which("clang++"):
        pytest.skip("no clang++ here")
    text = make("-n", "CUDA=0", other, f"BUILD={tmp_path}/b")
    sources = [*(ROOT / "flora").glob("*.cpp"), *(ROOT / "train").glob("*.cpp")]
    for source in sources:
        assert f"-o {tmp_path}/b/{source.relative_to(ROOT).with_suffix('.o')} " in text, source
    assert f"ln -sfn {tmp_path}/b/train_gpt2 train_gpt2" in text
    assert {"SANITIZE=address": "-fsanitize=address", "BLAS=none": "kernels/cpu/without_onednn.o", "CXX=clang++": "clang++ ",
            "CPU_ARCH=x86-64-v3": "-march=x86-64-v3"}[other] in text


def test_other_flags_in_the_same_folder_are_noticed(tmp_path):
    build, target = f"BUILD={tmp_path}/b", f"{tmp_path}/b/kernels/memory_plan.o"
    make("CUDA=0", build, target)
    make("-q", "CUDA=0", build, target)
    make("-q", "CUDA=0", build, "CPU_ARCH=x86-64", target, code=1)
    make("CUDA=0", build, "CPU_ARCH=x86-64", target)
    make("-q", "CUDA=0", build, "CPU_ARCH=x86-64", target)
    make("-q", "CUDA=0", build, target, code=1)


def test_a_program_without_cuda_says_why(tmp_path):
    reason = call("--device", "cuda", "--steps", 1).stderr
    if "built without CUDA" not in reason:
        pytest.skip("this program has the CUDA backend")
    assert "CUDA=0 was given" in make("-n", "CUDA=0", f"BUILD={tmp_path}/b")
    assert "no nvcc was found" in make("-n", "NVCC=", f"BUILD={tmp_path}/b")
