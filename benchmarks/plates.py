"""Opening, saving and checking plates at the size of a real screen: CPU seconds and memory

    OMP_NUM_THREADS=1 python benchmarks/plates.py [--plates 10] [--sites 500000] [--before ANOTHER_CHECKOUT]

`--plates` times 384 wells of 9 fields and 6 channels are hard links to one small TIFF. `--before` names the checkout of another
version, which is loaded into the same process under another name, and takes turns with this one. Medians of CPU seconds; memory is
what the process holds more afterwards, in MB. A step that a version does not have stays empty."""
import argparse, gc, importlib.util, os, sys, tempfile, time
from pathlib import Path
from statistics import median

import numpy as np, pandas as pd, tifffile

root = Path(__file__).resolve().parents[1]


def package(folder, name):
    "The library of a checkout under a name of its own"
    spec = importlib.util.spec_from_file_location(name, Path(folder)/'cellmae/__init__.py', submodule_search_locations=[str(Path(folder)/'cellmae')])
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return importlib.import_module(f'{name}.screen')

def write_plates(folder, plates, wells=384, fields=9, channels=6):
    "Hard links to one file per plate (no file can have more than 65,000), named as RxRx does"
    for p in range(plates):
        d,one = folder/f'P{p:03d}',folder.parent/f'{p}.tif'
        d.mkdir(parents=True)
        tifffile.imwrite(one, np.random.default_rng(p).integers(0, 4000, (32,32)).astype(np.uint16))
        for w in range(wells):
            well = f'{chr(65+w//24)}{w%24+1:02d}'
            for s in range(fields):
                for c in range(channels): os.link(one, d/f'{well}_s{s+1}_w{c+1}.tif')

def site_table(n):
    "Sites of six channels, as people hold them: text"
    i = np.arange(n)
    t = pd.DataFrame(dict(batch=[f'batch{o}' for o in i//(384*9*10)], plate=[f'P{o:03d}' for o in i//(384*9)]))
    t['well'] = [f'{chr(65+o//24)}{o%24+1:02d}' for o in i//9%384]
    t['site'] = [str(o+1) for o in i%9]
    t['perturbation'] = [f'GENE{o}' for o in i//9%384]
    for c in ('DNA','ER','RNA','AGP','mito','BF'):
        t[f'file_{c}'] = [f'{p}/{w}_s{s}_{c}.tif' for p,w,s in zip(t.plate, t.well, t.site)]
    return t

def held():
    gc.collect()
    return int(next(o for o in open('/proc/self/status') if o.startswith('VmRSS')).split()[1])/1e3

def timed(f):
    "Result, CPU seconds, and MB that are held more"
    before,start = held(),time.process_time()
    x = f()
    return x, time.process_time()-start, held()-before

def steps(screen, folder, table):
    "The steps of section 'Scale', each a name and a function"
    S,made,out = screen.Screen,{},Path(tempfile.mkdtemp())
    def keep(k, f): made[k] = f(); return made[k]
    yield 'open by the names of files', lambda: keep('a', lambda: S.from_pattern(folder, '{plate}/{well}_s{site}_w{channel}.tif'))
    if hasattr(S, 'open'): yield 'open by its path alone', lambda: S.open(folder)
    yield 'a table in memory', lambda: keep('b', lambda: S(table))
    yield 'wells', lambda: made['b'].wells
    yield 'split', lambda: screen.split(made['b'])
    def save():
        made['b']._ranges = np.float32([[0,4000]]*6)
        made['b'].save(out/'saved')
    yield 'save', save
    yield 'open what was saved', lambda: S(out/'saved')
    yield 'fingerprint', lambda: made['a'].fingerprint()
    yield 'check 2,000 sites', lambda: made['a'].subset(np.arange(2000)).check()

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--plates', type=int, default=10)
    p.add_argument('--sites', type=int, default=500_000, help='rows of the table in memory')
    p.add_argument('--before', help='another checkout')
    p.add_argument('--rounds', type=int, default=3)
    args = p.parse_args()
    with tempfile.TemporaryDirectory() as tmp:
        write_plates(Path(tmp)/'plates', args.plates)
        table,libs = site_table(args.sites),{'now': package(root, 'now')}
        if args.before: libs = {'before': package(args.before, 'before'), **libs}
        rows = {}
        for _ in range(args.rounds):
            for k,lib in libs.items():
                for name,f in steps(lib, Path(tmp)/'plates', table):
                    sys.stdout, out = open(os.devnull, 'w'), sys.stdout
                    try: *_,cpu,mb = timed(f)
                    finally: sys.stdout.close(); sys.stdout = out
                    rows.setdefault((name,k), []).append((cpu,mb))
    t = pd.DataFrame({k: dict(cpu=median(c for c,_ in v), MB=v[0][1]) for k,v in rows.items()}).T.unstack()
    print(t.round(2).to_string())

if __name__=='__main__': main()
