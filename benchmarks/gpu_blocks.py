"Blocks compiled one by one, which share what is compiled, beside the same model as it is: seconds of the first call, images a second, what comes out"
import copy, faulthandler, time
from functools import partial

import torch, torch._dynamo.utils

import embed as embedding, timing, train_step
from gpu import alone, out, write
from gpu_profile import images, make, seconds
from cellmae.blocks import compile_blocks

CASES = dict(full={'mae_vits16': dict(size=256, train=296, embed=256), 'mae_vitl8': dict(size=256, train=24, embed=64), 'camae_vits16': dict(size=256, train=40, embed=64)},
             tiny={'mae_vitt4': dict(size=16, train=2, embed=2)})
HOW = dict(full=dict(backend='inductor', rounds=5), tiny=dict(backend='eager', rounds=1))
STUCK = 45 # seconds after which it is told where a case is


def by_blocks(model, backend):
    "A copy of a model, its blocks compiled one by one"
    model = copy.deepcopy(model)
    compile_blocks(model, backend=backend)
    return model

def clocked(f, device):
    "What `f` gives, and its seconds"
    start = time.perf_counter()
    y = f()
    timing.sync(device)
    return y,round(time.perf_counter()-start, 2)

def compared(what, eager, net, first_s, bs, rounds, device, **more):
    "Keep the rates of both, measured in turn with the device to themselves"
    with alone(): secs = {k: seconds(f, device, rounds) for k,f in dict(eager=eager, compiled=net).items()}
    rates = {k: round(bs/timing.median([(s,0) for s in v]), 1) for k,v in secs.items()}
    counts = torch._dynamo.utils.counters
    write('blocks', what=what, bs=bs, first_s=first_s, **rates, gain=round(rates['compiled']/rates['eager'], 3), **more,
          graphs=counts['stats']['unique_graphs'], breaks=sum(counts['graph_break'].values()), seconds=secs)

def train(name, model, bs, size, device, backend, rounds):
    "Steps, after both gave one loss and gradient"
    net,x = by_blocks(model.train(), backend),images(bs, size, device)
    noise = torch.rand(bs, model.tokens(x[:1]).shape[1], device=device)
    loss,grad = train_step.gradient(model, x, noise, True)
    (own,g),first_s = clocked(lambda: train_step.gradient(net, x, noise, True), device)
    steps = [train_step.stepper('cellmae', m, x, noise.shape[1], True, False) for m in (model,net)]
    compared('train', *steps, first_s, bs, rounds, device, model=name, loss=[round(loss, 6),round(own, 6)], gradient_error=round(((g-grad).norm()/grad.norm()).item(), 6))

@torch.inference_mode()
def embed(name, model, bs, size, device, backend, rounds):
    "Embedding under autocast and with weights in bfloat16; cosines are to float32"
    x = images(bs, size, device)
    exact = embedding.embed(model.eval(), x, False)
    for what,m,bf16 in (('embed, autocast',model,True),('embed, bf16 weights',copy.deepcopy(model).bfloat16(),False)):
        eager,net = (partial(embedding.embed, o, x, bf16) for o in (m,by_blocks(m, backend)))
        y,first_s = clocked(net, device)
        compared(what, eager, net, first_s, bs, rounds, device, model=name, cosine=[round(embedding.cosine(o, exact), 6) for o in (eager(),y)])

def blocks(name, what, device, tiny):
    "One model, trained or embedding"
    torch._dynamo.reset(); torch._dynamo.utils.counters.clear()
    size = 'tiny' if tiny else 'full'
    case = CASES[size][name]
    with open(out/'stuck.txt', 'a') as f:
        faulthandler.dump_traceback_later(STUCK, file=f)
        model = make(name, case['size'], device, **(dict(depth=2) if tiny else {}))
        dict(train=train, embed=embed)[what](name, model, case[what], case['size'], device, **HOW[size])
        faulthandler.cancel_dump_traceback_later()
