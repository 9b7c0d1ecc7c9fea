"""Training steps and embedding of a small MAE alone and beside a busy program, as it is and `neighbourly`: `python benchmarks/busy.py`

A process per way to wait; in each, rounds without and with neighbours take turns. *Over as it is* is the ratio of medians."""
import argparse, json, os, subprocess, sys, time
from contextlib import contextmanager, nullcontext
from statistics import median

import pandas as pd, torch
from timing import markdown
from cellmae.device import has_bf16, memory_kept, neighbourly, spare_team
from cellmae.zoo import create_model

WAYS = {'as it is': nullcontext, 'neighbourly': neighbourly, 'always asleep': spare_team, 'OMP_WAIT_POLICY=passive': nullcontext}
WORK = 'training step','embedding'

@contextmanager
def neighbours(n):
    "So many processes that do nothing but compute, each of equal share with this one"
    busy = [subprocess.Popen([sys.executable, '-c', 'while True: pass']) for _ in range(n)]
    try: yield
    finally:
        for o in busy: o.kill(); o.wait()

def workload(a):
    "One training step and one embedding, as functions without arguments"
    torch.manual_seed(0)
    model = create_model(a.model, in_chans=6, img_size=a.size)
    x = torch.randint(0, 256, (a.bs,6,a.size,a.size), dtype=torch.uint8)
    low = lambda: torch.autocast('cpu', torch.bfloat16, enabled=has_bf16(x.device))
    def train():
        with low(): loss = model(x).loss
        loss.backward()
    def embed():
        with torch.inference_mode(), low(): model.encode(x)
    return dict(zip(WORK, (train, embed)))

def timed(work, seconds):
    "Median and longest seconds of a run, of as many as fit into `seconds`"
    took,start = [],time.perf_counter()
    while not took or time.perf_counter()-start<seconds:
        begun = time.perf_counter()
        work()
        took.append(time.perf_counter()-begun)
    return median(took),max(took)

def measure(a):
    "Rows `what, neighbours, round, median, longest` of one way to wait, in this process"
    torch.set_num_threads(a.threads)
    rows = []
    with memory_kept(), WAYS[a.way]():
        for work in (todo := workload(a)).values(): work()
        for round in range(a.rounds):
            for n in a.neighbours:
                with neighbours(n):
                    timed(todo['embedding'], a.settle)
                    rows += [(what, n, round, *timed(work, a.seconds)) for what,work in todo.items()]
    return rows

def in_process(way, args):
    "Rows of one way, measured in a process of its own, since the policy is read when torch is loaded"
    env = {k: v for k,v in os.environ.items() if k not in ('OMP_WAIT_POLICY','GOMP_SPINCOUNT')}
    if '=' in way: env.update([way.split('=')])
    out = subprocess.run([sys.executable, '-W', 'ignore', __file__, *args, '--way', way], env=env, text=True, stdout=subprocess.PIPE, check=True)
    t = pd.DataFrame(json.loads(out.stdout), columns=['what','neighbours','round','median','longest'])
    return t.assign(way=way)

def table(rows):
    "A row per work, number of neighbours and way"
    t = rows.groupby(['what','neighbours','way'], sort=False).agg(seconds=('median','median'), longest=('longest','max')).reset_index()
    usual = t[t.way=='as it is'].set_index(['what','neighbours']).seconds
    t['over as it is'] = t.seconds/usual.loc[pd.MultiIndex.from_frame(t[['what','neighbours']])].to_numpy()
    return t.sort_values(['what','neighbours'], kind='stable').round(3)

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--model', default='mae_vitt8')
    p.add_argument('--size', type=int, default=64, help='side of a crop')
    p.add_argument('--bs', type=int, default=32)
    p.add_argument('--threads', type=int, default=2)
    p.add_argument('--neighbours', type=int, nargs='+', default=[0,1])
    p.add_argument('--rounds', type=int, default=3)
    p.add_argument('--seconds', type=float, default=4, help='for each work in each round')
    p.add_argument('--settle', type=float, default=11, help='seconds before that, in which `neighbourly` may notice that others came or went')
    p.add_argument('--ways', nargs='+', default=list(WAYS))
    p.add_argument('--way', help='measure this one, here, and print rows as JSON')
    a = p.parse_args()
    if a.way: print(json.dumps(measure(a)))
    else: print(markdown(table(pd.concat([in_process(o, sys.argv[1:]) for o in a.ways])).to_dict('records')))
