"""From disk to batches and profiles: our store and readers and those of others, on the same images

    python benchmarks/data_images.py FOLDER
    python benchmarks/data.py FOLDER [--peers ENVIRONMENTS] [--before CHECKOUT] [--parts crops]

`ENVIRONMENTS` holds an environment for each other library, `litdata/bin/python` and so on (see
README.md); those that are not there are left out. Each part leaves a JSON file in `--out`, and
`results.md` is made of all that are there."""
import json, random, subprocess, sys, time
from pathlib import Path
from statistics import median

import torch

import data_embed as whole
from data_readers import parser
from data_report import report_all
from timing import machine

here = Path(__file__).resolve().parent
OURS = ['screen:store','screen:archive',
        *(f'CropLoader:{k}' for k in ('store','archive','tiff','deflate','png','ome_zarr')),
        'npy','zarr','hdf5']
BEFORE = ['before:tiff','before:deflate']
PEERS = ['tensorstore','litdata','mds','datasets','lance','webdataset',
         'batches:litdata','batches:mds','batches:datasets']
WINDOWS = ['screen:store',*(f'CropLoader:{k}' for k in ('store','planes','planes_deflate'))]
LIBRARIES = 'cellmae torch numpy zarr tifffile imagecodecs h5py'.split()


# crops: workers asked in turn

class Asked:
    "A worker in a process of its own, asked line by line"
    def __init__(self, python, script, folder, *more):
        self.errors = open(Path(folder)/'errors.log', 'a')
        command = [python, here/script, folder, *map(str, more)]
        self.process = subprocess.Popen(command, text=True, stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, stderr=self.errors)
    def ask(self, *words):
        try:
            print(*words, file=self.process.stdin, flush=True)
            return json.loads(self.process.stdout.readline() or '{"error": "it ended"}')
        except BrokenPipeError: return dict(error='it ended')
    def close(self): self.process.stdin.close(); self.process.wait(); self.errors.close()

def worker_of(library, folder, a):
    "A worker for a library, or for all that is installed here; None where it is not there"
    core,before = ['--core', a.core],['--before', a.before] if a.before else []
    if library=='here': return Asked(sys.executable, 'data_ours.py', folder, *core, *before)
    python = Path(a.peers or 'nowhere')/library/'bin/python'
    return Asked(python, 'data_readers.py', folder, *core) if python.exists() else None

def workers_of(folder, names, a):
    "The worker that has each name"
    library = {n: n.split(':')[-1] for n in names}
    where = {n: k if k in PEERS else 'here' for n,k in library.items()}
    each = {k: worker_of(k, folder, a) for k in dict.fromkeys(where.values())}
    return {n: each[k] for n,k in where.items() if each[k]}

def prepared(worker, name, folder):
    "What is said of a reader whose images are there and right; or of what went wrong"
    cost = folder/f'{name.split(":")[-1]}.json' # of writing, where that was done
    if not cost.exists(): cost.write_text(json.dumps(worker.ask('write', name)))
    cost = json.loads(cost.read_text())
    return cost if 'error' in cost else {**cost, **worker.ask('check', name)}

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
    return [crops_row(n, r, about[n]) for n,r in rates.items()]

def crops_row(name, rates, about):
    return dict(reader=name, rate=median(rates), low=min(rates), high=max(rates), rates=rates,
                **about)


# parts

def part_crops(folder, a): return crops(folder/'crops', OURS+BEFORE*bool(a.before)+PEERS, a)

def part_windows(folder, a):
    "Crops of sites that are larger and have 16 bits, ours alone"
    return crops(folder/'sites', WINDOWS, a)

def part_overlap(folder, a):
    return [whole.overlap(folder/'sites/planes_deflate', a.model, a.rounds//2)]

def part_readers(folder, a): return whole.readers_alone(folder/'sites', a.rounds//2)

def part_memory(folder, a):
    "Peaks of processes of their own, and their curves"
    def one(n, what):
        d = folder/f'small/{n}'
        if not d.exists(): whole.small_screen(d, n)
        command = [sys.executable, here/'data_embed.py', d, what]
        res = subprocess.run(command, text=True, stdout=subprocess.PIPE, check=True)
        return json.loads(res.stdout.splitlines()[-1])
    return [one(n, what) for what in whole.MEMORY for n in a.small]

def part_packing(folder, a):
    "Sites of 16 bits and images of bytes"
    kinds = dict(sites=['planes','planes_deflate'], crops=['tiff','deflate'])
    return [r for k,v in kinds.items() for r in whole.packing(folder/k, v, a.rounds//2)]

PARTS = {k[5:]: f for k,f in globals().items() if k.startswith('part_')}

def keep(file, rows, seconds):
    where = machine(torch.device('cpu'), LIBRARIES)
    file.write_text(json.dumps(dict(rows=rows, machine=where, seconds=round(seconds)), indent=1))

def main():
    p = parser(__doc__)
    p.add_argument('folder', type=Path, help='made by `data_images.py`')
    p.add_argument('--peers', help='folder with an environment for each other library')
    p.add_argument('--before', help='checkout of another version')
    p.add_argument('--parts', nargs='+', choices=list(PARTS), default=list(PARTS))
    p.add_argument('--rounds', type=int, default=4, help='of crops; half as many of whole sites')
    p.add_argument('--core', type=int, default=0, help='that crops are read on')
    p.add_argument('--model', default='mae_vits16')
    p.add_argument('--small', type=int, nargs='+', default=[200,2000,20000],
                   help='sites of the part about memory')
    p.add_argument('--out', type=Path, default=here/'data')
    a = p.parse_args()
    a.out.mkdir(parents=True, exist_ok=True)
    for name in a.parts:
        start = time.time()
        rows = PARTS[name](a.folder, a)
        print(f'{name}: {time.time()-start:.0f} s')
        keep(a.out/f'{name}.json', rows, time.time()-start)
    report_all(a.out)

if __name__=='__main__': main()
