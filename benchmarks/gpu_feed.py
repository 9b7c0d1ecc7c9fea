"How fast a training loop gets its images: from a store or from files, by threads, beside one batch that is there already; and the loader alone, by threads and by processes"
import os, time
from pathlib import Path

import numpy as np, torch
from fastai.callback.core import Callback, CancelFitException
from fastai.data.core import DataLoaders

import timing
from gpu import free, write
from cellmae.data import CropLoader, Sites
from cellmae.screen import open_screen
from cellmae.train import mae_learner
from cellmae.zoo import create_model

work = Path(os.environ['WORK'])
REPEATS = 40 # of each site in an epoch, so that it does not end while it is timed
FED = dict(full={'mae_vits16': (256,256,2.5), 'camae_vits16': (256,40,2.)}, tiny={'mae_vitt4': (32,2,.3)}) # side, batch, seconds
ALONE = dict(full=dict(threads=[1,4,16], processes=[16], seconds=1.2), tiny=dict(threads=[1], processes=[1], seconds=.2))
SOURCES = dict(store='noise_store', files='noise')


class Clock(Callback):
    "Images a second of a training loop, from when it has warmed up until it is stopped"
    order = 100
    def __init__(self, seconds, warm=8): self.seconds,self.warm,self.steps,self.seen = seconds,warm,0,0

    def after_batch(self):
        if not self.training: return
        self.steps += 1
        if self.steps==self.warm: self.start = self.now()
        if self.steps<=self.warm: return
        self.seen += len(self.xb[0])
        if time.perf_counter()-self.start>self.seconds: self.stop()

    def now(self): timing.sync(self.xb[0].device); return time.perf_counter()

    def stop(self): self.took = self.now()-self.start; raise CancelFitException

    @property
    def rate(self): return self.seen/self.took

class Resident(CropLoader):
    "The first batch again and again, where it is used"
    def __iter__(self):
        batch = next(super().__iter__())
        yield from (batch for _ in range(len(self)))

def loader(source, size, bs, threads, device, cls=CropLoader, **kw):
    "Crops of the large images, of each many times in an epoch"
    sites = Sites(open_screen(work/SOURCES[source]))
    return cls(sites, np.tile(np.arange(len(sites)), REPEATS), size, bs, num_workers=threads, device=device, **kw)

def looped(model, train, seconds, lr=1e-4):
    "Images a second of the ordinary learner"
    dls = DataLoaders(train, train.new(shuffle=False), device=train.device)
    clock = Clock(seconds)
    learn = mae_learner(dls, model.to(train.device), work/'speed', {}, lr, n_pictures=0)
    with learn.no_bar(): learn.fit(100, cbs=[clock])
    return clock.rate

def fed(name, device, tiny):
    "A row per source, with the number of threads that is taken by itself; one batch first and last"
    size,bs,secs = FED['tiny' if tiny else 'full'][name]
    model = create_model(name, img_size=size, alpha=0.)
    for source,threads,cls in (('one batch',0,Resident),('store',None,CropLoader),('files',None,CropLoader),('one batch',0,Resident)):
        dl = loader('files' if source=='files' else 'store', size, bs, threads, device, cls)
        write('fed', model=name, bs=bs, source=source, threads=dl.workers, images_per_s=round(looped(model, dl, secs), 1))
        free()

class Batches(torch.utils.data.Dataset):
    "Batches of a loader by number, for processes of torch's own loader"
    def __init__(self, dl): self.dl,self.items = dl,list(dl.get_idxs())
    def __len__(self): return len(self.items)
    def __getitem__(self, i): return self.dl.create_item(self.items[i])

def crops_per_s(batches, seconds, warm=3):
    "Crops a second of an iterator"
    batches,n,start = iter(batches),0,None
    for k,(x,_) in enumerate(batches):
        if k==warm: start = time.perf_counter()
        if k>warm: n += len(x)
        if start and time.perf_counter()-start>seconds: return n/(time.perf_counter()-start)
    return n/(time.perf_counter()-(start or 0))

def by_processes(dl, n): return torch.utils.data.DataLoader(Batches(dl), batch_size=None, num_workers=n)

def alone(tiny):
    "The loader alone, on the CPU, by threads and then by processes, which may find too little shared memory"
    o,cpu = ALONE['tiny' if tiny else 'full'],torch.device('cpu')
    size,bs = (32,2) if tiny else (256,32)
    for by,source in ((b,s) for b in ('threads','processes') for s in SOURCES):
        for n in o[by]:
            dl = loader(source, size, bs, n if by=='threads' else 0, cpu)
            try: rate = crops_per_s(dl if by=='threads' else by_processes(dl, n), o['seconds'], n+3)
            except RuntimeError as e: write('failed', case=['alone',source,by,str(n)], why=str(e)[:300])
            else: write('alone', source=source, by=by, n=n, crops_per_s=round(rate, 1))
