#!/usr/bin/env python
"Steps, embedding and memory of our models on one GPU, eager and compiled, beside a plain reading; each case in a process of its own"
import argparse, copy, fcntl, json, os, signal, subprocess, sys, time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch, torch._dynamo.utils

NOMINAL = 989 # TFLOP/s of an H100 or H200 in bfloat16, dense, as its maker says
MODELS = ['mae_vits16','mae_vitl8','camae_vits16','mae_vitb8','camae_vitl16'] # the most telling first
LEAST = 10 # seconds that a case needs at least
PLAIN = 'plain reading of the released'
COMPILED = [('mae_vits16','cellmae'), ('camae_vits16','cellmae'), ('mae_vitl8','cellmae'), ('mae_vits16',PLAIN), ('mae_vitb8','cellmae'), ('camae_vitl16','cellmae'), ('camae_vits16',PLAIN), ('mae_vitl8',PLAIN)]
SIZES = dict(full=dict(size=256, budget=20., rounds=7, product=8192), tiny=dict(size=32, budget=20., rounds=1, product=256, most=4))
TINY = ['camae_vits16']
out = Path(os.environ.get('OUT') or Path(__file__).parent/'gpu')

def write(name, **row):
    "Add a line to the file of all results, whole or not at all"
    with open(out/'rows.jsonl', 'a') as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        f.write(json.dumps([name,row])+'\n'); f.flush()

def read(name):
    "Rows of one kind"
    return [row for kind,row in map(json.loads, open(out/'rows.jsonl')) if kind==name] if (out/'rows.jsonl').exists() else []

