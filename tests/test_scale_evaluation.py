"Memory of the evaluation does not grow with the number of pairs"
import tracemalloc

import numpy as np
import pandas as pd

from cellmae.recall import recall
from cellmae.retrieval import average_precision


def peak(f):
    "MB allocated at most"
    tracemalloc.start()
    try: return f(), tracemalloc.get_traced_memory()[1]/1e6
    finally: tracemalloc.stop()

def test_average_precision_of_9216_wells():
    "42 million pairs, as lists of indices and cosines many GB"
    g = np.random.default_rng(0)
    obs = pd.DataFrame(dict(perturbation=np.arange(9216)//8, plate=np.arange(9216)%24))
    t,mb = peak(lambda: average_precision((g.normal(size=(9216, 32)), obs), neg_diffby='perturbation'))
    assert mb < 120
    assert abs((t.average_precision-t.chance).mean()) < 1e-3

def test_streaming_recall():
    "32 million pairs are 128 MB as they are"
    g = np.random.default_rng(0)
    X,known = g.normal(size=(8000, 32)),pd.DataFrame(g.integers(0, 8000, (5000, 2)).astype(str), columns=['entity1', 'entity2'])
    a,whole = peak(lambda: recall((X, np.arange(8000)), known, n_boot=0, n_perm=0))
    b,passed = peak(lambda: recall((X, np.arange(8000)), known, n_boot=0, n_perm=0, max_pairs=0))
    assert a.recall.tolist() == b.recall.tolist()
    assert passed < 110 < whole
