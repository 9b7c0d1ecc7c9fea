"The paper's comparison in miniature: every run in a process of its own, resumable; tables as CSV"
import argparse, json, resource, sys, time, warnings
from pathlib import Path

import anndata as ad, numpy as np, pandas as pd, torch

from cellmae.cavit import CAMAE
from cellmae.classifier import Classifier
from cellmae.embed import as_encoder, embed
from cellmae.profiles import read_profiles
from cellmae.recall import compare_recall, recall
from cellmae.scale import training_flops
from cellmae.screen import Screen
from cellmae.files import write_whole
from cellmae.synth import STAINS6, synth_screen
from cellmae.train import fit_mae, given
from cellmae.trials import run_processes
from cellmae.tvn import TVN, CenterScale, PCACenterScale, Sphere
from cellmae.profiles import aggregate
from cellmae.wsl import fit_wsl, make_classifier
from cellmae.zoo import create_model, recipe

SIZES = dict(
    small=dict(screen={}, epochs=dict(mae=12, wsl=24), inactive=(144,384), wsl=('densenet_t','densenet_s','densenet_m'),
               mae=dict(XS=dict(embed_dim=96, depth=3, num_heads=3), S=dict(embed_dim=128, depth=6, num_heads=4), T={}, B=dict(embed_dim=256, depth=8, num_heads=4))),
    gpu=dict(screen=dict(n_batches=12, sites_per_well=2), epochs=dict(mae=60, wsl=120), inactive=(384,1536), wsl=('densenet_s','densenet_m','densenet161'),
             mae=dict(XS=dict(embed_dim=128, depth=6, num_heads=4), S={}, T=dict(embed_dim=384, depth=12, num_heads=6), B=dict(embed_dim=768, depth=12, num_heads=12))),
    tiny=dict(screen=dict(n_pathways=5, genes_per_pathway=4, n_inactive=2, n_batches=2, controls_per_batch=6, size=64), epochs=dict(mae=1, wsl=1), inactive=(4,6), wsl=('densenet_t',)*3,
              mae=dict(XS=dict(embed_dim=24, depth=1, num_heads=2), S=dict(embed_dim=24, depth=1, num_heads=2), T=dict(embed_dim=24, depth=1, num_heads=2), B=dict(embed_dim=24, depth=1, num_heads=2))))
MAE_RUN = dict(lr=1e-3, alpha=.1, bs=64)   # of a MAE, where a run does not say otherwise: steeper than its recipe, and some stay on the plateau
TILE = 64 # what every encoder sees at once, statistics too
PARTS = ['baseline','scale','fourier','plateau','channels','inactive']
FEW = ['DNA','ER','actin','mito']   # the stains that some models are trained on
VIEWS = {   # what an encoder is shown: stains, and the seed of the screen relative to the one it was trained on
    'all six stains': (STAINS6, 0), 'wrong names': (STAINS6[::-1], 0), 'four stains': (FEW, 0), 'DNA, actin, mito': (['DNA','actin','mito'], 0),
    'RNA and golgi only': (['RNA','golgi'], 0), 'second screen: DNA, actin, golgi': (['DNA','actin','golgi'], 100)}
CORRECTIONS = {'none': None, 'centre-scale': CenterScale(), 'sphering': Sphere(), 'PCA-CS': PCACenterScale(), 'TVN of EFAAR': TVN(variant='efaar'), 'TVN': TVN()}


def mae_runs(size):
    "Sizes, parts of the screen, and Fourier weights"
    runs = [dict(part='scale', family='MAE', label=k, model='mae_vitt8', sizes=v) for k,v in size['mae'].items() if k!='B']
    runs += [dict(runs[2], label=f'T, {f:g} of the sites', fraction=f) for f in (.5,.25)]
    runs += [dict(part='fourier', family='MAE', label=f'T, alpha {a:g}', model='mae_vitt8', sizes=size['mae']['T'], alpha=a) for a in (0.,.001,.01)]
    return runs + [dict(part='fourier', family='MAE', label=f'B, alpha {a:g}', model='mae_vitt8', sizes=size['mae']['B'], alpha=a) for a in (0.,.1)]

