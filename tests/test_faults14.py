"Disks that are full, files that are damaged, gone or changed, and screens of odd kinds: what packing, reading and embedding say and do"
import os, re, resource, shutil, subprocess, sys, threading, time
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np, pandas as pd, pytest, tifffile, torch

from cellmae.data import CropLoader, Sites
from cellmae.embed import embed
from cellmae.files import locked
from cellmae.images import ImageError
from cellmae.profiles import read_profiles
from cellmae.screen import Screen, open_screen
from cellmae import store as store_room
from cellmae.store import append, pack, repack, verify
from commands import call, content

wells,stains = ('B03','C02','G11'),('DNA','ER') # of 8 x 12
SHARD = .013 # MB: three images of 2 x 40 x 48

def write(root, plates=('P1','P2'), sites='12', stains=stains, shape=(40,48)):
    "Planes that differ in all their pixels"
    for p in plates:
        for w in wells:
            for s in sites:
                for c in stains:
                    f = root/p/f'{w}_s{s}_{c}.tif'
                    f.parent.mkdir(parents=True, exist_ok=True)
                    rng = np.random.default_rng([*f'{p}{w}{s}{c}'.encode()])
                    tifffile.imwrite(f, rng.integers(100, 4000, shape).astype('u2'), photometric='minisblack')
    return opened(root)

def opened(root): return Screen.from_pattern(root, '{plate}/{well}_s{site}_{channel}.tif')

def packed(tmp_path, **kw):
    s = write(tmp_path/'files', **kw)
    return s,pack(s, tmp_path/'store', shard_mb=SHARD)

def same(a, b): return len(a)==len(b) and all(np.array_equal(a[i], b[i]) for i in range(len(a)))

def means(x):
    "An encoder that any screen can have"
    return x.float().mean((2,3))

def refused(capsys, command, *args):
    "The one line that a command ends with"
    capsys.readouterr()
    assert call(command, *args)==1
    err = [o for o in capsys.readouterr().err.splitlines() if not o.startswith('note: ')]
    assert len(err)==1 and err[0].startswith(command.__name__)
    return err[0]

# --- a store that is damaged

def shard(folder): return sorted((folder/'images.zarr/P1').glob('c.*'))[0]

def flip(f, at):
    b = bytearray(f.read_bytes())
    b[at] ^= 1
    f.write_bytes(b)

def short(f): f.write_bytes(f.read_bytes()[:-900])

damages = {
    'flipped bit': (lambda f: flip(f, 99), 'damaged', 'The bytes of image 0 have changed'),
    'missing shard': (Path.unlink, 'missing', 'This shard is not there'),
    'shard cut short': (short, 'unreadable', 'cut short or damaged'),
    'empty shard': (lambda f: f.write_bytes(b''), 'unreadable', 'cut short or damaged'),
    'index damaged': (lambda f: flip(f, -30), 'unreadable', 'cut short or damaged')}

@pytest.mark.parametrize('archive', [False, True])
@pytest.mark.parametrize('kind', damages)
def test_a_damaged_store(tmp_path, kind, archive):
    "It is found by `verify`, refused by `embed` with its place and cure, or left out if asked, and mended by `repack`"
    damage,problem,words = damages[kind]
    s = write(tmp_path/'files')
    pack(s, tmp_path/'store', shard_mb=SHARD, archive=archive)
    damage(f := shard(tmp_path/'store'))
    found = verify(tmp_path/'store')
    assert set(found.problem)=={problem} and set(found.file)=={str(f)} and set(found.plate)=={'P1'} and found.cure.str.contains('repack').all()
    store = open_screen(tmp_path/'store')
    with pytest.raises(ImageError, match=f'{words}.*repack.*plate P1, well B03, site 1'): embed(means, store, level='site', out=tmp_path/'e', progress=False)
    t = read_profiles(embed(means, store, level='site', out=tmp_path/'e', progress=False, leave_out=True))
    left = pd.read_csv(tmp_path/'e/left_out.csv').query('site==site')
    assert len(t)==12-len(left) and 1<=len(left)<=3 and set(left.plate)=={'P1'} and left.problem.str.contains(words).all()
    assert same(s, repack(store)) and verify(tmp_path/'store').empty

