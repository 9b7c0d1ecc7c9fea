"""The images of `data.py`: simulated fluorescence with noise, in the formats that people have it in

    python benchmarks/data_images.py FOLDER [--images 256] [--sites 48]

`FOLDER/crops` gets 6 x 512 x 512 bytes, as in RxRx, and `FOLDER/sites` 5 x 1080 x 1080 of 16 bits,
as a microscope leaves them. `images.npy` is what all others are compared with."""
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import imagecodecs, numpy as np, pandas as pd, tifffile, zarr

from cellmae.screen import Screen
from cellmae.synth import draw_cells, expose, make_batch, render_site
from data_readers import parser

KINDS = dict(crops=(6,512,np.uint8), sites=(5,1080,np.uint16)) # channels, side, type
CHANNELS = ['DNA','ER','RNA','AGP','mito','BF']


# pixels

def fluorescence(n, channels, side, dtype, drawn=3, seed=0):
    "`n` sites: few drawings, each turned and moved anew, with light and noise of its own"
    rng = np.random.default_rng(seed)
    cells = round(12*(side/128)**2)
    sharp = [render_site(draw_cells(cells, rng), rng, side)[:channels] for _ in range(drawn)]
    plates = [make_batch(rng) for _ in range(2)]
    for i in range(n):
        x = np.rot90(sharp[i%drawn], rng.integers(4), (1,2))
        x = expose(np.roll(x, rng.integers(side, size=2), (1,2)), plates[2*i//n], rng)
        yield x if dtype==np.uint16 else bright_to_255(x)

def bright_to_255(x):
    "Bytes of a site, its darkest and brightest thousandths cut off"
    lo,hi = np.percentile(x[:,::8,::8], (.1,99.9), axis=(1,2))[...,None,None].astype(np.float32)
    return ((x-lo)*(255/(hi-lo))).clip(0, 255).round().astype(np.uint8)

def write_source(folder, kind, n):
    "`images.npy`, the truth"
    channels,side,dtype = KINDS[kind]
    x = np.lib.format.open_memmap(folder/'images.npy', 'w+', dtype, (n,channels,side,side))
    for i,site in enumerate(fluorescence(n, channels, side, dtype)): x[i] = site
    x.flush()
    return x

def site_table(n, per_plate, per_well=4):
    "Plates P1, P2 with wells of four sites"
    i = np.arange(n)%per_plate
    well = [f'{chr(65+w//24)}{w%24+1:02d}' for w in i//per_well]
    return pd.DataFrame(dict(plate=[f'P{k//per_plate+1}' for k in range(n)], well=well,
                             site=(i%per_well+1).astype(str)))


# formats

def write_tiff(f, x, **kw): tifffile.imwrite(f, x, photometric='minisblack', metadata=None, **kw)
def write_deflate(f, x): write_tiff(f, x, compression='zlib')
def write_png(f, x): f.write_bytes(imagecodecs.png_encode(x, level=6))

def in_stacks(folder, images, write):
    "One file per site with all channels as pages"
    names = [f'{i:05d}.tif' for i in range(len(images))]
    for_each(lambda i: write(folder/names[i], images[i]), len(images))
    return dict(file=names)

def in_planes(folder, images, write, suffix='tif'):
    "One file per site and channel"
    names = {c: [f'{i:05d}_{c}.{suffix}' for i in range(len(images))] for c in channels_of(images)}
    def site(i):
        for c,x in zip(names, images[i]): write(folder/names[c][i], x)
    for_each(site, len(images))
    return {f'file_{c}': v for c,v in names.items()}

def in_ome_zarr(folder, images, table):
    "A plate of OME-Zarr 0.5 for each plate, a chunk for each plane, with zarr's usual zstd"
    for plate,t in table.groupby('plate'):
        group = zarr.open_group(str(folder/f'{plate}.zarr'), mode='w')
        wells = [(w[0],str(int(w[1:])),ids.tolist()) for w,ids in t.groupby('well').groups.items()]
        group.attrs['ome'] = about_plate(wells)
        for row,col,ids in wells: write_well(group.create_group(f'{row}/{col}'), images, ids)

def about_plate(wells):
    rows,cols = sorted({w[0] for w in wells}),sorted({w[1] for w in wells}, key=int)
    at = [dict(path=f'{r}/{c}', rowIndex=rows.index(r), columnIndex=cols.index(c))
          for r,c,_ in wells]
    return dict(version='0.5', plate=dict(rows=[dict(name=r) for r in rows],
                                          columns=[dict(name=c) for c in cols], wells=at))

def write_well(group, images, ids):
    fields = [dict(path=str(k+1)) for k in range(len(ids))]
    group.attrs['ome'] = dict(version='0.5', well=dict(images=fields))
    axes = [dict(name=a, type='space' if a in 'yx' else 'channel') for a in 'cyx']
    said = dict(multiscales=[dict(axes=axes, datasets=[dict(path='0')])],
                omero=dict(channels=[dict(label=c) for c in channels_of(images)]))
    for k,i in enumerate(ids):
        image = group.create_group(str(k+1))
        image.attrs['ome'] = dict(version='0.5', **said)
        x = images[i]
        image.create_array('0', shape=x.shape, chunks=(1,*x.shape[1:]), dtype=x.dtype)[...] = x

def channels_of(images): return CHANNELS[:images.shape[1]]

def for_each(f, n):
    with ThreadPoolExecutor(os.cpu_count()) as pool: list(pool.map(f, range(n)))


# screens

FORMATS = dict(
    tiff=lambda d,x,t: in_stacks(d, x, write_tiff), # bytes as they are
    deflate=lambda d,x,t: in_stacks(d, x, write_deflate),
    planes=lambda d,x,t: in_planes(d, x, write_tiff), # a file per channel
    planes_deflate=lambda d,x,t: in_planes(d, x, write_deflate),
    png=lambda d,x,t: in_planes(d, x, write_png, 'png'),
    ome_zarr=in_ome_zarr)
USED = dict(crops=['tiff','deflate','png','ome_zarr'],
            sites=['planes','planes_deflate','png','ome_zarr'])

def screen_of(folder, files, table, images, ranges):
    "The images of a folder as a screen that is saved there"
    names = channels_of(images)
    table = Screen.open(folder).table if files is None else table.assign(**files)
    screen = Screen(table, channels=names, root=folder, ranges=ranges)
    screen.save(folder)
    return screen

def made(folder, kind, n):
    "The images of `kind` in all formats below `folder`, written unless they are there"
    folder = Path(folder)/kind
    folder.mkdir(parents=True, exist_ok=True)
    images = folder/'images.npy'
    there = images.exists() and len(np.load(images, mmap_mode='r'))==n
    images = np.load(images, mmap_mode='r') if there else write_source(folder, kind, n)
    table,ranges = site_table(n, n//2),None
    for name in USED[kind]:
        d = folder/name
        if not (d/'screen.json').exists() or not there:
            d.mkdir(exist_ok=True)
            ranges = screen_of(d, FORMATS[name](d, images, table), table, images, ranges).ranges
    return folder

def main():
    p = parser(__doc__)
    p.add_argument('folder')
    p.add_argument('--images', type=int, default=256)
    p.add_argument('--sites', type=int, default=48)
    a = p.parse_args()
    for kind,n in (('crops',a.images),('sites',a.sites)): print(made(a.folder, kind, n))

if __name__=='__main__': main()
