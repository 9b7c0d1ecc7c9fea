#!/usr/bin/env python
"The planner against this machine: memory and time of an epoch of six models, each in a process of its own"
import argparse, ctypes, json, os, re, subprocess, sys, time
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event, Thread

import torch
import timing

CASES = {'mae_vitt8': 64, 'camae_vitt8_shared': 32, 'mae_vits16': 8, 'mae_vitb16': 4, 'camae_vits16': 2, 'munet_m': 2} # images in a batch
STEPS = 3 # of an epoch
out = Path(__file__).parent/'planner'

class Heap(ctypes.Structure):
    "What glibc says of its heap"
    _fields_ = [(k, ctypes.c_size_t) for k in 'arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost'.split()]

def in_use():
    "Bytes handed out by the C library"
    libc = ctypes.CDLL(None)
    libc.mallinfo2.restype = Heap
    heap = libc.mallinfo2()
    return heap.uordblks+heap.hblkhd

def resident(key): return int(re.search(key+r':\s*(\d+)', Path('/proc/self/status').read_text())[1])*1024

class Watched:
    "GB that come to be in use, and resident, while something runs"
    def __enter__(self):
        Path('/proc/self/clear_refs').write_text('5') # VmHWM begins again
        self.before,self.begin,self.most,self.done = in_use(),resident('VmRSS'),0,Event()
        self.thread = Thread(target=self.look, daemon=True)
        self.thread.start()
        return self
    def look(self):
        while not self.done.wait(.001): self.most = max(self.most, in_use())
    def __exit__(self, *args):
        self.done.set(); self.thread.join()
        self.used,self.held = (self.most-self.before)/2**30,(resident('VmHWM')-self.begin)/2**30

def learner(name, bs, folder):
    "A learner on a simulated screen with enough sites for some steps"
    from cellmae.data import screen_dls
    from cellmae.learner import mae_learner
    from cellmae.synth import synth_screen
    from cellmae.zoo import create_model, recipe
    size,wells = recipe(name).crop,-(-bs*STEPS//2)
    screen = synth_screen(f'{folder}/screen', n_pathways=1, genes_per_pathway=1, n_inactive=0, n_batches=1, controls_per_batch=wells, size=size, n_workers=0)
    dls = screen_dls(screen, size, bs, valid=0., device='cpu')
    return mae_learner(dls, create_model(name), folder, {}, bf16=False, n_pictures=0)

def measure(name):
    "Print memory, and seconds of an epoch after one that warms up"
    from cellmae.device import memory_kept
    bs = CASES[name]
    with TemporaryDirectory() as folder, memory_kept():
        warm = learner('mae_vitt8', 8, f'{folder}/warm')
        with warm.no_bar(), warm.no_logging(): warm.fit(1)
        del warm
        with Watched() as seen:
            learn = learner(name, bs, folder)
            images,secs = len(learn.dls.train.ids),[]
            with learn.no_bar(), learn.no_logging():
                for _ in range(2):
                    t = time.perf_counter(); learn.fit(1); secs.append(time.perf_counter()-t)
    largest = max(len(b) for b in learn.dls.train.epoch_batches(0))
    print(json.dumps(dict(model=name, bs=largest, images=images, used=seen.used, held=seen.held, seconds=secs[1])))

def guessed(row, speeds):
    "What the planner says of the same epoch"
    from cellmae.scale import plan
    p = plan(row['model'], row['images'], bs=row['bs'], bf16=False, device='cpu', flops_per_s=speeds[0], bytes_per_s=speeds[1]).iloc[0]
    return p.memory_gb,p.epoch_h*3600

def speeds():
    "Operations and bytes per second: what explains the step of a large and that of a small model"
    from cellmae.scale import How, measure_speed, needs
    from cellmae.zoo import cost, recipe
    rows,secs = [],[]
    for name,bs in dict(mae_vits16=8, camae_vitt8_shared=32).items():
        work,need = cost(name)['train']*1e9,needs(name, recipe(name).crop, How(bf16=False, gpu=False))
        rows.append([work, need.moved]); secs.append(work/measure_speed(name, 'cpu', bs, 3, bf16=False))
    a,b = torch.linalg.solve(torch.tensor(rows, dtype=torch.float64), torch.tensor(secs, dtype=torch.float64)).tolist()
    return (1/a,1/b) if min(a, b)>0 else (sum(r[0] for r in rows)/sum(secs),None)

def report(rows, rates, where):
    table = []
    for r in rows:
        gb,secs = guessed(r, rates)
        table.append({'model': r['model'], 'batch': r['bs'], 'planned, GB': f'{gb:.2f}', 'in use, GB': f"{r['used']:.2f}", 'off': f"{gb/r['used']-1:+.0%}",
                      'resident, GB': f"{r['held']:.2f}", 'resident / in use': f"{r['held']/r['used']:.2f}",
                      'planned, s': f'{secs:.1f}', 'measured, s': f"{r['seconds']:.1f}", 'off ': f"{secs/r['seconds']-1:+.0%}"})
    by = f'{rates[0]/1e9:.0f} GFLOP/s'+(f' and {rates[1]/1e9:.1f} GB/s' if rates[1] else '')
    return (f'`python benchmarks/planner.py`\n\n{json.dumps(where)}\n\nThe most memory that two epochs took, model, images and optimiser, and seconds of the second, in float32. In use: handed out by the C library '
            f'at the worst moment; resident: with the holes in its heap. Time planned from {by}, measured once on steps of mae_vits16 and camae_vitt8_shared.\n\n{timing.markdown(table)}\n')

def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--model', choices=list(CASES), help='(used by the script itself) measure one')
    p.add_argument('--models', nargs='*', default=list(CASES))
    p.add_argument('--threads', type=int, default=2)
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    if a.model: return measure(a.model)
    rates,rows = speeds(),[]
    for name in a.models:
        res = subprocess.run([sys.executable,__file__,'--model',name,'--threads',str(a.threads)], capture_output=True, text=True)
        if res.returncode: print(name, 'failed:', res.stderr[-400:]); continue
        rows.append(json.loads(res.stdout.splitlines()[-1])); print(rows[-1], flush=True)
    out.mkdir(exist_ok=True)
    text = report(rows, rates, timing.machine(torch.device('cpu'), ('torch','timm')))
    (out/'results.md').write_text(text); print(text)

if __name__ == '__main__': main()