@pytest.mark.parametrize('kind', [o for o in damages if o!='flipped bit'])
@pytest.mark.parametrize('workers', [0, 2])
def test_training_names_what_is_damaged(tmp_path, kind, workers):
    _,store = packed(tmp_path)
    damages[kind][0](shard(tmp_path/'store'))
    with pytest.raises(ImageError, match='repack.*plate P1, well'): list(CropLoader(Sites(store), range(12), 16, bs=2, num_workers=workers))

def test_a_flipped_bit_in_training_is_one_pixel(tmp_path):
    "Windows are not compared with the checksum of the whole image, which would read all of it"
    s,store = packed(tmp_path)
    whole = torch.cat([x for x,_ in CropLoader(Sites(store), range(12), 40, bs=4, train=False)])
    flip(shard(tmp_path/'store'), 99)
    x = torch.cat([x for x,_ in CropLoader(Sites(store), range(12), 40, bs=4, train=False)])
    assert (x!=whole).sum()<=1

def test_damage_by_commands(tmp_path, capsys):
    from cellmae.cli import cellmae_fit, cellmae_pack
    _,store = packed(tmp_path)
    shard(tmp_path/'store').unlink()
    said = refused(capsys, cellmae_fit, tmp_path/'store', '--out', tmp_path/'run', '--model', 'mae_vitt8', '--crop', 24, '--bs', 4, '--epochs', 1)
    assert 'missing' in said and 'plate P1, well' in said
    call(cellmae_pack, tmp_path/'store', '--verify')
    assert 'missing' in (said := capsys.readouterr().out) and 'P1' in said
    assert call(cellmae_pack, tmp_path/'store', '--repack')==0
    assert verify(tmp_path/'store').empty

# --- a store that is not whole

def without(name): return lambda store: (store/name).unlink()

def with_other(store):
    write(store.parent/'others', plates=('Q1',))
    pack(opened(store.parent/'others'), store.parent/'other')
    shutil.copy(store.parent/'other/screen.parquet', store)

def cut(name): return lambda store: (store/name).write_bytes((store/name).read_bytes()[:300])

def of_version(v):
    return lambda store: (f := store/'screen.json').write_text(f.read_text().replace('"version": 1', f'"version": {v}'))

halves = {
    'no table': (without('screen.parquet'), 'screen.parquet.*missing'),
    'a table cut short': (cut('screen.parquet'), 'screen.parquet.*(damaged|not a table)'),
    'no description': (without('screen.json'), 'screen.json.*missing.*pack'),
    'a description cut short': (cut('screen.json'), 'screen.json: damaged'),
    'a later version': (of_version(2), 'version 2.*reads version 1. Update cellmae'),
    'not yet packed': (lambda store: [f.unlink() for f in store.glob('screen.*')], 'not finished|not whole')}

@pytest.mark.parametrize('kind', halves)
def test_a_store_that_is_not_whole(tmp_path, kind, capsys):
    from cellmae.cli import cellmae_check
    damage,words = halves[kind]
    packed(tmp_path)
    damage(tmp_path/'store')
    for way in (open_screen, Screen.open, lambda f: embed(means, f, out=tmp_path/'e')):
        with pytest.raises((ValueError, FileNotFoundError), match=words): way(tmp_path/'store')
    assert re.search(words, refused(capsys, cellmae_check, tmp_path/'store', '--out', tmp_path/'checked'))

def test_the_table_of_another_store(tmp_path):
    "Each read says that its array is not there; nobody advises to delete, or mends, those that are"
    s,store = packed(tmp_path)
    with_other(tmp_path/'store')
    before = content(tmp_path/'store')
    for f in (verify, repack, lambda o: append(o, s), lambda o: pack(s, o)):
        with pytest.raises(ValueError, match='screen.parquet is the table of another store: it names Q1, which is not here, and not P1'): f(tmp_path/'store')
    with pytest.raises(ImageError, match='missing.*plate Q1, well B03'): embed(means, tmp_path/'store', progress=False)
    assert content(tmp_path/'store')==before
    store.save(tmp_path/'store')
    assert verify(tmp_path/'store').empty

