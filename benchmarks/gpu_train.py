#!/usr/bin/env python
"A screen simulated and packed on the machine, trainings whose recall is measured on the way, and how fast they are fed; each part in a process of its own"
import argparse, copy, json, os, subprocess, sys, time
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import anndata as ad, matplotlib.pyplot as plt, numpy as np, pandas as pd, torch
from fastai.callback.core import Callback, CancelFitException
from tifffile import imwrite

import gpu, gpu_blocks, gpu_feed, timing
from gpu import out, read, write
from gpu_profile import where_time_goes
from cellmae.data import screen_dls
from cellmae.embed import embed
from cellmae.encoders import STATS, as_encoder
from cellmae.files import cores
from cellmae.profiles import aggregate, read_profiles
from cellmae.recall import compare_recall, recall
from cellmae.screen import Screen, open_screen
from cellmae.store import pack
from cellmae.synth import STAINS6, synth_screen
from cellmae.train import fit_mae
from cellmae.tvn import TVN
from cellmae.zoo import cost, create_model

work = Path(os.environ.get('WORK') or '/tmp/cellmae_gpu')
SIZES = dict(
    full=dict(screen=dict(n_pathways=44, genes_per_pathway=10, n_inactive=44, n_batches=6, controls_per_batch=48, sites_per_well=3), noise=dict(n=192, side=1080), crop=64, bs=256, kw={}, trial=5),
    tiny=dict(screen=dict(n_pathways=5, genes_per_pathway=4, n_inactive=2, n_batches=2, controls_per_batch=6, size=64), noise=dict(n=4, side=64), crop=32, bs=16, kw=dict(depth=1, img_size=32), trial=.3))
MODELS = {'mae_vitt4': {}, 'mae_vitt4, 8 blocks of 256': dict(embed_dim=256, depth=8, num_heads=8)}
STEEP = dict(lr=1e-3, alpha=.1) # as in the tutorial of a longer run
RESULTS = 'times','recall','contrast','blocks','fed','alone','rates','parts','profile','failed'
POINTS = 10**np.linspace(-2, 0, 5) # of the way, evenly spaced in log FLOPs


@contextmanager
def timed(what, **more):
    start = time.perf_counter()
    yield
    write('times', what=what, seconds=round(time.perf_counter()-start, 2), **more)

def write_noise(row, side, root):
    "Images of one site, of camera noise"
    rng = np.random.default_rng(row['seed'])
    for s in STAINS6: imwrite(root/row[f'file_{s}'], rng.integers(200, 4000, (side,side), dtype=np.uint16), metadata=None)

