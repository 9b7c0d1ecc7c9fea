"From plates to a store to profiles by commands: what they write, say and refuse"
import importlib.metadata
import os
import socket
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import tifffile
import zarr

import cellmae
from cellmae.cli import cellmae_check, cellmae_embed, cellmae_fit, cellmae_pack
from cellmae.demo import demo
from cellmae.embed import embed
from cellmae.profiles import read_profiles
from cellmae.screen import Screen, open_screen
from cellmae.zoo import create_model, save_model
from commands import call

WELLS = [('P1','B03'), ('P1','C02'), ('P2','B03'), ('P2','H12')]


def pixels(plate, well, site, channel):
    "Pixels that are of this plane alone"
    seed = [*f'{plate}{well}{site}{channel}'.encode()]
    return np.random.default_rng(seed).integers(100, 4000, (40,48)).astype('u2')


@pytest.fixture
def plates(tmp_path):
    "Two plates as a microscope leaves them, neither square nor symmetric"
    for plate,well in WELLS:
        for site in (1,2):
            for c in ('w1','w2'):
                f = tmp_path/'plates'/plate/f'{well}_s{site}_{c}.tif'
                f.parent.mkdir(parents=True, exist_ok=True)
                tifffile.imwrite(f, pixels(plate, well, site, c), compression='zlib')
    return tmp_path/'plates'


@pytest.mark.parametrize('archive', [[], ['--archive']], ids=['plain','archive'])
@pytest.mark.parametrize('workers', [[], ['--workers','0'], ['--workers','3']], ids=' '.join)
def test_pack_command(plates, tmp_path, capsys, archive, workers):
    "A store holds what its plates hold, in any number of threads, and says what comes next"
    store = tmp_path/'store'
    assert call(cellmae_pack, plates, '--out', store, *archive, *workers) == 0
    said = capsys.readouterr().out
    assert '8 sites: ' in said and ' GB in ' in said
    assert said.strip().endswith(f'Next: cellmae_fit {store}')
    screen,packed = Screen.open(plates),open_screen(store)
    for i in range(8): np.testing.assert_array_equal(packed[i], screen[i])
    a = zarr.open_array(store/'images.zarr/P2', mode='r')
    assert a.shape == (4,2,40,48)
    there = (screen.table.plate=='P2')&(screen.table.well=='H12')
    np.testing.assert_array_equal(a[2], screen[int(np.flatnonzero(there)[0])])


def test_pack_leaves_out_and_lists(plates, tmp_path, capsys):
    bad = plates/'P1/C02_s2_w1.tif'
    bad.write_bytes(bad.read_bytes()[:60])
    assert call(cellmae_pack, plates, '--out', tmp_path/'store') == 0
    assert 'Left out: 1 site' in (said := capsys.readouterr().out) and 'C02' in said
    t = pd.read_csv(tmp_path/'store/left_out.csv')
    assert t[['plate','well','site']].astype(str).values.tolist() == [['P1','C02','2']]
    assert call(cellmae_pack, plates, '--out', tmp_path/'other', '--stop') == 1
    err = capsys.readouterr().err
    assert 'C02_s2_w1.tif' in err and err.count('\n') == 1


def test_pack_goes_on_and_grows(plates, tmp_path, capsys):
    store = tmp_path/'store'
    assert call(cellmae_pack, plates/'P1', '--out', store) == 0
    before = (store/'images.zarr/P1/c.0.0.0.0').stat().st_mtime_ns
    assert call(cellmae_pack, plates/'P1', '--out', store) == 0
    assert call(cellmae_pack, plates/'P2', '--out', store) == 1
    assert '`--append`' in capsys.readouterr().err
    assert call(cellmae_pack, plates/'P2', '--out', store, '--append') == 0
    assert (store/'images.zarr/P1/c.0.0.0.0').stat().st_mtime_ns == before
    assert open_screen(store).table.plate.tolist() == ['P1']*4+['P2']*4
    assert call(cellmae_pack, plates/'P2', '--out', store, '--append') == 1
    assert 'Plate P2' in capsys.readouterr().err


def flip(f): raw = bytearray(f.read_bytes()); raw[50] ^= 1; f.write_bytes(raw)
def cut(f): f.write_bytes(f.read_bytes()[:-9])
def remove(f): f.unlink()