def test_the_table_of_another_store_of_the_same_plates(tmp_path):
    _,store = packed(tmp_path)
    pack(write(tmp_path/'others', sites='34'), tmp_path/'other', shard_mb=SHARD)
    shutil.copy(tmp_path/'other/screen.parquet', tmp_path/'store')
    found = verify(tmp_path/'store')
    assert set(found.problem)=={'of other files'} and found.cure.str.contains('table of another store, put back its own').all()

@pytest.mark.parametrize('out', ['note.txt', 'note.txt/store'])
def test_a_file_where_a_folder_is_to_be(tmp_path, out, capsys):
    from cellmae.cli import cellmae_pack
    s = write(tmp_path/'files')
    (tmp_path/'note.txt').write_text('mine')
    for f in (pack, lambda s,o: embed(means, s, out=o, progress=False)):
        with pytest.raises(OSError, match='note.txt is no folder. Name another'): f(s, tmp_path/out)
    said = refused(capsys, cellmae_pack, tmp_path/'files', '--out', tmp_path/out)
    assert 'note.txt is no folder' in said and 'Errno' not in said and (tmp_path/'note.txt').read_text()=='mine'

def test_how_a_plate_was_read_stands_once_in_the_table(tmp_path):
    _,store = packed(tmp_path)
    grown = append(store, write(tmp_path/'more', plates=('P3',)))
    for s,n in ((store,1), (grown,2), (open_screen(tmp_path/'store'),2)):
        assert isinstance(s.table.source_how.dtype, pd.CategoricalDtype) and s.table.source_how.nunique()==n
    t = grown.table
    grown.table = t.assign(source_how=t.source_how.astype(str)) # as stores were before
    grown.save(tmp_path/'store')
    shard(tmp_path/'store').unlink()
    assert verify(repack(tmp_path/'store')).empty

@pytest.mark.parametrize('inside', ['images.zarr', 'images.zarr/P1'])
def test_inside_a_store(tmp_path, inside):
    packed(tmp_path)
    with pytest.raises(ValueError, match='lies inside a store. Open the store, .*/store[.]$'): open_screen(tmp_path/'store'/inside)

def test_a_store_without_its_arrays_description(tmp_path):
    _,store = packed(tmp_path)
    (tmp_path/'store/images.zarr/P1/zarr.json').unlink()
    with pytest.raises(ImageError, match='plate P1, well B03'): embed(means, tmp_path/'store', progress=False)
    assert set(verify(tmp_path/'store').plate)=={'P1'}
    repack(tmp_path/'store')
    assert verify(tmp_path/'store').empty

# --- a source that changes, and others at work

def test_images_deleted_while_they_are_embedded(tmp_path):
    "What is done stays; the call says what is gone, or leaves it out, and goes on once it is back"
    s,seen = write(tmp_path/'files'),[]
    s.fit_ranges()
    want,gone = embed(means, s, level='site', progress=False),tmp_path/'files/P2/G11_s2_ER.tif'
    raw = gone.read_bytes()
    def deleting(x):
        if not seen: gone.unlink(missing_ok=True)
        seen.append(len(x))
        return means(x)
    run = lambda **kw: embed(deleting, s, level='site', bs=1, out=tmp_path/'e', workers=0, progress=False, **kw)
    with pytest.raises(ImageError, match='G11_s2_ER.tif: missing.*plate P2, well G11, site 2'): run()
    assert [f.name for f in (tmp_path/'e/parts').iterdir()]==['00000_P1.parquet']
    gone.write_bytes(raw)
    n = len(seen)
    t = read_profiles(run())
    assert len(seen)==n+6 and (t.X==want.X).all() and t.obs.well.tolist()==want.obs.well.tolist()

def test_images_deleted_while_they_are_packed(tmp_path, monkeypatch, capsys):
    from cellmae.cli import cellmae_pack
    s = write(tmp_path/'files')
    s.fit_ranges()
    gone,real = tmp_path/'files/P2/G11_s2_ER.tif',store_room.write_shard
    monkeypatch.setattr(store_room, 'write_shard', lambda *a: (gone.unlink(missing_ok=True), real(*a)))
    said = refused(capsys, cellmae_pack, tmp_path/'files', '--out', tmp_path/'store', '--stop', '--workers', 0)
    assert 'G11_s2_ER.tif: missing' in said and 'well G11, site 2' in said and not (tmp_path/'store/screen.json').exists()
    assert call(cellmae_pack, tmp_path/'files', '--out', tmp_path/'store')==0
    left = pd.read_csv(tmp_path/'store/left_out.csv', dtype=str)
    assert 'Left out: 1 site' in capsys.readouterr().out and left[['plate','well','site','problem']].values.tolist()==[['P2','G11','2','missing']]

