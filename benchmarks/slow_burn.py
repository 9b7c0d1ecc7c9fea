#!/usr/bin/env python
"Recall against CPU time over two decades: every budget a run of its own, hour after hour, going on exactly after any kill"
import argparse, json, os, shutil, time, warnings
from pathlib import Path
from statistics import median

import pandas as pd, torch
from fastai.callback.core import Callback
from matplotlib import pyplot as plt
from timing import markdown

from cellmae.embed import embed
from cellmae.files import write_whole
from cellmae.profiles import aggregate, join_profiles, read_profiles
from cellmae.recall import compare_recall, recall
from cellmae.screen import open_screen
from cellmae.store import pack
from cellmae.synth import synth_screen
from cellmae.train import fit_mae
from cellmae.tvn import TVN
from cellmae.zoo import create_model

SIZES = dict(
    full=dict(screen=dict(sites_per_well=12), minutes=(2,8,32,128,512), crop=64, net={}, options=dict(save_every=30)), # 20,064 sites to train on
    tiny=dict(screen=dict(n_pathways=5, genes_per_pathway=4, n_inactive=2, n_batches=2, controls_per_batch=6, size=64, sites_per_well=3), minutes=(.005,.01), crop=32,
              net=dict(depth=1, embed_dim=48), options=dict(bs=16, save_every=.1)))
RECIPES = dict(plain=dict(model='mae_vitt8'), best=dict(model='mae_vitt4_energy')) # the paper's loss alone, and the best that is known
STATISTICS = 'intensity','spectrum'
HELD = '1' # the site of each well that no run is trained on, and that all are judged by

# --- the screen

def screen_in(out, bed, size):
    "Sites to train on and sites to judge by, of a store that is made if it is not there, and the known pairs"
    files,store,pairs = out/'screen',out/'store',out/'relationships.csv'
    if not pairs.exists():
        pack(synth_screen(files, bed=bed, n_workers=1, **SIZES[size]['screen']), store, workers=1)
        write_whole(pairs, lambda f: shutil.copy(files/'relationships.csv', f))
    if files.exists(): shutil.rmtree(files)
    screen = open_screen(store)
    held = (screen.table.site.astype(str)==HELD).to_numpy()
    return screen.subset(~held),screen.subset(held),pairs

# --- one run

class Spent(Callback):
    "Keep the CPU seconds of a run in its folder, over all its processes, what a kill undid included"
    def __init__(self, file, every=10.):
        self.file,self.every = file,every
        self.before = json.loads(file.read_text()) if file.exists() else 0.
        self.start = self.told = time.process_time()

    def total(self): return self.before+time.process_time()-self.start
    def tell(self): write_whole(self.file, lambda f: f.write_text(json.dumps(self.total())))

    def after_batch(self):
        if (now := time.process_time())-self.told>self.every: self.told = now; self.tell()

class Steps(Callback):
    "CPU seconds of each step of training"
    def __init__(self): self.at,self.took = time.process_time(),[]
    def after_batch(self):
        now = time.process_time()
        if self.training: self.took.append(now-self.at)
        self.at = now

def train(recipe, screen, out, size, epochs, cbs):
    "A whole run, or the rest of one"
    how,s = dict(RECIPES[recipe]),SIZES[size]
    torch.manual_seed(0)
    net = create_model(how.pop('model'), in_chans=len(screen.channels), img_size=s['crop'], **s['net'])
    return fit_mae(screen, net, out=out, epochs=epochs, n_pictures=0, num_workers=0, cbs=cbs, **how, **s['options'])

