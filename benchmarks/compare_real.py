"MAE, CA-MAE, WSL and statistics on real cells, the same processor time each: MitoCheck (one stain, 16 phenotypes) and PERISCOPE (five stains, guides)"
import argparse, os, tempfile, time, warnings
from pathlib import Path

import numpy as np, pandas as pd, torch
from fastai.callback.core import CancelFitException, Callback
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import LeaveOneGroupOut, StratifiedGroupKFold
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from cellmae.cavit import CAMAE
from cellmae.embed import as_encoder, embed
from cellmae.retrieval import balanced_accuracy
from cellmae.screen import write_stack_screen
from cellmae.files import write_whole
from cellmae.train import fit_mae
from cellmae.wsl import fit_wsl, make_classifier

ENCODERS = 'intensity statistics','spectrum statistics','untrained MAE','untrained DenseNet','MAE','MAE with energies','CA-MAE','WSL'
ENERGY = {'MAE with energies': .5} # share of that loss


def mitocheck(data, tmp):
    "Nuclei in one stain: phenotypes on plates not seen. A well says little about a nucleus, so WSL learns phenotypes, of the training plates of each fold"
    images,meta = np.load(data/'mitocheck_crops/crops.npz')['images'],pd.read_csv(data/'mitocheck_crops/metadata.csv')
    table = pd.DataFrame(dict(plate=meta.plate, well=[f'{w}_{i}' for i,w in enumerate(meta.well)], phenotype=meta.phenotype))
    return write_stack_screen(images[:,None], table, ['DNA'], tmp/'mitocheck'),dict(crop=64, bs=64, label='phenotype'),'phenotype','plate',5

def periscope(data, tmp):
    "Cells in five stains: genes, one guide left out at a time. WSL learns to tell guides apart, and never which belong to one gene"
    crops = np.load(data/'periscope_crops/crops_hela_dmem.npz')
    meta = pd.read_csv(data/'periscope_crops/metadata.csv').query('file=="crops_hela_dmem.npz"').sort_values('index')
    table = pd.DataFrame(dict(plate='HeLa', well=[f'{w}_{i}' for i,w in enumerate(meta.well)], perturbation=meta.guide, gene=meta.gene))
    return write_stack_screen(crops['images'], table, crops['channels'], tmp/'periscope'),dict(crop=64, bs=32, label='perturbation'),'gene','perturbation',None

class Time(Callback):
    "Seconds of processor time per training step"
    order,run_valid = 90,False
    def before_fit(self): self.start,self.steps = time.process_time(),0
    def after_batch(self):
        self.steps += 1
        if self.steps==1: self.start = time.process_time()   # the first step warms up
        if self.steps>8: raise CancelFitException
    def per_step(self): return (time.process_time()-self.start)/max(1, self.steps-1)

def fit(name, screen, out, epochs, crop, bs, label, seed, **kw):
    "Train a model"
    kw = dict(kw, out=out, epochs=epochs, crop=crop, bs=bs, seed=seed, save_every=120, crops=2 if len(screen)<500 else 1)
    if name=='WSL': return fit_wsl(screen, 'densenet_s', label=label, apart=None, **kw)
    if name=='CA-MAE': return fit_mae(screen, 'camae_vitt8_shared', n_pictures=1, **kw)
    steep = dict(lr=1e-3, alpha=.1) # steeper than its recipe, and it leaves the plateau on these screens
    return fit_mae(screen, 'mae_vitt8', n_pictures=1, energy=ENERGY.get(name, 0.), **steep, **kw)

def trained(name, screen, tmp, minutes, seed, kw):
    "A model after `minutes` of processor time, and its epochs"
    clock = Time()
    n_batches = len(fit(name, screen, tmp/f'{name}_trial', 10, seed=seed, cbs=[clock], **kw).dls.train)
    epochs = max(2, round(60*minutes/(clock.per_step()*n_batches)))
    return fit(name, screen, tmp/name, epochs, seed=seed, **kw).model,epochs

