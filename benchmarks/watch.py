#!/usr/bin/env python
"What watching costs: runs with and without it, in turns, on the screen of the demo"
import argparse, platform, time
from contextlib import redirect_stdout
from datetime import date
from io import StringIO
from os import getloadavg
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd
import torch
from fastcore.basics import patch

from cellmae.screen import open_screen
from cellmae.store import pack
from cellmae.synth import synth_screen
from cellmae.train import fit_mae
from cellmae.watch import Watch, looks_at_most, tiles_at_a_time
from cellmae.zoo import recipe

model,looks = 'mae_vitt8',[]

@patch
def after_epoch(self:Watch, epoch=Watch.after_epoch):
    "The same, with its CPU seconds"
    begin = time.process_time()
    epoch(self)
    looks.append(time.process_time()-begin)

def run(screen, out, epochs, **watch):
    "Wall and CPU seconds of a run, and those of its looks"
    looks.clear()
    wall,cpu = time.monotonic(),time.process_time()
    with redirect_stdout(StringIO()): fit_mae(screen, model, out, epochs=epochs, n_pictures=0, device='cpu', **watch)
    return dict(wall=time.monotonic()-wall, cpu=time.process_time()-cpu, looks=sum(looks))

def screen_in(folder):
    "The screen of the demo, packed, simulated if it is not there yet"
    if not (folder/'store').exists(): pack(synth_screen(folder/'screen'), folder/'store')
    return open_screen(folder/'store')

def compare(root, screen, pairs, rounds, epochs):
    "Every case in every round"
    cases = dict(plain={}, watched=dict(watch=True, n_watch=1), recall=dict(watch=pairs, n_watch=1))
    run(screen.subset(range(0, len(screen), 10)), root/'warm', 1, **cases['recall']) # libraries and files
    for i in range(rounds):
        for k in cases: yield dict(round=i, case=k, **run(screen, root/f'{k}{i}', epochs, **cases[k]))

def report(rows):
    "Medians over the rounds, as a table of markdown"
    t = pd.DataFrame(rows).set_index(['round','case']).unstack('case')
    yield '| | seconds of CPU | more CPU than plain | in looks | seconds | longer than plain |\n|---|---|---|---|---|---|'
    for k in ('plain', 'watched', 'recall'):
        more = {c: (t[c][k]/t[c]['plain']-1).median() for c in ('cpu', 'wall')}
        share = (t['looks'][k]/(t['cpu'][k]-t['looks'][k])).median()
        yield f'| {k} | {t["cpu"][k].median():.1f} | {more["cpu"]:+.1%} | {share:.1%} | {t["wall"][k].median():.1f} | {more["wall"]:+.1%} |'

def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--rounds', type=int, default=3)
    p.add_argument('--folder', type=Path, help='where the screen is kept for the next time')
    p.add_argument('--threads', type=int, default=torch.get_num_threads())
    a,whole = p.parse_args(),recipe(model).epochs
    torch.set_num_threads(a.threads)
    with TemporaryDirectory() as folder:
        root = Path(folder)
        home = a.folder or root/'home'
        screen = screen_in(home)
        n = .9*len(screen)
        between = whole//looks_at_most(whole*n) # epochs between two looks of the demo
        load = getloadavg()[0]
        rows = list(compare(root, screen, home/'screen/relationships.csv', a.rounds, between))
    print(f'{date.today()}, {platform.machine()}, {a.threads} threads, load {load:.1f} at the beginning: {a.rounds} rounds in turns of {between} epochs '
          f'of {n:.0f} images of {recipe(model).crop} pixels, then one look at {tiles_at_a_time(between*n)} tiles\n')
    for line in report(rows): print(line)

if __name__=='__main__': main()
