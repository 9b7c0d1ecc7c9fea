"Embedding at scale: the same bits in whatever way, parts that are whole, processes that share, sites left out, disks that are full"
import os, resource, shutil, signal, subprocess, sys, threading, time, warnings
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
from tifffile import imread, imwrite
from cellmae.cells import Cells
from cellmae.classifier import Classifier
from cellmae.embed import embed
from cellmae.imagenet import ImageNetEncoder
from cellmae.profiles import read_profiles, to_parquet
from cellmae.screen import Screen, open_screen
from cellmae.zoo import create_model
from processes import ended, in_processes

def mean_of_tiles(x): return x.float().mean((2,3))

def plates(root, n=3, sites=2, side=33):
    "Plates of wells B02, B03, B07, C02 and C03, all with other pixels; two plates to an experiment"
    rng,rows = np.random.default_rng(0),[]
    root.mkdir()
    for p in range(n):
        for well in ('B02','B03','B07','C02','C03')[:5-(p==1)]:
            for s in range(sites+(well=='B03')):
                f = f'P{p}_{well}_{s}.tif'
                imwrite(root/f, rng.integers(0, 2000+6000*len(rows)%50000, (2,side,side), dtype=np.uint16), photometric='minisblack')
                rows.append(dict(batch=f'E{p//2}', plate=f'P {p}/x', well=well, site=str(s), perturbation=f'g{well}', dose=[1.5,np.nan][s%2], file=f))
    return Screen(Screen(pd.DataFrame(rows), channels=['DNA','ER'], root=root).save(root))

@pytest.fixture(scope='module')
def screen(tmp_path_factory): return plates(tmp_path_factory.mktemp('scale')/'s')

@pytest.fixture(scope='module')
def models(screen):
    torch.manual_seed(0)
    tiny = create_model('mae_vitt8', in_chans=2, embed_dim=32, depth=1, num_heads=2, img_size=16)
    net = Classifier(ImageNetEncoder('densenet121', in_chans=2, img_size=32, growth_rate=8, block_config=(1,1), pretrained=False), n_classes=3, embed_dim=8)
    tiny.channels = net.channels = screen.channels
    return dict(vit=tiny, adapts=net, function=mean_of_tiles)

def cells_of(screen):
    rng = np.random.default_rng(1)
    row = np.repeat(np.arange(len(screen)), rng.integers(0, 5, len(screen)))
    return Cells(screen, pd.DataFrame(dict(row=row, label=1, area=9., y=rng.random(len(row))*33, x=rng.random(len(row))*33)))

def quiet(f, *args, **kw):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return f(*args, progress=False, **kw)

ways = [(name, level) for name in ('vit','adapts','function') for level in ('well','site','tile','cell')]
@pytest.mark.parametrize('name,level', ways)
def test_a_folder_holds_the_table_of_memory_to_the_last_bit(screen, models, tmp_path, name, level):
    mixed = screen.subset(np.random.default_rng(0).permutation(len(screen)))
    for s in (screen, mixed):
        kw = dict(level=level, size=32 if name=='adapts' else 16, bs=3, **(dict(cells=cells_of(s)) if level=='cell' else {}))
        whole = quiet(embed, models[name], s, **kw)
        a = to_parquet(whole, tmp_path/'a.parquet').read_bytes()
        for workers in (0,1,3):
            out = tmp_path/f'{workers}'
            assert quiet(embed, models[name], s, out=out, workers=workers, **kw).read_bytes()==a
            assert sorted(os.listdir(out))==['.lock','embed.json','profiles.parquet']
            shutil.rmtree(out)

@pytest.mark.parametrize('level', ['well','site','tile'])
def test_vectors_are_means_of_tiles(screen, level):
    e = quiet(embed, mean_of_tiles, screen, level=level, size=16)
    t,(lo,hi) = screen.table,np.float64(screen.ranges).T
    def bytes_of(f):
        x = np.clip(np.rint((np.float64(imread(screen.root/f))-lo[:,None,None])/(hi-lo)[:,None,None]*255), 0, 255)[:,:32,:32]
        return x.reshape(2,2,16,2,16).transpose(1,3,0,2,4).reshape(4,2,16,16).mean((2,3))
    tiles = np.stack([bytes_of(f) for f in t['file']])
    want = tiles.reshape(-1,2) if level=='tile' else tiles.mean(1)
    if level=='well': want = pd.DataFrame(want).groupby([t['plate'].astype(str), t['well'].astype(str)], sort=False).mean().to_numpy()
    np.testing.assert_allclose(e.X, want, atol=.02)
    if level=='well': assert e.obs[['well','n_tiles','n_sites']].iloc[[0,1]].values.tolist()==[['B02',8,2],['B03',12,3]]