def test_two_at_once(tmp_path, capsys):
    from cellmae.cli import cellmae_pack
    s,store = packed(tmp_path)
    more = write(tmp_path/'more', plates=('P3',))
    with locked(tmp_path/'store', 'packing'):
        said = refused(capsys, cellmae_pack, tmp_path/'files', '--out', tmp_path/'store')
        for busy in (lambda: append(store, more), lambda: repack(store)):
            with pytest.raises(BlockingIOError, match='in use by process'): busy()
    assert f'in use by process {os.getpid()}' in said and 'wait for it' in said
    with locked(tmp_path/'e', 'embedding'):
        with pytest.raises(BlockingIOError, match='in use by process'): embed(means, s, out=tmp_path/'e', progress=False)

def test_a_reader_while_plates_are_added(tmp_path):
    "It reads what was there when it was opened, before, while and after"
    s,store = packed(tmp_path)
    more,ended,seen = write(tmp_path/'more', plates=('P3','P0')),threading.Event(),[]
    def read():
        loader = CropLoader(Sites(store), range(12), 40, bs=5, train=False, num_workers=2)
        while not ended.is_set() or len(seen)<3: seen.append(torch.cat([x for x,_ in loader]).numpy())
    reader = threading.Thread(target=read)
    reader.start()
    grown = append(store, more)
    ended.set(); reader.join()
    want = np.stack([s[i][:, :, 4:44] for i in range(12)])
    assert len(seen)>=3 and all((o==want).all() for o in seen)
    more._ranges = s.ranges
    assert len(grown)==24 and all(np.array_equal(grown[12+i], more[i]) for i in range(12)) and same(s, store)

# --- the same by `cellmae_embed`, as in a terminal

@pytest.fixture
def model(tmp_path):
    "The smallest model that is a folder"
    from cellmae.zoo import create_model, save_model
    torch.manual_seed(0)
    net = create_model('mae_vitt8', in_chans=2, img_size=16, depth=1)
    net.channels = [*stains]
    return save_model(net, tmp_path/'model')

def deleting(monkeypatch, files):
    "Files vanish while the first sites are encoded"
    from cellmae.vit import Encoder as kind
    own = kind.forward
    def forward(self, *args, **kw):
        for f in files: f.unlink(missing_ok=True)
        return own(self, *args, **kw)
    monkeypatch.setattr(kind, 'forward', forward)

@contextmanager
def room(size):
    "No file may be larger"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try: yield
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, before)

def tables(tmp_path, model, capsys, data, harm, mend, words, left):
    "The command refuses, with `--leave_out` goes on without the sites, and once all is mended gives what was to be given"
    from cellmae.cli import cellmae_embed
    how = '--level','site','--workers',0
    assert call(cellmae_embed, model, data, '--out', tmp_path/'want.parquet', *how)==0
    with harm(): said = refused(capsys, cellmae_embed, model, data, '--out', tmp_path/'e.parquet', *how)
    assert re.search(words, said) and not (tmp_path/'e.parquet').exists() and 'Traceback' not in said
    if left:
        with harm(): assert call(cellmae_embed, model, data, '--out', tmp_path/'l.parquet', *how, '--leave_out')==0
        assert f'{left} sites could not be read' in re.sub('1 site ', '1 sites ', capsys.readouterr().out)
        assert len(read_profiles(tmp_path/'l.parquet'))==12-left
    mend()
    assert call(cellmae_embed, model, data, '--out', tmp_path/'e.parquet', *how)==0
    assert (tmp_path/'e.parquet').read_bytes()==(tmp_path/'want.parquet').read_bytes() and not (tmp_path/'e.parts').exists()

