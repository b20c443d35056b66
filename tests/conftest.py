"""conftest.py: pytest's settings for this folder."""


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes more than a few seconds; left out by tests/run.py --fast")
