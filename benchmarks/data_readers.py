"""Stores of other libraries, as their users write and read them, and a worker that reads crops

    PYTHON benchmarks/data_readers.py FOLDER [--core 0]

The worker stays on one core and answers each line with a line of JSON: `write NAME`, `check NAME`,
`crops NAME SEED`. PYTHON is one that has the library of that name; nothing of cellmae is needed.
`FOLDER` holds `images.npy`, bytes `(n,C,H,W)`, with which all that is read is compared."""
import argparse, json, os, shutil, sys, time
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np

SIZE,BATCH = 256,64 # side of a crop, crops in a batch


# what `Reader` names

def write_npy(images, folder):
    folder.mkdir()
    np.save(folder/'images.npy', images)
def open_npy(folder): return np.load(folder/'images.npy', mmap_mode='r').__getitem__

def write_zarr(images, folder, per_shard=64):
    import zarr
    n,*shape = images.shape
    z = zarr.create_array(str(folder/'images.zarr'), shape=images.shape, chunks=(1,*shape),
                          shards=(min(n, per_shard),*shape), dtype=images.dtype, compressors=None)
    for i in range(0, n, per_shard): z[i:i+per_shard] = images[i:i+per_shard]
def open_zarr(folder):
    import zarr
    return zarr.open_array(str(folder/'images.zarr'), mode='r').__getitem__

def open_tensorstore(folder):
    import tensorstore as ts
    path = str(folder.parent/'zarr'/'images.zarr')
    z = ts.open(dict(driver='zarr3', kvstore=dict(driver='file', path=path))).result()
    return lambda i: z[i].read().result()

def write_hdf5(images, folder):
    import h5py
    folder.mkdir()
    with h5py.File(folder/'images.h5', 'w') as f:
        f.create_dataset('images', data=images, chunks=(1,*images.shape[1:]))
def open_hdf5(folder):
    import h5py
    return h5py.File(folder/'images.h5', 'r')['images'].__getitem__

class Given:
    "An image as a sample of litdata, which pickles what makes it"
    def __init__(self, file): self.file = str(file)
    def __call__(self, i): return dict(image=np.array(np.load(self.file, mmap_mode='r')[i]))

def write_litdata(images, folder):
    import litdata
    litdata.optimize(Given(images.filename), list(range(len(images))), str(folder),
                     chunk_bytes='64MB', num_workers=1, verbose=False)
def open_litdata(folder):
    from litdata import StreamingDataset
    data = StreamingDataset(str(folder))
    return lambda i: data[i]['image']

def write_mds(images, folder):
    from streaming import MDSWriter
    kind = f'ndarray:{images.dtype}:{",".join(map(str, images.shape[1:]))}'
    with MDSWriter(out=str(folder), columns=dict(image=kind)) as out:
        for x in images: out.write(dict(image=np.array(x)))
def open_mds(folder):
    from streaming import StreamingDataset
    from streaming.base.util import clean_stale_shared_memory
    clean_stale_shared_memory()
    data = StreamingDataset(local=str(folder), batch_size=BATCH)
    return lambda i: data[i]['image']

def write_webdataset(images, folder):
    from webdataset import ShardWriter
    folder.mkdir()
    with ShardWriter(str(folder/'%04d.tar'), maxsize=64e6, verbose=0) as out:
        for i,x in enumerate(images): out.write({'__key__': f'{i:06d}', 'image.npy': np.array(x)})
def open_webdataset(folder):
    "In the order of the file, whatever is asked for: there is no other"
    from webdataset import WebDataset
    def passes():
        while True:
            data = WebDataset(sorted(map(str, folder.glob('*.tar'))), shardshuffle=False)
            yield from (o['image.npy'] for o in data.decode())
    each = passes()
    return lambda i: next(each)

def write_datasets(images, folder):
    from datasets import Dataset, Features, Value
    rows = lambda: (dict(image=x.tobytes()) for x in images)
    kind = Features(dict(image=Value('large_binary')))
    data = Dataset.from_generator(rows, features=kind, cache_dir=str(folder/'cache'))
    data.save_to_disk(folder/'data')
    shutil.rmtree(folder/'cache')
    (folder/'shape.json').write_text(json.dumps(images.shape[1:]))
def open_datasets(folder):
    from datasets import load_from_disk
    data,shape = load_from_disk(folder/'data'),json.loads((folder/'shape.json').read_text())
    return lambda i: np.frombuffer(data[i]['image'], np.uint8).reshape(shape)

def write_lance(images, folder):
    import lance, pyarrow as pa
    about = {b'lance-encoding:blob': b'true', b'shape': json.dumps(images.shape[1:]).encode()}
    kind = pa.schema([pa.field('image', pa.large_binary(), metadata=about)])
    column = lambda x: pa.array([x.tobytes()], pa.large_binary())
    some = (pa.record_batch([column(x)], schema=kind) for x in images)
    lance.write_dataset(pa.RecordBatchReader.from_batches(kind, some), folder/'images.lance',
                        data_storage_version='2.0')
def open_lance(folder):
    import lance
    data = lance.dataset(folder/'images.lance')
    shape = json.loads(data.schema.field('image').metadata[b'shape'])
    def get(i):
        with data.take_blobs('image', indices=[i])[0] as f:
            return np.frombuffer(f.read(), np.uint8).reshape(shape)
    return get

class Crops:
    "What people write around a data set for torch: a crop of an image, turned over at random"
    def __init__(self, get, n, train): self.get,self.n,self.train = get,n,train
    def __len__(self): return self.n
    def __getitem__(self, i):
        import torch
        x = self.get(i)
        if not self.train: return torch.from_numpy(middle(x).copy())
        top,left = (np.random.randint(side-SIZE+1) for side in x.shape[1:])
        up,down = 1-2*np.random.randint(2, size=2)
        return torch.from_numpy(x[:, top:top+SIZE, left:left+SIZE][:, ::up, ::down].copy())