def test_any_number_of_threads_gives_the_same_bits(screen, models):
    n = torch.get_num_threads()
    try:
        X = []
        for k in (1,2,5):
            torch.set_num_threads(k)
            X.append(quiet(embed, models['vit'], screen, level='tile', size=16, bs=3).X)
            assert torch.get_num_threads()==k
        with pytest.raises(ValueError): quiet(embed, models['vit'], screen.subset(range(3)), size=99)
        assert torch.get_num_threads()==5
    finally: torch.set_num_threads(n)
    assert (X[0]==X[1]).all() and (X[0]==X[2]).all()

def test_a_model_computes_in_threads_and_a_function_in_this_one(screen, models):
    me,seen = threading.get_ident(),set()
    def f(x): seen.add(threading.get_ident()); return mean_of_tiles(x)
    quiet(embed, f, screen, size=16)
    assert seen=={me}
    model = models['vit']
    own = model.encode
    def encode(x, **kw): seen.add((threading.get_ident(), torch.get_num_threads(), model.training)); return own(x, **kw)
    model.encode = encode
    try: model.train(); quiet(embed, model, screen, size=16); assert model.training
    finally: del model.encode; model.eval()
    seen.discard(me)
    assert me not in {o[0] for o in seen} and {o[1:] for o in seen}=={(1,False)}

def test_a_plate_has_the_same_bits_whatever_else_is_embedded(screen, models):
    every = quiet(embed, models['vit'], screen, level='site', size=16, bs=3)
    for plate in every.obs['plate'].unique():
        own = (screen.table['plate']==plate).to_numpy()
        assert (quiet(embed, models['vit'], screen.subset(own), level='site', size=16, bs=3).X==every.X[own]).all()

@pytest.mark.parametrize('level', ['well','tile'])
@pytest.mark.parametrize('batches', [0,5,12,20,29])
def test_a_run_goes_on_at_the_first_missing_part(screen, tmp_path, level, batches):
    whole = quiet(embed, mean_of_tiles, screen, out=tmp_path/'a', bs=4, size=16, level=level).read_bytes()
    seen,last = [],batches
    def counting(x):
        seen.append(len(x))
        if len(seen)>last: raise KeyboardInterrupt
        return x.float().mean((2,3))
    counting.__name__ = 'mean_of_tiles'
    with pytest.raises(KeyboardInterrupt): quiet(embed, counting, screen, out=tmp_path/'b', bs=4, size=16, level=level)
    done = len(os.listdir(tmp_path/'b/parts')) if (tmp_path/'b/parts').exists() else 0
    assert done==sum(batches>=np.cumsum([11,9,11])), 'a plate that was done is there, and no other'
    whole_parts = {f.name: f.read_bytes() for f in (tmp_path/'b').glob('parts/*')}
    for f in (tmp_path/'b').glob('parts/*'): assert read_profiles(f).n_vars==2
    n = len(seen)
    last = 10**9
    assert quiet(embed, counting, screen, out=tmp_path/'b', bs=4, size=16, level=level).read_bytes()==whole
    assert len(seen)-n==31-sum([11,9,11][:len(whole_parts)]), 'only what was missing was encoded'
    assert sorted(os.listdir(tmp_path/'b'))==['.lock','embed.json','profiles.parquet']

others = dict(level=dict(level='site'), size=dict(size=11), bs=dict(bs=5), channels=dict(), screen=dict(), model=dict())
@pytest.mark.parametrize('what', others)
def test_a_folder_of_something_else_is_refused_in_words(screen, models, tmp_path, what):
    quiet(embed, models['function'], screen, out=tmp_path/'o', size=16, bs=4)
    other,model = screen,models['function']
    if what=='screen': other = screen.subset(range(4))
    if what=='channels': other = Screen(screen.table, screen.channels[::-1], screen.root, ranges=screen.ranges[::-1])
    if what=='model': model = lambda x: x.float().amax((2,3))
    with pytest.raises(ValueError, match=f'{what}=.* there, .* here.*[Nn]ame another folder'):
        quiet(embed, model, other, out=tmp_path/'o', **{**dict(size=16, bs=4), **others[what]})