@pytest.mark.parametrize('harm', [flip, cut, remove])
def test_damage_is_found_and_mended(plates, tmp_path, capsys, harm):
    store = tmp_path/'store'
    call(cellmae_pack, plates, '--out', store)
    f = store/'images.zarr/P2/c.0.0.0.0'
    raw = f.read_bytes()
    assert call(cellmae_pack, store, '--verify') == 0
    harm(f)
    capsys.readouterr()
    assert call(cellmae_pack, store, '--verify') == 1
    out,err = capsys.readouterr()
    assert 'plate P2' in out and f'`cellmae_pack {store} --repack`' in out and '1 problem.' in err
    assert call(cellmae_pack, store, '--repack') == 0 and f.read_bytes() == raw
    assert call(cellmae_pack, store, '--verify') == 0


def test_sources_that_changed_are_found_if_asked(plates, tmp_path, capsys):
    call(cellmae_pack, plates, '--out', tmp_path/'store')
    tifffile.imwrite(plates/'P1/B03_s1_w2.tif', pixels('another','B03',1,'w2'))
    assert call(cellmae_pack, tmp_path/'store', '--verify') == 0
    assert call(cellmae_pack, tmp_path/'store', '--verify', '--sources') == 1
    assert 'source changed' in capsys.readouterr().out
    assert call(cellmae_pack, tmp_path/'store', '--repack', '--sources') == 0
    assert call(cellmae_pack, tmp_path/'store', '--verify', '--sources') == 0


odd = {'two ways': (['--verify','--repack'], '--verify or --repack'),
       'three ways': (['--append','--repack'], '--append or --repack'),
       'out': (['--verify','--out','x'], '--out does not go with --verify'),
       'stop': (['--repack','--stop'], '--stop does not go with --repack'),
       'a way to open': (['--verify','--pattern','x'], '--pattern does not go'),
       'root': (['--verify','--root','x'], '--root does not go'),
       'archive': (['--append','--archive'], '--archive does not go with --append'),
       'sources': (['--sources'], '--sources'), 'no store': (['--verify'], 'no store')}

@pytest.mark.parametrize('args,said', odd.values(), ids=odd)
def test_options_that_do_not_go_together(plates, tmp_path, monkeypatch, capsys, args, said):
    monkeypatch.chdir(tmp_path)
    Screen.open(plates).save('saved')
    assert call(cellmae_pack, 'saved', *args) == 1
    err = capsys.readouterr().err
    assert said in err and err.count('\n') == 1 and not (tmp_path/'cellmae_store').exists()


def test_store_goes_where_plates_go(plates, tmp_path):
    store = tmp_path/'store'
    call(cellmae_pack, plates, '--out', store)
    assert call(cellmae_check, store, '--out', tmp_path/'check') == 0
    fit = ['--model','mae_vitt8','--epochs',1,'--crop',32,'--bs',4]
    for name,where in dict(a=plates, b=store).items():
        assert call(cellmae_fit, where, '--out', tmp_path/name, *fit, '--workers', 2) == 0
    a,b = ((tmp_path/o/'model/model.safetensors').read_bytes() for o in 'ab')
    assert a == b


def test_demo_decodes_images_once(plates, tmp_path, monkeypatch):
    "Own plates are packed below the folder of the run, and a store is used as it is"
    demo(tmp_path/'run', Screen.open(plates), epochs=1, crop=32, bs=4)
    store = open_screen(tmp_path/'run/store')
    assert store.packed and len(store) == 8
    monkeypatch.setattr('cellmae.demo.pack', None)
    demo(tmp_path/'again', store, epochs=1, crop=32, bs=4)
    assert not (tmp_path/'again/store').exists()


LEAVING = """
import sys, time
from pathlib import Path
from cellmae.files import ahead
def work(i): time.sleep(.3*i); Path(sys.argv[1], str(i)).touch()
for i,_ in ahead(work, range(1, 9), 2): raise SystemExit(1)
"""

def test_work_that_was_begun_ends_before_the_process_does(tmp_path):
    "Python aborts where a thread is torn from compiled code, and the exit code is another"
    done = subprocess.run([sys.executable, '-c', LEAVING, tmp_path], capture_output=True)
    names = sorted(f.name for f in tmp_path.iterdir())
    assert done.returncode == 1 and names[:2] == ['1','2'] and len(names) < 5


def column_means(x): return x.float().mean((2,3))

@pytest.fixture
def model(tmp_path):
    "The smallest model that is a folder"
    net = create_model('mae_vitt8', in_chans=2, img_size=32, depth=1)
    net.channels = ['1','2']
    return save_model(net, tmp_path/'model')