def encoder(name, screen, tmp, minutes, seed, kw):
    "The encoder of a name, and the epochs it was trained for"
    torch.manual_seed(seed)
    if name.endswith('statistics'): return name.split()[0],0
    if name=='untrained DenseNet': return make_classifier('densenet_s', 2, screen.channels, kw['crop']),0
    if name=='untrained MAE': return as_encoder('mae_vitt8', screen.channels, 'meanstd', seed=seed),0
    return trained(name, screen, tmp, minutes, seed, kw)

def vectors(name, screen, folds, tmp, minutes, seed, kw):
    "Vectors of all cells for each fold, and epochs; they differ only where labels of the training side were seen"
    def embedded(model):
        pool = None if name.startswith('WSL') or 'DenseNet' in name or 'statistics' in name else 'meanstd'
        return embed(model, screen, pool=pool, channelwise=isinstance(model, CAMAE), level='site', progress=False).X
    if name!='WSL' or kw['label']!='phenotype':
        model,epochs = encoder(name, screen, tmp, minutes, seed, kw)
        return [embedded(model)]*len(folds),epochs
    out = []
    for k,(train,_) in enumerate(folds):
        model,epochs = trained(name, screen.subset(train), tmp/f'fold_{k}', minutes, seed, kw)
        out.append(embedded(model))
    return out,epochs

def predict(x, y, train, test, k=5):
    "Classes of the test side, by logistic regression and by the `k` nearest neighbours on the training side"
    x = StandardScaler().fit(x[train]).transform(x)
    linear = LogisticRegression(C=.1, max_iter=1000, class_weight='balanced').fit(x[train], y[train]).predict(x[test])
    return linear,KNeighborsClassifier(k, metric='cosine').fit(x[train], y[train]).predict(x[test])

def evaluate(xs, folds, y, groups):
    "Linear probe and nearest neighbours over the folds"
    preds = np.empty((2,len(y)), dtype=object)
    for x,(train,test) in zip(xs, folds): preds[:,test] = predict(x, y, train, test)
    return {f'{how}{end}': v for how,p in zip(('probe','knn'), preds.astype(str)) for end,v in zip(('','_low','_high'), balanced_accuracy(y, p, groups, 500))}

def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--data', type=Path, default=os.environ.get('CELLMAE_DATA'), help='folder with mitocheck_crops and periscope_crops')
    p.add_argument('--sets', nargs='+', default=['mitocheck','periscope'])
    p.add_argument('--encoders', nargs='+', default=ENCODERS)
    p.add_argument('--minutes', type=float, default=4, help='processor time of each training')
    p.add_argument('--seeds', nargs='+', type=int, default=[0])
    p.add_argument('--tables', type=Path, default=Path(__file__).parent/'compare', help='where real.csv goes')
    args = p.parse_args()
    warnings.filterwarnings('ignore')
    rows = []
    for set_ in args.sets:
        for seed in args.seeds:
            tmp = Path(tempfile.mkdtemp())
            screen,kw,target,groups,n_folds = dict(mitocheck=mitocheck, periscope=periscope)[set_](Path(args.data), tmp)
            y,groups = screen.table[target].to_numpy().astype(str),screen.table[groups].to_numpy()
            folds = list(StratifiedGroupKFold(n_folds, shuffle=True, random_state=0).split(y, y, groups)) if n_folds else list(LeaveOneGroupOut().split(y, y, groups))
            for name in args.encoders:
                xs,epochs = vectors(name, screen, folds, tmp, args.minutes, seed, kw)
                rows.append(dict(set=set_, encoder=name, seed=seed, minutes=args.minutes if epochs else 0, epochs=epochs, dimensions=xs[0].shape[1], chance=1/len(set(y)), **evaluate(xs, folds, y, groups)))
                print({k: round(v, 3) if isinstance(v, float) else v for k,v in rows[-1].items()}, flush=True)
                write_whole(args.tables/'real.csv', lambda f: pd.DataFrame(rows).to_csv(f, index=False, float_format='%.5g'))

if __name__ == '__main__': main()