def wsl_runs(size):
    "Sizes, parts of the screen, and a ViT backbone"
    runs = [dict(part='scale', family='WSL', label=k, model=k) for k in size['wsl']]
    runs += [dict(runs[1], label=f'{runs[1]["label"]}, {f:g} of the sites', fraction=f) for f in (.5,.25)]
    return runs + [dict(part='scale', family='WSL of a ViT', label='T', model='mae_vitt8', bs=64)]

def plateau_runs(size):
    "Short runs, measured by their loss alone: which rates and Fourier weights leave the plateau of guessing the mean?"
    return [dict(part='plateau', family=f, label=f'{f}, rate {lr:g}, alpha {a:g}', model=m, sizes=size['mae']['T'], lr=lr, alpha=a, bs=32, epochs=min(4, size['epochs']['mae']), views=())
            for f,m in (('MAE','mae_vitt8'), ('CA-MAE','camae_vitt8_shared')) for lr in (5e-4,1e-3) for a in (0.,.03,.1)]

def channel_runs(size):
    "CA-MAE and MAE of equal width, on six stains and on four, both by the recipe of the CA-MAE"
    r,six,four = recipe('camae_vitt8_shared'),('all six stains','wrong names','DNA, actin, mito','second screen: DNA, actin, golgi'),('four stains','RNA and golgi only','all six stains')
    def of(family, model, label, **kw): return dict(part='channels', family=family, model=model, label=f'{family}, {label}', sizes=size['mae']['T'], lr=r.lr, alpha=r.alpha, bs=r.bs, **kw)
    runs = [of(f, m, f'trained on {"four" if few else "six"}', channels=FEW if few else None, views=four if few else six) for few in (False,True) for f,m in (('CA-MAE','camae_vitt8_shared'),('MAE','mae_vitt8'))]
    return runs + [of('CA-MAE', 'camae_vitt8', 'a decoder per stain')] + [dict(part='channels', family='statistics', label=k, model=k, views=tuple(v for v in VIEWS if v!='wrong names')) for k in ('intensity','spectrum')]

def inactive_runs(size):
    "The same genes among more and more that do nothing, as many images seen; the fewest are in the part `scale`"
    return [dict(part='inactive', family=f, label=f'{f}, {n} inactive', model=m, n_inactive=n, sizes=size['mae']['T'] if f=='MAE' else {})
            for n in size['inactive'] for f,m in (('WSL', size['wsl'][1]), ('MAE','mae_vitt8'))]

def baseline_runs(size):
    "Encoders that learn nothing, and the truth"
    return [dict(part='baseline', family='baseline', label=k, model=k) for k in ('intensity','spectrum','oracle','untrained MAE','untrained DenseNet')]

def all_runs(size, parts):
    "Every run of some parts, by a key that can be a file name"
    runs = [r for f in (baseline_runs, mae_runs, wsl_runs, plateau_runs, channel_runs, inactive_runs) for r in f(SIZES[size]) if r['part'] in parts]
    return {'_'.join(''.join(c if c.isalnum() else ' ' for c in f'{r["part"]} {r["family"]} {r["label"]}').split()): r for r in runs}


def open_synth(out, size, seed, n_inactive=None):
    "The screen of a seed, simulated if it is not there"
    kw = SIZES[size]['screen'] | ({} if n_inactive is None else dict(n_inactive=n_inactive))
    return synth_screen(out/f'screen_{seed}_{n_inactive or "default"}', seed=seed, n_workers=1, **kw)

def fewer(screen, fraction, seed):
    "Part of the sites of a screen, the same in every batch"
    rng = np.random.default_rng(seed)
    keep = [rng.permutation(ids)[:round(fraction*len(ids))] for ids in screen.table.groupby('batch', observed=True).indices.values()]
    return screen.subset(np.sort(np.concatenate(keep)))