@contextmanager
def alone(seconds=0, shared=False):
    "Have the device to oneself, or share it with others that do; a process that holds it longer than `seconds`, if any, is ended, however stuck"
    with open(out/'.device', 'w') as f:
        fcntl.flock(f, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        signal.alarm(seconds)
        try: yield
        finally: signal.alarm(0)


class Case:
    "A model of ours or its plain reading, with the largest batch that the planner lets fit"
    def __init__(self, name, kinds, compiled, tiny):
        import train_step
        from cellmae.zoo import cost
        o = SIZES['tiny' if tiny else 'full']
        self.name,self.compiled,self.tiny,self.size,self.rounds = name,compiled,tiny,o['size'],o['rounds']
        self.device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
        kw = dict(depth=1) if tiny else {}
        self.kw = kw | (dict(decoder=dict(embed_dim=256, depth=2)) if tiny else {}) # as `train_step.models` makes small ones
        self.work = cost(name, self.size, **self.kw)
        self.tokens = self.work['tokens']
        fits = int(self.plan(o['budget'], 2**20).largest_bs.iloc[0])
        self.bs = max(1, min(fits-fits%8 or fits, o.get('most', fits)))
        make = train_step.models(name, tiny, img_size=self.size, **kw)
        self.models = {k: self.seeded(make[k]) for k in kinds} # on the CPU, where weights are drawn before the device is taken

    def seeded(self, make): torch.manual_seed(0); return make()

    def plan(self, memory_gb, bs):
        from cellmae.scale import plan
        return plan(self.name, 1e6, memory_gb, bs=bs, crop=self.size, **self.kw)

    def built(self, kind):
        from cellmae.blocks import compile_blocks
        model = copy.deepcopy(self.models[kind]).to(self.device)
        if self.compiled: compile_blocks(model, backend='eager' if self.tiny else 'inductor')
        return model

    def images(self, bs): return torch.randint(0, 256, (bs,6,self.size,self.size), dtype=torch.uint8, device=self.device)

    def say(self, kind, what, bs, secs, **more):
        "Keep the rate of a case"
        import timing
        work = self.work['embed' if what=='embed' else 'train']
        rate = bs/timing.median(secs)
        write('speed', model=self.name, case=kind, what=what, compiled=self.compiled, bs=bs, images_per_s=round(rate, 1), tflops=round(rate*work/1e3, 2),
              seconds=[round(s, 5) for s,_ in secs], **more)

def free():
    "What a case leaves behind must not count for the next"
    import gc
    gc.collect()
    if torch.cuda.is_available(): torch.cuda.empty_cache(); torch.cuda.reset_peak_memory_stats()

def peak_gb(): return round(torch.cuda.max_memory_allocated()/2**30, 3) if torch.cuda.is_available() else None

def halving(f, bs):
    "`f(bs)`, with half the images as often as memory runs out"
    while True:
        try: return bs,f(bs)
        except torch.OutOfMemoryError:
            if bs==1: raise
            bs //= 2; free()

def steps(case, kind, bs):
    "A training step of a case that has run twice, and seconds of that"
    import train_step
    model,x = case.built(kind).train(),case.images(bs)
    step = train_step.stepper(kind, model, x, case.tokens, True, False)
    t = time.perf_counter()
    step(); step()
    if x.is_cuda: torch.cuda.synchronize()
    return step,time.perf_counter()-t

def embedding(case, kind, bs):
    "Embedding by a case that has run once, and seconds of that"
    import embed
    model,x = case.built(kind).eval(),case.images(bs)
    t = time.perf_counter()
    embed.embed(model, x, True)
    if x.is_cuda: torch.cuda.synchronize()
    return lambda: embed.embed(model, x, True),time.perf_counter()-t

def measured(case, kind, what, made, bs):
    "Time what was made, with the device to oneself"
    import timing
    run,first = made
    secs = timing.measure({what: run}, case.rounds, case.device)[what]
    breaks = sum(torch._dynamo.utils.counters['graph_break'].values()) if case.compiled else None
    case.say(kind, what, bs, secs, first_s=round(first, 2), peak_gb=peak_gb(), graph_breaks=breaks)

def parts(case): return ('train',steps,case.bs),('embed',embedding,4 if case.tiny else 256) # as many as `embed` takes on a GPU

def check(case):
    "Ours and the plain reading of equal weights: one loss and gradient in float32, and how far bfloat16 bends the gradient"
    import train_step
    torch.backends.cudnn.allow_tf32 = False # the plain reading has a convolution
    x = case.images(2)
    noise = torch.rand(2, case.tokens, device=case.device)
    built = {k: case.built(k).train() for k in ('cellmae',PLAIN)}
    values = {k: train_step.gradient(m, x, noise) for k,m in built.items()}
    half = {k: train_step.gradient(m, x, noise, True) for k,m in built.items()}
    torch.backends.cudnn.allow_tf32 = True
    (l,g),(l2,g2) = values.values()
    write('check', model=case.name, loss=l, plain_loss=l2, same=abs(l-l2)<1e-5*abs(l) and abs(g.norm()-g2.norm()).item()<1e-4*g.norm().item(),
          bf16_loss={k: v[0] for k,v in half.items()}, bf16_gradient_error={k: ((half[k][1]-values[k][1]).norm()/values[k][1].norm()).item() for k in built})

def planned(case):
    "Peak memory of the step that the planner means, with Lion as `fit_mae` takes it, beside its guess"
    from cellmae.scale import measure_speed
    bs,flops = halving(lambda bs: measure_speed(case.models['cellmae'], case.device, bs, 3, bf16=True), case.bs)
    write('plan', model=case.name, bs=bs, guess_gb=round(case.plan(None, bs).memory_gb.iloc[0], 3), peak_gb=peak_gb(), tflops=flops/1e12)

def ceiling(case):
    "Operations per second of a large product in bfloat16"
    import timing
    n = SIZES['tiny' if case.tiny else 'full']['product']
    write('ceiling', n=n, tflops=timing.peak_rate(case.device, True, n), machine=timing.machine(case.device))

def eager(name, tiny):
    "All of a model that needs no compiler"
    case = Case(name, ('cellmae',PLAIN), False, tiny)
    with alone(0 if tiny else 60):
        for f in (ceiling, check, planned): f(case); free()
        for what,make,bs in parts(case):
            for kind in case.models:
                own,made = halving(partial(make, case, kind), bs)
                measured(case, kind, what, made, own)
                del made; free()

def compiled(name, kind, tiny):
    "Compile while others measure, then measure alone"
    case = Case(name, (kind,), True, tiny)
    for what,make,bs in parts(case):
        free()
        own,made = halving(partial(make, case, kind), bs)
        if torch.cuda.is_available(): torch.cuda.empty_cache()
        with alone(0 if tiny else 30): measured(case, kind, what, made, own)
        del made

def run(args, deadline, script=None):
    "A case in a process of its own, until it ends or time is up; what goes wrong is a result too"
    start,left = time.time(),deadline-time.time()
    if left<LEAST: return write('failed', case=args, why='no time was left')
    p = subprocess.Popen([sys.executable,script or __file__,*args], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try: why = p.communicate(timeout=left)[1].strip()
    except subprocess.TimeoutExpired:
        os.killpg(p.pid, signal.SIGKILL) # with those that compile or read for it
        why = f'still running after {left:.0f} s'
    last = (why.splitlines() or ['no message'])[-1][:300]
    if p.wait(): write('failed', case=args, why=last if last.startswith('still') else f'{p.returncode}: {last}', log=why[-3000:])
    print(f'{time.time()-start:5.0f} s  {"failed: "+last if p.returncode else "ok"}  {" ".join(args)}')

def tests(deadline, tiny):
    "The tests that know CUDA, with the device to themselves"
    with alone():
        cmd = [sys.executable,'-m','pytest','-q','-s','-p','no:cacheprovider','--tb=line','tests/test_cuda.py',*['-k','bf16_loss']*tiny]
        with open(out/'tests.txt', 'w') as f:
            try: subprocess.run(cmd, stdout=f, stderr=subprocess.STDOUT, timeout=min(75, deadline-time.time()))
            except subprocess.TimeoutExpired: f.write('\nstill running when time was up')
    lines = (out/'tests.txt').read_text().splitlines()
    print('\n'.join(l for l in lines if l.startswith(('FAILED','ERROR','E ','cuda:')) or 'passed' in l or 'failed' in l or 'Error' in l or 'still' in l))

def speed(limit, tiny):
    "Tests, then all cases: two queues, one of which compiles beside the other; then the table"
    (out/'rows.jsonl').unlink(missing_ok=True)
    deadline,small = time.time()+limit,['--tiny']*tiny
    models = TINY if tiny else MODELS
    todo = [(m,k) for m,k in COMPILED if not tiny or (m,k)==('mae_vits16','cellmae')]
    with ThreadPoolExecutor(1) as first, ThreadPoolExecutor(1 if tiny else 3) as eagers, ThreadPoolExecutor(1 if tiny else 3) as compilers:
        first.submit(tests, deadline, tiny); time.sleep(0 if tiny else 2)
        for m in models: eagers.submit(run, ['eager','--model',m,*small], deadline)
        for m,k in todo: compilers.submit(run, ['compiled','--model',m,'--kind',k,*small], deadline)
    report()

def report():
    "One table of all that was measured, and what failed"
    import timing
    rows,ceilings,plans = read('speed'),read('ceiling'),{r['model']: r for r in read('plan')}
    top = max((r['tflops'] for r in ceilings), default=float('nan'))
    base = {(r['model'],r['what']): r['images_per_s'] for r in rows if r['case']=='cellmae' and not r['compiled']}
    table = [{'model': r['model'], 'what': r['what'], 'case': r['case']+', compiled'*r['compiled'], 'batch': r['bs'], 'images/s': f"{r['images_per_s']:,.0f}",
              'over ours, eager': f"{r['images_per_s']/base[r['model'],r['what']]:.2f}" if (r['model'],r['what']) in base else '',
              'TFLOP/s': f"{r['tflops']:.0f}", 'of nominal': f"{r['tflops']/NOMINAL:.0%}", 'of product': f"{r['tflops']/top:.0%}", 'peak GB': r['peak_gb'], 'first s': r['first_s']}
             for r in sorted(rows, key=lambda r: (r['what'],MODELS.index(r['model']),r['compiled'],r['case']))]
    memory = [dict(model=m, batch=r['bs'], **{'planner, GB': r['guess_gb'], 'measured, GB': r['peak_gb']}) for m,r in plans.items()]
    same = [dict(model=r['model'], **{'one loss and gradient': r['same'], 'loss': f"{r['loss']:.6f}", 'plain': f"{r['plain_loss']:.6f}", 'gradient error of bf16': f"{r['bf16_gradient_error']['cellmae']:.1%}"}) for r in read('check')]
    failed = [dict(case=' '.join(r['case']), why=r['why']) for r in read('failed')]
    where = dict(ceilings[-1]['machine'] if ceilings else {}, product_tflops=round(top, 1))
    (out/'speed.json').write_text(json.dumps(dict(machine=where, speed=rows, memory=list(plans.values()), check=read('check'), failed=read('failed')), indent=1))
    for name,t in dict(speed=table, memory=memory, check=same, failed=failed).items():
        if t: print(f'\n## {name}\n\n{timing.markdown(t)}')
    print('\n'+json.dumps(where))

def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('task', choices=['speed','eager','compiled'])
    p.add_argument('--model', choices=MODELS)
    p.add_argument('--kind', default='cellmae')
    p.add_argument('--limit', type=float, default=185, help='seconds for all')
    p.add_argument('--tiny', action='store_true', help='small models, for a CPU')
    a = p.parse_args()
    out.mkdir(parents=True, exist_ok=True)
    if a.task=='speed': speed(a.limit, a.tiny)
    elif a.task=='eager': eager(a.model, a.tiny)
    else: compiled(a.model, a.kind, a.tiny)

if __name__ == '__main__': main()
