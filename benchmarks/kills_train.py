"Kill training at random moments: a second run must end with all that an undisturbed one has, to the last bit"
import os, random
from itertools import count

from kills import JOBS, beside, clear, content, finish, fork, kill, main # first, for it says that no threads are started
import numpy as np, pandas as pd, torch
from fastai.callback.core import Callback
from fastai.torch_core import num_distrib, rank_distrib
from PIL import Image
from cellmae.store import pack
from cellmae.synth import synth_screen
from cellmae.train import fit_mae
from cellmae.wsl import fit_wsl
from cellmae.zoo import create_model

def sources(folder):
    "A screen of two batches, as files and as a store, and what is known of its genes"
    folder.mkdir(parents=True)
    screen = synth_screen(folder/'files', n_pathways=3, genes_per_pathway=2, n_inactive=0, n_batches=2,
                          controls_per_batch=4, sites_per_well=2, size=64, n_workers=0)
    screen.fit_ranges()
    pack(screen, folder/'store', workers=0)

# --- the jobs

class Steps(Callback):
    "Note how many steps this process took, not those before it was killed"
    def __init__(self, file): self.file,self.steps = file,count()
    def after_step(self): next(self.steps)
    def after_fit(self): self.file.write_text(str(next(self.steps)))

class Poison(Callback):
    "Spoil a step of the second epoch, in the last process only"
    order,run_valid = 5,False
    def __init__(self, what): self.what = what
    def here(self): return (self.epoch,self.iter)==(1,2) and rank_distrib()==max(1, num_distrib())-1
    def after_loss(self):
        if self.what=='loss' and self.here(): self.learn.loss = self.loss*float('nan')
    def after_backward(self):
        if self.what=='gradient' and self.here(): next(self.model.parameters()).grad.view(-1)[0] = float('nan')

def training(fit, source='files', poison=None, **how):
    "A job that trains"
    def job(of, out):
        steps = Steps(beside(out, f'steps{rank_distrib()}'))
        own = dict(epochs=3, bs=8, crop=32, save_every=0, num_workers=0, device='cpu', bf16=False, valid=.25)
        fit(of/source, out=out, cbs=[steps, *[Poison(poison)]*bool(poison)], **{**own, **how})
    return job

def mae(data, **kw):
    torch.manual_seed(0)
    return fit_mae(data, create_model('mae_vitt8', img_size=32, in_chans=6, depth=1, embed_dim=48), **kw)

def wsl(data, **kw): return fit_wsl(data, 'densenet_t', apart=None, **kw)

TRAINING = {
    'fit_mae, plain': training(mae),
    'fit_mae, 2 threads, average': training(mae, num_workers=2, ema=.9),
    'fit_mae, bf16, average, 2 parts': training(mae, bf16=True, ema=.9, accumulate=2),
    'fit_mae, watched, saved now and then': training(mae, 'store', watch=True, n_watch=3, save_every=.2),
    'fit_mae, spoilt gradient, average': training(mae, poison='gradient', ema=.9),
    'fit_mae, 2 processes, plain': training(mae),
    'fit_mae, 2 processes, average, bf16': training(mae, 'store', num_workers=2, ema=.9, bf16=True),
    'fit_mae, 2 processes, watched, spoilt gradient': training(mae, watch=True, n_watch=3, poison='gradient', accumulate=2),
    'fit_mae, 2 processes, sharded': training(mae, shard=True, ema=.9),
    'fit_wsl, plain': training(wsl),
    'fit_wsl, average, bf16, 2 threads': training(wsl, 'store', ema=.9, bf16=True, num_workers=2),
    'fit_wsl, spoilt loss, 2 parts': training(wsl, poison='loss', accumulate=2, save_every=.2),
    'fit_wsl, 2 processes, average': training(wsl, ema=.9),
    'fit_wsl, 2 processes, watched, spoilt loss': training(wsl, 'store', watch=True, n_watch=3, poison='loss', num_workers=2)}

JOBS.update(TRAINING)

# --- what a run leaves

