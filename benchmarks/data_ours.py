"""Our readers for the worker of `data_readers.py`, and those of another version beside them in one process

    python benchmarks/data_ours.py FOLDER [--core 0] [--before ANOTHER_CHECKOUT]

`screen:FORMAT` crops what `screen[i]` gives, `CropLoader:FORMAT` takes an epoch's batches from the training loader, and
`before:FORMAT` does so with the other version, its cache in memory off."""
import argparse
from importlib import import_module

import numpy as np

from cellmae.data import CropLoader, Sites, centre_crop
from cellmae.screen import open_screen
from data_readers import BATCH, READERS, SIZE, Worker, add_options, serve, timed
from plates import package


FORMATS = 'store archive tiff deflate png ome_zarr planes planes_deflate'.split()

def open_images(folder): return open_screen(folder).__getitem__

def pack_images(images, folder):
    from cellmae.store import pack
    raw = next(folder.parent/o for o in ('tiff','planes') if (folder.parent/o).exists())
    pack(open_screen(raw), folder, archive=folder.name=='archive')

def loader_now(folder, train=True):
    "An epoch of crops by the training loader"
    screen = open_screen(folder)
    return CropLoader(Sites(screen), np.arange(len(screen)), SIZE, BATCH, train=train)

def loader_before(folder, train=True):
    "The same by the other version"
    data,screen = (import_module(f'before.{o}') for o in ('data','screen'))
    sites = data.Sites(screen.open_screen(folder), cache_gb=0)
    return data.CropLoader(sites, np.arange(len(sites)), SIZE, BATCH, train=train)

LOADERS = dict(CropLoader=loader_now, before=loader_before)
PACKED = dict.fromkeys(['store','archive'], pack_images)
OURS = {f'{how}:{k}': ('cellmae', PACKED.get(k) if how=='screen' else None, open_)
        for how,open_ in dict(screen=open_images, **LOADERS).items() for k in FORMATS}

class Ours(Worker):
    "A worker whose readers may be loaders, which give batches of crops"
    def is_loader(self, name): return name.split(':')[0] in LOADERS

    def all_of(self, name):
        if not self.is_loader(name): return super().all_of(name)
        batches = self.readers[name][2](self.place(name), train=False)
        return (x.numpy() for batch,_ in batches for x in batch)

    def truth(self, name):
        return (centre_crop(x, SIZE) for x in self.images) if self.is_loader(name) else self.images

    def crops(self, name, seed):
        if not self.is_loader(name): return super().crops(name, seed)
        loader = self.get(name)
        loader.epoch = int(seed)
        return dict(crops=len(self.images), **timed(lambda: [None for _ in loader]))

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(p)
    p.add_argument('--before', help='another checkout')
    a = p.parse_args()
    if a.before: package(a.before, 'before')
    serve(Ours(a.folder, {**READERS, **OURS}), a.core)

if __name__=='__main__': main()