@pytest.mark.parametrize('kind,words,left', [('flipped bit', 'bytes of image 0 have changed.*P1, well B03', 1), ('missing shard', 'not there.*P1, well B03', 3)])
def test_embed_command_of_a_damaged_store(tmp_path, model, capsys, kind, words, left):
    packed(tmp_path)
    raw = (f := shard(tmp_path/'store')).read_bytes()
    @contextmanager
    def harm(): f.write_bytes(raw); damages[kind][0](f); yield
    tables(tmp_path, model, capsys, tmp_path/'store', harm, lambda: f.write_bytes(raw), words, left)

def test_embed_command_while_images_are_deleted(tmp_path, model, capsys, monkeypatch):
    write(tmp_path/'files').save(tmp_path/'files')
    f = tmp_path/'files/P2/G11_s2_ER.tif'
    raw = f.read_bytes()
    @contextmanager
    def harm():
        f.write_bytes(raw)
        with monkeypatch.context() as m: deleting(m, [f]); yield
    tables(tmp_path, model, capsys, tmp_path/'files', harm, lambda: f.write_bytes(raw), 'G11_s2_ER.tif: missing.*P2, well G11, site 2', 1)
    assert not (tmp_path/'e.parts').exists()

def test_embed_command_on_a_full_disk(tmp_path, model, capsys):
    write(tmp_path/'files').save(tmp_path/'files')
    tables(tmp_path, model, capsys, tmp_path/'files', lambda: room(4000), lambda: None, 'No room for .*parquet.*make room, and the same call goes on', 0)

# --- an embedding that goes on otherwise than it began

def begun(s, out, **kw):
    "Embed until the second plate"
    def f(x):
        if f.n==6: raise KeyboardInterrupt
        f.n += len(x)
        return means(x)
    f.n,f.__name__ = 0,'means'
    with pytest.raises(KeyboardInterrupt): embed(f, s, bs=2, level='site', out=out, progress=False, **kw)
    return f

@pytest.mark.parametrize('workers', [0, 1, 64])
def test_it_goes_on_with_other_threads(tmp_path, workers):
    s = write(tmp_path/'files')
    f = begun(s, tmp_path/'e', workers=2)
    assert [o.name for o in (tmp_path/'e/parts').iterdir()]==['00000_P1.parquet']
    f.n = -10**6
    one,other = embed(f, s, bs=2, level='site', out=tmp_path/'e', progress=False, workers=workers),embed(f, s, bs=2, level='site', out=tmp_path/'o', progress=False, workers=0)
    assert one.read_bytes()==other.read_bytes() and f.n==-10**6+6+12

others = {
    'another encoder': (dict(encoder='intensity'), 'model='),
    'another level': (dict(level='well'), "level='site' there, 'well' here"),
    'another batch': (dict(bs=3), 'bs=2 there, 3 here'),
    'tiles': (dict(size=16), 'tile|size=0 there, 16 here'),
    'a larger screen': (dict(plates=('P1','P2','P3')), 'sites=12 there, 18 here')}

@pytest.mark.parametrize('kind', others)
def test_another_embedding_is_refused(tmp_path, kind):
    change,words = others[kind]
    s = write(tmp_path/'files')
    f = begun(s, tmp_path/'e')
    before,f.n = content(tmp_path/'e'),-10**6
    if plates := change.pop('plates', None): s = write(tmp_path/'files', plates=plates)
    how = dict(dict(bs=2, level='site', encoder=f), **change)
    with pytest.raises(ValueError, match=f'e holds other vectors: .*({words}).*Name another folder'):
        embed(how.pop('encoder'), s, out=tmp_path/'e', progress=False, **how)
    assert content(tmp_path/'e')==before
    shutil.rmtree(tmp_path/'e') # as told, or so

def test_a_model_that_learned_more_is_refused(tmp_path):
    from cellmae.zoo import create_model
    s = write(tmp_path/'files')
    torch.manual_seed(0)
    model = create_model('mae_vitt8', in_chans=2, depth=1)
    model.channels = s.channels
    run = lambda: embed(model, s, size=16, out=tmp_path/'e', progress=False)
    first = run().read_bytes()
    assert run().read_bytes()==first
    with torch.no_grad(): next(model.parameters()).add_(1)
    with pytest.raises(ValueError, match='weights='): run()

# --- screens of odd kinds