def flat(o, at=''):
    "A nested thing as values by place: tensors by their bytes, numbers as they print, so that NaN is NaN"
    if isinstance(o, dict): return {k:v for i,x in o.items() for k,v in flat(x, f'{at}/{i}').items()}
    if isinstance(o, (list,tuple)): return flat(dict(enumerate(o)), at)
    if not isinstance(o, torch.Tensor): return {at: repr(o)}
    return {at: (str(o.dtype), tuple(o.shape), o.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if o.dim() else repr(o.item()))}

def history(f):
    "Columns of numbers, times aside"
    t = pd.read_csv(f)
    return {c: t[c].map(repr).tolist() for c in t if c not in ('time','seconds')}

def told(f):
    "What a file says, but for the time at which it was written"
    if f.suffix=='.pth': return flat(torch.load(f, map_location='cpu', weights_only=True))
    if f.suffix=='.png': return np.asarray(Image.open(f)).tobytes()
    if f.name=='history.csv': return history(f)
    return f.read_bytes()

def left(out):
    "All that a run leaves, by place; the checkpoint before the last depends on the clock"
    found = {k: told(out/k) for k in content(out) if k not in ('.lock','checkpoint.old.pth')}
    return {f'{k}{at}': v for k,o in found.items() for at,v in (o if isinstance(o, dict) else {'':o}).items()}

def differing(want, got): return sorted(k for k in {*want,*got} if want.get(k)!=got.get(k))

def half_written(out, want):
    "Files that stand under their names and are no beginning of what they are in the end"
    if not (out/'history.csv').exists(): return []
    begun = {f'history.csv{k}': v for k,v in history(out/'history.csv').items()}
    return [k for k,v in begun.items() if v!=want[k][:len(v)]]

def reached(out):
    "Epoch and batch before which the checkpoint was written"
    f = next((f for f in (out/'checkpoint.pth', out/'checkpoint.old.pth') if f.exists()), None)
    return tuple(torch.load(f, weights_only=True)['at']) if f else (0,0)

def steps_of(out): return int(beside(out, 'steps0').read_text())

def one_kill(name, of, out, rng):
    "What a kill did, and whether the second run made up for it"
    whole = of/'undisturbed'/name
    want,how = left(whole),rng.choice(('change','second of all','second of one') if '2 processes' in name else ('change','second of all'))
    while not kill(name, of, out, moment := rng.random(), how): clear(out)
    torn,(epoch,batch) = half_written(out, want),reached(out)
    finish(name, of, out)
    odd,again = differing(want, left(out)),steps_of(out)
    clear(out)
    return dict(job=name, killed=how, at=round(moment, 2), epoch=epoch, batch=batch, steps=steps_of(whole), again=again,
                torn=', '.join(torn), differ=', '.join(odd[:9]))

def campaign(n, seed, folder, jobs):
    "As many kills as asked for, the jobs in turn"
    rng,of,rows = random.Random(seed),folder/'of',[]
    os.waitpid(fork(sources, of), 0)
    for o in ('undisturbed','killed'): (of/o).mkdir()
    for k in range(n):
        name = jobs[k%len(jobs)]
        if k<len(jobs): finish(name, of, of/'undisturbed'/name)
        rows.append(one_kill(name, of, of/'killed'/name, rng))
        print('{job:46} killed by {killed:13} at {at:4.2f}: went on in epoch {epoch} before batch {batch}, took {again:2} of {steps:2} steps; {torn}{differ}'.format(**rows[-1]), flush=True)
    return pd.DataFrame(rows)

def markdown(table):
    "A row per job"
    lines = ['| job | kills | steps of a run | taken again by the second | half-written | other in the end |', '|---|---|---|---|---|---|']
    for name,t in table.groupby('job', sort=False):
        again = f'{t.again.min()} to {t.again.max()}'
        lines.append(f'| {name} | {len(t)} | {t.steps.iat[0]} | {again} | {(t.torn!="").sum()} | {(t.differ!="").sum()} |')
    return '\n'.join(lines)

if __name__=='__main__': main(__doc__, TRAINING, 50, campaign, markdown, 'all that an undisturbed one has, to the last bit')
