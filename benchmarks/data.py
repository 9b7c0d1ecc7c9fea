"""From disk to batches and profiles: our store and readers beside those of other libraries, on the same images

    python benchmarks/data_images.py FOLDER
    OMP_NUM_THREADS=1 python benchmarks/data.py FOLDER [--peers ENVIRONMENTS] [--before ANOTHER_CHECKOUT] [--parts crops]

`ENVIRONMENTS` holds an environment for each other library, `litdata/bin/python` and so on (see README.md); those that are
not there are left out. Each part leaves a JSON file in `--out`, and `results.md` is made of all that are there."""
import argparse, json, random, re, subprocess, sys, time
from pathlib import Path
from statistics import median

import torch

import data_embed as whole
from data_report import report_all
from timing import machine

here = Path(__file__).resolve().parent
OURS = ['screen:store','CropLoader:store','screen:archive','CropLoader:archive','CropLoader:tiff','CropLoader:deflate',
        'CropLoader:png','CropLoader:ome_zarr','npy','batches:npy','zarr','hdf5']
BEFORE = ['before:tiff','before:deflate']
PEERS = ['tensorstore','litdata','mds','datasets','lance','webdataset','batches:litdata','batches:mds','batches:datasets']
BASE = 'CropLoader:store'
LIBRARIES = 'cellmae torch numpy zarr tifffile imagecodecs h5py'.split()


# crops: workers asked in turn

class Asked:
    "A worker in a process of its own, asked line by line"
    def __init__(self, python, script, folder, *more):
        self.errors = open(Path(folder)/'errors.log', 'a')
        self.process = subprocess.Popen([python, str(here/script), str(folder), *map(str, more)], text=True,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors)
    def ask(self, *words):
        try:
            print(*words, file=self.process.stdin, flush=True)
            return json.loads(self.process.stdout.readline() or '{"error": "it ended"}')
        except BrokenPipeError: return dict(error='it ended')
    def close(self): self.process.stdin.close(); self.process.wait(); self.errors.close()

def worker_of(library, folder, a):
    "A worker for a library, or for all that is installed here; None where it is not there"
    more = ['--core', a.core]
    if library=='here': return Asked(sys.executable, 'data_ours.py', folder, *more, *(['--before', a.before] if a.before else []))
    python = Path(a.peers or '')/library/'bin/python'
    return Asked(python, 'data_readers.py', folder, *more) if a.peers and python.exists() else None

def workers_of(folder, names, a):
    "The worker that has each name"
    where = {n: n.split(':')[-1] if n.split(':')[-1] in PEERS else 'here' for n in names}
    each = {k: worker_of(k, folder, a) for k in dict.fromkeys(where.values())}
    return {n: each[k] for n,k in where.items() if each[k]}

def prepared(worker, name, folder):
    "What is said of a reader whose images are there and right; or of what went wrong"
    place = folder/name.split(':')[-1]
    cost = {} if place.exists() else worker.ask('write', name)
    return {**cost, **(worker.ask('check', name) if 'error' not in cost else {})}

def crops(folder, names, a):
    "Rows of readers: crops a second of CPU, all readers in turn, in another order each round"
    workers = workers_of(folder, names, a)
    about = {n: prepared(w, n, folder) for n,w in workers.items()}
    for n,o in about.items():
        if 'error' in o: print(f'{n} is left out: {o["error"]}')
    rng,rates = random.Random(0),{n: [] for n,o in about.items() if 'error' not in o}
    for k in range(a.rounds+1):
        for n in rng.sample(list(rates), len(rates)):
            o = workers[n].ask('crops', n, k)
            if k: rates[n].append(o['crops']/o['cpu'])
    for w in {*workers.values()}: w.close()
    return [crops_row(n, r, rates[BASE], about[n]) for n,r in rates.items()]

def crops_row(name, rates, base, about):
    return dict(reader=name, rate=median(rates), low=min(rates), high=max(rates), rates=rates,
                store_over=median(b/r for b,r in zip(base, rates)), **about)


# parts

def part_crops(folder, a): return crops(folder/'crops', OURS+BEFORE*bool(a.before)+PEERS, a)

def part_windows(folder, a):
    "Crops of sites that are larger and have 16 bits, ours alone"
    return crops(folder/'sites', ['screen:store','CropLoader:store','CropLoader:planes','CropLoader:planes_deflate'], a)

def part_overlap(folder, a): return [whole.overlap(folder/'sites/planes_deflate', a.model, a.rounds)]

def part_readers(folder, a):
    return whole.readers_alone(folder/'sites', ['planes','planes_deflate','png','ome_zarr','store'], rounds=a.rounds)

def part_memory(folder, a):
    "Peaks of processes of their own, and their curves"
    def one(n, what):
        d = folder/f'small/{n}'
        if not d.exists(): whole.small_screen(d, n)
        res = subprocess.run([sys.executable, here/'data_embed.py', d, what], capture_output=True, text=True)
        return json.loads(res.stdout.splitlines()[-1]) if not res.returncode else dict(what=what, sites=n, error=res.stderr[-300:])
    return [one(n, what) for what in whole.MEMORY for n in a.small]

def part_packing(folder, a):
    "Sites of 16 bits and images of bytes"
    kinds = dict(sites=['planes','planes_deflate'], crops=['tiff','deflate'])
    return [r for k,v in kinds.items() for r in whole.packing(folder/k, v, rounds=a.rounds)]

PARTS = {k[5:]: f for k,f in globals().items() if k.startswith('part_')}

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('folder', type=Path, help='made by `data_images.py`')
    p.add_argument('--peers', help='folder with an environment for each other library')
    p.add_argument('--before', help='checkout of another version')
    p.add_argument('--parts', nargs='+', choices=list(PARTS), default=list(PARTS))
    p.add_argument('--rounds', type=int, default=4)
    p.add_argument('--core', type=int, default=0, help='that crops are read on')
    p.add_argument('--model', default='mae_vits16')
    p.add_argument('--small', type=int, nargs='+', default=[200,2000,20000], help='sites of the part about memory')
    p.add_argument('--out', type=Path, default=here/'data')
    a = p.parse_args()
    a.out.mkdir(parents=True, exist_ok=True)
    for name in a.parts:
        start = time.time()
        rows = PARTS[name](a.folder, a)
        print(f'{name}: {time.time()-start:.0f} s')
        kept = dict(rows=rows, machine=machine(torch.device('cpu'), LIBRARIES), seconds=round(time.time()-start))
        (a.out/f'{name}.json').write_text(json.dumps(kept, indent=1))
    report_all(a.out)

if __name__=='__main__': main()