def noise_screen(n, side, root, processes):
    "Large uncompressed images, on which only the speed of reading can be measured"
    root.mkdir(parents=True)
    t = pd.DataFrame([dict(plate='P1', well=f'{"ABCDEFGH"[k//12]}{k%12+1:02d}', site=s+1, batch='B1', perturbation='X', control=False, seed=4*k+s) for k in range(-(-n//4)) for s in range(4)][:n])
    for s in STAINS6: t[f'file_{s}'] = [f'{k:04d}_{s}.tif' for k in t.seed]
    with get_context('fork').Pool(processes) as pool: pool.map(partial(write_noise, side=side, root=root), t.to_dict('records'), 4)
    Screen(t.drop(columns='seed'), root=root).save(root)

def screens(tiny):
    "The simulated screen and its store, and large images and theirs"
    o,n = SIZES['tiny' if tiny else 'full'],max(1, cores()-4) # the others compile
    with timed('simulate', processes=n): sites = len(synth_screen(work/'screen', **o['screen'], n_workers=0 if tiny else n))
    with timed('pack', sites=sites): pack(work/'screen', work/'store')
    with timed('large images', **o['noise']): noise_screen(**o['noise'], root=work/'noise', processes=n)
    with timed('pack large images'): pack(work/'noise', work/'noise_store')

class Kept(Callback):
    "Weights at some steps of the way, and the loss there; the last where time is up"
    order,run_valid = 101,False
    def __init__(self, at, folder, stop): self.at,self.folder,self.stop,self.steps,self.seen = list(at),folder,stop,0,0

    def before_fit(self): self.keep(None)

    def after_batch(self):
        self.steps += 1
        self.seen += len(self.xb[0])
        late = time.time()>self.stop
        if self.steps in self.at or late: self.keep(self.smooth_loss.item())
        if late: raise CancelFitException

    def keep(self, loss):
        state = {k: v.detach().cpu() for k,v in self.model.state_dict().items()}
        torch.save(dict(step=self.steps, images=self.seen, loss=loss, state=state), self.folder/f'{self.steps:07d}.pth')

def loaders(o):
    "Two crops of each site that is read"
    return screen_dls(work/'store', o['crop'], o['bs'], crops=2, valid=.02)

def trained(label, o, seconds, stop):
    "The model of a run, the folder of what was kept of it, and operations per image; as many epochs as the seconds allow"
    torch.manual_seed(0)
    model,dls,folder = create_model('mae_vitt4', **MODELS[label], **o['kw']),loaders(o),work/label
    folder.mkdir()
    each = cost(model)['train']*1e9
    speed = gpu_feed.looped(copy.deepcopy(model), dls.train, o['trial'])
    n = len(dls.train)*o['bs']
    epochs = max(1, int(seconds*speed/n))
    at = {max(1, round(epochs*len(dls.train)*p)) for p in POINTS}
    with timed('train', model=label, epochs=epochs, trial=round(speed, 1)):
        learn = fit_mae(loaders(o), model, work/f'{label}, run', epochs=epochs, **STEEP, n_pictures=0, save_every=600, cbs=[Kept(at, folder, stop)])
    return learn.model,folder,each

def at_points(model, folder, each):
    "Models as they were at each point of the way, and what is known of them"
    for f in sorted(folder.glob('*.pth')):
        k = torch.load(f)
        then = copy.deepcopy(model)
        then.load_state_dict(k.pop('state'))
        yield then,dict(k, flops=k['images']*each)

def profiles(encoders, store, crop):
    "Wells by several encoders of the same tiles, which are read once"
    widths = {}
    def side_by_side(x):
        parts = {k: f(x) for k,f in encoders.items()}
        widths.update({k: v.shape[1] for k,v in parts.items()})
        return torch.cat([v.float().cpu() for v in parts.values()], 1) # wherever each was computed
    wells = embed(side_by_side, store, size=crop, bs=1024, progress=False)
    ends = np.cumsum(list(widths.values()))
    return {k: ad.AnnData(wells.X[:,e-w:e].copy(), obs=wells.obs, uns=wells.uns) for (k,w),e in zip(widths.items(), ends)}

def statistics(device): return {k: lambda x, f=f: f(x.to(device)).float().cpu() for k,f in STATS.items()}

def relevance(name, wells, **more):
    "Recall of the true pairs after TVN, with its interval, and the map"
    corrected = TVN().fit_transform(wells)
    r = recall(corrected, work/'screen/relationships.csv', thresholds=[(.05,.95)], n_perm=0).iloc[0]
    write('recall', encoder=name, **more, **{k: round(float(r[k]), 4) for k in ('recall','ci_low','ci_high')}, n_pairs=int(r.n_pairs), n_genes=int(r.n_genes))
    return aggregate(corrected)

def contrast(a, b, names, label):
    r = compare_recall(a, b, work/'screen/relationships.csv').iloc[0]
    write('contrast', model=label, contrast=names, **{k: float(f'{r[k]:.4g}') for k in ('a','b','gain','t','p')})

def fit(label, seconds, stop, tiny):
    "Train, then measure recall at each point of the way, beside statistics of equal tiles"
    o,device = SIZES['tiny' if tiny else 'full'],torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    model,folder,each = trained(label, o, seconds, stop)
    store,points = open_screen(work/'store'),{}
    encoders = statistics(device)
    for then,about in at_points(model.to(device), folder, each):
        points[about['step']] = about
        encoders[about['step']] = as_encoder(then, store.channels, 'meanstd').encode
    with timed('embed', model=label): wells = profiles(encoders, store, o['crop'])
    maps = {k: relevance(label, w, **points[k]) if k in points else relevance(k, w) for k,w in wells.items() if k in points or label==next(iter(MODELS))}
    if label==next(iter(MODELS)): relevance('the truth', read_profiles(work/'screen/truth.csv', prefix='Truth_'))
    else: maps |= {k: aggregate(TVN().fit_transform(wells[k])) for k in STATS}
    first,last = min(points),max(points)
    for a in (first,*STATS): contrast(maps[a], maps[last], f'{"untrained" if a==first else a} -> trained', label)

def tests(deadline):
    "What `embed` gives on a GPU"
    cmd = [sys.executable,'-m','pytest','-q','-p','no:cacheprovider','--tb=short','tests/test_cuda.py','-k','embed']
    try: said = subprocess.run(cmd, capture_output=True, text=True, timeout=max(1, deadline-time.time())).stdout
    except subprocess.TimeoutExpired: said = 'still running when time was up'
    (out/'tests_embed.txt').write_text(said)
    print('tests of embed:', (said.strip().splitlines() or ['nothing said'])[-1])

def here(args, deadline, script=None):
    "A part in this process, as in a tiny run"
    try: main(args)
    except Exception as e: write('failed', case=args, why=f'{type(e).__name__}: {e}')

def everything(limit, tiny):
    "Compile while screens are made; train and measure recall; then feed; what is left of the time goes to a profile"
    (out/'rows.jsonl').unlink(missing_ok=True)
    start,small,size = time.time(),['--tiny']*tiny,'tiny' if tiny else 'full'
    def end(part): return start+limit*part # of all the time
    work.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(1 if tiny else 4) as pool, ThreadPoolExecutor(1 if tiny else 4) as compilers:
        def go(*args, until, pool=pool): return pool.submit(here if tiny else gpu.run, [*args,*small], end(until), __file__)
        made = go('screens', until=.3)
        compiled = [go('blocks', '--model', m, '--what', w, until=.21, pool=compilers) for m in gpu_blocks.CASES[size] for w in ('embed','train')]
        wait([made,*compiled])
        late = end(.765) # when training must end, for there to be time for the rest
        seconds = 1 if tiny else max(2, late-time.time()-25) # less what starting takes
        fits = [go('fit', '--model', m, '--seconds', str(seconds), '--stop', str(late), until=.87) for m in [*MODELS][:1 if tiny else None]]
        wait(fits+([] if tiny else [pool.submit(tests, end(.45))]))
        for m,until in zip(gpu_feed.FED[size], (.94,1)):
            wait([go('fed', '--model', m, until=until)])
            if until<1: wait([go('alone', until=.995)])
        wait([go('profile', until=1)])
    report()

def table(title, rows):
    "A table, printed and kept"
    if not rows: return
    keys = list(dict.fromkeys(k for r in rows for k in r))
    said = f'\n## {title}\n\n'+timing.markdown([{k: r.get(k, '') for k in keys} for r in rows])
    print(said)
    with open(out/'train.md', 'a') as f: f.write(said+'\n')

def picture(points, lines, file):
    "Recall against FLOPs, with intervals"
    fig,ax = plt.subplots(figsize=(5,3.4), dpi=110)
    for k,p in points.groupby('encoder'):
        ax.errorbar(p.flops, p.recall, np.abs(p[['ci_low','ci_high']].T-p.recall.to_numpy()), marker='o', capsize=2, label=k)
    for r,style in zip(lines.itertuples(), ('--',':','-.','-')): ax.axhline(r.recall, color='grey', ls=style, lw=1, label=r.encoder)
    ax.set(xscale='log', xlabel='FLOPs of training', ylabel='recall of true pairs, after TVN', ylim=(0,1))
    ax.legend(fontsize=7, frameon=False)
    fig.savefig(file, bbox_inches='tight'); plt.close(fig)

def report():
    "Tables of all that was measured, one file of it, and a picture"
    found = {k: read(k) for k in RESULTS}
    where = timing.machine(torch.device('cuda' if torch.cuda.is_available() else 'cpu'))
    (out/'train.json').write_text(json.dumps(dict(machine=where, **found), indent=1))
    (out/'train.md').write_text(json.dumps(where)+'\n')
    t = pd.DataFrame(found['recall'])
    if len(t) and 'images' in t: picture(t[t.images>0], t[~(t.images>0)].drop_duplicates('encoder'), out/'train.png')
    for k in ('times','recall','contrast','blocks','fed','alone','rates'): table(k, [{c: v for c,v in r.items() if k=='times' or c!='seconds'} for r in found[k]])
    table('parts', [dict(model=r['model'], batch=r['bs'], **r['ms']) for r in found['parts']])
    table('profile', [{k: r[k] for k in ('model','what','bs','step_ms','kernel_ms','idle','launches')} for r in found['profile']])
    for r in found['profile']:
        for kind in ('kernels','operators'): table(f'{r["model"]}, {r["what"]}, batch {r["bs"]}: {kind}', r[kind])
    table('failed', [dict(case=' '.join(r['case']), why=r['why']) for r in found['failed']])
    print('\n'+json.dumps(where))

def main(args=None):
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('task', choices=['all','screens','blocks','profile','fit','fed','alone','report'])
    p.add_argument('--model')
    p.add_argument('--what', choices=['train','embed'])
    p.add_argument('--seconds', type=float)
    p.add_argument('--stop', type=float, help='when training ends at the latest, in seconds of the epoch')
    p.add_argument('--limit', type=float, default=380, help='seconds for all')
    p.add_argument('--tiny', action='store_true', help='small, for a CPU')
    a = p.parse_args(args)
    out.mkdir(parents=True, exist_ok=True)
    device = torch.device('cuda' if a.task not in ('screens','alone') and torch.cuda.is_available() else 'cpu') # no processes are forked where CUDA was begun
    def owned(f, *args, shared=False):
        with gpu.alone(shared=shared): f(*args)
    dict(all=lambda: everything(a.limit, a.tiny), screens=lambda: screens(a.tiny), blocks=lambda: gpu_blocks.blocks(a.model, a.what, device, a.tiny),
         profile=lambda: owned(where_time_goes, a.tiny), fit=lambda: owned(fit, a.model, a.seconds, a.stop, a.tiny, shared=True),
         fed=lambda: owned(gpu_feed.fed, a.model, device, a.tiny), alone=lambda: gpu_feed.alone(a.tiny), report=report)[a.task]()

if __name__ == '__main__': main()
