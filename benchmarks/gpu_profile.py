"Where the time of a step goes on a GPU: kernels, gaps between them, parts of the step, and other batches and weights"
import copy, time
from contextlib import contextmanager
from functools import partial

import torch
from torch.profiler import ProfilerActivity, profile

import embed as embedding, timing, train_step
from gpu import free, write
from cellmae.zoo import create_model

CASES = dict(full=[('mae_vitt4',64,[256,1024],[]), ('camae_vits16',256,[40,120],[])],
             tiny=[('mae_vitt4',32,[2],[2])]) # name, side, batches of training, batches of embedding


def make(name, size, device, **kw):
    torch.manual_seed(0)
    return create_model(name, img_size=size, drop_path=0., **kw).to(device)

def images(bs, size, device): return torch.randint(0, 256, (bs,6,size,size), dtype=torch.uint8, device=device)

def seconds(f, device, rounds): return [round(s, 5) for s,_ in timing.measure({'f': f}, rounds, device)['f']]

def trace(f, steps, device):
    "What ran on the device in some steps"
    kinds = [ProfilerActivity.CPU]+[ProfilerActivity.CUDA]*(device.type=='cuda')
    with profile(activities=kinds) as p:
        for _ in range(steps): f()
        timing.sync(device)
    return p

def ranked(rows, steps, most=15):
    "The `most` that take longest: ms a step, calls a step"
    return [dict(name=k, ms=round(t/1e3/steps, 4), calls=round(n/steps, 1)) for k,t,n in sorted(rows, key=lambda o: -o[1])[:most]]

def on_device(p, cuda):
    "Names, microseconds and calls: of kernels, and of the operators that started them"
    key,kernels,ops = 'self_device_time_total' if cuda else 'self_cpu_time_total',{},[]
    for e in p.events() if cuda else []:
        if e.device_type!=torch.autograd.DeviceType.CUDA or e.name.startswith('Optimizer.') or getattr(e, 'is_user_annotation', False): continue # what only names others
        t,n = kernels.get(e.name, (0,0))
        kernels[e.name] = t+e.time_range.elapsed_us(),n+1
    for e in p.key_averages():
        if e.device_type==torch.autograd.DeviceType.CPU and getattr(e, key)>0: ops.append((e.key, getattr(e, key), e.count))
    return [(k[:120],*v) for k,v in kernels.items()],ops

def kernels(what, f, secs, device, **case):
    "Keep the longest kernels and operators, and the part of a step in which the device does nothing"
    steps = 2
    rows,ops = on_device(trace(f, steps, device), device.type=='cuda')
    busy,step = sum(t for _,t,_ in rows)/1e6/steps,timing.median([(s,0) for s in secs])
    write('profile', what=what, **case, step_ms=round(1e3*step, 3), kernel_ms=round(1e3*busy, 3), idle=round(1-busy/step, 3) if rows else None,
          launches=sum(n for *_,n in rows)/steps, kernels=ranked(rows, steps), operators=ranked(ops, steps))

class Marks:
    "Times between marks on the device, without waiting for it before the end"
    def __init__(self, device): self.cuda,self.at = device.type=='cuda',[]
    def __call__(self, name, *_):
        if self.cuda: e = torch.cuda.Event(enable_timing=True); e.record()
        else: e = time.perf_counter()
        self.at.append((name, e))
    def ms(self):
        if self.cuda: torch.cuda.synchronize()
        gap = (lambda a,b: a.elapsed_time(b)) if self.cuda else (lambda a,b: 1e3*(b-a))
        return {n: round(gap(a, b), 3) for (_,a),(n,b) in zip(self.at, self.at[1:])}

@contextmanager
def hooked(model, mark):
    "Marks around encoder and decoder"
    hooks = [m.register_forward_pre_hook(lambda *_, n=n: mark(n)) for m,n in ((model.encoder,'standardise, cut, mask'), (model.decoder,'between'))]
    hooks += [m.register_forward_hook(lambda *_, n=n: mark(n)) for m,n in ((model.encoder,'encoder'), (model.decoder,'decoder'))]
    try: yield
    finally:
        for h in hooks: h.remove()

def split(model, x, opt):
    "Milliseconds of each part of a step, medians of some"
    rows,device = [],x.device
    for _ in range(6):
        mark = Marks(device); mark('start')
        with hooked(model, mark), torch.autocast(device.type, torch.bfloat16): loss = model(x).loss
        mark('loss'); loss.backward(); mark('backward'); opt.step(); mark('optimiser'); opt.zero_grad()
        rows.append(mark.ms())
    return {k: sorted(r[k] for r in rows[1:])[2] for k in rows[0]}

def training(name, model, size, batches, rounds, device):
    "Steps as they are; its parts; with all in bfloat16; and with more images"
    tokens = model.tokens(images(1, size, device)).shape[1]
    def one(m, what, bs, bf16=True):
        x = images(bs, size, device)
        step = train_step.stepper('cellmae', m, x, tokens, bf16, False)
        secs = seconds(step, device, rounds)
        rate(name, what, bs, secs)
        if bs==batches[0]: kernels(what, step, secs, device, model=name, bs=bs)
    one(model.train(), 'train', batches[0])
    write('parts', model=name, bs=batches[0], ms=split(model, images(batches[0], size, device), train_step.adamw(model.parameters(), fused=True)))
    one(copy.deepcopy(model).bfloat16(), 'train, all in bf16', batches[0], False); free()
    for bs in batches[1:]: one(model, 'train', bs)

def rate(name, what, bs, secs, **more): write('rates', model=name, what=what, bs=bs, images_per_s=round(bs/timing.median([(s,0) for s in secs]), 1), seconds=secs, **more)

def encoding(name, model, size, batches, rounds, device):
    "Embedding under autocast and with weights in bfloat16"
    model.eval()
    low,few = copy.deepcopy(model).bfloat16(),images(8, size, device)
    exact = embedding.embed(model, few, False)
    for bs in batches:
        x = images(bs, size, device)
        for what,f in {'autocast': lambda x: embedding.embed(model, x, True), 'bf16 weights': lambda x: embedding.embed(low, x, False)}.items():
            secs = seconds(partial(f, x), device, rounds)
            rate(name, f'embed, {what}', bs, secs, cosine=round(embedding.cosine(f(few), exact), 6))
            if bs==batches[0]: kernels(f'embed, {what}', partial(f, x), secs, device, model=name, bs=bs)

def tried(name, what, f, *args):
    "What fails is a result too"
    try: f(name, *args)
    except Exception as e: write('failed', case=['profile',name,what], why=f'{type(e).__name__}: {str(e)[:300]}')
    free()

def where_time_goes(tiny):
    "All cases, training and embedding"
    device,rounds = torch.device('cuda' if torch.cuda.is_available() else 'cpu'),1 if tiny else 5
    for name,size,train,embed in CASES['tiny' if tiny else 'full']:
        model = make(name, size, device, alpha=.1 if name=='mae_vitt4' else 0.)
        if embed: tried(name, 'embed', encoding, model, size, embed, rounds, device)
        tried(name, 'train', training, model, size, train, rounds, device)
        del model; free()