def test_one_function_is_told_from_another_of_its_name(screen, tmp_path):
    quiet(embed, lambda x: x.float().mean((2,3)), screen, out=tmp_path)
    with pytest.raises(ValueError, match='weights='): quiet(embed, lambda x: x.float().amax((2,3)), screen, out=tmp_path)

def test_a_folder_of_unknown_profiles_is_left_alone(screen, tmp_path):
    (tmp_path/'profiles.parquet').write_text('mine')
    with pytest.raises(FileExistsError, match='Name another'): quiet(embed, mean_of_tiles, screen, out=tmp_path)
    assert (tmp_path/'profiles.parquet').read_text()=='mine'

def test_a_folder_in_use_is_refused(screen, tmp_path):
    def again(x):
        with pytest.raises(BlockingIOError, match='in use by process'): quiet(embed, mean_of_tiles, screen, out=tmp_path)
        return mean_of_tiles(x)
    quiet(embed, again, screen.subset([0]), out=tmp_path)

@pytest.fixture
def damaged(screen, tmp_path):
    "Both sites of a well and one of another are gone, one is cut short"
    root = tmp_path/'damaged'
    shutil.copytree(screen.root, root)
    s = open_screen(root)
    for f in ('P0_C02_0.tif','P0_C02_1.tif','P1_B03_2.tif'): (root/f).unlink()
    f = root/'P2_B07_1.tif'
    f.write_bytes(f.read_bytes()[:900])
    return s

gone = ['P0_C02_0.tif','P0_C02_1.tif','P1_B03_2.tif','P2_B07_1.tif']
def test_the_first_unreadable_site_stops_the_run_with_its_name(damaged, tmp_path):
    with pytest.raises(ValueError, match='P0_C02_0.tif.*well C02'): quiet(embed, mean_of_tiles, damaged, size=16)
    other = damaged.subset(damaged.table['plate'].astype(str).to_numpy()!='P 0/x')
    with pytest.raises(ValueError, match='P1_B03_2.tif.*well B03'): quiet(embed, mean_of_tiles, other, size=16, out=tmp_path/'o')
    late = damaged.subset(~damaged.table['file'].isin(gone[:3]).to_numpy())
    with pytest.raises(ValueError, match='P2_B07_1.tif.*well B07'): quiet(embed, mean_of_tiles, late, size=16, out=tmp_path/'p')
    assert len(os.listdir(tmp_path/'p/parts'))==2, 'the plates before it stay'

@pytest.mark.parametrize('level', ['well','site','tile'])
def test_unreadable_sites_are_left_out_where_that_is_asked_for(screen, damaged, tmp_path, level, capsys):
    kw = dict(level=level, size=16, bs=4)
    good = screen.subset(~screen.table['file'].isin(gone).to_numpy())
    want = quiet(embed, mean_of_tiles, good, **kw)
    for n,e in enumerate([quiet(embed, mean_of_tiles, damaged, leave_out=True, **kw), read_profiles(quiet(embed, mean_of_tiles, damaged, leave_out=True, out=tmp_path/'o', **kw))]):
        assert (e.X==want.X).all() and (e.obs['well'].to_numpy()==want.obs['well'].to_numpy()).all()
        assert e.uns['cellmae']['sites_left_out']==4
        left = pd.read_csv(tmp_path/'o/left_out.csv', keep_default_na=False, dtype=str) if n else e.uns['left_out']
        assert [*left]==['batch','plate','well','site','file','problem']
        assert left['well'].tolist()==['C02','C02','B03','B07','C02'] and left['site'].tolist()==['0','1','2','1','']
        assert [Path(f).name for f in left['file'][:4]]==gone
        assert left['problem'].iloc[-1]=='nothing is left of this well'
    assert '4 sites could not be read' in capsys.readouterr().out

def test_what_is_mended_is_embedded_by_the_next_call_that_stops(screen, damaged, tmp_path):
    n = iter(range(25))
    def f(x):
        if next(n, None) is None: raise RuntimeError('stop')
        return x.float().mean((2,3))
    with pytest.raises(RuntimeError): quiet(embed, f, damaged, size=16, bs=4, out=tmp_path/'o', leave_out=True)
    assert os.listdir(tmp_path/'o/parts')
    for name in gone: shutil.copy(screen.root/name, damaged.root/name)
    n = iter(range(99))
    back = read_profiles(quiet(embed, f, damaged, size=16, bs=4, out=tmp_path/'o'))
    assert (back.X==quiet(embed, mean_of_tiles, screen, size=16, bs=4).X).all() and not (tmp_path/'o/left_out.csv').exists()