def odd(tmp_path, kind):
    "A screen of one kind; seven sites on a plate that is neither square nor symmetric"
    rng,rows = np.random.default_rng(0),[]
    channels = dict(one_channel=1, twelve=12).get(kind, 2)
    (tmp_path/'odd').mkdir()
    for i in range(1 if kind=='one_site' else 7):
        shape = (channels, 40+(i%3)*7*(kind=='sizes'), 48)
        x = rng.integers(100, 4000, shape).astype('f4' if kind=='floats' else 'u2')
        tifffile.imwrite(tmp_path/f'odd/{i}.tif', x, photometric='minisblack')
        plate = {'names': ['a/b #i=1','A/B #I=1','..','\u677f','zarr.json','%s','x'*200][i], 'plates': f'P{i}'}.get(kind, 'P')
        rows.append(dict(batch='b', plate=plate, well=f'{"BCG"[i%3]}{2+i//2:02d}', site=str(i%2+1), file=f'{i}.tif'))
    return Screen(pd.DataFrame(rows), channels=[f'c{k}' for k in range(channels)], root=tmp_path/'odd')

@pytest.mark.parametrize('workers', [0, 2, 64])
@pytest.mark.parametrize('kind', ['plain','one_site','one_channel','twelve','floats','sizes','names','plates'])
def test_odd_screens(tmp_path, kind, workers):
    "Packed, trained on and embedded as any other, by any number of threads"
    s = odd(tmp_path, kind)
    store = pack(s, tmp_path/'store', shard_mb=SHARD, workers=workers)
    assert same(s, store) and verify(store).empty and store.table.plate.tolist()==s.table.plate.tolist()
    for a,b in zip(*(CropLoader(Sites(o), range(len(s)), 32, bs=3, num_workers=n) for o,n in ((s,0), (store,workers))), strict=True):
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
    for level in ('well','site','tile'):
        want = embed(means, s, level=level, size=16, bs=5, workers=0, progress=False)
        got = read_profiles(embed(means, store, level=level, size=16, bs=5, workers=workers, out=tmp_path/level, progress=False))
        assert (got.X==want.X).all() and got.obs.plate.tolist()==want.obs.plate.tolist() and got.obs.well.tolist()==want.obs.well.tolist()
        assert not (tmp_path/level/'parts').exists() and not list((tmp_path/level).glob('.*part*'))

def test_sites_without_cells(tmp_path):
    s = odd(tmp_path, 'plain')
    t = s.table[['plate','well','site']].iloc[[0,0,3]].assign(y=[5,20,30], x=[7,40,12])
    want = embed(means, s, level='cell', size=16, cells=t, progress=False)
    got = read_profiles(embed(means, pack(s, tmp_path/'store'), level='cell', size=16, cells=t, out=tmp_path/'e', progress=False))
    assert len(want)==3 and (got.X==want.X).all()

def test_a_plate_of_which_nothing_can_be_read(tmp_path, capsys):
    s = write(tmp_path/'files')
    s.fit_ranges()
    for f in (tmp_path/'files/P1').iterdir(): f.write_bytes(b'')
    t = read_profiles(embed(means, s, level='site', out=tmp_path/'e', leave_out=True, progress=False))
    left = pd.read_csv(tmp_path/'e/left_out.csv', dtype=str, keep_default_na=False)
    assert set(t.obs.plate)=={'P2'} and len(left)==6+3 and (left.plate=='P1').all()
    store = pack(s, tmp_path/'store')
    assert set(store.table.plate)=={'P2'} and len(pd.read_csv(tmp_path/'store/left_out.csv'))==6
    for f in (tmp_path/'files/P2').iterdir(): f.write_bytes(b'')
    with pytest.raises(ValueError, match='No site could be read. The first: .*P1.*B03'): embed(means, s, out=tmp_path/'none', leave_out=True, progress=False)
    with pytest.raises(ImageError, match='P1/B03'): pack(s, tmp_path/'nothing')

@pytest.mark.parametrize('workers', [-1])
def test_numbers_that_mean_nothing(tmp_path, workers):
    s = write(tmp_path/'files')
    with pytest.raises(ValueError, match='workers=-1'): pack(s, tmp_path/'store', workers=workers)
    with pytest.raises(ValueError, match='workers=-1'): embed(means, s, workers=workers, progress=False)
    with pytest.raises(ValueError, match='no sites'): pack(s.subset([]), tmp_path/'store')

