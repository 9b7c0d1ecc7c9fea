#!/usr/bin/env python
"Draw the picture at the top of the README: a plate, what the model sees of it, what it draws, and the map"
import argparse
from pathlib import Path

import numpy as np, torch
from matplotlib import pyplot as plt
from PIL import Image

from cellmae.explore import blocks_of, map_points, strongest
from cellmae.overview import composite
from cellmae.plots import reconstruct
from cellmae.profiles import read_profiles
from cellmae.screen import open_screen
from cellmae.tvn import TVN
from cellmae.zoo import load_model

SHOWN = ['DNA','ER','actin','mito']
DARK,GAP = '#10131a',(.13,.21,.33)


def in_colour(x, channels, limits):
    "Stains `(C,H,W)` as one picture `(H,W,3)`; what is hidden (NaN) in a dark blue"
    planes = [(x[channels.index(c)]-lo)/(hi-lo) for c,(lo,hi) in zip(SHOWN, limits)]
    return np.where(np.isnan(planes[0])[...,None], GAP, composite(np.stack(planes), SHOWN))


def limits_of(images, channels):
    "Black and white of each stain that is shown"
    return [np.nanpercentile(images[:,channels.index(c)], (5,99.7)) for c in SHOWN]


def montage(tiles, cols, gap=5):
    "Pictures `(n,h,w,3)` as a plate"
    n,h,w,_ = tiles.shape
    rows,dark = n//cols,np.array([int(DARK[i:i+2], 16)/255 for i in (1,3,5)])
    page = np.ones((rows*(h+gap)-gap, cols*(w+gap)-gap, 3))*dark
    for i,t in enumerate(tiles[:rows*cols]):
        r,c = divmod(i, cols)
        page[r*(h+gap):r*(h+gap)+h, c*(w+gap):c*(w+gap)+w] = t
    return page


def cosines(profiles, most=90):
    "Cosines of the strongest perturbations, alike ones side by side"
    _,cos,_,_ = blocks_of(strongest(map_points(TVN().fit_transform(profiles)), most).X)
    return cos


def panels(screen, model, profiles, crop, seed):
    "The four pictures, each with its title"
    channels,rng = list(screen.channels),np.random.default_rng(seed)
    wells = np.stack([screen[i][:,16:112,16:112] for i in rng.choice(len(screen), 24, replace=False)])
    near = limits_of(wells, channels)
    plate = montage(np.stack([in_colour(x.astype(float), channels, near) for x in wells]), 6)
    x = torch.as_tensor(wells[:1,:,:crop,:crop].copy()).float()
    target,seen,drawn = reconstruct(model, x, seed)
    own = limits_of(target, channels)
    views = [in_colour(v[0], channels, own) for v in (seen,drawn)]
    titles = 'plates', 'a quarter is visible', 'the model draws the rest', 'the map of genes'
    return dict(zip(titles, (plate, *views, cosines(profiles))))


def draw(pictures, file):
    "Side by side on a dark ground, which looks the same on a light page and on a dark one"
    ratios = [p.shape[1]/p.shape[0] for p in pictures.values()]
    room = dict(width_ratios=ratios, wspace=.05, left=.012, right=.988, top=.87, bottom=.04)
    fig,axs = plt.subplots(1, len(pictures), figsize=(11.2,2.75), facecolor=DARK, gridspec_kw=room)
    for ax,(title,p) in zip(axs, pictures.items()):
        how = dict(cmap='RdBu_r', vmin=-.8, vmax=.8) if p.ndim==2 else {}
        ax.imshow(p, interpolation='nearest' if len(p)<100 else 'antialiased', **how)
        ax.set_title(title, color='#e8eaf0', size=11, pad=6); ax.set_axis_off()
    fig.savefig(file, dpi=150, facecolor=DARK)
    few = Image.open(file).convert('RGB').quantize(160, dither=Image.Dither.NONE) # a third of the bytes
    few.save(file, optimize=True)


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('screen'); p.add_argument('model'); p.add_argument('profiles')
    p.add_argument('--out', type=Path, default=Path('nbs/images/banner.png'))
    p.add_argument('--seed', type=int, default=0)
    a = p.parse_args()
    model = load_model(a.model)
    pictures = panels(open_screen(a.screen), model, read_profiles(a.profiles), model.config['img_size'], a.seed)
    draw(pictures, a.out)


if __name__ == '__main__': main()
