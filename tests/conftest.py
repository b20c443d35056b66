"""conftest.py: pytest's settings for this folder, and the data that tests of the program train on."""
import os
import signal
from pathlib import Path

import pytest

# Under nohup, or in the background of a script, some signals are ignored, and programs started here would inherit that.
# A handler goes with exec: they have the default.
for number in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, lambda *_: None)


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes more than a few seconds; left out by tests/run.py --fast")
    config.addinivalue_line("markers", "cuda: of the program on the CUDA backend (tests/run.py --suite cuda-on-cpu, gpu)")


@pytest.fixture(autouse=True)
def no_run_goes_on():
    """A test that fails half-way leaves no run behind that trains for ever."""
    from program import PROGRAM

    yield
    for task in Path("/proc/self/task").iterdir():
        for child in (task / "children").read_text().split():
            if os.path.realpath(f"/proc/{child}/exe") == str(PROGRAM):
                os.kill(int(child), signal.SIGKILL)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A folder with one training and one validation shard of byte tokens. Skips where the program is not built."""
    from program import PROGRAM, language, write_shard

    if not PROGRAM.exists():
        pytest.skip("./train_gpt2 is not built (make)")
    folder = tmp_path_factory.mktemp("data")
    write_shard(folder / "text_train_000000.bin", language(20000, seed=1))
    write_shard(folder / "text_val_000000.bin", language(2000, seed=2))
    return folder


@pytest.fixture
def train(data, tmp_path):
    """train(name, *flags): a tiny run on the data into tmp_path/name, which must succeed. Returns that path."""
    from program import TINY, succeed, with_defaults

    def start(name, *flags, steps=12):
        out = tmp_path / name
        defaults = [*TINY, "--data", data / "text_train_*.bin", "--eval-every", 0]
        succeed("--steps", steps, "--out", out, *with_defaults(flags, defaults))
        return out

    return start
