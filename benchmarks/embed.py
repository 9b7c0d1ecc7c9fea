#!/usr/bin/env python
"Embedding of our models against others: one forward pass of the encoder over all tokens"
import argparse, copy
from functools import partial
from importlib.util import find_spec

import torch

from cellmae.zoo import cost, create_model
import peers, timing


def models(name, **kw):
    "Our model and its peers, `{case: function that makes it}`"
    def ours(**more): return create_model(name, **{**kw, **more})
    def with_weights(peer, **more):
        base = ours(**more)
        return peer(base).load(base)
    if name.startswith('camae'): return {'cellmae': ours, 'plain reading of the released': lambda: with_weights(peers.PlainCAMAE)}
    standard = {k: partial(with_weights, v, parallel=False) for k,v in {'plain MAE': peers.PlainMAE, 'transformers': peers.HFMAE, 'lightly': peers.LightlyMAE}.items() if 'plain' in k or find_spec(k)}
    return {'cellmae': ours, 'plain reading of the released': lambda: with_weights(peers.PlainMAE), 'cellmae, standard blocks': lambda: ours(parallel=False), **standard}

def twin(case): return 'cellmae' if case.startswith(('plain reading', 'cellmae, bf16', 'cellmae, fp32')) or case=='cellmae' else 'cellmae, standard blocks' # what `case` is divided by

@torch.inference_mode()
def embed(model, x, bf16):
    with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16): return model.encode(x).float()

def cosine(a, b): return torch.cosine_similarity(a, b).min().item()

def batch_sizes(a, device, x, kw):
    "Our model alone on the same images, in batches of several sizes"
    torch.manual_seed(0)
    model = create_model(a.model, **kw).to(device).eval()
    cases = {f'batches of {n}': (lambda n=n: [embed(model, o, a.bf16) for o in x.split(n)]) for n in a.split}
    secs = timing.measure(cases, a.rounds, device, a.as_used)
    timing.show(f"embed, {a.model}, {a.bs} images, {'bf16' if a.bf16 else 'fp32'}", timing.table(secs, f'batches of {a.split[0]}', a.bs), timing.machine(device), a.out)


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--model', default='mae_vits16')
    p.add_argument('--bs', type=int, default=16)
    p.add_argument('--bf16', action='store_true', help='all cases in bfloat16 autocast, and ours with bfloat16 weights')
    p.add_argument('--split', type=int, nargs='+', help='our model alone, the images in batches of these sizes')
    timing.add_options(p)
    run(p.parse_args())

def run(a):
    "Build, check, measure, show"
    torch.set_num_threads(a.threads)
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    x = torch.randint(0, 256, (a.bs,6,a.size,a.size), dtype=torch.uint8, device=device)
    kw = dict(img_size=a.size, **({'depth': a.depth} if a.depth else {}))
    if a.split: return batch_sizes(a, device, x, kw)
    def build(f): torch.manual_seed(0); return f().to(device).eval()
    built = {k: build(f) for k,f in models(a.model, **kw).items()}
    exact = {k: embed(m, x, False) for k,m in built.items()}
    for k in built: assert cosine(exact[k], exact[twin(k)]) > 1-1e-5, f'{k} and {twin(k)} differ'
    cases = {k: (lambda m=m: embed(m, x, a.bf16)) for k,m in built.items()}
    if a.bf16:
        half = copy.deepcopy(built['cellmae']).bfloat16()
        cases['cellmae, bf16 weights'] = lambda: embed(half, x, False)
        cases['cellmae, fp32'] = lambda: embed(built['cellmae'], x, False)
        exact |= {'cellmae, bf16 weights': exact['cellmae'], 'cellmae, fp32': exact['cellmae']}
    columns = {'cosine to its own fp32': {k: round(cosine(f(), exact[k]), 6) for k,f in cases.items()}} if a.bf16 else {}
    secs = timing.measure(cases, a.rounds, device, a.as_used)
    columns |= timing.utilisation(secs, {k: cost(m)['embed']*a.bs for k,m in built.items() if k.startswith('cellmae')}, device, a.bf16)
    timing.show(f"embed, {a.model}, batch {a.bs}, {'bf16' if a.bf16 else 'fp32'}", timing.table(secs, {k: twin(k) for k in cases}, a.bs, **columns), timing.machine(device), a.out)

if __name__ == '__main__': main()
