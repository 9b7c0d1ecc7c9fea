"The benchmark of readers runs on small images, and its tables say what was measured"
import json, subprocess, sys
from pathlib import Path

import numpy as np, pytest

root = Path(__file__).resolve().parents[1]/'benchmarks'
sys.path.append(str(root))
import data_images, data_readers, data_report

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "Five images of two channels and 300 x 280 pixels"
    d = tmp_path_factory.mktemp('images')
    np.save(d/'images.npy', np.random.default_rng(0).integers(0, 256, (5,2,300,280)).astype(np.uint8))
    return d

@pytest.mark.parametrize('name', ['npy','zarr','hdf5','batches:npy'])
def test_reader_gives_what_was_written(folder, name):
    w = data_readers.Worker(folder, data_readers.READERS)
    if name=='batches:npy': w.write('npy')
    w.write(name)
    assert w.check(name)['MB']>=w.images.nbytes/1e6
    assert w.crops(name, 1)['crops']==5

def test_wrong_pixels_are_noticed(folder):
    w = data_readers.Worker(folder, data_readers.READERS)
    w.write('npy')
    w.images = w.images.copy()
    w.images[3,1,150,140] ^= 1
    for name in ('npy','batches:npy'):
        with pytest.raises(ValueError, match='1 images differ, the first is 3'): w.check(name)

def test_worker_answers_line_by_line(folder):
    lines = 'write npy\ncheck npy\ncrops npy 1\ncheck nobody\n'
    out = subprocess.run([sys.executable, root/'data_readers.py', folder], input=lines, text=True, capture_output=True)
    wrote,checked,crops,error = map(json.loads, out.stdout.splitlines())
    assert checked['version']==np.__version__ and crops['crops']==5 and 'KeyError' in error['error']

def test_formats_hold_the_same_pixels(tmp_path, monkeypatch):
    from cellmae.screen import open_screen
    monkeypatch.setattr(data_images, 'KINDS', dict(crops=(2,64,np.uint8), sites=(3,48,np.uint16)))
    for kind in ('crops','sites'):
        d = data_images.made(tmp_path, kind, 12)
        truth,screens = np.load(d/'images.npy'),[open_screen(d/k) for k in data_images.USED[kind]]
        for s in screens:
            assert len(s)==12 and set(s.table.plate)=={'P1','P2'}
            assert all((s.read(i)==x).all() for i,x in enumerate(truth))
        assert all((s.ranges==screens[0].ranges).all() for s in screens)

def test_goals_are_told_from_rounds():
    "A ratio is that within rounds; readers that were not there are no goal"
    rows = [dict(reader='CropLoader:store', rate=6000., rates=[6000.,3000.]),
            dict(reader='before:tiff', rate=1000., rates=[2000.,500.])]
    told = {o['goal']: (o['measured'],o['met']) for o in data_report.goals(dict(crops=rows))}
    assert told=={'crops/s and core in batches': (6000.,'yes'),
                  'batches, over the loader before on raw TIFF': (4.5,'yes')}

def test_multiplied_rows():
    "100 sites of 16 tiles: reading 2 a second and core, an encoder of 80 tiles a second"
    row = data_report.embedding(36000, 16, 2., 80, 'store')
    assert row['1 core']=='5.0 h' and row['8 cores']=='2.0 h'
    assert data_report.by_cores('pack', 36000, 10., 'sites')['8 cores']=='7.5 min'
