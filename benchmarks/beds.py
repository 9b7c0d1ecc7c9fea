#!/usr/bin/env python
"The two simulated screens without a trained model: what can be read of each parameter, and the ladder"
import argparse, os
os.environ.setdefault('OMP_NUM_THREADS', '1')
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np, pandas as pd, torch
from scipy import ndimage
from sklearn.linear_model import RidgeCV
from sklearn.model_selection import cross_val_predict

from cellmae.embed import embed
from cellmae.profiles import read_profiles
from cellmae.recall import recall
from cellmae.stats import intensity_stats, spectrum_stats
from cellmae.synth import BEDS, STAINS6, draw_cells, expose, synth_screen
from cellmae.tvn import TVN
from cellmae.zoo import create_model

SIDE = 64 # of the patch of a cell, and of the tiles of statistics
DULL = dict(gain=np.ones(6), offset=np.full(6, 300.), blur=np.full(6, .8), tilt=np.zeros((6,2)), slope=np.zeros((6,2)))
grid = np.mgrid[:SIDE,:SIDE].astype(np.float32)

# --- measurements by hand: `c` are the cells of a site, whose outlines and axes are known, `x (n,6,64,64)` are its patches

def col(v): return np.float32(v)[:,None,None]
def smooth(x, s): return ndimage.gaussian_filter(x, (0,)*(x.ndim-2)+(s,s))
def mean(w, x): return (w*x).sum((-2,-1))/(w.sum((-2,-1))+1e-3)
def parts(c): return dict(cytoplasm=c.inside-c.innuc, nucleus=c.innuc)

def patches(c, site):
    "The site around each cell"
    x = np.pad(site, ((0,0),(SIDE,SIDE),(SIDE,SIDE)), mode='edge').astype(np.float32)
    return np.stack([x[:, b+SIDE:b+2*SIDE, a+SIDE:a+2*SIDE] for a,b in c.corner])

def outlines(c):
    "Area, moments up to the sixth wave, and perimeter of cells and nuclei"
    for k,w in dict(cell=c.inside, nucleus=c.innuc).items():
        y,x = [g-col(mean(w, g)) for g in grid]
        t,area,slopes = np.arctan2(y, x),w.sum((1,2))+1e-3,np.gradient(w, axis=(1,2))
        yield f'{k} area',area
        yield f'{k} elongation',np.hypot(mean(w, x*x-y*y), mean(w, 2*x*y))/mean(w, x*x+y*y)
        yield f'{k} spread',mean(w, x*x+y*y)/area
        yield f'{k} perimeter',np.hypot(*slopes).sum((1,2))/np.sqrt(area)
        for n in range(2, 7): yield f'{k} wave {n}',np.hypot(mean(w, np.cos(n*t)), mean(w, np.sin(n*t)))
    a = c.turn+c.side # where the Golgi is
    yield 'nucleus off',(c.nucleus.x-c.cell.x)*np.cos(a)+(c.nucleus.y-c.cell.y)*np.sin(a)

def moments(c, x):
    "Brightness, and spread, skew and tails of three bands, of each stain in each part"
    bands = x-smooth(x, 3), x-smooth(x, 1.5), smooth(x, 2.5)-smooth(x, 7)
    for i,s in enumerate(STAINS6):
        for p,w in parts(c).items():
            level = mean(w, x[:,i]-x[:,i].min())
            yield f'{s} {p}',np.log(level+1)
            for b,h in zip(('middle','fine','broad'), bands):
                h = h[:,i]-col(mean(w, h[:,i]))
                sd = np.sqrt(mean(w, h*h))+1e-3
                z = h/col(sd)
                yield f'{s} {p} {b} spread',np.log(sd/(level+20))
                yield f'{s} {p} {b} skew',mean(w, z*z*z)
                yield f'{s} {p} {b} tails',np.log(mean(w, z*z*z*z)+.1)

