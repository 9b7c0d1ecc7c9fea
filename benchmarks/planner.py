#!/usr/bin/env python
"The planner against this machine: memory and time of a short epoch of six models, each in a process of its own"
import argparse, ctypes, json, re, subprocess, sys, time
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event, Thread

import torch
import timing

CASES = {'mae_vitt8': (64,8), 'camae_vitt8_shared': (32,6), 'mae_vits16': (8,3), 'mae_vitb16': (6,3), 'camae_vits16': (2,3), 'munet_m': (2,3)} # images of a batch, steps

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

def learner(name, bs, steps, folder):
    "A learner as `fit_mae` makes it, on a simulated screen of one site in each well"
    from cellmae.data import screen_dls
    from cellmae.learner import mae_learner
    from cellmae.synth import synth_screen
    from cellmae.zoo import create_model, recipe
    size = recipe(name).crop
    screen = synth_screen(f'{folder}/screen', n_pathways=1, genes_per_pathway=1, n_inactive=0, n_batches=1, controls_per_batch=bs*steps-1, size=size, n_workers=0)
    dls = screen_dls(screen, size, bs, valid=0., device='cpu')
    return mae_learner(dls, create_model(name), folder, {}, bf16=False, n_pictures=0)

def epochs(learn, n):
    "Seconds of each of some epochs"
    secs = []
    with learn.no_bar(), learn.no_logging():
        for _ in range(n): t = time.perf_counter(); learn.fit(1); secs.append(time.perf_counter()-t)
    return secs

def measure(name):
    "Print memory and seconds of an epoch, after one that warms up, and the speed that `measure_speed` finds then"
    from cellmae.device import memory_kept
    from cellmae.scale import measure_speed
    bs,steps = CASES[name]
    with TemporaryDirectory() as folder, memory_kept():
        epochs(learner('mae_vitt8', 4, 1, f'{folder}/warm'), 1) # libraries take what they need
        with Watched() as seen:
            learn = learner(name, bs, steps, folder)
            secs = epochs(learn, 2)[1]
        sizes = [len(b) for b in learn.dls.train.epoch_batches(0)]
        speed = measure_speed(name, 'cpu', max(sizes), 3, bf16=False)
    print(json.dumps(dict(model=name, bs=max(sizes), images=sum(sizes), used=seen.used, held=seen.held, seconds=secs, speed=speed)))

def run(name, threads, out):
    "Measure a model in a process of its own, plan the same, and keep both"
    from cellmae.scale import plan
    res = subprocess.run([sys.executable, __file__, '--model', name, '--threads', str(threads)], capture_output=True, text=True)
    if res.returncode: return print(name, 'failed:', res.stderr[-400:], flush=True)
    row = json.loads(res.stdout.splitlines()[-1])
    p = plan(name, row['images'], bs=row['bs'], bf16=False, device='cpu', flops_per_s=row['speed']).iloc[0]
    row.update(planned_gb=p.memory_gb, planned_s=p.epoch_h*3600, where=timing.machine(torch.device('cpu'), ('torch','timm')))
    (out/f'{name}.json').write_text(json.dumps(row, indent=1)+'\n')
    print(line(row), flush=True)

def off(planned, measured): return f'{planned/measured-1:+.0%}'

def line(r):
    "A row of the table"
    return {'model': r['model'], 'batch': r['bs'], 'planned, GB': f"{r['planned_gb']:.2f}", 'in use, GB': f"{r['used']:.2f}", 'off': off(r['planned_gb'], r['used']),
            'resident, GB': f"{r['held']:.2f}", 'GFLOP/s': f"{r['speed']/1e9:.0f}", 'images': r['images'],
            'planned, s': f"{r['planned_s']:.1f}", 'epoch, s': f"{r['seconds']:.1f}", 'off ': off(r['planned_s'], r['seconds'])}

def report(rows):
    "The page of all that was measured so far"
    return (f"`python benchmarks/planner.py`\n\n{json.dumps(rows[-1]['where'])}\n\nThe most memory that two epochs took (model, images, optimiser), in float32, and the seconds of the second, a training epoch "
            "through the learner of `fit_mae`. In use: handed out by the C library at the worst moment. Resident: what the system counts, which is more, since blocks that were freed and not used again stay with the "
            "process, and gaps between blocks of other sizes. Seconds are planned from the speed that `measure_speed` finds for the model in three steps with random images.\n\n"
            f"{timing.markdown([line(r) for r in rows])}\n")

def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--model', choices=list(CASES), help='(used by the script itself) measure one')
    p.add_argument('--models', nargs='*', choices=list(CASES), default=list(CASES))
    p.add_argument('--threads', type=int, default=2)
    p.add_argument('--out', type=Path, default=Path(__file__).parent/'planner', help='folder for a file per model and `results.md`')
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    if a.model: return measure(a.model)
    a.out.mkdir(parents=True, exist_ok=True)
    for name in a.models: run(name, a.threads, a.out)
    rows = [json.loads(f.read_text()) for name in CASES if (f := a.out/f'{name}.json').exists()]
    if rows: (a.out/'results.md').write_text(report(rows)); print(report(rows))

if __name__ == '__main__': main()