# --- kills

def test_a_store_killed_at_its_first_file(tmp_path):
    s = write(tmp_path/'files')
    (tmp_path/'store/images.zarr').mkdir(parents=True)
    (tmp_path/'store/images.zarr/.zarr.node7-1-c0ffee.part.json').write_text('{"zarr')
    pack(s, tmp_path/'store')
    assert not list((tmp_path/'store').rglob('.*part*'))
    (tmp_path/'other/images.zarr').mkdir(parents=True)
    (tmp_path/'other/images.zarr/c.0.0').write_text('of somebody else')
    with pytest.raises(FileExistsError, match='no store of ours. Name another folder'): pack(s, tmp_path/'other')

@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')
def test_kills():
    "`benchmarks/kills.py` does more of them"
    p = subprocess.run([sys.executable, '-W', 'ignore', 'benchmarks/kills.py', '--n', '3', '--jobs', 'pack, 2', 'append', 'embed, wells, of files'],
                       capture_output=True, text=True, env={**os.environ, 'PYTHONPATH': os.getcwd()}, timeout=180)
    assert p.returncode==0, p.stdout[-2000:]+p.stderr[-2000:]
    assert 'After all of 3 kills' in p.stdout

# --- disks, in a process that may mount its own

def own_disks():
    "Can a process have disks of its own here?"
    if not shutil.which('unshare'): return False
    return subprocess.run(['unshare','-rm','mount','-t','tmpfs','tmpfs','/mnt'], capture_output=True).returncode==0

def run(code, *args, lead=(), timeout=180):
    "The output of a program that has what is defined here"
    head = 'import sys; sys.path.insert(0, "tests")\nfrom test_faults14 import *\n'
    env = {**os.environ, 'PYTHONPATH': os.getcwd(), 'OMP_NUM_THREADS': '1'}
    p = subprocess.run([*lead, sys.executable, '-W', 'ignore', '-c', head+code, *map(str, args)], capture_output=True, text=True, env=env, timeout=timeout)
    assert p.returncode==0, p.stderr[-3000:]
    return p.stdout

def size(disk, how): subprocess.run(['mount','-o',f'remount,{how}',disk], check=True)

def packs_on_a_full_disk(files, disk):
    "Too small from the start; full on the way; large enough"
    out = disk/'store'
    mounted(disk, '60k')
    with pytest.raises(OSError, match='the store takes .* left. Name a folder on another disk'): pack(files, out, shard_mb=SHARD)
    assert [f.name for f in out.iterdir()]==['.lock']
    store_room.shutil.disk_usage = lambda f: type('Free', (), dict(free=10**15)) # somebody else fills it meanwhile
    for kb in (60, 80):
        size(disk, f'size={kb}k')
        with pytest.raises(OSError, match='the disk is full. What was packed is kept: make room and call again'): pack(files, out, shard_mb=SHARD)
        assert not [f for f in out.rglob('.*part*')] and not (out/'screen.json').exists()
    there = {f: f.stat().st_ino for f in out.rglob('c.*')}
    assert len(there)>2
    size(disk, 'size=4m')
    pack(files, out, shard_mb=SHARD)
    assert verify(out).empty and there.items() <= {f: f.stat().st_ino for f in out.rglob('c.*')}.items()

def mounted(disk, size):
    disk.mkdir()
    subprocess.run(['mount','-t','tmpfs','-o',f'size={size}','tmpfs',disk], check=True)

def embeds_on_a_full_disk(files, disk):
    "While a part is written, and while parts are joined"
    wide = lambda x: x.float().flatten(1)[:,:200]
    wide.__name__ = 'wide'
    want = embed(wide, files, level='site', bs=4, progress=False)
    mounted(disk, '120k')
    for kb,there in ((120,1), (230,2), (340,3)): # parts of 94 kB, a table of 104
        size(disk, f'size={kb}k')
        with pytest.raises(OSError, match='No room for .*(parquet|parts).*make room, and the same call goes on'): embed(wide, files, level='site', bs=4, out=disk/'e', progress=False)
        assert len(list(disk.glob('e/parts/*')))==there and not (disk/'e/profiles.parquet').exists() and not list(disk.rglob('.*part*'))
    size(disk, 'size=4m')
    t = read_profiles(embed(wide, files, level='site', bs=4, out=disk/'e', progress=False))
    assert (t.X==want.X).all() and not (disk/'e/parts').exists()

