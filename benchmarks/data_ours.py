"""Our readers for the worker of `data_readers.py`, and those of another version in one process

    python benchmarks/data_ours.py FOLDER [--core 0] [--before CHECKOUT]

`screen:FORMAT` crops what `screen[i]` gives, `CropLoader:FORMAT` takes an epoch's batches from the
training loader, and `before:FORMAT` does so with the other version, its cache in memory off."""
from importlib import import_module

import numpy as np

from cellmae.data import CropLoader, Sites
from cellmae.images import to_uint8
from cellmae.screen import open_screen
from data_readers import BATCH, READERS, SIZE, Reader, Worker, serve, worker_parser
from plates import package

FORMATS = 'store archive tiff deflate png ome_zarr planes planes_deflate'.split()


def open_images(folder): return open_screen(folder).__getitem__

def pack_images(images, folder):
    "From raw TIFF"
    from cellmae.store import pack
    raw = next(folder.parent/o for o in ('tiff','planes') if (folder.parent/o).exists())
    pack(open_screen(raw), folder, archive=folder.name=='archive')

def epochs(CropLoader, sites):
    "Epochs of crops of all sites"
    def epoch(seed, train=True):
        loader = CropLoader(sites, np.arange(len(sites)), SIZE, BATCH, train=train)
        loader.epoch = seed
        return loader
    return epoch

def open_loader(folder): return epochs(CropLoader, Sites(folder))

def open_before(folder):
    "The loader of another version, all images read each time"
    data = import_module('before.data')
    return epochs(data.CropLoader, data.Sites(folder, cache_gb=0))

OURS = {}
for k in FORMATS:
    write = pack_images if k in ('store','archive') else None
    OURS[f'screen:{k}'] = Reader('cellmae', write, open_images)
    OURS[f'CropLoader:{k}'] = Reader('cellmae', None, open_loader, True)
    OURS[f'before:{k}'] = Reader('cellmae', None, open_before, True)

class Ours(Worker):
    "A worker that also knows what becomes of images of 16 bits"
    def __init__(self, folder):
        super().__init__(folder, {**READERS, **OURS})
        if self.images.dtype==np.uint8: return
        ranges = open_screen(self.folder/'planes').ranges
        self.images = np.stack([to_uint8(x, ranges) for x in self.images])

def main():
    p = worker_parser(__doc__)
    p.add_argument('--before', help='another checkout')
    a = p.parse_args()
    if a.before: package(a.before, 'before')
    serve(Ours(a.folder), a.core)

if __name__=='__main__': main()
