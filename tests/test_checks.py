"What `check()` finds, that it finds little else, and that it can be stopped and taken up again"
import os, signal, subprocess, sys, time, warnings

import numpy as np
import pandas as pd
import pytest
from scipy.ndimage import gaussian_filter
from tifffile import imread, imwrite

from cellmae.checks import Seen, field_counts, measure_plane, sharpness, spread, thinned
from cellmae.files import ahead
from cellmae.screen import Screen

wells = [f'{r}{c:02d}' for r in 'BCD' for c in range(2, 6)] # 3 x 4 of a plate of 8 x 12
stains = dict(DNA=5, ER=9, actin=13) # radius of what they stain


def cells(seed, radius, gain=1., blur=0., h=80, w=96, offset=200, full=65535):
    "Discs on a background, as a camera counts them, `(h,w)` uint16"
    g,(y,x),img = np.random.default_rng(seed),np.mgrid[:h,:w],np.zeros((h,w))
    for cy,cx in g.uniform((0,0), (h,w), (12,2)):
        img += 1200*g.uniform(.6,1.4)/(1+np.exp((np.hypot(y-cy, x-cx)-radius)/.5))
    return g.poisson(offset+gain*gaussian_filter(img, blur)).clip(0, full).astype(np.uint16)

def name(p, w, s, c): return f'{p}/{w}_s{s}_{c}.tif'

def plates(root, n=1, fields=2, channels=('DNA', 'ER'), spoil=None):
    "Plates of twelve wells; `spoil(p, w, s, c)` gives options of `cells`"
    for i,p in enumerate('abcde'[:n]):
        (root/p).mkdir(parents=True)
        for w in wells:
            for s in range(1, fields+1):
                for k,c in enumerate(channels):
                    odd = spoil(p, w, s, c) if spoil else {}
                    img = cells([i, wells.index(w), s, k], odd.pop('radius', stains[c]), **odd)
                    imwrite(root/name(p, w, s, c), img)
    return opened(root)

def opened(root):
    meta = pd.DataFrame(dict(well=wells, perturbation=['DMSO']*3+wells[3:]))
    return Screen.from_pattern(root, '{plate}/{well}_s{site}_{channel}.tif', meta=meta)

def found(screen, **kw): return screen.check(**kw)[['problem', 'plate', 'well', 'site', 'channel']].values.tolist()

# --- numbers of a plane

def test_measures_of_a_plane():
    p = np.full((64, 80), 100, np.uint16)
    p[:8] = 4095; p[8:40] = 200
    m = measure_plane(p)
    assert (m['lo'], m['hi'], m['median'], m['signal']) == (100, 4095, 200, 3995)
    assert m['top'] == 1/8 and m['mean'] == p.mean() and m['hole'] == pytest.approx(24/64)
    q = p.copy(); q[0,0] -= 1
    assert measure_plane(q)['crc'] != m['crc'] and measure_plane(p[::-1])['crc'] != m['crc']

@pytest.mark.parametrize('shape', [(1, 1), (3, 500), (500, 5), (7, 9), (2048, 300), (1081, 1083)])
@pytest.mark.parametrize('kind', ['u1', 'u2', 'i4', 'f4'])
def test_planes_of_any_shape(shape, kind):
    p = np.random.default_rng(0).integers(0, 200, shape).astype(kind)
    m = measure_plane(p)
    assert m['lo'] == p.min() and np.isfinite([v for k,v in m.items() if k != 'focus']).all()
    assert min(thinned(p).shape) >= min(256, *shape)
    assert np.isnan(m['focus']) == (min(shape) < 6) and sharpness(np.ones(shape)) != sharpness(p)

@pytest.mark.parametrize('more,factor', [(dict(), 2), (dict(gain=4), 3), (dict(gain=.3), 1.1), (dict(offset=800), 1.1)])
def test_sharpness_falls_with_blur_as_far_as_noise_lets_it(more, factor):
    sharp,soft = (np.array([sharpness(cells(i, 8, blur=b, h=200, w=240, **more)) for i in range(8)]) for b in (0, 3))
    assert (soft < sharp.min()/factor).all() and sharp.max() < 3*sharp.min()

# --- fields beside their plate: what is found, where, and nothing else

