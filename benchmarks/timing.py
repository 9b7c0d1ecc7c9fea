"Cases side by side in one process: rounds in shuffled order, medians, ratios paired by round"
import json, os, platform, random, re, statistics as st, subprocess, sys, time
from contextlib import nullcontext
from importlib.metadata import version, PackageNotFoundError
from pathlib import Path

import torch
from cellmae.device import memory_kept


def sync(device):
    if device.type == 'cuda': torch.cuda.synchronize()

def stopwatch(case, device):
    "Seconds and CPU seconds that one run of a case takes"
    sync(device); start,cpu = time.perf_counter(),time.process_time()
    case()
    sync(device)
    return time.perf_counter()-start, time.process_time()-cpu

def kept(name, as_used):
    "Within this, memory is kept from run to run: of all cases, or as each is used, of ours alone"
    return nullcontext() if as_used and not name.startswith('cellmae') else memory_kept()

def second_of_two(name, case, device):
    "The second of two runs, of which ours finds the memory of the first, as in our loops"
    with kept(name, True):
        case()
        return stopwatch(case, device)

def measure(
    cases, # `{name: function without arguments}`
    rounds, # How often each case runs
    device, # `torch.device`
    as_used=False, # Keep memory for our cases alone? Otherwise for all
    seed=0, # Order of the cases
): # `{name: [(seconds, CPU seconds)]}`, one pair per round
    "Run all cases once per round, in a new order each time, after a round that does not count"
    order,rng,secs = list(cases),random.Random(seed),{k: [] for k in cases}
    with nullcontext() if as_used else memory_kept():
        for _ in range(1+rounds):
            rng.shuffle(order)
            for k in order: secs[k].append(second_of_two(k, cases[k], device) if as_used else stopwatch(cases[k], device))
    return {k: v[1:] for k,v in secs.items()}

def add_options(p):
    "Options that all benchmarks of the models share"
    p.add_argument('--size', type=int, default=256, help='side of a crop')
    p.add_argument('--depth', type=int, help='blocks of the encoder, for smoke tests')
    p.add_argument('--rounds', type=int, default=9)
    p.add_argument('--threads', type=int, default=2)
    p.add_argument('--as-used', action='store_true', help='freed memory is kept from step to step for our cases alone, not for all')
    p.add_argument('--out', help='JSON file for the results')

def median(secs): return st.median([t for t,_ in secs])

def peak_rate(device, bf16, n=4096, rounds=5):
    "Operations per second of a large matrix product, in 10^12"
    a,b = torch.randn(2, n, n, device=device, dtype=torch.bfloat16 if bf16 else torch.float32)
    return 2*n**3/1e12/median(measure({'product': lambda: a@b}, rounds, device)['product'])

def utilisation(
    secs, # What `measure` gave
    work, # GFLOP per run, `{case: number}`
    device, # `torch.device`
    bf16, # Did products run in bfloat16?
): # Two columns of `table`
    "Operations per second, and what part they are of those of a large matrix product"
    peak,rate = peak_rate(device, bf16),{k: w/1e3/median(secs[k]) for k,w in work.items()}
    return {'TFLOP/s': {k: f'{r:.3g}' for k,r in rate.items()}, 'of peak': {k: f'{r/peak:.0%}' for k,r in rate.items()}}

def table(
    secs, # What `measure` gave
    ours, # Name of the case that a case is divided by, `{case: name}`, or one name for all
    n_images, # Images per run
    **columns, # Further columns, `{name: value}` each
): # Rows as dicts
    "Medians of seconds and CPU seconds, and the medians over rounds of both divided by ours"
    def ratio(k, i):
        base = ours if isinstance(ours, str) else ours[k]
        return round(st.median([a[i]/b[i] for a,b in zip(secs[k], secs[base])]), 2)
    return [{'case': k, 'seconds': f'{median(v):.3g}', 'images/s': f'{n_images/median(v):.3g}', 'over ours': ratio(k, 0),
             'CPU seconds': f'{st.median([c for _,c in v]):.3g}', 'CPU over ours': ratio(k, 1), **{c: o.get(k, '') for c,o in columns.items()}} for k,v in secs.items()]

def markdown(rows):
    heads = list(rows[0])
    return '\n'.join(['| ' + ' | '.join(heads) + ' |', '|' + '---|'*len(heads), *['| ' + ' | '.join(str(r[h]) for h in heads) + ' |' for r in rows]])

def processor():
    "What the processor calls itself"
    about = Path('/proc/cpuinfo')
    lines = about.read_text().splitlines() if about.exists() else []
    return next((l.split(':')[1].strip() for l in lines if l.startswith('model name')), platform.machine())

def machine(device, packages=('torch','timm','transformers','lightly')):
    "Where and with what this was measured"
    def have(p):
        try: return version(p)
        except PackageNotFoundError: return None
    return dict(cpu=processor(), cores=os.cpu_count(), threads=torch.get_num_threads(), load=round(os.getloadavg()[0], 1), device=torch.cuda.get_device_name() if device.type=='cuda' else 'cpu', date=time.strftime('%Y-%m-%d'),
                versions={p: have(p) for p in packages if have(p)})

def peak_memory(names):
    "Peak memory in MB of each case in a process of its own: this script again with `--only name`"
    out = {}
    for name in names:
        res = subprocess.run([sys.executable, *sys.argv, '--only', name], capture_output=True, text=True)
        out[name] = json.loads(res.stdout.splitlines()[-1])['peak_mb'] if res.returncode == 0 else f'failed: {res.stderr[-200:]}'
    return out

def report_peak(name, case, device, as_used, steps=2):
    "Run one case and print the peak of this process (CPU), or of the GPU's allocator"
    with kept(name, as_used):
        for _ in range(steps): case()
    sync(device)
    peak = torch.cuda.max_memory_allocated()/2**20 if device.type=='cuda' else int(re.search(r'VmHWM:\s*(\d+)', Path('/proc/self/status').read_text())[1])/1024
    print(json.dumps(dict(peak_mb=round(peak))))

def show(title, rows, where, out=None):
    "Print a table, and keep it with the machine's description as JSON"
    print(f'\n## {title}\n\n{markdown(rows)}\n\n{json.dumps(where)}')
    if out:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        Path(out).write_text(json.dumps(dict(title=title, rows=rows, machine=where, command=' '.join(['python', *sys.argv])), indent=1))