def says_so_on_a_disk_that_may_not_be_written_to(files, disk):
    mounted(disk, '4m')
    pack(files, disk/'store')
    size(disk, 'ro')
    for f in (lambda: pack(files, disk/'other'), lambda: repack(disk/'store'), lambda: embed(means, files, out=disk/'e', progress=False)):
        with pytest.raises(OSError, match=f'Read-only file system.*{disk}'): f()
    assert same(open_screen(files), pack(files, disk/'store')) and verify(disk/'store').empty

def says_so_on_a_disk_without_any_room(files, disk):
    mounted(disk, '64k')
    with suppress(OSError): (disk/'all').write_bytes(bytes(10**6))
    with pytest.raises(OSError, match='(?i)no (space|room)|takes|disk is full'): pack(files, disk/'store')
    with pytest.raises(OSError, match='(?i)no (space|room)'): embed(means, files, out=disk/'e', progress=False)

@pytest.mark.skipif(not own_disks(), reason='needs disks of its own')
def test_disks(tmp_path):
    "In one process, which takes longer to start than to do this"
    write(tmp_path/'files', plates=('P1','P2','P3')).save(tmp_path/'files')
    kinds = packs_on_a_full_disk,embeds_on_a_full_disk,says_so_on_a_disk_that_may_not_be_written_to,says_so_on_a_disk_without_any_room
    calls = [f'{f.__name__}(Path(sys.argv[1]), Path(sys.argv[2])/"{k}")' for k,f in enumerate(kinds)]
    (tmp_path/'disks').mkdir()
    run('\n'.join(calls), tmp_path/'files', tmp_path/'disks', lead=['unshare','-rm'])

# --- a read that hangs, as on a server that is gone

hangs = '''
import atexit, signal
from cellmae.train import fit_mae
files,out = map(Path, sys.argv[1:])
fifo = sorted(files.glob('P2/*_ER.tif'))[-1]
s = open_screen(files)
jobs = dict(pack0=lambda: pack(s, out/'p0', workers=0), pack2=lambda: pack(s, out/'p2', workers=2),
            fit0=lambda: fit_mae(s, 'mae_vitt8', out/'f0', epochs=1, crop=32, bs=4, num_workers=0, device='cpu'),
            fit2=lambda: fit_mae(s, 'mae_vitt8', out/'f2', epochs=1, crop=32, bs=4, num_workers=2, device='cpu'),
            embed0=lambda: embed(means, s, out=out/'e0', workers=0), embed2=lambda: embed('mae_vitt8', s, size=32, out=out/'e2', workers=2))
os.unlink(fifo); os.mkfifo(fifo) # who opens it for reading waits for ever
for name,job in jobs.items():
    if not (pid := os.fork()):
        signal.alarm(60)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.dup2(2, 1)
        try: job()
        except KeyboardInterrupt: atexit._run_exitfuncs(); os._exit(130) # the rest is long only in a fork, which copies all pages
        os._exit(1)
    writer = opened_for_writing(fifo) # by now it is being read
    os.kill(pid, signal.SIGINT); start = time.monotonic()
    end = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    print(name, end, round(time.monotonic()-start, 2), flush=True)
    os.close(writer)
'''

def opened_for_writing(fifo):
    "A pipe that is being read, from which nothing comes; without a reader it cannot be opened"
    for _ in range(300):
        with suppress(OSError): return os.open(fifo, os.O_WRONLY|os.O_NONBLOCK)
        time.sleep(.1)
    raise TimeoutError('nobody reads it')

@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')
def test_a_read_that_hangs(tmp_path):
    "Ctrl-C ends packing, training and embedding at once, and they go on another time"
    write(tmp_path/'files').save(tmp_path/'files')
    out = run(hangs, tmp_path/'files', tmp_path)
    seen = [o.split() for o in out.splitlines() if re.match(r'\w+ -?\d+ [\d.]+$', o)]
    print(out)
    assert [o[:2] for o in seen]==[[k,'130'] for k in ('pack0','pack2','fit0','fit2','embed0','embed2')]
    assert max(float(o[2]) for o in seen)<2
