#!/usr/bin/env python
"Does the installed cellmae work? Import every module and, if asked, train a tiny model on a tiny simulated screen"
import argparse, importlib, pkgutil, tempfile
from pathlib import Path

import cellmae


def import_all():
    names = [m.name for m in pkgutil.iter_modules(cellmae.__path__)]
    for name in names: importlib.import_module(f'cellmae.{name}')
    print(f'cellmae {cellmae.__version__}: {len(names)} modules imported')


def train(out):
    from cellmae.synth import synth_screen
    from cellmae.train import fit_mae
    screen = synth_screen(out/'screen', n_pathways=2, genes_per_pathway=2, n_inactive=2, n_batches=2,
                          controls_per_batch=4, size=64, n_workers=0)
    learn = fit_mae(screen, 'mae_vitt8', out=out/'run', epochs=1, bs=8)
    losses = dict(zip(learn.recorder.metric_names[1:], learn.recorder.values[-1]))
    print(f'trained on {len(screen)} sites: {losses}')


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--below', type=Path, help='folder in which cellmae must be installed')
    p.add_argument('--train', action='store_true', help='train as well')
    a = p.parse_args()
    where = Path(cellmae.__file__).resolve()
    if a.below and not where.is_relative_to(a.below.resolve()): p.error(f'{where} is not below {a.below}')
    import_all()
    if a.train:
        with tempfile.TemporaryDirectory() as d: train(Path(d))
