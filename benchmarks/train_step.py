#!/usr/bin/env python
"One optimiser step of our models against others, or one part of it: same sizes, same loss, same optimiser, same precision"
import argparse
from functools import partial
from importlib.util import find_spec

import torch
from timm.optim.lion import Lion

from cellmae.fourier import fourier_loss, masked_mean, mix, pixel_loss
from cellmae.masking import random_mask, take
from cellmae.zoo import cost, create_model
import peers, timing

families = dict(mae=('mae_vits16', 'mae_vitb16', 'mae_vitb8', 'mae_vitl8'), camae=('camae_vits16', 'camae_vitb16', 'camae_vitl16'))
adamw = partial(torch.optim.AdamW, lr=1e-4, betas=(.9,.95))


def models(name, small_decoder, **kw):
    "Our models and their peers, `{case: function that makes it}`; a CA-MAE of full size with the Fourier loss"
    decoder,alpha = dict(embed_dim=256, depth=2) if small_decoder else {},.01 if name.startswith('camae') and kw['img_size']==256 else 0. # the released Fourier loss sees patches at this size only
    def ours(**more): return create_model(name, alpha=alpha, drop_path=0., decoder=decoder, **{**kw, **more})
    def with_weights(peer, **more):
        base = ours(**more)
        return peer(base).load(base)
    if name.startswith('camae'): return {'cellmae': ours, 'plain reading of the released': lambda: with_weights(peers.PlainCAMAE)} | (
        {} if small_decoder else {'cellmae, shared decoder': lambda: create_model(name+'_shared', alpha=alpha, drop_path=0., **kw)})
    standard = {k: partial(with_weights, v, parallel=False) for k,v in {'plain MAE': peers.PlainMAE, 'transformers': peers.HFMAE, 'lightly': peers.LightlyMAE}.items() if 'plain' in k or find_spec(k)}
    return {'cellmae': ours, 'plain reading of the released': lambda: with_weights(peers.PlainMAE), 'cellmae, standard blocks': lambda: ours(parallel=False), **standard,
            'plain MAE, eager attention': lambda: peers.eager(standard['plain MAE']()), 'plain MAE, default AdamW': standard['plain MAE']}

def twin(case): return 'cellmae' if case.startswith('plain reading') or case in ('cellmae', 'cellmae, shared decoder') else 'cellmae, standard blocks' # what `case` is divided by

def stepper(case, model, x, tokens, bf16, compiled):
    "One step: standardise, hide, forward, backward, AdamW"
    opt = adamw(model.parameters(), fused=None if 'default AdamW' in case else True)
    net = torch.compile(model) if compiled else model
    def step():
        noise = torch.rand(len(x), tokens, device=x.device)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16): out = net(x, noise)
        getattr(out, 'loss', out).backward(); opt.step(); opt.zero_grad()
    return step

