"The training reader: the same batches whoever reads them, ahead of their use, in bounded memory"
import gc, os, signal, subprocess, sys, threading, time
import numpy as np, pandas as pd, pytest, tifffile, torch
from fastai.callback.core import Callback
from cellmae.data import CropLoader, Sites, one_ahead, put, reading_threads, screen_dls
from cellmae.images import ImageError
from cellmae.screen import Screen
from cellmae.store import pack
from cellmae.train import mae_learner
from cellmae.zoo import create_model

stains = ['DNA', 'ER', 'mito']

@pytest.fixture(scope='module')
def screen(tmp_path_factory):
    "Sites of different sizes, with different pixels, on a plate that is neither square nor symmetric"
    root,rng,rows = tmp_path_factory.mktemp('reader'),np.random.default_rng(0),[]
    for i in range(24):
        row = dict(plate='P', well=f'{"BC"[i%2]}{i//2%7+2:02d}', site=i//14+1, batch=f'b{i%3}')
        for c in stains:
            x = rng.integers(0, 4000, (30+i%5, 53-i%4)).astype(np.uint16)
            tifffile.imwrite(root/f'{i}_{c}.tif', x)
            row[f'file_{c}'] = f'{i}_{c}.tif'
        rows.append(row)
    s = Screen(pd.DataFrame(rows), root=root)
    s.fit_ranges()
    return s

@pytest.fixture(scope='module')
def cells(screen):
    rng = np.random.default_rng(1)
    t = screen.table[['plate','well','site']].loc[np.repeat(range(24), 3)]
    return t.assign(y=rng.integers(0, 30, len(t)), x=rng.integers(0, 50, len(t)))

def batches(screen, workers, epoch=1, start=0, share=None, **options):
    "All batches of training and validation"
    dls = screen_dls(screen, 16, bs=4, valid=.3, num_workers=workers, device='cpu', **options)
    for dl in dls: dl.epoch,dl.start = epoch,start
    if share: dls.train.share(*share)
    return [b for dl in dls for b in dl]

def equal(a, b):
    return len(a)==len(b) and all(torch.equal(x, y) for p,q in zip(a, b) for x,y in zip(p, q))

kinds = dict(plain={}, crops=dict(crops=3), apart=dict(apart='batch'), resumed=dict(start=2), seed=dict(seed=7),
             second=dict(share=(1,2)))

@pytest.mark.parametrize('kind', [*kinds, 'cells'])
def test_batches_do_not_depend_on_who_reads_them(screen, cells, kind):
    options = dict(cells=cells, crops=2) if kind=='cells' else {**kinds[kind]}

    one,*others = (batches(screen, n, **options) for n in (0, 1, 4))
    assert len(one)>2 and all(equal(one, o) for o in others)
    assert not equal(one, batches(screen, 0, **{**options, 'epoch':2}))

def test_batches_are_those_of_the_seed(screen):
    "Place and flips of each crop, from numbers that begin a million draws apart"
    dl = CropLoader(Sites(screen), range(24), size=16, bs=5, crops=2, seed=3, num_workers=2)
    dl.epoch = 1
    for k,(x,ids) in enumerate(dl):
        for place,(crop,i) in enumerate(zip(x, ids)):
            site = screen[int(i)]
            if place%2==0: rng = np.random.Generator(np.random.PCG64([3, 1, k]).advance(2**20*(place//2)))
            r,c = rng.integers(site.shape[1]-15),rng.integers(site.shape[2]-15)
            up,left = 1-2*rng.integers(2, size=2)
            assert (crop.numpy()==site[:, r:r+16, c:c+16][:, ::up, ::left]).all()

@pytest.mark.parametrize('size', [1, 2, 7, 8, 12, 31])
@pytest.mark.parametrize('turn', [(1,1), (1,-1), (-1,1), (-1,-1)])
def test_windows_of_all_widths_are_mirrored(size, turn):
    "Out of an image that nobody may write to, at places that no number is aligned to"
    x = np.random.default_rng(0).integers(0, 256, (3,40,41), dtype=np.uint8)
    x.setflags(write=False)
    window,out = x[:, 5:5+size, 3:3+size][:, ::turn[0], ::turn[1]],np.zeros((3,size,size), np.uint8)
    put(out, window)
    assert (out==window).all()

# --- shared by processes

def shares(screen, ranks, parts=1, workers=0, start=0, **options):
    "What each of some processes reads of training and of validation: batches, and their places"
    out = []
    for rank in range(ranks):
        dls = screen_dls(screen, 16, valid=.3, num_workers=workers, device='cpu', **{**dict(bs=5), **options})
        for dl in dls: dl.share(rank, ranks, parts); dl.epoch,dl.start = 1,start
        out.append([([*dl],dl.places[start:]) for dl in dls])
    return zip(*out)

def joined(of, k):
    "Batch `k` of all processes together, each crop at its place"
    some = [(batches[k],places[k]) for batches,places in of if places[k].count]
    assert sorted(p.first for _,p in some)==np.cumsum([0]+[p.count for _,p in some])[:-1].tolist(), 'side by side'
    return [torch.cat([b[j][:p.count] for b,p in some]) for j in (0,1)]

def panels(screen):
    "The same sites with two stains, and with three"
    return [screen, Screen(screen.table.drop(columns='file_mito'), root=screen.root, channels=stains[:2], ranges=screen.ranges[:2])]

shared = dict(plain={}, crops=dict(crops=3), apart=dict(apart='batch'), panels={}, cells=dict(crops=2), one=dict(bs=1), threads=dict(workers=3), resumed=dict(start=2))

@pytest.mark.parametrize('kind', shared)
@pytest.mark.parametrize('ranks', [2, 3, 5, 7])
def test_processes_share_each_batch(screen, cells, kind, ranks):
    "Also batches with fewer sites than processes"
    options = dict(shared[kind], **(dict(cells=cells) if kind=='cells' else {}))
    of = panels(screen) if kind=='panels' else screen
    (whole,),_ = shares(of, 1, **options)
    train,_ = shares(of, ranks, **{'workers':1, **options})
    assert len(whole[0])>1 and all(len(batches)==len(places)==len(whole[0]) for batches,places in train)
    for k,want in enumerate(whole[0]):
        assert equal([joined(train, k)], [want])
        most = max(p.count for _,places in train for p in places[k:k+1])
        assert all(len(b[k][0])<=most for b,_ in train) and all(p[k].whole==len(want[1]) for _,p in train)

@pytest.mark.parametrize('ranks,parts', [(1,2), (2,1), (2,3), (3,1), (5,2), (9,1)])
@pytest.mark.parametrize('kind', ['plain','panels'])
def test_validation_is_shared_in_small_batches(screen, kind, ranks, parts):
    "Every image counts once, in batches no larger than a part of training, as many in every process"
    of = panels(screen) if kind=='panels' else screen
    _,((whole,_),) = shares(of, 1)
    _,held = shares(of, ranks, parts)
    counted = [b for batches,places in held for b,p in zip(batches, places) if p.count]
    assert len({len(batches) for batches,_ in held})==1 and max(len(i) for _,i in counted)<=-(-5//(ranks*parts))
    crops = {int(i):x for b in counted for x,i in zip(*b)}
    assert sum(len(i) for _,i in counted)==len(crops)==sum(len(i) for _,i in whole)
    assert all(torch.equal(crops[int(i)], x) for b in whole for x,i in zip(*b))
    one,_ = shares(of, 1)
    _,alone = shares(of, 1, ranks*parts)
    assert sorted(i.tolist() for _,i in counted)==sorted(i.tolist() for _,i in alone[0][0]), 'batches are those of one process'

def test_nothing_held_out_is_shared_by_all(screen):
    for rank in range(3):
        dls = screen_dls(screen, 16, bs=4, valid=0, device='cpu')
        dls.valid.share(rank, 3, 2)
        assert len(dls.valid)==0 and [*dls.valid]==[]

# --- several at a time, left early, small in memory

def reading(): return [t for t in threading.enumerate() if t.name.endswith('(_work)')]

def wait_for_none():
    gc.collect() # errors of other tests may still hold theirs
    end = time.monotonic()+5
    while reading() and time.monotonic()<end: time.sleep(.01)
    return not reading()

def test_iterators_do_not_disturb_one_another(screen):
    dl = CropLoader(Sites(screen), range(24), size=16, bs=4, num_workers=2)
    want = {}
    for e in (0, 1):
        dl.epoch = e
        want[e] = list(dl)
    dl.epoch = 0; a = iter(dl); first = [next(a)]
    dl.epoch = 1; b = iter(dl); second = [next(b)]
    for o,p in zip(a, b, strict=True): first.append(o); second.append(p)
    assert equal(first, want[0]) and equal(second, want[1])
    assert wait_for_none()

def test_an_iterator_left_early_leaves_no_threads(screen):
    dl = CropLoader(Sites(screen), range(24), size=16, bs=2, num_workers=3)
    for _ in dl: break
    assert wait_for_none()
    it = iter(dl); next(it); assert reading()
    it.close()
    assert wait_for_none()
    assert dl.one_batch()[0].shape==(2,3,16,16) and not reading()

class Slow:
    "Sites that take a while, and say who is reading"
    channels,packed = ['a'],None
    def __init__(self, n, size=64, seconds=0, hook=None):
        self.n,self.size,self.seconds,self.hook,self.lock = n,size,seconds,hook,threading.Lock()
        self.table = pd.DataFrame(dict(plate='P', well='B03', site=range(n), file_a=[f'{i}.tif' for i in range(n)]))
    def __len__(self): return self.n
    def fit_ranges(self): return np.float32([[0,255]])
    def __getitem__(self, i):
        if self.hook: self.hook(i)
        time.sleep(self.seconds)
        return np.full((1,self.size,self.size), i%256, np.uint8)

def slow_loader(n, size=64, bs=1, workers=2, **kw):
    sites = Sites.__new__(Sites)
    sites.screens,sites.starts,sites.panels,sites.cells = [Slow(n, size, **kw)],np.array([0,n]),[('a',)],None
    return CropLoader(sites, range(n), size=size, bs=bs, num_workers=workers)

@pytest.mark.parametrize('workers', [0, 1, 4])
def test_few_batches_are_on_their_way(workers):
    begun = []
    it = iter(slow_loader(200, workers=workers, hook=begun.append))
    for k in range(1, 40):
        next(it); time.sleep(.002)
        assert k<=len(begun)<=k+workers+2

def test_memory_does_not_grow_over_an_epoch():
    "Four batches wait, one is in use, one is made, and each thread reads an image: of a hundred, no more are ever there"
    import tracemalloc
    dl,size = slow_loader(400, size=256, bs=4, workers=2),4*256**2
    tracemalloc.start()
    for _ in dl: pass
    _,most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size<most<8*size

def test_threads_read_side_by_side():
    start = time.monotonic()
    assert len(list(slow_loader(24, workers=8, seconds=.1)))==24
    assert time.monotonic()-start<1.2

# --- errors and interrupts

class Odd(Exception): pass

@pytest.mark.parametrize('workers', [0, 2])
def test_an_error_names_its_place_and_keeps_its_type(workers):
    def hook(i):
        if i==7: raise Odd('never heard of')
    with pytest.raises(Odd, match='never heard of') as e: list(slow_loader(20, workers=workers, hook=hook))
    assert str(e.value)=='never heard of' and e.value.__notes__==['At plate P, well B03, site 7: 7.tif']
    assert wait_for_none()

@pytest.mark.parametrize('workers', [0, 2])
def test_a_damaged_file_is_named_with_its_well(screen, tmp_path, workers):
    (tmp_path/'bad.tif').write_bytes(b'II*\0')
    t = screen.table.copy()
    t.loc[5, 'file_ER'] = str(tmp_path/'bad.tif')
    bad = Screen(t, root=screen.root, ranges=screen.ranges)
    dl = CropLoader(Sites(bad), range(24), size=16, bs=4, num_workers=workers)
    with pytest.raises(ImageError, match=f'bad.tif: unreadable.*plate P, well {t.well[5]}, site {t.site[5]}'): list(dl)
    assert wait_for_none()

@pytest.mark.skipif(os.name=='nt', reason='signals')
@pytest.mark.parametrize('workers', [0, 1, 4])
@pytest.mark.parametrize('after', [.02, .3])
def test_ctrl_c_stops_at_once(workers, after, monkeypatch):
    "While batches come, and while one hangs"
    go_on = threading.Event()
    hang = lambda i: i==30 and go_on.wait(60)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Timer(after, lambda: (begun.append(time.monotonic()), os.kill(os.getpid(), signal.SIGINT))).start()
    begun = []
    try:
        with pytest.raises(KeyboardInterrupt): list(slow_loader(600, workers=workers, seconds=.002, hook=hang))
        assert time.monotonic()-begun[0]<2
    finally:
        signal.signal(signal.SIGINT, before)
        go_on.set()
    assert wait_for_none()

stop = '''
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler) # a process in the background may ignore it
from cellmae.data import CropLoader, screen_dls
from cellmae.screen import Screen
dl = screen_dls(Screen.open(sys.argv[1]), 16, bs=2, valid=0, num_workers=4, device='cpu').train
read = Screen.__getitem__
Screen.__getitem__ = lambda self, i: time.sleep(999) if i==3 else read(self, i)
print('ready', flush=True)
for _ in dl: pass
'''

@pytest.mark.skipif(os.name=='nt', reason='signals')
def test_a_program_ends_while_a_read_hangs(screen):
    screen.save(screen.root)
    p = subprocess.Popen([sys.executable, '-W', 'ignore', '-c', stop, screen.root], text=True, stdout=subprocess.PIPE,
                         stderr=subprocess.PIPE, env={**os.environ, 'PYTHONPATH': os.getcwd()})
    while p.stdout.readline()!='ready\n': pass
    time.sleep(.3)
    p.send_signal(signal.SIGINT); start = time.monotonic()
    _,error = p.communicate(timeout=20)
    assert error.rstrip().endswith('KeyboardInterrupt') and p.returncode in (1, 130, -signal.SIGINT)
    assert time.monotonic()-start<8

# --- as fastai asks for it

def test_fastai_finds_what_it_knows(screen):
    seen = []
    def double(b): seen.append(threading.current_thread()); return b[0].float()*2,b[1]
    dl = CropLoader(Sites(screen), range(24), size=16, bs=4, num_workers=2, after_batch=double)
    plain = CropLoader(Sites(screen), range(24), size=16, bs=4, num_workers=2)
    for (x,i),(y,j) in zip(dl, plain): assert torch.equal(x, 2.*y) and torch.equal(i, j)
    assert set(seen)=={threading.main_thread()}
    item = CropLoader(Sites(screen), range(24), size=16, bs=4, num_workers=2, after_item=lambda b: (255-b[0],b[1]))
    for (x,_),(y,_) in zip(item, plain): assert torch.equal(x, 255-y)

def test_the_number_of_workers_goes_along(screen):
    for n in (None, 0, 3):
        dls = screen_dls(screen, 16, bs=4, num_workers=n, device='cpu')
        want = reading_threads('cpu') if n is None else n
        assert [dls.train.workers, dls.train.new(shuffle=False).workers]==[want]*2
        with dls.train.fake_l.no_multiproc(): assert dls.train.workers==0
        assert dls.train.workers==want

def test_beside_a_gpu_all_cores_read(monkeypatch):
    for n,threads in ((1,1), (2,1), (8,7), (64,16)):
        monkeypatch.setattr('cellmae.data.cores', lambda: n)
        assert reading_threads('cuda')==reading_threads(torch.device('cuda', 1))==threads
        assert reading_threads('cuda', mapped=True)==min(threads, 4)
        assert reading_threads('cpu')==reading_threads(None)==reading_threads('cpu', mapped=True)==1

def test_each_batch_is_sent_before_the_one_before_is_used():
    done = []
    out = one_ahead(range(3), lambda i: done.append(f'send {i}') or i, lambda i: done.append(f'receive {i}') or i)
    for i in out: done.append(f'use {i}')
    assert done==['send 0','send 1','receive 0','use 0','send 2','receive 1','use 1','receive 2','use 2']
    assert list(one_ahead([], id, id))==[]

@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
@pytest.mark.parametrize('workers', [0, 3])
def test_a_gpu_gets_the_same(screen, workers):
    "Also while it computes, and its memory is handed on"
    dls = screen_dls(screen, 16, bs=4, crops=2, num_workers=workers, device='cuda')
    want = batches(screen, 0, epoch=0, crops=2)
    kept,load = [],torch.ones(2000, 2000, device='cuda')
    for dl in dls:
        for x,ids in dl:
            for _ in range(10): load = load@load*1e-4
            kept.append((x.float()+load[0,0]*0,ids.clone()))
            assert x.is_cuda and ids.is_cuda
            del x
    assert all(torch.equal(x.cpu(), y.float()) and torch.equal(i.cpu(), j) for (x,i),(y,j) in zip(kept, want, strict=True))

class Stop(Callback):
    "Someone presses the button"
    def after_pred(self):
        if self.iter==2: raise KeyboardInterrupt

def test_a_run_that_stops_leaves_no_threads(screen, tmp_path):
    "Though a notebook keeps the traceback"
    model = create_model('mae_vitt8', in_chans=3, img_size=16, depth=1, embed_dim=48)
    dls = screen_dls(screen, 16, bs=2, valid=0, num_workers=2, device='cpu')
    with pytest.raises(KeyboardInterrupt) as kept:
        mae_learner(dls, model, tmp_path, dict(seed=0), n_pictures=0, cbs=Stop()).fit(1)
    assert wait_for_none() and kept.value.__traceback__

# --- a store

@pytest.fixture(scope='module')
def even(tmp_path_factory):
    "A screen of one size of images, and its store"
    root,rng = tmp_path_factory.mktemp('even'),np.random.default_rng(0)
    for i in range(12): tifffile.imwrite(root/f'{i}.tif', rng.integers(0, 4000, (3,40,56)).astype(np.uint16), photometric='minisblack')
    t = pd.DataFrame(dict(plate=['P']*7+['Q']*5, well=[f'{"BC"[i%2]}{i+2:02d}' for i in range(12)], file=[f'{i}.tif' for i in range(12)]))
    s = Screen(t, stains, root)
    return s,pack(s, root/'store', workers=1)

@pytest.mark.parametrize('workers', [0, 3])
def test_a_store_gives_the_batches_of_its_files(even, workers):
    files,store = (batches(s, workers, crops=2) for s in even)
    assert len(files)>2 and equal(files, store)

def test_few_threads_read_a_store(even, tmp_path, monkeypatch):
    "Where all images come from one, and none is to be decompressed"
    monkeypatch.setattr('cellmae.data.cores', lambda: 12)
    files,store = even
    archive = pack(files, tmp_path/'archive', workers=1, archive=True)
    for data,threads in ((files,11), (store,4), ([store,store],4), ([store,files],11), (archive,11), (store.subset([0]),4)):
        dl = CropLoader(Sites(data), [0], size=16, device=torch.device('cuda'))
        assert [dl.workers, dl.new(shuffle=False).workers]==[threads]*2
        assert CropLoader(Sites(data), [0], size=16, device=torch.device('cuda'), num_workers=9).workers==9

def test_a_crop_too_large_for_a_store_is_known_at_once(even, monkeypatch):
    monkeypatch.setattr(Screen, 'read', lambda *a: pytest.fail('an image was read'))
    screen_dls(even[1], 40, device='cpu')
    monkeypatch.undo()
    with pytest.raises(ValueError, match='well B02.*, which is 40x56 and 11 more of 12 sites'): screen_dls(even[1], 41)

class Busy(Callback):
    "A model that takes a while"
    def __init__(self, seconds): self.seconds = seconds
    def after_pred(self): time.sleep(self.seconds)

@pytest.mark.parametrize('kind,slow,step,said', [('files',.02,0,1), ('files',0,.05,0), ('store',.02,0,0)])
def test_a_run_that_waits_for_files_says_what_helps(even, tmp_path, monkeypatch, capsys, kind, slow, step, said):
    screen,read = even[kind=='store'],Screen.__getitem__
    monkeypatch.setattr(Screen, '__getitem__', lambda self, i: (time.sleep(slow), read(self, i))[1])
    model = create_model('mae_vitt8', in_chans=3, img_size=16, depth=1, embed_dim=48)
    dls = screen_dls(screen, 16, bs=2, valid=0, num_workers=0, device='cpu')
    learn = mae_learner(dls, model, tmp_path, dict(seed=0), n_pictures=0, cbs=Busy(step))
    learn.waits.seconds = .1
    learn.fit(2)
    text = capsys.readouterr().out
    assert text.count('of the time goes into waiting for images')==text.count('pack(screen, folder)')==said
