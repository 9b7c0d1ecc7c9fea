"Every correction on every set of wells at hand, each compared with centre-scale on the same genes"
import argparse, os, tempfile, time, warnings
from functools import partial
from pathlib import Path

import numpy as np, pandas as pd
from anndata import AnnData
from scipy.stats import t as student
from sklearn.base import clone
from sklearn.pipeline import make_pipeline
from timing import markdown

from cellmae.choose import ReplicateWeights, choose_correction
from cellmae.embed import embed
from cellmae.profiles import aggregate, read_profiles, to_parquet
from cellmae.recall import compare_recall, recall, relationship_sets
from cellmae.retrieval import average_precision, match
from cellmae.stats import intensity_stats, spectrum_stats
from cellmae.synth import synth_screen
from cellmae.tvn import TVN, CenterScale, PCACenterScale, Sphere

BASE = CenterScale()
CORRECTIONS = {'none':None, **{repr(t): t for t in (
    CenterScale(None), BASE, CenterScale(robust=True),
    *(Sphere(shrink=a) for a in (0,None,.5)), PCACenterScale(),
    *(TVN(variant=v) for v in ('efaar','efaar_2023','efaar_2024')), TVN(0), TVN(), TVN(1),
    ReplicateWeights())}}


def wells(x, **columns):
    "Profiles with the columns that corrections and measures ask for"
    x.obs = x.obs.assign(**{k: x.obs[v] if isinstance(v, str) else v for k,v in columns.items()})
    return x[np.isfinite(x.X).all(1)].copy()

def mitocheck(data, cache):
    "siRNA, nearly all of them hits: 7 scores"
    scores = 'cell_death','binuclear','polylobed','large','dynamic','mitotic','grape'
    x = read_profiles(data/'mitocheck_wells/wells.csv.gz', scores)
    return wells(x, batch='plate', perturbation='gene')

def idr(letter, data, cache):
    "siRNA, 4 plates: density series and empty wells left out"
    file = next((data/'idr0028_rho_sirna').glob(f'screen{letter}_*_features.tsv.gz'))
    names = [*pd.read_csv(file, sep='\t', encoding='latin-1', nrows=0)][6:]
    x = read_profiles(file, names)
    x = x[~x.obs.Genes.astype(str).str.fullmatch(r'\d+|Empty')]
    return wells(x.copy(), batch='Plate', perturbation='Genes', well='Well',
                 control=x.obs.Genes=='Cells')

def jump(kind, data, cache):
    "One kind of perturbation in two cell lines, positive controls left out: 15 probabilities"
    file = data/'jump_cpjump1_wells/wells_15_phenotypes.csv.gz'
    x = read_profiles(file, [*pd.read_csv(file, nrows=0)][8:])
    x = x[(x.obs.treatment_type==kind)&x.obs.control_type.isin(['','negcon'])].copy()
    arm,control = x.obs.Cell_type+' '+x.obs.Time.astype(str),x.obs.control_type=='negcon'
    return wells(x, batch='Plate', well='Well', perturbation='treatment', control=control, arm=arm)

def bbbc021(data, cache):
    "Compounds with mechanisms in ten weeks, which are its batches"
    x = read_profiles(data/'bbbc021_wells/BBBC021_feature_selected_mad_robustize.csv.gz')
    treatment = x.obs.Compound+' '+x.obs.Concentration.astype(str)
    return wells(x, batch=x.obs.Plate.str.split('_').str[0], well='Well', perturbation=treatment,
                 control=x.obs.Compound=='DMSO')

def periscope(data, cache):
    "One row per gene, and no controls: what is corrected is learnt from all genes"
    file = data/'periscope_hela_hplm/HeLa_HPLM_hit_list_PCA.csv.gz'
    gene = pd.read_csv(file, nrows=0).columns[0]
    x = read_profiles(file, [str(i) for i in range(56)])
    return wells(x, perturbation=gene.removeprefix('Metadata_'))

def simulated(difficulty, stats, data, cache):
    "Simulated screen, statistics of tiles of 64 px; rendered and embedded once"
    file = cache/f'simulated_{difficulty}_{stats.__name__}.parquet'
    if not file.exists():
        screen = synth_screen(cache/f'screen_{difficulty}', difficulty=difficulty)
        to_parquet(embed(stats, screen, size=64), file)
    return wells(read_profiles(file))


def cluster_means(values, groups, W):
    "Bootstrap means of `values (n)`, whole groups drawn as often as `W (n_boot,G)` says"
    g = pd.factorize(groups)[0]
    return (W@np.bincount(g, values))/(W@np.bincount(g))

