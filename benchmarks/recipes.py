"Which recipe finds most in a few CPU-minutes? Every run in a process of its own, resumable, on simulated screens"
import argparse, json, sys, warnings
from pathlib import Path

import anndata as ad, numpy as np, pandas as pd, torch
from cellmae.cavit import CAMAE
from cellmae.embed import embed
from cellmae.features import regress_features
from cellmae.files import write_whole
from cellmae.profiles import aggregate, join_profiles, read_profiles
from cellmae.recall import compare_recall, recall
from cellmae.screen import open_screen
from cellmae.store import pack
from cellmae.synth import synth_screen
from cellmae.train import fit_mae
from cellmae.trials import Stopwatch, compare_trials, run_processes
from cellmae.tvn import TVN, CenterScale
from cellmae.zoo import create_model
from timing import processor

TAILS = dict(thresholds=[(.05,.95)], n_perm=0)
STATISTICS = 'intensity','spectrum'
SCREENS = dict(first=dict(seed=0), second=dict(seed=100), form=dict(seed=0, bed='form')) # recipes are chosen on the first
SHORT = dict(epochs=8) # a third of the recipe's 24
PATCHES = dict(model='mae_vitt8_energy', **SHORT)
RECIPES = {   # name -> model, what differs in it (`net`), options of `fit_mae`
    'plain': dict(model='mae_vitt8'),
    'short': dict(model='mae_vitt8', **SHORT),
    'short, twice the rate': dict(model='mae_vitt8', lr=1e-3, **SHORT),
    'short, patches of 4': dict(model='mae_vitt4', **SHORT),
    'short, energies': dict(model='mae_vitt8', energy=.5, **SHORT),
    'short, energies alone': dict(model='mae_vitt8', energy=1., **SHORT),
    'short, energies of patches': PATCHES,
    'short, energies of patches alone': dict(PATCHES, energy=1.),
    'short, energies, patches of 4': dict(model='mae_vitt4', energy=.5, **SHORT),
    'short, energies of patches, patches of 4': dict(model='mae_vitt4_energy', **SHORT),
    'energies of patches, patches of 4': dict(model='mae_vitt4_energy'), # ten minutes
    'energies of patches, half hidden': dict(PATCHES, mask_ratio=.5),
    'energies of patches, nine tenths hidden': dict(PATCHES, mask_ratio=.9),
    'energies of patches, batch 16': dict(PATCHES, bs=16),
    'energies of patches, twice the rate': dict(PATCHES, lr=1e-3),
    'energies of patches, no Fourier loss': dict(PATCHES, alpha=0.),
    'energies of patches, small decoder': dict(PATCHES, net=dict(decoder=dict(embed_dim=64, depth=1))),
    'energies of patches, average': dict(PATCHES, ema=.99),
    'energies of patches, gamma 1': dict(PATCHES, net=dict(init_values=1.)),
    'energies of patches, drop path': dict(PATCHES, net=dict(drop_path=.1)),
    'energies of patches, normalised pixels': dict(PATCHES, net=dict(norm_pix=True)),
    'energies of patches, crops of 48': dict(PATCHES, crop=48),
    'energies of patches, crops of 96': dict(PATCHES, crop=96),
    'channels, short': dict(model='camae_vitt8_shared', epochs=6),
    'channels, energies, short': dict(model='camae_vitt8_energy_shared', epochs=6),
    'channels': dict(model='camae_vitt8_shared'),
    'channels, energies': dict(model='camae_vitt8_energy_shared'),
}

BASES = {'short': [k for k in RECIPES if k.startswith('short, energies')], 'short, energies of patches': [k for k in RECIPES if k.startswith('energies of patches')],
         'channels, short': ['channels, energies, short'], 'channels': ['channels, energies']} # and what is compared with each

def screen_of(out, name):
    "A screen by name, simulated and packed if it is not there"
    files,store = out/f'screen_{name}',out/f'store_{name}'
    if not store.exists(): pack(synth_screen(files, n_workers=1, **SCREENS[name]), store)
    return open_screen(store),files

# --- read-outs: one pass of the encoder gives all of them

def pooled(t):
    "Means and spreads `(B,4*G*D)` of tokens `(2,B,G,L,D)` after block 1 and after the last norm, of `G` groups side by side"
    return torch.cat([*t.mean(3).flatten(2), *t.std(3, correction=0).flatten(2)], -1)

def groups_of(model, n_channels):
    "Into how many groups tokens are pooled: one; in a channel-agnostic model also one per channel"
    return [1,n_channels] if isinstance(model, CAMAE) else [1]

def tokens_pooled(model, x):
    "Tokens of the encoder, pooled in each of these ways"
    depth,norm = len(model.encoder.blocks),model.encoder.norm
    first,last = model.features(x, blocks=[1,depth])
    t = torch.stack([first, norm(last)])[:,:,1:].float() # (2,B,L,D)
    return [pooled(t.unflatten(2, (n,-1))) for n in groups_of(model, x.shape[1])]

READ = {'meanstd': (1,3), 'mean': (1,), 'mean, spread of block 1': (1,2), 'block 1': (0,2)} # of those four
BY = '',', by channel'

