"""Parts of `data.py` about whole sites: reading behind computing, readers alone, memory, packing

    python benchmarks/data_embed.py SCREEN well

is one process of the part about memory, which prints its peak and its curve."""
import json, os, random, re, tempfile, threading, time
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np, pandas as pd, torch

from cellmae.data import CropLoader, Sites
from cellmae.embed import embed
from cellmae.encoders import as_encoder
from cellmae.files import ahead
from cellmae.images import tile
from cellmae.screen import Screen, open_screen
from cellmae.zoo import create_model
from data_images import site_table, write_tiff
from data_readers import parser, timed

TILE = 256
SITES = ['planes','planes_deflate','png','ome_zarr','store']


# reading hides behind computing

def encoder_alone(model, screen, n):
    "CPU seconds that encoding a site takes at least: with one thread or with all"
    encoder = as_encoder(model)
    tiles = torch.from_numpy(np.concatenate([tile(screen[i], TILE) for i in range(n)]))
    def all_tiles(): return [encoder.encode(x) for x in tiles.split(encoder.bs)]
    return min(with_threads(t, all_tiles)['cpu'] for t in (1, os.cpu_count()))/n

def with_threads(n, f):
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try: return timed(f)
    finally: torch.set_num_threads(before)

def reading_alone(screen, n):
    "CPU seconds that reading a site takes at least: one after the other or two at once"
    read = lambda i: screen[i].shape
    return min(timed(lambda: list(ahead(read, range(n), w)))['cpu'] for w in (0,2))/n

def overlap(folder, model, rounds=3, parts=16):
    "`embed` end to end, and what both cores need for its parts"
    screen,rows = open_screen(folder),[]
    net = create_model(model, in_chans=len(screen.channels)).eval()
    net.channels = screen.channels
    for _ in range(rounds):
        n = min(parts, len(screen))
        parts_ = dict(encode=encoder_alone(net, screen, n), read=reading_alone(screen, n))
        rows.append(dict(parts_, **in_folder(partial(embed, net, screen, progress=False))))
    return overlap_table(rows, len(screen))

def in_folder(f):
    "What a run with `out=` takes"
    with tempfile.TemporaryDirectory() as d: return timed(lambda: f(out=Path(d)/'out'))

def overlap_table(rows, n):
    t = pd.DataFrame(rows)
    need = (t.encode+t.read)*n/os.cpu_count()
    t = t.assign(need=need, over=t.wall/need, busy=t.cpu/t.wall/os.cpu_count())
    return dict(sites=n, **t.median())


# an encoder that costs nothing

def nothing(x): return torch.zeros(len(x), 1)

class AsDataset(torch.utils.data.Dataset):
    "Tiles of a site, for torch's own processes"
    def __init__(self, screen): self.screen = screen
    def __len__(self): return len(self.screen)
    def __getitem__(self, i): return torch.from_numpy(tile(self.screen[i], TILE))

def by_threads(screen, workers):
    return embed(nothing, screen, size=TILE, workers=workers, progress=False)

def by_processes(screen, workers):
    loader = torch.utils.data.DataLoader(AsDataset(screen), batch_size=None, num_workers=workers)
    for x in loader: nothing(x)

WAYS = dict(threads=by_threads, processes=by_processes)

def readers_alone(folder, rounds=3, kinds=SITES, workers=(1,2,4)):
    "Sites a second that each format reaches, by threads and by processes"
    def row(images, workers, how):
        screen = open_screen(folder/images)
        return dict(rate=len(screen)/timed(lambda: WAYS[how](screen, workers))['wall'])
    there = [k for k in kinds if (folder/k).exists()] # `part_windows` packs the store
    return rounds_of(row, rounds, images=there, workers=workers, how=WAYS)

def rounds_of(row, rounds, **cases):
    "Medians of what `row` gives for every case, in another order each round"
    all_ = [dict(zip(cases, o)) for o in product(*cases.values())]
    rng = random.Random(0)
    rows = [case | row(**case) for _ in range(rounds) for case in rng.sample(all_, len(all_))]
    return pd.DataFrame(rows).groupby(list(cases)).median().reset_index().to_dict('records')