def with_channels(screen, channels):
    "The screen with some of its stains, or under other names where all come in another order"
    if set(channels)==set(screen.channels) and channels!=screen.channels: channels = dict(zip(screen.channels, channels))
    ranges = dict(zip(screen.channels, screen.fit_ranges()))
    return Screen(screen.table, channels=channels, root=screen.root, ranges=[ranges[c] for c in channels])

def train(run, screen, out, size, seed):
    "The trained model, and what training it cost"
    if run['channels']: screen = with_channels(screen, run['channels'])
    if run['fraction']<1: screen = fewer(screen, run['fraction'], seed)
    epochs = run['epochs'] or SIZES[size]['epochs']['wsl' if run['family'].startswith('WSL') else 'mae']
    if run['n_inactive']: epochs = max(1, round(epochs*run['n_usual']/len(screen)))   # as many images seen
    kw,start = dict(out=out, seed=seed, epochs=epochs, save_every=60),time.process_time()
    if run['family'].startswith('WSL'): learn = fit_wsl(screen, run['model'], cutmix=0., share=0., **given(bs=run['bs']), **kw)   # both help long runs and slow short ones
    else:
        torch.manual_seed(seed)
        r = MAE_RUN | given(**{k: run[k] for k in MAE_RUN})
        model = create_model(run['model'], in_chans=len(screen.channels), alpha=r['alpha'], **run['sizes'])
        learn = fit_mae(screen, model, n_pictures=1, lr=r['lr'], bs=r['bs'], **kw)
    n,model = len(learn.dls.train.ids),learn.model
    return model,dict(epochs=epochs, n_train=n, params=sum(p.numel() for p in model.parameters()), train_s=time.process_time()-start,
                      flops=training_flops(model, epochs*n, 64, in_chans=len(screen.channels)))

def baseline(run, screen, size, seed):
    "The encoder of a run that trains nothing, or the profiles of the oracle"
    if run['label']=='oracle': return read_profiles(screen.root/'truth.csv', prefix='Truth_')
    torch.manual_seed(seed)
    if run['label']=='untrained DenseNet': return make_classifier(SIZES[size]['wsl'][1], 2, screen.channels, 64)
    if run['label']=='untrained MAE': model = create_model('mae_vitt8', in_chans=len(screen.channels), **SIZES[size]['mae']['T']); model.channels = screen.channels; return model
    return run['model']


def shown(model, channels, pool):
    "An encoder for a view: stains that the model wants and the view lacks are blank"
    face = as_encoder(model, channels, pool, channelwise=isinstance(model, CAMAE))
    if face.channels is None or set(face.channels)<=set(channels): return face
    have = [c for c in face.channels if c in channels]
    if not have: return None
    def encode(x):
        full = x.new_zeros(len(x), len(face.channels), *x.shape[2:])
        full[:,[face.channels.index(c) for c in have]] = x
        return face.encode(full)
    return face._replace(encode=encode, channels=have)

def profiles(model, screen, pool):
    "Wells by pooling: means are half of means and standard deviations, and the mean of those by stain is that of all, so one pass gives all"
    if isinstance(model, ad.AnnData): return {'': model}
    face = shown(model, screen.channels, pool)
    if face is None: return {}
    p = embed(face, screen, size=TILE, progress=False)
    if pool!='meanstd': return {pool or '': p}
    def wells(x): return ad.AnnData(x.reshape(p.n_obs, -1), obs=p.obs, uns=p.uns)
    means = p.X.reshape(p.n_obs, len(screen.channels) if face.channelwise else 1, 2, -1)[:,:,0]
    whole = {'meanstd by stain': p, 'mean by stain': wells(means)} if face.channelwise else {'meanstd': p}
    return whole | {'mean': wells(means.mean(1))}