def plan(recipe, screen, out, size):
    "Epochs of each budget, from some steps that are timed once and for all"
    file = out/'plans'/f'{recipe}.json'
    if not file.exists():
        few,trial,steps = screen.subset(range(0, len(screen), max(1, len(screen)//1000))),out/'trial',Steps()
        shutil.rmtree(trial, ignore_errors=True)
        learn = train(recipe, few, trial, size, 1, [steps])
        site = median(steps.took)*len(learn.dls.train)/len(few)
        write_whole(file, lambda f: f.write_text(json.dumps({m: max(1, round(60*m/(site*len(screen)))) for m in SIZES[size]['minutes']})))
        shutil.rmtree(trial)
    return json.loads(file.read_text())

# --- what it found

def corrected(profiles): return TVN().fit_transform(profiles)

def told(wells, pairs):
    "Recall of corrected wells, with its interval"
    r = recall(wells, pairs, thresholds=[(.05,.95)], n_perm=0).iloc[0]
    return {k: float(r[k]) for k in ('recall','ci_low','ci_high')}

def against(base, wells, pairs):
    "p of a paired test of a map against another"
    return float(compare_recall(aggregate(base), aggregate(wells), pairs).p.iloc[0])

def kept(file, f):
    "What `f` gives, computed once"
    if not file.exists():
        write_whole(file, lambda o: o.write_text(json.dumps(f())))
    return json.loads(file.read_text())

def profiles_of(model, held, at, crop): return read_profiles(embed(model, held, size=crop, out=at, progress=False))

def statistics(name, held, pairs, out, crop): return dict(recipe=name, **told(corrected(profiles_of(name, held, out/name, crop)), pairs))

def point(recipe, minutes, epochs, screen, held, pairs, out, size):
    "A run of a budget, and what it found"
    at,crop = out/'runs'/f'{recipe}_{minutes}',SIZES[size]['crop']
    at.mkdir(parents=True, exist_ok=True)
    spent = Spent(at/'cpu.json')
    learn = train(recipe, screen, at, size, epochs, [spent])
    spent.tell()
    own,bar = map(corrected, (profiles_of(learn.model, held, at/'profiles', crop), read_profiles(out/'spectrum/profiles.parquet')))
    both = join_profiles(own, bar)
    found = dict(**told(own, pairs), p=against(bar, own, pairs), joined=told(both, pairs)['recall'], joined_p=against(bar, both, pairs))
    return dict(recipe=recipe, minutes=float(minutes), epochs=epochs, cpu_s=spent.total(), sites=len(screen), held=len(held), **found)

# --- all of them

def write_tables(out, tables):
    "A table and a picture of all that is finished; `p` of paired tests against spectrum statistics"
    t = pd.DataFrame([json.loads(f.read_text()) for f in sorted((out/'points').glob('*.json'))])
    t = t.reindex(columns='recipe minutes epochs cpu_s sites held recall ci_low ci_high p joined joined_p'.split()).sort_values(['recipe','minutes'], ignore_index=True)
    tables.mkdir(exist_ok=True)
    t.to_csv(tables/'results.csv', index=False, float_format='%.4g')
    (tables/'results.md').write_text(shown(t))
    draw(t, tables/'curve.png')

def shown(t):
    "A row per point"
    ps = {k: t[k].map('{:.1g}'.format, na_action='ignore') for k in ('p','joined_p')}
    t = t.assign(hours=(t.cpu_s/3600).round(3)).round(3).assign(**ps)[['recipe','hours','epochs','recall','ci_low','ci_high','p','joined','joined_p']].astype(object)
    return markdown(t.where(t.notna(), '').to_dict('records'))+'\n'

def draw(t, file):
    "Recall against CPU hours"
    fig,ax = plt.subplots(figsize=(6,3.5), layout='tight')
    for k,o in t.groupby('recipe'):
        if k in STATISTICS: ax.axhline(o.recall.iat[0], color='k', lw=1, ls=':' if k=='intensity' else '--', label=f'{k} statistics')
        else: ax.errorbar(o.cpu_s/3600, o.recall, [o.recall-o.ci_low, o.ci_high-o.recall], marker='o', capsize=3, label=k)
    ax.set_xscale('log'); ax.set_xlabel('CPU hours'); ax.set_ylabel('recall'); ax.legend()
    fig.savefig(file, dpi=100)
    plt.close(fig)

def burn(out, bed, size, recipes, tables, minutes=None):
    "Statistics first, then budgets from short to long, the recipes in turn"
    out.mkdir(parents=True, exist_ok=True)
    screen,held,pairs = screen_in(out, bed, size)
    for k in STATISTICS: kept(out/'points'/f'{k}.json', lambda: statistics(k, held, pairs, out, SIZES[size]['crop']))
    for m in map(str, minutes or SIZES[size]['minutes']):
        for r in recipes:
            done = out/'points'/f'{r}_{m}.json'
            if done.exists(): continue
            epochs = plan(r, screen, out, size)[m]
            print(time.strftime('%X'), r, m, 'minutes:', epochs, 'epochs', flush=True)
            print(kept(done, lambda: point(r, m, epochs, screen, held, pairs, out, size)), flush=True)
            write_tables(out, tables)

def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--out', type=Path, default=Path('slow_burn'), help='folder that holds the screen and the runs: 3 GB and more')
    p.add_argument('--tables', type=Path, default=Path(__file__).parent/'slow_burn', help='where results.csv, results.md and curve.png go')
    p.add_argument('--bed', default='plain', help='of the simulated screen, see `synth_screen`')
    p.add_argument('--recipes', nargs='+', default=list(RECIPES), choices=list(RECIPES))
    p.add_argument('--minutes', nargs='+', type=int, choices=SIZES['full']['minutes'], help='budgets in CPU minutes; all of them if not given')
    p.add_argument('--threads', type=int, default=1)
    p.add_argument('--nice', type=int, default=5, help='how far it stands back behind other programs')
    p.add_argument('--tiny', action='store_true', help='all of it, in seconds')
    args = p.parse_args()
    warnings.filterwarnings('ignore')
    torch.set_num_threads(args.threads)
    if hasattr(os, 'nice'): os.nice(args.nice)
    burn(args.out, args.bed, 'tiny' if args.tiny else 'full', args.recipes, args.tables, args.minutes)

if __name__=='__main__': main()
