#!/usr/bin/env python
"One optimiser step of our models against others: same sizes, same loss, same optimiser, same precision"
import argparse
from importlib.util import find_spec

import torch

from cellmae.zoo import cost, create_model
import peers, timing

families = dict(mae=('mae_vits16', 'mae_vitb16', 'mae_vitb8', 'mae_vitl8'), camae=('camae_vits16', 'camae_vitb16', 'camae_vitl16'))


def models(name, small_decoder, **kw):
    "Our models and their peers, `{case: function that makes it}`; those that compute the same function as `cellmae` share its weights"
    decoder = dict(embed_dim=256, depth=2) if small_decoder else {}
    def ours(**more): return create_model(name, alpha=0., drop_path=0., decoder=decoder, **{**kw, **more})
    def with_weights(peer, **more):
        base = ours(**more)
        return peer(base).load(base)
    if name.startswith('camae'): return {'cellmae': ours, 'plain reading of the released': lambda: with_weights(peers.PlainCAMAE)} | (
        {} if small_decoder else {'cellmae shared decoder': lambda: create_model(name+'_shared', alpha=0., drop_path=0., **kw)})
    return {'cellmae': ours, 'cellmae, standard blocks': lambda: ours(parallel=False), 'plain MAE': lambda: with_weights(peers.PlainMAE, parallel=False),
            **{k: (lambda peer=peer: peer(ours())) for k,peer in dict(transformers=peers.HFMAE, lightly=peers.LightlyMAE).items() if find_spec(k)}}

def stepper(model, x, tokens, bf16, compiled):
    "One step: standardise, hide, forward, backward, AdamW"
    opt = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(.9,.95), fused=True)
    net = torch.compile(model) if compiled else model
    def step():
        noise = torch.rand(len(x), tokens, device=x.device)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16): out = net(x, noise)
        loss = getattr(out, 'loss', out)
        loss.backward(); opt.step(); opt.zero_grad()
    return step

def check_equal(a, b, x, noise):
    "Two models of the same weights must have the same loss"
    with torch.no_grad(): la,lb = [getattr(o, 'loss', o).item() for o in (a(x, noise), b(x, noise))]
    assert abs(la-lb) < 1e-4, f'losses differ: {la} and {lb}'
    return la


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--model', default='mae_vits16', help='a name of cellmae.zoo: ' + ', '.join(sum(families.values(), ())))
    p.add_argument('--bs', type=int, default=8)
    p.add_argument('--size', type=int, default=256, help='side of a crop')
    p.add_argument('--depth', type=int, help='blocks of the encoder, for smoke tests')
    p.add_argument('--small-decoder', action='store_true', help='2 blocks of 256 per channel')
    p.add_argument('--bf16', action='store_true')
    p.add_argument('--compile', action='store_true')
    p.add_argument('--rounds', type=int, default=9)
    p.add_argument('--threads', type=int, default=2)
    p.add_argument('--cases', help='only these, separated by semicolons')
    p.add_argument('--memory', action='store_true', help='peak memory too, each case in a process of its own')
    p.add_argument('--only', help='(used by --memory) measure the memory of one case')
    p.add_argument('--out', help='JSON file for the results')
    a = p.parse_args()
    torch.set_num_threads(a.threads); torch.manual_seed(0)
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    x = torch.randint(0, 256, (a.bs,6,a.size,a.size), dtype=torch.uint8, device=device)
    kw = dict(img_size=a.size, **({'depth': a.depth} if a.depth else {}))
    make = models(a.model, a.small_decoder, **kw)
    if a.cases: make = {k: make[k] for k in a.cases.split(';')}
    tokens = create_model(a.model, **kw).tokens(x[:1].cpu()).shape[1]
    def build(k): torch.manual_seed(0); return make[k]().to(device).train()
    if a.only: return timing.report_peak(stepper(build(a.only), x, tokens, a.bf16, a.compile), device)
    built = {k: build(k) for k in make}
    twins = [('cellmae','plain reading of the released'), ('cellmae, standard blocks','plain MAE')]
    for u,v in twins:
        if u in built and v in built: print(f'{v}: same loss as {u}, {check_equal(built[u], built[v], x, torch.rand(a.bs, tokens, device=device)):.6f}')
    secs = timing.measure({k: stepper(m, x, tokens, a.bf16, a.compile) for k,m in built.items()}, a.rounds, device)
    columns = {'M weights': {k: round(sum(p.numel() for p in m.parameters())/1e6, 1) for k,m in built.items()}}
    if device.type == 'cuda' and not a.depth:
        work = cost(a.model)['train']
        columns['TFLOP/s'] = {'cellmae': round(work*a.bs/1e3/sorted(secs['cellmae'])[len(secs['cellmae'])//2], 1)}
    if a.memory: columns['peak MB'] = timing.peak_memory(built)
    timing.show(f"train step, {a.model}, batch {a.bs}, {'bf16' if a.bf16 else 'fp32'}", timing.table(secs, 'cellmae', a.bs, **columns), timing.machine(device), a.out)

if __name__ == '__main__': main()