def test_nothing_that_can_be_read_is_an_error_with_the_first_reason(screen, tmp_path):
    lost = open_screen(screen.root)
    lost.table = lost.table.assign(file='gone.tif')
    for out in (None, tmp_path/'o'):
        with pytest.raises(ValueError, match='No site could be read.*gone.tif'): quiet(embed, mean_of_tiles, lost, leave_out=True, out=out)

def test_images_deleted_in_mid_run(screen, tmp_path):
    root = tmp_path/'s'
    shutil.copytree(screen.root, root)
    table = pd.read_parquet(root/'screen.parquet')
    fresh = lambda: Screen(table, channels=['DNA','ER'], root=root)
    seen = []
    def f(x):
        seen.append(1)
        if len(seen)==1:
            for o in root.glob('P2_*.tif'): os.rename(o, o.with_suffix('.away'))
        return x.float().mean((2,3))
    with pytest.raises(ValueError, match='P2_B02_0.tif.*missing'): quiet(embed, f, fresh(), out=tmp_path/'o', workers=0, size=16, bs=4)
    assert len(os.listdir(tmp_path/'o/parts'))==2
    for o in root.glob('P2_*.away'): os.rename(o, o.with_suffix('.tif'))
    path = quiet(embed, f, fresh(), out=tmp_path/'o', size=16, bs=4)
    assert (read_profiles(path).X==quiet(embed, mean_of_tiles, fresh(), size=16, bs=4).X).all()

@pytest.mark.parametrize('what', ['part','table'])
def test_a_full_disk_is_an_error_and_the_next_call_goes_on(screen, tmp_path, what):
    wide = torch.randn(2, 700)
    def f(x): return mean_of_tiles(x)@wide
    kw = dict(size=16, bs=4, level='tile')
    whole = quiet(embed, f, screen, out=tmp_path/'a', **kw).read_bytes()
    limit = len(whole)-1000 if what=='table' else len(whole)//30
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(OSError, match='No room for .*parquet.*make room'): quiet(embed, f, screen, out=tmp_path/'b', **kw)
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert len(list((tmp_path/'b/parts').iterdir()))==(3 if what=='table' else 0) and not (tmp_path/'b/profiles.parquet').exists()
    assert not list((tmp_path/'b').rglob('.*.part*'))
    assert quiet(embed, f, screen, out=tmp_path/'b', **kw).read_bytes()==whole

def content(folder): return {f.name: f.read_bytes() for f in folder.iterdir() if f.name!='.lock'}

def own_share(root, out, slow, rank):
    def f(x): time.sleep(slow); return x.float().mean((2,3))
    f.__name__ = 'mean'
    embed(f, open_screen(root), level='tile', size=16, bs=4, out=out)

@pytest.fixture(scope='module')
def alone(screen, tmp_path_factory):
    out = tmp_path_factory.mktemp('alone')
    own_share(screen.root, out, 0, 0)
    return (out/'profiles.parquet').read_bytes()

@pytest.mark.parametrize('n', [2,3,5])
def test_processes_share_the_plates_and_make_one_table(screen, alone, tmp_path, n):
    codes,said = ended(*in_processes(n, own_share, screen.root, tmp_path, 0))
    assert codes==[0]*n, said
    assert (tmp_path/'profiles.parquet').read_bytes()==alone
    assert sorted(os.listdir(tmp_path))==['.lock','embed.json','profiles.parquet']
    assert not any(said[1:]), 'only the first process speaks'

@pytest.mark.parametrize('dies,n', [(0,2), (1,2), (1,3), (2,3)])
def test_a_process_that_is_killed_ends_all_with_its_name(screen, alone, tmp_path, dies, n):
    ps,reads = in_processes(n, own_share, screen.root, tmp_path, .3)
    while not (tmp_path/'embed.json').exists(): time.sleep(.02)
    time.sleep(.5)
    start = time.monotonic()
    os.kill(ps[dies].pid, signal.SIGKILL)
    codes,said = ended(ps, reads, 20)
    assert time.monotonic()-start<8
    assert codes[dies]==-signal.SIGKILL and all(c==1 for k,c in enumerate(codes) if k!=dies)
    assert all(f'Process {dies} of {n} ended' in o for k,o in enumerate(said) if k!=dies), said
    codes,said = ended(*in_processes(5-n, own_share, screen.root, tmp_path, 0))
    assert codes==[0]*(5-n) and (tmp_path/'profiles.parquet').read_bytes()==alone

def share_of_a_model_that_adapts(net, root, out, rank): quiet(embed, net, open_screen(root), level='tile', size=32, bs=3, out=out)