def places(c, x):
    "Where each stain is: from centre to rim, towards the Golgi, along the axis of the cell"
    t = c.cell.polar()[1]
    for i,s in enumerate(STAINS6):
        for p,w in parts(c).items():
            w = w*(x[:,i]-x[:,i].min())
            yield f'{s} {p} rim',mean(w, c.rho)
            yield f'{s} {p} rim of nucleus',mean(w, c.nrho)
            yield f'{s} {p} side',mean(w, np.cos(t-col(c.side)))
            yield f'{s} {p} both sides',mean(w, np.cos(2*(t-col(c.side))))
            yield f'{s} {p} axis',mean(w, np.cos(2*t))
        yield f'{s} cortex',mean(np.exp(-.5*((c.rho-.93)/.06)**2)*c.inside, x[:,i])/mean(c.inside, x[:,i])

def directions(c, x):
    "How straight a texture runs, whether all of it runs one way, and along the axis of the cell or across"
    gy,gx = [ndimage.gaussian_filter(x, (0,0,.7,.7), order=o) for o in ((0,0,1,0),(0,0,0,1))]
    a,b,size = [smooth(o, 1.5) for o in (gx*gx-gy*gy, 2*gx*gy, gx*gx+gy*gy)]
    straight,way = np.hypot(a, b),np.arctan2(b, a)/2
    for i,s in enumerate(STAINS6):
        for p,w in parts(c).items():
            yield f'{s} {p} straight',mean(w, straight[:,i])/mean(w, size[:,i])
            w = w*straight[:,i]
            yield f'{s} {p} along',mean(w, np.cos(2*(way[:,i]-col(c.turn))))
            for n in (2,4): yield f'{s} {p} order {n}',np.hypot(mean(w, np.cos(n*way[:,i])), mean(w, np.sin(n*way[:,i])))

def together(c, x):
    "Correlations of stains, once what is smooth is taken away"
    h = x-smooth(x, 3)
    for p,w in parts(c).items():
        z = np.stack([o/col(np.sqrt(mean(w, o*o))+1e-3) for o in (h[:,i]-col(mean(w, h[:,i])) for i in range(6))])
        for i in range(6):
            for j in range(i): yield f'{STAINS6[i]} on {STAINS6[j]}, {p}',mean(w, z[i]*z[j])

def peaks(c, x):
    "Bright spots of each stain, and how near the centre of the nucleus they lie"
    h = x-smooth(x, 3)
    top = (x==ndimage.maximum_filter(x, (1,1,3,3)))&(h>2*h.std((2,3), keepdims=True))
    for i,s in enumerate(STAINS6):
        for p,w in parts(c).items():
            n = (top[:,i]*(w>.5)).sum((1,2))
            yield f'{s} {p} spots',n
            yield f'{s} {p} place of spots',(top[:,i]*(w>.5)*c.nrho).sum((1,2))/(n+.1)

def pieces(c, site):
    "Connected pieces of the brightest pixels of a site: how many, how large, how long"
    for i,s in enumerate(STAINS6):
        h = smooth(site[i].astype(np.float32), .6)-smooth(site[i].astype(np.float32), 4)
        for q in (80,90,95):
            lab,n = ndimage.label(h>np.percentile(h, q), np.ones((3,3)))
            y,x = np.nonzero(lab)
            k = lab[y,x]-1
            area = np.bincount(k)
            far = (x-(np.bincount(k, x)/area)[k])**2+(y-(np.bincount(k, y)/area)[k])**2
            found = n/c.inside.sum(), np.log(area).mean(), np.log((area**2).sum()/area.sum()), (np.bincount(k, far)/area).sum()/area.sum()
            for what,v in zip(('number','size','largest','length'), found): yield f'{s} pieces at {q}, {what}',np.full(c.n, v)

def measurements(c, site):
    "All of them, averaged over the cells of a site by their areas `(m,)`"
    x,area = patches(c, site),c.inside.sum((1,2))
    all_of = [*outlines(c), *(o for f in (moments,places,directions,together,peaks) for o in f(c, x)), *pieces(c, site)]
    return np.nan_to_num(np.stack([v for _,v in all_of]))@(area/area.sum())

# --- what can be read