def compared(values, base, groups, n_boot=1000, seed=0):
    "Mean and gain over the base of the same rows, with intervals over groups"
    n = pd.Series(groups).nunique()
    W = np.random.default_rng(seed).multinomial(n, np.full(n, 1/n), n_boot)
    gain = values-base
    low,high = np.percentile(cluster_means(values, groups, W), [2.5,97.5])
    boot = cluster_means(gain, groups, W)
    gain_low,gain_high = np.percentile(boot, [2.5,97.5])
    p = 2*student.sf(abs(gain.mean())/max(boot.std(), 1e-12), n-1)
    return dict(value=values.mean(), low=low, high=high, gain=gain.mean(), gain_low=gain_low,
                gain_high=gain_high, p=p, n=len(values))

def recalls(x, base, pairs):
    "Recall of every set of pairs, and of all of them together"
    found = recall(x, pairs, [(.05,.95)], n_perm=0).set_index('source')
    gains = compare_recall(base, x, pairs)
    for k,r in found.loc[gains.index].iterrows():
        gain,t,p = gains.loc[k,['gain','t','p']]
        half = abs(1.96*gain/t) if t else 0.
        yield f'recall {k}',dict(value=r.recall, low=r.ci_low, high=r.ci_high, chance=.1, gain=gain,
                                 gain_low=gain-half, gain_high=gain+half, p=p, n=r.n_pairs)

def by_replicates(x, other, arm):
    "Average precision of each perturbation, with `chance`: its wells in others of column `other`"
    treated = x[~x.obs.control]
    ap = average_precision(treated, ['perturbation',*arm], other, arm, ['perturbation',other])
    ap = ap[ap.n_pos>0]
    return ap.groupby(['perturbation',*arm], observed=True)[['average_precision','chance']].mean()

def replicates(x, base, other='batch', arm=()):
    "Mean average precision of replicates across batches"
    a,b = (by_replicates(o, other, list(arm)) for o in (x,base))
    name = a.index.get_level_values('perturbation')
    row = compared(*(o.average_precision.to_numpy() for o in (a,b)), name)
    yield 'mAP replicates',dict(row, chance=a.chance.mean())

def treatments(x):
    "One profile per treatment, with compound, mechanism, and the week of most of its wells"
    t = aggregate(x[~x.obs.control])
    week = x.obs.groupby('perturbation', observed=True).batch.first()
    t.obs['batch'] = week[t.obs_names].to_numpy()
    return t

def mechanisms(x, base):
    "Is the nearest treatment of another compound (NSCB: and week) of the same mechanism?"
    x,base = map(treatments, (x,base))
    for k,other in {'NSC':['Compound'], 'NSCB':['Compound','batch']}.items():
        a,b = (match(o, 'moa', other) for o in (x,base))
        yield k,dict(compared(a.right*1., b.right*1., a.Compound), chance=a.chance.mean())


def known(data, cache):
    "The five public sets, and all their pairs together"
    files = 'CORUM','HuMAP','Reactome','SIGNOR','StringDB'
    sets = relationship_sets({k: data/f'gene_relationships/{k}.txt' for k in files})
    return {**sets, 'any': pd.concat(sets.values())}

def true(difficulty, data, cache):
    "Pairs of genes of one simulated pathway"
    return relationship_sets({'true pairs': cache/f'screen_{difficulty}/relationships.csv'})

def pairs_among(names, sets, least=20):
    "The pairs of each set whose genes are both there, if they are not too few"
    sets = {k: v[v.isin(set(names)).all(axis=1)] for k,v in sets.items()}
    return {k: v for k,v in sets.items() if len(v)>=least}

SETS = { # How to read it, its known pairs, and measures beside their recall
    'mitocheck': (mitocheck, known, [replicates]),
    'periscope': (periscope, known, []),
    'bbbc021': (bbbc021, None, [mechanisms, partial(replicates, other='Plate')]),
    **{f'idr_{k}': (partial(idr, k), None, [replicates]) for k in 'AC'},
    **{f'jump_{k}': (partial(jump, k), None, [partial(replicates, arm=['arm'])])
       for k in ('compound','crispr','orf')},
    **{f'simulated_{d}_{k}': (partial(simulated, d, f), partial(true, d), [replicates])
       for d in (1,2) for k,f in dict(spectrum=spectrum_stats, intensity=intensity_stats).items()}}

def opened(name, data, cache):
    "Profiles and measures of a set"
    read,pairs,measures = SETS[name]
    x = read(data, cache)
    if not pairs: return x,measures
    return x,[partial(recalls, pairs=pairs_among(x.obs.perturbation, pairs(data, cache))),*measures]


def corrected(x, tfm):
    "Profiles after a correction; all rows teach where nothing says which are controls"
    if tfm is None: return x
    if 'control' in x.obs: return clone(tfm).fit_transform(x)
    return AnnData(clone(tfm).fit_transform(x.X), obs=x.obs)

