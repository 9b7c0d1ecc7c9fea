"""Each notebook is one test, run as `nbdev_test --n_workers 0` runs it: in one process, without flagged cells

`CELLMAE_FLAGS='slow data' pytest tests/test_nbs.py` runs those too."""
import os

import pytest
from nbdev.config import get_config
from nbdev.doclinks import nbglob
from nbdev.test import test_nb as run_nb

cfg = get_config()
nbs = sorted(nbglob(as_path=True))


@pytest.mark.parametrize('path', nbs, ids=lambda o: o.relative_to(cfg.nbs_path).with_suffix('').as_posix())
def test_notebook(path):
    import matplotlib.pyplot as plt
    flags = os.environ.get('CELLMAE_FLAGS', '').split()
    passed,_ = run_nb(path.absolute(), skip_flags=cfg.tst_flags.split(), force_flags=flags, basepath=cfg.config_path)
    plt.close('all')
    assert passed, 'see the traceback on stderr'
