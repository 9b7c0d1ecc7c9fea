"Shared by all tests: where things are, and folders that not every machine has"
import os, sys
from pathlib import Path

import pytest

root = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(root), str(root/'tools')]
os.environ.setdefault('MPLBACKEND', 'agg')


def pytest_configure(config):
    "Keys are categories: a `groupby` that does not say `observed=True` would make a row of each pair of them"
    config.addinivalue_line('filterwarnings', 'error:The default of observed=False:FutureWarning')


def _folder(var):
    "The folder that environment variable `var` names, or a skip that says so"
    path = os.environ.get(var)
    if not path: pytest.skip(f'{var} is not set')
    return Path(path)


@pytest.fixture
def data(): return _folder('CELLMAE_DATA')

@pytest.fixture
def golden(): return _folder('CELLMAE_GOLDEN')

@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    "Run at the top of the checkout, and leave environment and arguments as they were"
    monkeypatch.chdir(root)
    monkeypatch.setattr(sys, 'argv', sys.argv)
    before = dict(os.environ)
    yield
    os.environ.clear(); os.environ.update(before)
