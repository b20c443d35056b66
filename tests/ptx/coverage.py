"""coverage.py FOLDER: what the tests on the interpreter reached, from the files that PTXSIM_COVERAGE named: a line for each
kernel in FOLDER/kernels.txt, the least executed first. Fails where no test launched one: it is to be tested, or deleted
from its dispatch."""
import subprocess
import sys
from pathlib import Path

OWN_KERNELS = ("test_ptx_arithmetic", "test_ptx_mistakes", "test_ptx_warps")  # of the interpreter's tests


def main():
    folder = Path(sys.argv[1])
    kernels = {}  # name: launches, instructions of threads, and whether each instruction was executed
    for file in sorted(folder.glob("test_*")):
        if file.name in OWN_KERNELS:
            continue
        for line in file.read_text().splitlines():
            name, launches, lanes, executed = line.split(" ")
            before = kernels.get(name, (0, 0, "0" * len(executed)))
            union = "".join(max(pair) for pair in zip(before[2], executed))
            kernels[name] = (before[0] + int(launches), before[1] + int(lanes), union)
    if not kernels:
        sys.exit(f"{folder}: no test has run")
    readable = subprocess.run(["c++filt"], input="\n".join(kernels), capture_output=True, text=True, check=True)
    rows = sorted((executed.count("1") / len(executed), launches, name)
                  for name, (launches, _, executed) in zip(readable.stdout.splitlines(), kernels.values()))
    text = [f"{100 * part:5.1f}% {launches:7} launches  {name}\n" for part, launches, name in rows]
    (folder / "kernels.txt").write_text("".join(text))
    instructions = sum(len(executed) for _, _, executed in kernels.values())
    reached = sum(executed.count("1") for _, _, executed in kernels.values())
    print(f"{sum(launches > 0 for _, launches, _ in rows)} of {len(rows)} kernels launched, {reached} of {instructions} "
          f"instructions of PTX executed ({100 * reached / instructions:.1f}%), "
          f"{sum(lanes for _, lanes, _ in kernels.values()) / 1e9:.1f} billion by threads; by kernel: {folder}/kernels.txt")
    missing = [name for _, launches, name in rows if not launches]
    for name in missing:
        print(f"no test launches {name}")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