def half(p): q = p.copy(); q[p.shape[0]//2:] = 0; return q

odd = {
    'blank': dict(gain=.02), 'dim': dict(gain=.12), 'out of focus': dict(blur=4), 'saturated': dict(gain=6, full=4095)}

def test_a_plate_of_many_kinds_of_cells_is_quiet(tmp_path):
    g = np.random.default_rng(0)
    s = plates(tmp_path, 2, 3, spoil=lambda *o: dict(gain=g.uniform(.6, 1.6), radius=g.uniform(6, 12), offset=g.integers(150, 300)))
    assert found(s) == []

@pytest.mark.parametrize('kind', odd)
def test_one_field_beside_its_plate(tmp_path, kind):
    at = 'a', 'C03', 2, 'ER'
    s = plates(tmp_path, spoil=lambda *o: dict(odd[kind]) if o == at else dict(gain=.8, full=4095))
    assert found(s) == [[kind, 'a', 'C03', '2', 'ER']]

@pytest.mark.parametrize('kind', ['blank', 'dim', 'out of focus'])
def test_a_plate_that_differs_as_a_whole_is_compared_with_itself(tmp_path, kind):
    s = plates(tmp_path, 2, spoil=lambda p,*o: dict(odd[kind]) if p == 'b' else {})
    assert found(s) == []

def test_few_fields_are_compared_with_nothing(tmp_path):
    s = plates(tmp_path, spoil=lambda p,w,s,c: dict(gain=.02) if w == 'B02' else {})
    assert 'blank' in s.check().problem.tolist()
    assert 'blank' not in s.subset(range(5)).check().problem.tolist()

@pytest.mark.parametrize('full', [255, 1023, 4095, 65535])
def test_the_end_of_the_scale_is_that_of_the_camera(tmp_path, full):
    def odd(p, w, s, c): return dict(gain=full/200 if w == 'B02' and c == 'ER' else full/20000, offset=full/50, full=full)
    assert found(plates(tmp_path, spoil=odd))[-2:] == [['saturated', 'a', 'B02', s, 'ER'] for s in '12']

def test_an_odd_end_of_the_scale_is_one_if_many_fields_pile_up_there(tmp_path):
    s = plates(tmp_path, spoil=lambda p,w,s,c: dict(gain=5, full=3700) if w[0] == 'B' else {})
    row, = s.check().query('channel=="DNA"').to_dict('records')
    assert (row['problem'], row['plate'], row['well']) == ('saturated', 'a', '') and 'In 8 of 24 fields' in row['cure'] and '3700' in row['cure']
    one = plates(tmp_path/'one', spoil=lambda *o: dict(gain=5, full=3700) if o == ('a', 'B02', 1, 'ER') else {})
    assert found(one) == []

def test_half_a_plane_is_missing(tmp_path):
    s,f = plates(tmp_path),name('a', 'D04', 1, 'DNA')
    imwrite(tmp_path/f, half(cells(99, 5)))
    row, = s.check().to_dict('records')
    assert (row['problem'], row['file']) == ('part missing', f) and row['cure'].startswith('50% of its pixels are 0')

def test_black_around_every_cell_is_no_missing_part(tmp_path):
    s = plates(tmp_path)
    for f in tmp_path.glob('a/*_DNA.tif'):
        x = cells(len(f.name)+int(f.stat().st_ino)%1000, 5)
        imwrite(f, np.where(x > 500, x, 0).astype(np.uint16))
    assert 'part missing' not in s.check().problem.tolist()

# --- channels

def test_channels_that_show_the_same_thing(tmp_path):
    s = plates(tmp_path, channels=('DNA', 'ER', 'actin'))
    assert found(s) == []
    g = np.random.default_rng(0)
    for w in wells:
        for i in (1, 2):
            x = s.read(s.table.index[(s.table.well == w)&(s.table.site == str(i))][0])[s.channels.index('DNA')]
            imwrite(tmp_path/name('a', w, i, 'actin'), (2*x+g.poisson(20, x.shape)).astype(np.uint16))
    row, = s.check().to_dict('records')
    assert row['problem'] == 'same thing twice' and sorted(row['channel'].split(', ')) == ['DNA', 'actin']
    assert 'sites: 24' in row['cure'] and row['plate'] == ''

def test_channels_that_changed_places_on_a_plate(tmp_path):
    three = 'DNA', 'ER', 'actin'
    s = plates(tmp_path, 4, 1, three)
    assert found(s) == []
    for w in wells:
        a,b = (tmp_path/name('c', w, 1, c) for c in three[:2])
        x = a.read_bytes(); a.write_bytes(b.read_bytes()); b.write_bytes(x)
    row, = s.check().to_dict('records')
    assert (row['problem'], row['plate'], row['well']) == ('channels swapped?', 'c', '')
    assert 'its DNA like ER' in row['cure'] and 'its ER like DNA' in row['cure']

@pytest.mark.parametrize('gain', [.4, 3])
def test_a_plate_with_one_bright_channel_has_them_in_their_places(tmp_path, gain):
    s = plates(tmp_path, 4, 1, ('DNA', 'ER', 'actin'), lambda p,w,s,c: dict(gain=gain) if (p, c) == ('c', 'ER') else {})
    assert found(s) == []

# --- the table alone

def test_missing_fields_are_counted_per_plate(tmp_path):
    s = plates(tmp_path, 2, 3)
    gone = (s.table.plate == 'b')&s.table.well.isin(['B02', 'D05'])&(s.table.site != '1')
    s = s.subset((~gone).to_numpy())
    assert found(s) == [['missing fields', 'b', '', '', '']]
    assert '2 of 12 wells have fewer than 3: B02 (1), D05 (1)' in s.check().cure[0]
    w = field_counts(s.table).set_index(['plate', 'well'])
    assert w.loc[('b', 'B02')].tolist()[-2:] == [1, 3] and (w.loc['a'].has == 3).all()

def test_a_plate_without_a_channel(tmp_path):
    t = plates(tmp_path, 2, 1).table.copy()
    t.loc[t.plate == 'a', 'file_ER'] = ''
    rows = found(Screen(t, root=tmp_path))
    assert rows[0] == ['missing channel', 'a', '', '', 'ER']
    assert rows[1:] == [['missing', 'a', w, '1', 'ER'] for w in wells] # each site, for those who leave sites out

# --- in what order, and again

def test_a_sample_is_spread_over_plates_and_wells():
    t = pd.DataFrame([dict(batch=p, plate=p, well=w, site=s) for p in 'abc' for w in wells for s in '1234'])
    order = spread(t)
    assert sorted(order) == list(range(len(t)))
    assert t.iloc[order[:3]].plate.nunique() == 3 and len(t.iloc[order[:36]][['plate', 'well']].drop_duplicates()) == 36

def test_a_sample_of_sites(tmp_path, capsys):
    s = plates(tmp_path)
    for w in wells: (tmp_path/name('a', w, 1, 'ER')).unlink()
    assert 0 < len(s.check(n=8)) < 8 and len(s.check()) == 12
    assert capsys.readouterr().out == ''

def test_a_large_screen_is_told_by_a_sample_first(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr('cellmae.checks.SAMPLE', 8)
    s = plates(tmp_path)
    (tmp_path/name('a', 'B02', 1, 'ER')).unlink()
    s.check()
    said, = capsys.readouterr().out.splitlines()
    assert said.startswith('8 of 24 sites: ') and 'GB of pixels' in said
    s.check(n=5)
    assert capsys.readouterr().out.startswith('5 of 24 sites')

def reads(screen, monkeypatch):
    "Files that are read from now on"
    log,read = [],type(screen).read_files
    monkeypatch.setattr(type(screen), 'read_files', lambda self, fs: (log.extend(fs), read(self, fs))[1])
    return log

def test_a_second_call_reads_what_is_new_or_changed_or_was_no_image(tmp_path, monkeypatch):
    s,out = plates(tmp_path/'x'),tmp_path/'out'
    (tmp_path/'x'/name('a', 'B02', 1, 'ER')).unlink()
    first = s.check(n=12, out=out)
    log = reads(s, monkeypatch)
    s.check(n=12, out=out)
    known = len(first[first.problem == 'missing'])
    assert len(log) == 2*known
    log.clear(); s.check(out=out)
    assert len(log) == 2*12+2*known
    imwrite(tmp_path/'x'/name('a', 'D05', 2, 'DNA'), cells(7, 5, gain=.02))
    os.utime(tmp_path/'x'/name('a', 'D04', 2, 'DNA'), (1, 1)) # an older copy
    log.clear(); third = opened(tmp_path/'x').check(out=out)
    assert len(log) == 2*2+1 and third[['problem', 'well']].values.tolist() == [['missing', 'B02'], ['blank', 'D05']]
    assert opened(tmp_path/'x').check().equals(third)

def test_what_is_kept_is_a_table_of_planes(tmp_path):
    s = plates(tmp_path/'x')
    s.check(out=tmp_path)
    t = pd.read_parquet(tmp_path/'check.parquet')
    assert len(t) == 48 and {'plate', 'well', 'site', 'channel', 'file', 'median', 'focus', 'problem'} <= set(t)
    i = t.index[t.file == name('a', 'C04', 1, 'ER')][0]
    assert t['hi'][i] == cells([0, wells.index('C04'), 1, 1], 9).max()
    assert [f.name for f in tmp_path.iterdir() if f.name != 'x'] == ['check.parquet']

def test_other_planes_of_the_same_files_are_read_again(tmp_path, monkeypatch):
    for w in wells: imwrite(tmp_path/f'{w}_DNA.tif', np.stack([cells([wells.index(w), z], 5) for z in range(3)]),
                             photometric='minisblack', metadata=dict(axes='ZYX'))
    for z in (0, 1):
        s = Screen.from_pattern(tmp_path, '{well}_{channel}.tif', z=z)
        log = reads(s, monkeypatch)
        s.check(out=tmp_path/'out')
        assert len(log) == 12
        monkeypatch.undo()

def test_a_record_of_a_plane_is_small():
    s = Screen(pd.DataFrame(dict(well=['A01'], **{f'file_c{i}': 'x' for i in range(6)})))
    assert Seen(s).planes.dtype.itemsize == 76

# --- the page

def page(screen, to, **kw):
    "Text of a page that needs nothing else"
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        text = screen.report(to/'page.html', **kw).read_text(encoding='utf-8')
    assert '://' not in text and '<script' not in text and len(text) < 5e6
    return text

def test_a_page_of_many_plates_draws_some_and_says_so(tmp_path):
    s = plates(tmp_path, 5, 1, ('DNA',))
    parts = [s.table.assign(plate=s.table.plate.astype(str)+f'{i:02d}', batch=f'week {i}') for i in range(8)]
    many = Screen(pd.concat(parts, ignore_index=True), root=tmp_path)
    text = page(many, tmp_path, n=100)
    assert '100 of 480 sites were read' in text and '12 of 40 plates are drawn' in text
    assert 'duplicate' in text and text.count('class=pictures') == 12

def test_a_page_shows_controls_beside_others_and_each_channel(tmp_path):
    text = page(plates(tmp_path, 2), tmp_path)
    assert text.count('DMSO (control)') == 4 and text.count('field ') == 10
    assert text.count('data:image/jpeg') == 20 and 'Plates side by side' in text

odd_screens = dict(
    one_site=lambda s: s.subset([0]),
    no_places=lambda s: Screen(s.table.assign(well=[f'POS{i}' for i in range(24)]), root=s.root),
    some_places=lambda s: Screen(s.table.assign(well=['POS1']*2+s.table.well.tolist()[2:]), root=s.root),
    one_channel=lambda s: Screen(s.table.drop(columns='file_ER'), root=s.root),
    all_missing=lambda s: Screen(s.table.assign(file_DNA='x.tif', file_ER='y.tif'), root=s.root),
    one_channel_missing=lambda s: Screen(s.table.assign(file_ER=''), root=s.root))

@pytest.mark.parametrize('kind', odd_screens)
def test_a_page_of_odd_screens(tmp_path, kind):
    text = page(odd_screens[kind](plates(tmp_path)), tmp_path)
    assert 'What is wrong' in text and ('No maps' in text) == (kind == 'no_places')
    assert ('1 of 12 wells have no place' in text) == (kind == 'some_places')

@pytest.mark.parametrize('to', [lambda x: np.float32(x/65535), lambda x: np.where(x > 900, np.nan, np.float32(x)), np.zeros_like,
                                lambda x: x[:1], lambda x: x[:,:2], lambda x: (x>>8).astype(np.uint8)])
@pytest.mark.parametrize('which', ['a/*_ER.tif', 'a/*.tif'])
def test_a_page_of_bad_planes(tmp_path, to, which):
    s = plates(tmp_path, fields=1)
    for f in tmp_path.glob(which): imwrite(f, to(imread(f)), photometric='minisblack')
    assert 'What is wrong' in page(s, tmp_path)

def test_no_page_of_nothing(tmp_path):
    with pytest.raises(ValueError, match='no sites'): plates(tmp_path).subset([]).report(tmp_path/'page.html')

def test_a_screen_with_one_file_per_site(tmp_path):
    t = plates(tmp_path).table
    for i,(a,b) in enumerate(zip(t.file_DNA, t.file_ER)):
        imwrite(tmp_path/f'{i}.tif', np.stack([imread(tmp_path/a), imread(tmp_path/b)]), photometric='minisblack')
    s = Screen(t.drop(columns=['file_DNA', 'file_ER']).assign(file=[f'{i}.tif' for i in range(24)]), ['DNA', 'ER'], tmp_path)
    assert found(s) == [] and 'data:image/jpeg' in page(s, tmp_path)
    (tmp_path/'3.tif').write_bytes(b'')
    row, = s.check().to_dict('records')
    assert (row['problem'], row['channel'], row['file']) == ('unreadable', 'DNA, ER', '3.tif')

def test_a_page_of_images_of_8_bits(tmp_path):
    for w in wells: imwrite(tmp_path/f'{w}_DNA.tif', (cells(wells.index(w), 5)>>5).clip(0, 255).astype(np.uint8))
    text = page(Screen.from_pattern(tmp_path, '{well}_{channel}.tif'), tmp_path)
    assert '<td>uint8</td>' in text and '<td>255</td>' in text

def test_checks_and_pages_are_light_to_import():
    prog = "import sys, cellmae.screen, cellmae.overview; print({'torch', 'matplotlib', 'scipy', 'zarr', 'h5py', 'pyarrow.parquet', 'fsspec'} & set(sys.modules) or '')"
    res = subprocess.run([sys.executable, '-c', prog], capture_output=True, text=True)
    assert res.returncode == 0 and not res.stdout.strip(), res.stdout+res.stderr

# --- threads and interrupts

def test_a_read_that_hangs_holds_up_nothing_else():
    done = ahead(lambda i: time.sleep(60) if i == 0 else i, range(300), 2, ordered=False)
    start = time.monotonic()
    assert {next(done)[0] for _ in range(299)} == set(range(1, 300)) and time.monotonic()-start < 10

stop = '''
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler) # a process in the background may ignore it
import numpy as np, pandas as pd, tifffile
from cellmae.screen import Screen
tifffile.imwrite('x.tif', np.arange(64*64, dtype='u2').reshape(64, 64))
n = np.arange(34560)
s = Screen(pd.DataFrame(dict(plate=n//3456, well=[f'{chr(65+k//24)}{k%24+1:02d}' for k in n//9%384], site=n%9, file_DNA='x.tif')))
if sys.argv[1] == 'hangs': Screen.read_files = lambda *a: time.sleep(999)
print('ready', flush=True); s.check(out=sys.argv[2] or None)
'''

@pytest.mark.skipif(os.name == 'nt', reason='signals')
@pytest.mark.parametrize('after,how,out', [(.05, '', ''), (.2, 'hangs', ''), (.4, '', 'out'), (.7, 'hangs', 'out'), (1, '', '')])
def test_check_stops_at_once(tmp_path, after, how, out):
    p = subprocess.Popen([sys.executable, '-c', stop, how, out], cwd=tmp_path, text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, 'PYTHONPATH': os.getcwd()})
    assert 'Say where' in (said := p.stdout.readline()) or said == 'ready\n'
    if said != 'ready\n': p.stdout.readline()
    time.sleep(after)
    p.send_signal(signal.SIGINT); start = time.monotonic()
    said,error = p.communicate(timeout=20)
    assert 'KeyboardInterrupt' in error and 'Stopped at' in said and 'of 34,560 sites' in said
    assert time.monotonic()-start < 8 # a second and less, where the machine does nothing else
    assert (tmp_path/'out/check.parquet').exists() == (out != '' and how == '')
