"""test_ptx.py: what nvcc makes of the kernels, where it is: 16 bytes of global memory that lie together are read and
written at once."""
import os
import re
import shutil
import subprocess
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Kernels that have another way, element by element, for rows at any address.
ANY_ADDRESS = ("classifier_gradient_kernel", "squares_kernel", "attention_decode_kernel")

ENTRY = re.compile(r"\.entry (\w+)\(.*?\n\{(.*?)\n\}", re.S)
ACCESS = re.compile(r"\s*(?:@!?%p\d+ )?(ld|st)\.((?:\w+\.)*)[a-z](\d+)\s+.*\[(%\w+)(?:\+(-?\d+))?\]")


def narrow_accesses(body):
    """(ld or st, base register, first byte) of 16 bytes that one basic block reads or writes in smaller pieces."""
    pieces = defaultdict(set)
    block = 0
    for line in body.splitlines():
        if line.startswith("$L"):
            block += 1
        if not (access := ACCESS.match(line)):
            continue
        kind, modifiers, bits, base, offset = access.groups()
        vector = re.search(r"\bv(\d)\.", modifiers)
        size = int(bits) // 8 * int(vector[1] if vector else 1)
        if "global." in modifiers and size < 16:
            first = int(offset or 0)
            pieces[kind, block, base].update(range(first, first + size))
    return [(kind, base, first) for (kind, _, base), touched in pieces.items() for first in touched
            if first - 1 not in touched and touched.issuperset(range(first, first + 16))]


@pytest.mark.parametrize("lines, found", [
    (["st.global.v2.f32 \t[%rd1], {%f1, %f2};", "st.global.f32 \t[%rd1+8], %f3;", "st.global.u32 \t[%rd1+12], %r1;"], 1),
    (["@%%p1 ld.global.nc.b16 \t%%rs1, [%%rd2+%d];" % (2 * i) for i in range(8)], 1),
    (["st.global.v4.f32 \t[%rd1], {%f1, %f2, %f3, %f4};"], 0),
    (["st.global.f32 \t[%%rd%d], %%f1;" % i for i in range(4)], 0),
    (["st.shared.f32 \t[%%r1+%d], %%f1;" % (4 * i) for i in range(4)], 0),
    (["st.global.f32 \t[%%rd1+%d], %%f1;" % (4 * i) for i in range(3)], 0),
    (["st.global.v2.f32 \t[%rd1], {%f1, %f2};", "$L__BB0_2:", "st.global.v2.f32 \t[%rd1+8], {%f1, %f2};"], 0),
])
def test_narrow_accesses_are_found(lines, found):
    assert len(narrow_accesses("\n".join(lines))) == found


@pytest.mark.slow
def test_16_bytes_are_one_access():
    build = os.environ.get("BUILD", "build")
    if "NVCC" not in os.environ and not shutil.which("nvcc") and not Path("/usr/local/cuda/bin/nvcc").exists():
        pytest.skip("needs nvcc")
    subprocess.run(["make", "-s", f"-j{len(os.sched_getaffinity(0))}", "CUDA=1", f"BUILD={build}", "ptx"], cwd=ROOT,
                   check=True)
    kernels, narrow = 0, {}
    for source in sorted((ROOT / "kernels/cuda").glob("*.cu")):
        ptx = (ROOT / build / "ptx" / source.name).with_suffix(".ptx").read_text(encoding="utf-8")
        for name, body in ENTRY.findall(ptx):
            kernels += 1
            if (found := narrow_accesses(body)) and not any(kernel in name for kernel in ANY_ADDRESS):
                narrow[name] = found
    assert kernels > 50
    assert not narrow