@pytest.mark.parametrize('n', [2,3])
def test_a_model_that_adapts_to_its_batch_gives_the_same_bits_in_processes(screen, models, tmp_path, n):
    "Its statistics are those of a plate's batches, whichever process has the plate"
    want = to_parquet(quiet(embed, models['adapts'], screen, level='tile', size=32, bs=3), tmp_path/'want.parquet').read_bytes()
    codes,said = ended(*in_processes(n, share_of_a_model_that_adapts, models['adapts'], screen.root, tmp_path/'o'))
    assert codes==[0]*n, said
    assert (tmp_path/'o/profiles.parquet').read_bytes()==want

def counted_share(root, out, last, rank):
    "A process that fails after its batch `last`"
    def f(x):
        f.n += 1
        if f.n>f.last: raise ValueError('no such luck')
        return x.float().mean((2,3))
    f.n,f.last = 0,last
    embed(f, open_screen(root), level='tile', size=16, bs=4, out=out)

@pytest.mark.parametrize('before,after', [(2,1), (1,3), (2,5)])
def test_a_run_goes_on_in_another_number_of_processes(screen, tmp_path, before, after):
    codes,_ = ended(*in_processes(before, counted_share, screen.root, tmp_path/'o', 12))
    there = [*(tmp_path/'o').glob('parts/*.parquet')]
    assert any(codes) and 1<=len(there)<3, 'a plate of 11 batches was done, not all'
    codes,said = ended(*in_processes(after, counted_share, screen.root, tmp_path/'o', 99))
    assert codes==[0]*after and f'{len(there)} of 3 plates are there' in said[0], said
    codes,said = ended(*in_processes(1, counted_share, screen.root, tmp_path/'want', 99))
    assert content(tmp_path/'o')==content(tmp_path/'want')

def raising(root, out, who, rank):
    def f(x):
        if rank==who: raise ValueError('no such luck')
        time.sleep(.2)
        return x.float().mean((2,3))
    embed(f, open_screen(root), size=16, bs=4, out=out)

@pytest.mark.parametrize('who', [0,2])
def test_an_error_in_one_process_is_told_to_all(screen, tmp_path, who):
    codes,said = ended(*in_processes(3, raising, screen.root, tmp_path, who), 20)
    assert codes==[1]*3 and all('no such luck' in o for o in said)
    assert all(f'Process {who} of 3 ended: ValueError: no such luck' in o for k,o in enumerate(said) if k!=who), said

def test_a_folder_that_is_refused_is_refused_by_all(screen, alone, tmp_path):
    embed(mean_of_tiles, screen, level='site', out=tmp_path, progress=False)
    codes,said = ended(*in_processes(2, own_share, screen.root, tmp_path, 0), 20)
    assert codes==[1,1] and all("level='site' there, 'tile' here" in o for o in said), said

program = '''
import sys
from cellmae.embed import embed
def mean(x): return x.float().mean((2,3))
embed(mean, sys.argv[1], level='tile', size=16, bs=4, out=sys.argv[2])
'''
def test_torchrun(screen, tmp_path):
    (tmp_path/'e.py').write_text(program)
    embed_alone = [sys.executable, '-W', 'ignore', tmp_path/'e.py', screen.root, tmp_path/'a']
    by_two = [sys.executable, '-W', 'ignore', '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2', *embed_alone[3:-1], tmp_path/'b']
    for cmd in (embed_alone, by_two):
        p = subprocess.run(cmd, capture_output=True, text=True, timeout=300)
        assert p.returncode==0, p.stderr[-3000:]
    assert (tmp_path/'a/profiles.parquet').read_bytes()==(tmp_path/'b/profiles.parquet').read_bytes()


def test_files_have_the_same_bits_in_whatever_pieces_rows_come(tmp_path):
    import pyarrow as pa
    from cellmae.profiles import write_rows
    n, rng = 300_000, np.random.default_rng(0)
    t = pa.table({'Metadata_well': [f'a long name of well {i//7}' for i in range(n)], **{f'emb_{k}': rng.normal(size=n).astype(np.float32) for k in range(3)}})
    cuts = np.sort(rng.choice(n, 40, replace=False))
    write_rows([t], {}, tmp_path/'whole.parquet')
    write_rows((t[a:b] for a, b in zip([0, *cuts], [*cuts, n])), {}, tmp_path/'cut.parquet')
    assert (tmp_path/'whole.parquet').read_bytes() == (tmp_path/'cut.parquet').read_bytes()