kinds = ['out.parquet', 'out.csv', 'out.h5ad', 'v1.2.tsv', 'folder']

@pytest.mark.parametrize('out', kinds)
def test_embed_command_writes_what_embed_gives(plates, tmp_path, capsys, model, out):
    out = tmp_path/out
    assert call(cellmae_embed, model, plates, '--out', out, '--level', 'site') == 0
    assert '8 rows of 192 numbers' in capsys.readouterr().out
    got = read_profiles(out/'profiles.parquet' if out.name=='folder' else out)
    want = embed(model, Screen.open(plates), level='site', progress=False)
    np.testing.assert_allclose(got.X, want.X, rtol=1e-6)
    assert got.obs.well.tolist() == want.obs.well.tolist()
    assert not [*tmp_path.glob('*.parts')]


def test_embed_command_goes_on(plates, tmp_path, capsys, model):
    "A stop after the first plate: parts lie beside the file, and the rest is all that is done"
    store,whole,out = (tmp_path/o for o in ('store','whole.parquet','out.parquet'))
    call(cellmae_pack, plates, '--out', store)
    call(cellmae_embed, model, store, '--out', whole)
    shard = store/'images.zarr/P2/c.0.0.0.0'
    raw = shard.read_bytes()
    flip(shard)
    capsys.readouterr()
    assert call(cellmae_embed, model, store, '--out', out) == 1
    assert 'plate P2, well B03' in capsys.readouterr().err and not out.exists()
    assert [f.name for f in (tmp_path/'out.parts/parts').glob('*.parquet')] == ['00000_P1.parquet']
    (store/'again').write_bytes(raw)
    (store/'again').replace(shard) # not in its place, where a thread that is ending may still read
    assert call(cellmae_embed, model, store, '--out', out) == 0
    assert '1 of 2 plates are there' in capsys.readouterr().out
    assert out.read_bytes() == whole.read_bytes() and not (tmp_path/'out.parts').exists()


def test_embed_command_leaves_out_if_asked(plates, tmp_path, capsys, model):
    (plates/'P2/B03_s1_w1.tif').write_bytes(b'II*')
    out = tmp_path/'out.parquet'
    assert call(cellmae_embed, model, plates, '--out', out, '--leave_out') == 0
    said = capsys.readouterr().out
    left = pd.read_csv(tmp_path/'out.parts/left_out.csv')
    assert left.well.tolist() == ['B03'] and str(tmp_path/'out.parts/left_out.csv') in said
    t = pd.read_parquet(out)
    assert t[t.Metadata_plate=='P2'].Metadata_n_sites.tolist() == [1,2]
    assert call(cellmae_embed, model, plates, '--out', tmp_path/'no.xlsx') == 1


def test_processes_share_the_plates(plates, tmp_path, model):
    "Two processes write the table of one"
    one,two = tmp_path/'one.parquet',tmp_path/'two.parquet'
    call(cellmae_embed, model, plates, '--out', one)
    script = tmp_path/'cellmae_embed.py'
    script.write_text('from cellmae.cli import cellmae_embed\ncellmae_embed()')
    run = [sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node', '2',
           '--master_port', str(free_port()), script, model, plates, '--out', two]
    done = subprocess.run(run, capture_output=True, text=True, env={**os.environ, 'OMP_NUM_THREADS':'1'})
    assert done.returncode == 0, done.stderr[-2000:]
    assert two.read_bytes() == one.read_bytes()
    assert done.stdout.count('4 rows of 192 numbers') == 1 and not (tmp_path/'two.parts').exists()


def free_port():
    with socket.socket() as s: s.bind(('', 0)); return s.getsockname()[1]


def test_versions_need_no_installed_package(plates, monkeypatch):
    "A clone on the path is no distribution that could be asked for its version"
    found = importlib.metadata.Distribution.from_name
    def hidden(name):
        if name=='cellmae': raise importlib.metadata.PackageNotFoundError(name)
        return found(name)
    monkeypatch.setattr(importlib.metadata.Distribution, 'from_name', hidden)
    with pytest.raises(importlib.metadata.PackageNotFoundError): importlib.metadata.version('cellmae')
    e = embed(column_means, Screen.open(plates), progress=False)
    assert e.uns['cellmae']['versions']['cellmae'] == cellmae.__version__