def read_outs(model, screen):
    "Profiles of wells by read-out"
    @torch.inference_mode()
    def encode(x):
        with torch.autocast('cpu', torch.bfloat16): return torch.cat(tokens_pooled(model.eval(), x), -1)
    p = embed(encode, screen, size=model.config['img_size'], progress=False)
    ends = np.cumsum(groups_of(model, len(screen.channels)))
    groups = [np.split(X, 4, 1) for X in np.split(p.X, ends[:-1]*p.X.shape[1]//ends[-1], 1)]
    return {k+by: ad.AnnData(np.concatenate([parts[i] for i in which], 1), obs=p.obs)
            for by,parts in zip(BY, groups) for k,which in READ.items()}

def statistics(out, name, size):
    "Profiles of statistics on tiles of a size, kept"
    screen,_ = screen_of(out, name)
    found = {}
    for k in STATISTICS:
        file = out/f'{name}_{k}_{size}.h5ad'
        if not file.exists(): write_whole(file, embed(k, screen, size=size, progress=False).write_h5ad)
        found[k] = ad.read_h5ad(file)
    return found

# --- one run

def told(t): return {k: float(t[k]) for k in ('recall','ci_low','ci_high')}

def measured(profiles, stats, files):
    "Recall of each read-out, alone and joined with spectrum statistics, and paired tests against these"
    known,tvn = files/'relationships.csv',lambda p: TVN().fit_transform(p)
    bar,rows,maps = tvn(stats['spectrum']),[],{}
    for k,p in {**profiles, **stats}.items():
        w = tvn(p)
        maps[k] = aggregate(w)
        both = {} if k in stats else dict(joined=join_profiles(w, bar))
        for of,m in {'alone': w, **both}.items():
            test = compare_recall(bar, m, known).iloc[0]
            rows.append(dict(readout=k, of=of, **told(recall(m, known, **TAILS).iloc[0]), gain=test.gain, p=test.p))
    return rows,maps

def execute(key, screen_name, seed, out):
    "Train, embed, measure, and write what came out"
    at,run = out/'runs'/f'{key}_{screen_name}_{seed}',dict(RECIPES[key])
    screen,files = screen_of(out, screen_name)
    watch,net = Stopwatch(),run.pop('net', {})
    torch.manual_seed(seed)
    crop = run.get('crop', 64)
    model = create_model(run.pop('model'), in_chans=len(screen.channels), img_size=crop, **net)
    learn = fit_mae(screen, model, out=at, seed=seed, bf16=True, n_pictures=0, save_every=60, num_workers=0, cbs=[watch], **run)
    cost,history = watch.spent[1],pd.read_csv(at/'history.csv').iloc[-1].to_dict()
    profiles = read_outs(learn.model, screen)
    rows,maps = measured(profiles, statistics(out, screen_name, crop), files)
    truth = read_profiles(files/'truth.csv', prefix='Truth_')
    r2,_ = regress_features(*(CenterScale().fit_transform(p) for p in (profiles['meanstd'],truth)), n_boot=0)
    write_whole(at/'wells.h5ad', profiles['meanstd'].write_h5ad)
    for k,m in maps.items(): write_whole(at/f'{k}.h5ad', m.write_h5ad)
    result = dict(recipe=key, screen=screen_name, seed=seed, cpu_s=cost, machine=processor(), r2=r2.r2.to_dict(), history=history, rows=rows)
    write_whole(at.with_suffix('.json'), lambda f: f.write_text(json.dumps(result, default=float)))

def command(key, screen, seed, args):
    "What does one run in a process of its own"
    return [sys.executable, '-W', 'ignore', __file__, '--run', key, '--screens', screen, '--seeds', str(seed), '--out', str(args.out)]

def collect(out):
    "One row per run and read-out; `gain` and its `p` are over spectrum statistics"
    rows = []
    for f in sorted((out/'runs').glob('*.json')):
        r = json.loads(f.read_text())
        bar = next(o['recall'] for o in r['rows'] if o['readout']=='spectrum')
        about = {**{k: r[k] for k in ('recipe','screen','seed','cpu_s')}, 'machine': r.get('machine', 'earlier')}
        rows += [{**about, **o, 'gain': o['recall']-bar} for o in r['rows']]
    return pd.DataFrame(rows)

def against(runs, out, base, readout='meanstd'):
    "Recall of each recipe less that of a base of the same seed, and its paired test"
    rows = []
    for screen,own in runs.groupby('screen'):
        seeds = own.seed[own.recipe==base]
        done = own[own.recipe.isin([base,*BASES[base]]) & own.seed.isin(seeds)][['recipe','seed']].drop_duplicates()
        maps = {(r,s): ad.read_h5ad(out/'runs'/f'{r}_{screen}_{s}'/f'{readout}.h5ad') for r,s in zip(done.recipe, done.seed)}
        if done.recipe.nunique()>1: rows.append(compare_trials(maps, screen_of(out, screen)[1]/'relationships.csv', base).assign(screen=screen))
    return pd.concat(rows).assign(readout=readout)[['recipe','screen','seed','readout','recall','base','gain','p']] if rows else pd.DataFrame()

def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--recipes', nargs='+', default=list(RECIPES))
    p.add_argument('--screens', nargs='+', default=['first'])
    p.add_argument('--seeds', nargs='+', type=int, default=[0])
    p.add_argument('--out', type=Path, default=Path('recipes'))
    p.add_argument('--tables', type=Path, default=Path(__file__).parent/'recipes')
    p.add_argument('--jobs', type=int, default=1)
    p.add_argument('--run', help='one recipe, in this process')
    args = p.parse_args()
    warnings.filterwarnings('ignore')
    if args.run: return execute(args.run, args.screens[0], args.seeds[0], args.out)
    jobs = [(r,s,k) for k in args.seeds for s in args.screens for r in args.recipes]
    run_processes({args.out/'runs'/f'{r}_{s}_{k}.json': command(r, s, k, args) for r,s,k in jobs}, args.jobs)
    runs = collect(args.out)
    gains = pd.concat([against(runs, args.out, base, o) for base in BASES for o in ('meanstd', *['mean, by channel']*base.startswith('channels'))])
    for name,t in dict(runs=runs, gains=gains).items():
        write_whole(args.tables/f'{name}.csv', lambda f: t.to_csv(f, index=False, float_format='%.4g'))

if __name__ == '__main__': main()