# memory

def small_screen(folder, n, side=128, links=64):
    "`n` sites, links to a few small images"
    folder.mkdir(parents=True, exist_ok=True)
    rng,names = np.random.default_rng(0),[f'{i:06d}.tif' for i in range(n)]
    for i in range(links):
        x = rng.gamma(2, 30, (3,side,side)).clip(0, 255).astype(np.uint8)
        write_tiff(folder/f'one{i}.tif', x)
    for i,f in enumerate(names): os.link(folder/f'one{i%links}.tif', folder/f)
    t = site_table(n, 384*9, 9).assign(file=names)
    Screen(t, channels=['DNA','ER','RNA'], root=folder, ranges=[[0,255]]*3).save(folder)

def of_status(key):
    return int(re.search(rf'{key}:\s*(\d+)', Path('/proc/self/status').read_text())[1])/1024

class Watched:
    "Memory of this process that is its own (no pages of files), in MB, every so many seconds"
    def __init__(self, every=.1): self.every,self.curve,self.over = every,[],threading.Event()
    def watch(self):
        start = time.perf_counter()
        while not self.over.wait(self.every):
            self.curve.append((round(time.perf_counter()-start, 2), round(of_status('RssAnon'), 1)))
    def __enter__(self): threading.Thread(target=self.watch, daemon=True).start(); return self
    def __exit__(self, *_): self.over.set()

def flat(x): return x[:,:,::2,::2].reshape(len(x), -1)[:,:128].float()

MEMORY = dict(
    well=lambda s,d: embed(flat, s, size=32, out=d, progress=False),
    tile=lambda s,d: embed(flat, s, size=32, level='tile', out=d, progress=False),
    epoch=lambda s,d: [None for _ in CropLoader(Sites(s), np.arange(len(s)), 64, 64)])

def memory(folder, what):
    "Peak in MB of this process, and its memory over time"
    screen = open_screen(folder)
    with tempfile.TemporaryDirectory() as d, Watched() as w: MEMORY[what](screen, Path(d)/'out')
    curve = w.curve[::max(1, len(w.curve)//200)]
    return dict(what=what, sites=len(screen), peak=of_status('VmHWM'), curve=curve)


# packing

def packed_by_us(screen, out, workers):
    from cellmae.store import pack
    pack(screen, out, workers=workers)

def packed_by_zarr(screen, out, workers, per_shard=24):
    "The same array through zarr-python, read ahead in the same way"
    import zarr
    shape = screen[0].shape
    z = zarr.create_array(str(out), shape=(len(screen),*shape), chunks=(1,*shape), dtype='u1',
                          shards=(per_shard,*shape), compressors=None)
    some = [range(k, min(k+per_shard, len(screen))) for k in range(0, len(screen), per_shard)]
    for r in some:
        z[r.start:r.stop] = np.stack([x for _,x in ahead(screen.__getitem__, r, workers)])

PACKERS = dict(pack=packed_by_us, zarr=packed_by_zarr)

def packing(folder, kinds, rounds=3, workers=(1,2)):
    "Sites and MB of the store a second; CPU seconds a site"
    def row(images, workers, by):
        screen = open_screen(folder/images)
        with tempfile.TemporaryDirectory(dir=folder) as d:
            took = timed(lambda: PACKERS[by](screen, Path(d)/'store', workers))
        rate = len(screen)/took['wall']
        return dict(sites=rate, MB=rate*screen[0].nbytes/1e6, cpu=took['cpu']/len(screen))
    return rounds_of(row, rounds, images=kinds, workers=workers, by=PACKERS)

def main():
    p = parser(__doc__)
    p.add_argument('folder', help='a screen')
    p.add_argument('what', choices=list(MEMORY))
    a = p.parse_args()
    print(json.dumps(memory(a.folder, a.what)))

if __name__=='__main__': main()