SCALES = {'raw':None, 'arcsinh':CenterScale(arcsinh=True)} # What comes before the correction

def rows_of(x, base, tfm, measures):
    "Rows of one correction, or the reason why there are none"
    start = time.process_time()
    try: y = corrected(x, tfm)
    except ValueError as e: return [dict(error=str(e))]
    seconds = time.process_time()-start
    return [dict(row, measure=k, seconds=seconds)
            for f in measures for k,row in f(y, base)]

CHOICE = 'replicates found'
CANDIDATES = 'none','CenterScale()','Sphere()','TVN()','ReplicateWeights()'

def choice_of(x):
    "What `choose_correction` finds for the candidates, raw and arcsinh"
    steps = {(s,k): [o for o in (SCALES[s],CORRECTIONS[k]) if o is not None]
             for s in SCALES for k in CANDIDATES if k in CORRECTIONS}
    named = {' '.join(k): make_pipeline(*(o or ['passthrough'])) for k,o in steps.items()}
    try: table = choose_correction(x, named).table
    except ValueError as e:
        return [dict(scale='raw', correction='none', measure=CHOICE, error=str(e))]
    return [dict(zip(('scale','correction'), k.split(' ', 1)), measure=CHOICE, value=r.found,
                 low=r.low, high=r.high, chance=.05) for k,r in table.iterrows()]

def run(name, data, cache, done=()):
    "Table of one set, without the `(scale, correction)`, and the choice, that are `done`"
    x,measures = opened(name, data, cache)
    base,res = corrected(x, BASE),[]
    for scale,before in SCALES.items():
        todo = {k: t for k,t in CORRECTIONS.items() if (scale,k) not in done}
        z = corrected(x, before) if todo else None
        for k,t in todo.items():
            res += [dict(set=name, scale=scale, correction=k, **r)
                    for r in rows_of(z, base, t, measures)]
    if CHOICE not in done: res += [dict(r, set=name) for r in choice_of(x)]
    return pd.DataFrame(res)


def marked(r):
    "Value, and how it compares with centre-scale: better (+) or worse (-), at p < .05 and < .001"
    if np.isnan(r.value): return ''
    sign = '+' if r.gain>0 else '-'
    return f'{r.value:.3f}'.lstrip('0') + (f' {sign}' if r.p<.05 else '') + sign*(r.p<.001)

def as_markdown(table):
    "A table for each scale: a line per set and measure, a column per correction"
    text = f'`+` and `-`: better and worse than `{BASE}`, p < .05; twice: p < .001.\n'
    for scale,t in table.groupby('scale', sort=False):
        t = t[t.measure.notna()].assign(cell=lambda o: o.apply(marked, axis=1))
        t = t.pivot_table('cell', ['set','measure'], 'correction', 'first', sort=False)
        t = t[[k for k in CORRECTIONS if k in t]].fillna('')
        text += f'\n## {scale}\n\n' + markdown(t.reset_index().to_dict('records')) + '\n'
    return text

def write(table, out):
    order = table.set.map(list(SETS).index)*1000+table.scale.map(list(SCALES).index)
    table = table.iloc[np.argsort(order, kind='stable')]
    table.to_csv(out/'results.csv', index=False, float_format='%.4g')
    (out/'results.md').write_text(as_markdown(table))
    return table

def stored(out, redo=()):
    "What is there already, but for sets to `redo` and corrections that are no more"
    file = out/'results.csv'
    if not file.exists(): return pd.DataFrame(columns=['set','scale','correction','measure'])
    table = pd.read_csv(file)
    return table[~table.set.isin(redo)&table.correction.isin(CORRECTIONS)]

def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--data', type=Path, default=os.environ.get('CELLMAE_DATA'))
    p.add_argument('--sets', nargs='+', default=SETS, choices=SETS)
    p.add_argument('--redo', action='store_true', help='also what results.csv has')
    p.add_argument('--out', type=Path, default=Path(__file__).parent/'corrections')
    p.add_argument('--cache', type=Path, default=Path(tempfile.gettempdir())/'cellmae_corrections',
                   help='for the simulated screens and their profiles')
    args = p.parse_args()
    args.cache.mkdir(exist_ok=True, parents=True)
    table = stored(args.out, args.sets if args.redo else ())
    for name in args.sets:
        start,rows = time.process_time(),table[table.set==name]
        done = {*zip(rows.scale, rows.correction),*rows.measure}
        with warnings.catch_warnings(action='ignore'):
            new = run(name, args.data, args.cache, done)
        if len(new): table = write(pd.concat([table,new], ignore_index=True), args.out)
        print(f'{name}: {len(new)} rows, {time.process_time()-start:.0f} s of processor time',
              flush=True)

if __name__=='__main__': main()
