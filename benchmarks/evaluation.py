"""The evaluation against the package `efaar-benchmarking` 1.0: same input, same result, one process

    python -m venv /some/where && /some/where/bin/pip install . copairs && /some/where/bin/pip install --no-deps efaar-benchmarking
    OMP_NUM_THREADS=2 /some/where/bin/python benchmarks/evaluation.py [map tvn recall stream] [--genes 17000] [--dims 384 1024] [--plates 60] [--repeats 3]

Only two functions of that package are used, so its heavier dependencies (scvi-tools, geomloss) are replaced by empty modules
where they are not installed. Each line runs both sides in turn in this process, `repeats` times, and reports medians: of seconds, of
the ratios of seconds and CPU seconds within each round, and of memory, which is the peak of the process (VmHWM, reset before each
run) less what it held before. The last column is the largest difference between the two results."""
import argparse, gc, importlib, sys, time, types, warnings
from importlib.metadata import version
from pathlib import Path
from statistics import median

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from cellmae.recall import recall
from cellmae.retrieval import average_precision
from cellmae.tvn import TVN


def stub(name, attr):
    "An empty module where `name` is not installed"
    try: importlib.import_module(name)
    except ImportError: sys.modules[name] = types.SimpleNamespace(**{attr: None}, __name__=name, __spec__=None)

for o in (('scvi.model', 'SCVI'), ('geomloss', 'SamplesLoss')): stub(*o)
from efaar_benchmarking.benchmarking import known_relationship_benchmark
from efaar_benchmarking.constants import BENCHMARK_DATA_DIR, BENCHMARK_SOURCES
from efaar_benchmarking.efaar import tvn_on_controls
from sklearn.utils import Bunch


def held(key): return int(next(o for o in open('/proc/self/status') if o.startswith(key)).split()[1])/1e6

def measure(f):
    "Result, seconds, CPU seconds, and GB above what was held"
    gc.collect(); open('/proc/self/clear_refs', 'w').write('5')
    m,t,c = held('VmRSS'),time.perf_counter(),time.process_time()
    res = f()
    return res, time.perf_counter()-t, time.process_time()-c, held('VmHWM')-m

def rounds(fs, repeats):
    "Results of the first round, and seconds, CPU seconds and GB `(repeats,len(fs),3)`; the order turns every round"
    first,nums = [None]*len(fs),np.empty((repeats,len(fs),3))
    for r in range(repeats):
        for i in list(range(len(fs)))[::1 if r%2==0 else -1]:
            res,*nums[r,i] = measure(fs[i])
            if r==0: first[i] = res
    return first,nums

def cell(m): return f'{m[0]:.{2 if m[0]<10 else 0}f} s, +{m[2]:.2f} GB'

def versus(name, ours, theirs, gap, repeats):
    "Both sides in turn; one line of the table"
    res,m = rounds([ours,theirs], repeats)
    times = [f'{median(m[:,1,i]/m[:,0,i]):.1f}x' for i in (0,1)]
    a,b = np.median(m, 0)
    print(f'| {name} | {cell(b)} | {cell(a)} | {times[0]} | {times[1]} | {b[2]/max(a[2], 1e-3):.1f}x | {gap(*res):.1e} |', flush=True)

def alone(name, ours, repeats):
    "One side, where the other has no such thing or cannot be run"
    print(f'| {name} | - | {cell(np.median(rounds([ours], repeats)[1], 0)[0])} | | | | |', flush=True)


def noise_map(n, D):
    "Five public sets, and `n` profiles: genes of the sets first, then made-up names"
    sets = {k: Path(BENCHMARK_DATA_DIR)/f'{k}.txt' for k in BENCHMARK_SOURCES}
    known = sorted({str(o) for f in sets.values() for o in pd.read_csv(f, dtype=str, keep_default_na=False).to_numpy().ravel()})
    return sets, np.array((known+[f'X{i}' for i in range(n)])[:n]), np.random.default_rng(0).normal(size=(n, D)).astype(np.float32)

