#!/usr/bin/env python
"What watching costs: runs with and without it, one after the other in turns, on a simulated screen"
import argparse, time
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd
import torch

from cellmae.synth import synth_screen
from cellmae.train import fit_mae


def run(screen, out, epochs, **kw):
    "Wall and CPU seconds of a run"
    wall,cpu = time.monotonic(),time.process_time()
    with redirect_stdout(StringIO()): fit_mae(screen, 'mae_vitt8', out, epochs=epochs, crop=32, crops=2, bs=32, device='cpu', n_pictures=0, **kw)
    return dict(wall=time.monotonic()-wall, cpu=time.process_time()-cpu)

def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--rounds', type=int, default=3)
    p.add_argument('--epochs', type=int, default=10)
    p.add_argument('--wells', type=int, default=4, help='of each of 80 genes in each of 3 batches')
    p.add_argument('--threads', type=int, default=2)
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    with TemporaryDirectory() as folder:
        root = Path(folder)
        screen = synth_screen(root/'screen', n_pathways=8, genes_per_pathway=10, n_inactive=0, n_batches=3, wells_per_gene=a.wells, controls_per_batch=40, size=64)
        cases = dict(plain={}, watched=dict(watch=True), recall=dict(watch=screen.root/'relationships.csv'))
        run(screen, root/'warm', 1) # libraries and files
        rows = [dict(case=k, round=i, **run(screen, root/f'{k}{i}', a.epochs, **kw)) for i in range(a.rounds) for k,kw in cases.items()]
    t = pd.DataFrame(rows).pivot(index='round', columns='case', values=['wall', 'cpu'])
    for clock in ('wall', 'cpu'):
        for k in ('watched', 'recall'):
            extra = t[clock][k]/t[clock].plain-1
            print(f'{k}, {clock}: {extra.median():+.1%} (rounds {", ".join(f"{o:+.1%}" for o in extra)}) of {t[clock].plain.median():.0f} s')

if __name__=='__main__': main()