def measured(wells, relationships, corrections):
    "Recall under each correction, and the map after the last"
    rows = []
    for name,tfm in corrections.items():
        t = recall(wells if tfm is None else (wells_ := tfm.fit_transform(wells)), relationships, thresholds=[(.05,.95)], n_perm=0).iloc[0]
        rows.append(dict(correction=name, **t[['recall','ci_low','ci_high','n_pairs','n_genes']]))
    return rows,aggregate(wells_)

def view_of(run, view, out, size, seed):
    "The screen that an encoder is shown"
    channels,shift = VIEWS[view]
    screen = open_synth(out, size, seed+shift, None if shift else run['n_inactive'])
    if run['n_inactive']:   # the map of the usual genes
        extra = screen.table.perturbation.str.match(r'N\d+$') & (screen.table.perturbation.str[1:].where(lambda s: s.str.isdigit(), '0').astype(int)>SIZES[size]['screen'].get('n_inactive', 24))
        screen = screen.subset(~extra.to_numpy())
    return with_channels(screen, channels)

def execute(key, run, out, size, seed):
    "Train, embed, measure, and write what came out"
    run = dict(fraction=1, alpha=None, channels=None, n_inactive=None, sizes={}, views=('all six stains',), epochs=None, lr=None, bs=None) | run
    screen,at = open_synth(out, size, seed, run['n_inactive']),out/'runs'/f'{key}_{seed}'
    run['n_usual'] = len(open_synth(out, size, seed))
    model,cost = (baseline(run, screen, size, seed),{}) if run['part']=='baseline' or run['family']=='statistics' else train(run, screen, at, size, seed)
    pools = (None,) if isinstance(model, str) or isinstance(model, ad.AnnData) else ('neck','meanstd') if isinstance(model, Classifier) else ('meanstd',)
    rows,start = [],time.process_time()
    for view in run['views']:
        shown_to = view_of(run, view, out, size, seed)
        found = {name: wells for pool in pools for name,wells in profiles(model, shown_to, pool).items()}
        if run['family']=='MAE' and run['part']=='scale': found['first block'] = profiles(model.trim(1), shown_to, 'meanstd')['meanstd']   # how much of the map is there already?
        for name,wells in found.items():
            ablate = run['label'] in ('T','densenet_s') and view=='all six stains'
            some,genes = measured(wells, shown_to.root/'relationships.csv', {k: CORRECTIONS[k] for k in (['TVN'] if name=='first block' else CORRECTIONS if ablate else ['none','TVN'])})
            rows += [dict(view=view, pool=name, **r) for r in some]
            write_whole(at/f'{view}_{name}.h5ad', genes.write_h5ad)
    cost |= dict(embed_s=time.process_time()-start, memory_gb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/2**20)
    result = dict(part=run['part'], family=run['family'], label=run['label'], seed=seed, **cost, rows=rows)
    write_whole(at.with_suffix('.json'), lambda f: f.write_text(json.dumps(result, default=float)))


def command(key, seed, args):
    "What does one run in a process of its own"
    return [sys.executable, __file__, '--run', key, '--seeds', str(seed), '--size', args.size, '--out', str(args.out)]

def collect(out):
    "Tables of all runs that are done"
    files = sorted((out/'runs').glob('*.json'))
    runs,histories = [json.loads(f.read_text()) for f in files],[f.with_suffix('')/'history.csv' for f in files]
    rows = [{**{k:v for k,v in r.items() if k!='rows'}, **row} for r in runs for row in r['rows']]
    curves = [pd.read_csv(h).assign(**{k: r[k] for k in ('part','family','label','seed')}) for r,h in zip(runs, histories) if h.exists()]
    return pd.DataFrame(rows),pd.concat([c.filter(['part','family','label','seed','epoch','train_loss','valid_loss','mse','fourier']) for c in curves]) if curves else pd.DataFrame()