def gradient(model, x, noise, bf16=False):
    "Loss and gradient of all weights, one long vector on the CPU"
    with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16): out = model(x, noise)
    loss = getattr(out, 'loss', out)
    loss.backward()
    grad = torch.cat([p.grad.flatten().cpu() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    return loss.item(),grad

def check(built, x, noise, bf16):
    "Cases of equal weights must have the same loss and size of gradient; how far bfloat16 bends each case's gradient"
    values,error = {},{}
    for k,m in built.items():
        loss,grad = gradient(m, x, noise)
        values[k] = loss,grad.norm().item()
        if bf16: error[k] = f'{(gradient(m, x, noise, True)[1]-grad).norm()/grad.norm():.1%}'
    for k,(loss,size) in values.items():
        if k == 'cellmae, shared decoder': continue
        l,s = values[twin(k)]
        assert abs(loss-l) < 1e-5*abs(l) and abs(size-s) < 1e-4*s, f'{k} has loss {loss} and gradient {size}, {twin(k)} has {l} and {s}'
    return {'loss': {k: f'{v[0]:.6f}' for k,v in values.items()}, **({'gradient error of bf16': error} if bf16 else {})}


def loss(a, device):
    "Mixed loss of a CA-MAE and its gradient: squared error and half spectra of the hidden patches, or the released way"
    p,l = 16,6*(a.size//16)**2
    pred,target = [torch.randn(a.bs, l, p*p, device=device) for _ in range(2)]
    pred.requires_grad_()
    m = random_mask(torch.rand(a.bs, l, device=device))
    def ours():
        x,y = take(pred, m.ids_mask),take(target, m.ids_mask)
        return mix(pixel_loss(x, y).mean(), fourier_loss(x, y, p).mean())
    def theirs(): return mix(masked_mean(pixel_loss(pred, target), m.mask), peers.released_fourier(pred, target, m.mask, 6))
    values = ours().item(),theirs().item()
    assert a.size != 256 or abs(values[0]-values[1]) < 1e-6*values[0], values # the released planes are patches at this size only
    def both(f): f().backward(); pred.grad = None
    return {'cellmae': lambda: both(ours), 'the released way': lambda: both(theirs)},'cellmae',{'loss': dict(zip(('cellmae','the released way'), values))}

def lion(a, device):
    "Updates of the model's weights by timm's Lion, tensor by tensor, with `foreach` and compiled, and by fused AdamW"
    def make(opt):
        torch.manual_seed(0)
        model = create_model(a.model, img_size=a.size, **({'depth': a.depth} if a.depth else {})).to(device)
        for p in model.parameters(): p.grad = torch.randn_like(p)
        return model,opt(model.parameters())
    kinds = {'Lion': partial(Lion, lr=1e-4, foreach=False), 'Lion, foreach': partial(Lion, lr=1e-4, foreach=True), 'Lion, default': partial(Lion, lr=1e-4), 'fused AdamW': partial(adamw, fused=True)}
    made = {k: make(o) for k,o in (kinds | ({'Lion, compiled': kinds['Lion']} if a.compile else {})).items()}
    steps = {k: torch.compile(opt.step) if k.endswith('compiled') else opt.step for k,(_,opt) in made.items()}
    for step in steps.values(): step()
    for k,(model,_) in made.items():
        if 'Lion' in k: torch.testing.assert_close(dict(model.named_parameters()), dict(made['Lion'][0].named_parameters()))
    return steps,'Lion',{}

def measure_part(a, device):
    "Time one part of a step"
    cases,ours,columns = dict(loss=loss, lion=lion)[a.part](a, device)
    secs = timing.measure(cases, a.rounds, device, a.as_used)
    timing.show(f'{a.part}, {a.model}, batch {a.bs}', timing.table(secs, ours, a.bs, **columns), timing.machine(device), a.out)


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--model', default='mae_vits16', help='a name of cellmae.zoo: ' + ', '.join(sum(families.values(), ())))
    p.add_argument('--bs', type=int, default=8)
    p.add_argument('--patch', type=int, help='side of a patch, if not the model\'s')
    p.add_argument('--small-decoder', action='store_true', help='2 blocks of 256 per channel')
    p.add_argument('--bf16', action='store_true', help='all cases in bfloat16 autocast, and the first peer in float32 too')
    p.add_argument('--compile', action='store_true', help='all cases by torch.compile, which takes minutes; with `--part lion` one more case')
    p.add_argument('--part', choices=['loss','lion'], help='only this part of a step')
    p.add_argument('--cases', help='only these, separated by semicolons')
    p.add_argument('--memory', action='store_true', help='peak memory too, each case in a process of its own')
    p.add_argument('--only', help='(used by --memory) measure the memory of one case')
    timing.add_options(p)
    run(p.parse_args())

def run(a):
    "Build, check, measure, show"
    torch.set_num_threads(a.threads); torch.manual_seed(0)
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    if a.part: return measure_part(a, device)
    x = torch.randint(0, 256, (a.bs,6,a.size,a.size), dtype=torch.uint8, device=device)
    kw = dict(img_size=a.size, **{k: v for k,v in dict(depth=a.depth, patch_size=a.patch).items() if v})
    make = models(a.model, a.small_decoder, **kw)
    if a.cases: make = {k: make[k] for k in a.cases.split(';')}
    tokens = create_model(a.model, **kw).tokens(x[:1].cpu()).shape[1]
    def build(k): torch.manual_seed(0); return make[k]().to(device).train()
    def step(k, model, bf16=a.bf16): return stepper(k, model, x, tokens, bf16, a.compile)
    if a.only: return timing.report_peak(a.only, step(a.only, build(a.only)), device, a.as_used)
    built = {k: build(k) for k in make}
    columns = check(built, x, torch.rand(a.bs, tokens, device=device), a.bf16)
    cases = {k: step(k, m) for k,m in built.items()}
    if a.bf16: cases |= {k+', fp32': step(k, built[k], False) for k in ('plain MAE','plain reading of the released') if k in built}
    secs = timing.measure(cases, a.rounds, device, a.as_used)
    columns |= timing.utilisation(secs, {k: cost(m)['train']*a.bs for k,m in built.items() if k.startswith('cellmae')}, device, a.bf16)
    if a.memory: columns['peak MB'] = timing.peak_memory(built)
    timing.show(f"train step, {a.model}, batch {a.bs}, {'bf16' if a.bf16 else 'fp32'}", timing.table(secs, {k: twin(k) for k in cases}, a.bs, **columns), timing.machine(device), a.out)

if __name__ == '__main__': main()