def bench_recall(n, D, repeats):
    sets,names,X = noise_map(n, D)
    data = Bunch(features=pd.DataFrame(X), metadata=pd.DataFrame(dict(gene=names)))
    def gap(a, b): return np.abs(a.recall.to_numpy().reshape(-1, 2)-b.set_index('source').loc[BENCHMARK_SOURCES].filter(like='recall').to_numpy()).max()
    theirs = lambda: known_relationship_benchmark(data, 'gene')
    versus(f'recall, {n:,} genes x {D}, 5 sets', lambda: recall((X, names), sets, n_boot=0, n_perm=0), theirs, gap, repeats)
    alone('the same with intervals and null', lambda: recall((X, names), sets), repeats)

def bench_stream(n, D, repeats):
    "More pairs than fit in memory"
    sets,names,X = noise_map(n, D)
    alone(f'recall, {n:,} perturbations x {D}, 5 sets', lambda: recall((X, names), sets, n_boot=0, n_perm=0), repeats)

def bench_tvn(plates, D, wells, controls, repeats):
    "Inner products are compared, as components may be mirrored: their largest difference over the largest of them"
    rng = np.random.default_rng(0)
    batch,n = np.repeat(np.arange(plates).astype(str), wells),plates*wells
    c = np.tile(np.arange(wells)<controls, plates)
    X = (rng.normal(size=(n, D))@(rng.normal(size=(D, D))/D**.5)+rng.normal(size=(plates, D))[batch.astype(int)]).astype(np.float32)
    meta = pd.DataFrame(dict(pert=np.where(c, 'EMPTY', 'x'), batch=batch))
    def gap(a, b):
        G,H = (y[:500].real.astype(float)@y[:500].real.astype(float).T for y in (a, b))
        return np.abs(G-H).max()/np.abs(H).max()
    versus(f'TVN, {plates} plates x {wells:,} wells x {D}', lambda: TVN(variant='efaar').fit_transform(X, controls=c, batches=batch),
           lambda: tvn_on_controls(X, meta, 'pert', 'EMPTY', 'batch'), gap, repeats)

def bench_map(n, D, repeats):
    "Against copairs, if it is installed; its replicates against everything else lists all pairs, so there the screen is smaller"
    try: from copairs.map import average_precision as theirs
    except ImportError: return
    rng = np.random.default_rng(0)
    X,obs = rng.normal(size=(n, D)),pd.DataFrame(dict(perturbation=np.arange(n)//8, plate=np.arange(n)%24))
    for n in (n//4, n):
        x,o = X[:n],obs[:n]
        ours = lambda: average_precision((x, o), neg_diffby='perturbation', ties='first')
        if n<=2500: versus(f'average precision, {n:,} wells x {D}', ours, lambda: theirs(o, x, ['perturbation'], [], [], ['perturbation'], progress_bar=False),
                           lambda a,b: np.abs(a.average_precision-b.average_precision).max(), repeats)
        else: alone(f'average precision, {n:,} wells x {D}', ours, repeats)


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    for k,v in dict(genes=17000, plates=60, repeats=3).items(): p.add_argument(f'--{k}', type=int, default=v)
    p.add_argument('--dims', type=int, nargs='+', default=[384,1024])
    p.add_argument('what', nargs='*', default=['map', 'tvn', 'recall', 'stream'], help='parts to run')
    a = p.parse_args()
    warnings.simplefilter('ignore')
    print(', '.join(f'{o} {version(o)}' for o in ('efaar-benchmarking', 'numpy', 'scipy', 'scikit-learn', 'pandas')), '\n')
    print('| what | theirs | ours | time | CPU time | memory | largest difference |\n|---|---|---|---|---|---|---|')
    if 'map' in a.what: bench_map(9216, 384, a.repeats)
    if 'tvn' in a.what:
        bench_tvn(a.plates, 384, 1400, 120, a.repeats)
        bench_tvn(max(12, a.plates//5), 1024, 1400, 120, a.repeats)
    for D in a.dims:
        if 'recall' in a.what: bench_recall(a.genes, D, a.repeats)
    if 'stream' in a.what: bench_stream(100_000, 128, 1)