def contrasts(out, seeds):
    "Pairs of models on the same screen: gain in recall after TVN, with a paired test"
    rows = []
    for what,a,b in CONTRASTS:
        for s in seeds:
            files = [out/'runs'/f'{k}_{s}'/f for k,f in (a,b)]
            if not all(f.exists() for f in files): continue
            t = compare_recall(*map(ad.read_h5ad, files), out/f'screen_{s}_default/relationships.csv').iloc[0]
            rows.append(dict(contrast=what, seed=s, **t[['a','b','gain','t','p']]))
    return pd.DataFrame(rows)

six,neck,by_stain = [f'all six stains_{k}.h5ad' for k in ('meanstd','neck','mean by stain')]
CONTRASTS = [('WSL -> MAE', ('scale_WSL_densenet_s',neck), ('scale_MAE_T',six)), ('MAE -> WSL of the same ViT', ('scale_MAE_T',six), ('scale_WSL_of_a_ViT_T',neck)), ('MAE XS -> T', ('scale_MAE_XS',six), ('scale_MAE_T',six)),
    ('quarter of the sites -> all', ('scale_MAE_T_0_25_of_the_sites',six), ('scale_MAE_T',six)), ('alpha 0 -> .01', ('fourier_MAE_T_alpha_0',six), ('fourier_MAE_T_alpha_0_01',six)),
    ('alpha 0 -> .1', ('fourier_MAE_T_alpha_0',six), ('scale_MAE_T',six)), ('B, alpha 0 -> .1', ('fourier_MAE_B_alpha_0',six), ('fourier_MAE_B_alpha_0_1',six)),
    ('MAE -> CA-MAE', ('channels_MAE_MAE_trained_on_six',six), ('channels_CA_MAE_CA_MAE_trained_on_six',by_stain)),
    ('CA-MAE: decoder per stain -> shared', ('channels_CA_MAE_CA_MAE_a_decoder_per_stain',by_stain), ('channels_CA_MAE_CA_MAE_trained_on_six',by_stain)),
    ('spectrum -> MAE', ('baseline_baseline_spectrum','all six stains_.h5ad'), ('scale_MAE_T',six)), ('untrained -> MAE', ('baseline_baseline_untrained_MAE',six), ('scale_MAE_T',six))]

def write_tables(out, tables, seeds):
    "The three tables, as CSV"
    runs,curves = collect(out)
    for name,t in dict(runs=runs, curves=curves, contrasts=contrasts(out, seeds)).items():
        write_whole(tables/f'{name}.csv', lambda f: t.to_csv(f, index=False, float_format='%.5g'))
    return runs

def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--parts', nargs='+', default=PARTS)
    p.add_argument('--seeds', nargs='+', type=int, default=[0])
    p.add_argument('--size', choices=SIZES, default='small')
    p.add_argument('--out', type=Path, default=Path('compare_runs'), help='screens and runs; a finished run is not done again')
    p.add_argument('--tables', type=Path, default=Path(__file__).parent/'compare', help='where the CSV files go')
    p.add_argument('--workers', type=int, default=2, help='runs at a time')
    p.add_argument('--threads', type=int, default=1, help='threads of each run')
    p.add_argument('--run', help='one run by its key, in this process')
    args = p.parse_args()
    warnings.filterwarnings('ignore')
    runs = all_runs(args.size, PARTS if args.run else args.parts)
    if args.run: return execute(args.run, runs[args.run], args.out, args.size, args.seeds[0])
    for s in args.seeds:
        for n in {r.get('n_inactive') for r in runs.values()}: open_synth(args.out, args.size, s, n)
        if 'channels' in args.parts: open_synth(args.out, args.size, s+100)
    run_processes({args.out/'runs'/f'{k}_{s}.json': command(k, s, args) for s in args.seeds for k in runs}, args.workers, args.threads)
    t = write_tables(args.out, args.tables, args.seeds)
    print(t[t.correction=='TVN'].groupby(['part','family','label','view','pool'], sort=False).recall.agg(['mean','min','max','size']).round(3).to_string())

if __name__ == '__main__': main()