def one_site(i, bed):
    "Parameters of a site in units of `sd`, and what is measured of it"
    b,rng = BEDS[bed],np.random.default_rng((9,i))
    d = draw_cells(12, rng, .7*rng.standard_normal(len(b.params)), b.params)
    c = b.cells(d, rng)
    site = expose(np.stack([c.compose(f()) for f in (c.dna,c.er,c.rna,c.actin,c.mito,c.golgi)]), DULL, rng)
    grey = torch.from_numpy(((site-250)/30).clip(0, 255).astype(np.uint8))
    tiles = torch.stack([grey[:, y:y+SIDE, x:x+SIDE] for y in (0,SIDE) for x in (0,SIDE)])
    area = c.inside.sum((1,2))
    return ((d-b.params.base)/b.params.sd).T.to_numpy()@(area/area.sum()), *[f(tiles).mean(0).numpy() for f in (intensity_stats,spectrum_stats)], measurements(c, site)

def r2(X, Y):
    "Share of variance of each column that a ridge finds in sites it has not seen"
    X = (X-X.mean(0))/(X.std(0)+1e-6)
    ridge = RidgeCV(np.logspace(-1, 5, 13), alpha_per_target=True)
    return 1-((Y-cross_val_predict(ridge, X, Y, cv=5))**2).sum(0)/((Y-Y.mean(0))**2).sum(0)

def legible(bed, n, jobs):
    "R2 of each parameter by intensity, spectra and hand"
    with ProcessPoolExecutor(jobs) as pool: found = list(pool.map(partial(one_site, bed=bed), range(n), chunksize=10))
    Y,*X = [np.stack(o) for o in zip(*found)]
    t = pd.DataFrame({k: r2(x, Y) for k,x in zip(('intensity','spectrum','by hand'), X)}, index=BEDS[bed].params.index)
    return t.assign(bed=bed, kind=BEDS[bed].params.kind).reset_index()

# --- the ladder

def untrained():
    torch.manual_seed(0)
    return create_model('mae_vitt8', in_chans=6, img_size=SIDE)

def ladder(bed, out, screen):
    "Recall after TVN of what learns nothing, on equal tiles"
    s = synth_screen(out/f'beds_{bed}', bed=bed, **screen)
    for k,f in {'intensity': 'intensity', 'spectrum': 'spectrum', 'untrained MAE': untrained()}.items():
        yield bed,k,embed(f, s, size=SIDE, progress=False),s.root
    yield bed,'oracle',read_profiles(s.root/'truth.csv', prefix='Truth_'),s.root

def rung(bed, encoder, profiles, root):
    r = recall(TVN().fit_transform(profiles), root/'relationships.csv', thresholds=[(.05,.95)], n_perm=0).iloc[0]
    return dict(bed=bed, encoder=encoder, recall=r.recall, ci_low=r.ci_low, ci_high=r.ci_high)

def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--out', type=Path, default=Path('beds'), help='folder for the screens')
    p.add_argument('--tables', type=Path, default=Path(__file__).parent/'beds')
    p.add_argument('--beds', nargs='+', default=list(BEDS), choices=list(BEDS))
    p.add_argument('--sites', type=int, default=1000, help='sites that are measured')
    p.add_argument('--jobs', type=int, default=2)
    p.add_argument('--tiny', action='store_true', help='all of it, in seconds')
    args = p.parse_args()
    torch.set_num_threads(1)
    screen = dict(n_pathways=5, genes_per_pathway=4, n_inactive=2, n_batches=2, controls_per_batch=6, size=64) if args.tiny else {}
    args.tables.mkdir(parents=True, exist_ok=True)
    tables = dict(legible=pd.concat([legible(b, args.sites, args.jobs) for b in args.beds]),
                  ladder=pd.DataFrame([rung(*o) for b in args.beds for o in ladder(b, args.out, screen)]))
    for k,t in tables.items():
        t.round(3).to_csv(args.tables/f'{k}.csv', index=False)
        print(t.round(3).to_string(index=False))

if __name__=='__main__': main()