def loading(open_one):
    "A reader whose crops torch's `DataLoader` puts into batches"
    def open_all(folder):
        from torch.utils.data import DataLoader
        get,n = open_one(folder),len(np.load(folder.parent/'images.npy', mmap_mode='r'))
        def epoch(seed, train=True):
            return DataLoader(Crops(get, n, train), batch_size=BATCH, shuffle=train)
        return epoch
    return open_all

def middle(x):
    "The window in the middle of an image"
    top,left = ((side-SIZE)//2 for side in x.shape[1:])
    return x[:, top:top+SIZE, left:left+SIZE]

class Reader(NamedTuple):
    library:str # On PyPI
    write:Callable|None # `write(images, folder)`; None: another has written them
    open:Callable # `open(folder)`, which gives `get(i)`, or, if `loads`, `epoch(seed, train=True)`
    loads:bool=False # Does it give batches of crops?

READERS = {
    'npy': Reader('numpy', write_npy, open_npy),
    'zarr': Reader('zarr', write_zarr, open_zarr),
    'hdf5': Reader('h5py', write_hdf5, open_hdf5),
    'tensorstore': Reader('tensorstore', None, open_tensorstore),
    'litdata': Reader('litdata', write_litdata, open_litdata),
    'mds': Reader('mosaicml-streaming', write_mds, open_mds),
    'datasets': Reader('datasets', write_datasets, open_datasets),
    'lance': Reader('pylance', write_lance, open_lance),
    'webdataset': Reader('webdataset', write_webdataset, open_webdataset)}
READERS |= {f'batches:{k}': Reader(r.library, None, loading(r.open), True)
            for k,r in READERS.items()}


# the worker

class Worker:
    "Reads crops of the images in `folder/images.npy` through any reader"
    def __init__(self, folder, readers):
        self.folder,self.readers,self.opened = Path(folder),readers,{}
        self.images = np.load(self.folder/'images.npy', mmap_mode='r')

    def place(self, name): return self.folder/name.split(':')[-1]

    def get(self, name):
        if name not in self.opened: self.opened[name] = self.readers[name].open(self.place(name))
        return self.opened[name]

    def write(self, name):
        "All images, into a new folder; CPU seconds also of processes that were begun for it"
        folder,write = self.place(name),self.readers[name].write
        if write is None: return {}
        shutil.rmtree(folder, ignore_errors=True)
        start = sum(os.times()[:4])
        write(self.images, folder)
        return dict(write=sum(os.times()[:4])-start)

    def check(self, name):
        "Every image, or the middle of it, is as it was; by this, its pages are warm"
        truth = map(middle, self.images) if self.readers[name].loads else self.images
        pairs = enumerate(zip(self.all_of(name), truth, strict=True))
        bad = [i for i,(a,b) in pairs if not np.array_equal(a, b)]
        if bad: raise ValueError(f'{name}: {len(bad)} images differ, the first is {bad[0]}')
        return dict(MB=megabytes(self.place(name)), version=version(self.readers[name].library))

    def all_of(self, name):
        get = self.get(name)
        if not self.readers[name].loads: return map(get, range(len(self.images)))
        return (x.numpy() for batch in get(0, train=False) for x in crops_of(batch))

    def crops(self, name, seed):
        "A random crop of each image in random order, as batches"
        get,seed = self.get(name),int(seed)
        if self.readers[name].loads: took = timed(lambda: [len(batch) for batch in get(seed)])
        else: took = timed(partial(crop_all, get, self.images.shape, seed))
        return dict(crops=len(self.images), **took)

    def answer(self, line):
        what,*given = line.split()
        return getattr(self, what)(*given)

def crops_of(batch): return batch[0] if isinstance(batch, (tuple,list)) else batch

def crop_all(get, shape, seed):
    "A crop of each image, copied into its place in a batch"
    n,channels,*sides = shape
    rng,out = np.random.default_rng(seed),np.empty((BATCH,channels,SIZE,SIZE), np.uint8)
    tops,lefts = (rng.integers(side-SIZE+1, size=n).tolist() for side in sides)
    for k,(i,y,x) in enumerate(zip(rng.permutation(n).tolist(), tops, lefts)):
        out[k%BATCH] = get(i)[:, y:y+SIZE, x:x+SIZE]

def timed(f):
    "CPU seconds of this process and seconds of the clock"
    start,wall = time.process_time(),time.perf_counter()
    f()
    return dict(cpu=time.process_time()-start, wall=time.perf_counter()-wall)

def megabytes(folder):
    return sum(f.stat().st_size for f in Path(folder).rglob('*') if f.is_file())/1e6

def serve(worker, core):
    "A line of JSON for each line, until there are none; what libraries print goes to stderr"
    os.sched_setaffinity(0, {core})
    answers = os.fdopen(os.dup(1), 'w')
    os.dup2(2, 1)
    for line in sys.stdin:
        try: said = worker.answer(line)
        except Exception as e: said = dict(error=f'{type(e).__name__}: {e}')
        print(json.dumps(said), file=answers, flush=True)

def parser(doc):
    plain = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(description=doc, formatter_class=plain)

def worker_parser(doc):
    p = parser(doc)
    p.add_argument('folder', help='with `images.npy`, see `data_images.py`')
    p.add_argument('--core', type=int, default=0)
    return p

def main():
    a = worker_parser(__doc__).parse_args()
    serve(Worker(a.folder, READERS), a.core)

if __name__=='__main__': main()
