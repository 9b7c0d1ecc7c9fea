"What a broken plate gets: what `Screen.open` says, or `check()`, kind by kind of damage"
import html, shutil

import imagecodecs
import numpy as np
import pandas as pd
import pytest
import tifffile

from cellmae.images import ImageError
from cellmae.screen import Screen

wells,stains = ['B03', 'B04', 'C02', 'G11'], ['DNA', 'ER'] # of 8 x 12
spot = 'P1/C02_s2_ER.tif' # what is damaged

def pixels(name, shape=(40, 48)):
    "A gradient and noise that belong to a name"
    g = np.random.default_rng(list(name.encode()))
    return g.poisson(300+np.add.outer(np.arange(shape[0]), 9*np.arange(shape[1]))).astype(np.uint16)

def write(f, x, **kw):
    f.parent.mkdir(parents=True, exist_ok=True)
    tifffile.imwrite(f, x, **{'photometric': 'minisblack', **kw})

@pytest.fixture
def root(tmp_path):
    "Two plates, four wells, two fields, a file per stain"
    for p in ('P1', 'P2'):
        for w in wells:
            for s in '12':
                for c in stains:
                    name = f'{p}/{w}_s{s}_{c}.tif'
                    write(tmp_path/name, pixels(name))
    return tmp_path

def opened(root, **kw):
    meta = pd.DataFrame(dict(well=wells, perturbation=['DMSO']*3+['TP53']))
    return Screen.from_pattern(root, '{plate}/{well}_s{site}_{channel}.tif', meta=meta, **kw)

def change(f, to): write(f, to(tifffile.imread(f)))

def as_saved_page(f): f.write_text('<!DOCTYPE html><html><title>Sign in</title></html>')

# --- one file is not what it was: it is named, with its well, and nothing else is

files = {
    'absent': (lambda f: f.unlink(), 'missing', 'No such file'),
    'a link to nowhere': (lambda f: (f.unlink(), f.symlink_to('gone.tif')), 'missing', 'No such file'),
    'a folder of that name': (lambda f: (f.unlink(), f.mkdir()), None, ''),
    'empty': (lambda f: f.write_bytes(b''), 'unreadable', 'Copy it again'),
    'cut short': (lambda f: f.write_bytes(f.read_bytes()[:700]), 'unreadable', 'Copy it again'),
    'without its head': (lambda f: f.write_bytes(bytes(400)+f.read_bytes()[400:]), 'unreadable', 'Copy it again'),
    'a web page': (as_saved_page, 'unreadable', 'Copy it again'),
    'text': (lambda f: f.write_text('version https://git-lfs.github.com/spec/v1'), 'unreadable', 'Copy it again'),
    'filled up with zeros': (lambda f: change(f, lambda x: np.where(np.arange(40)[:,None] < 25, x, 0).astype(np.uint16)), 'part missing', '38% of its pixels are 0'),
    'all black': (lambda f: change(f, np.zeros_like), 'constant', 'All pixels are 0'),
    'all at the maximum': (lambda f: change(f, lambda x: np.full_like(x, 65535)), 'constant', 'All pixels are 65535'),
    '8 bit among 16': (lambda f: change(f, lambda x: (x>>4).astype(np.uint8)), 'wrong type', 'uint8, but most have uint16'),
    'float among integers': (lambda f: change(f, np.float32), 'wrong type', 'float32, but most have uint16'),
    'float in 0..1': (lambda f: change(f, lambda x: np.float32(x/65535)), 'float in 0..1', 'multiply'),
    'NaN': (lambda f: change(f, lambda x: np.where(x == x.max(), np.nan, np.float32(x))), 'not finite', 'NaN'),
    'of half the size': (lambda f: change(f, lambda x: x[::2,::2]), 'wrong size', '20x24, but most have 40x48'),
    'turned': (lambda f: change(f, lambda x: x.T), 'wrong size', '48x40, but most have 40x48'),
    'in colours': (lambda f: write(f, np.stack([pixels(k)>>4 for k in 'abc'], -1).astype(np.uint8), photometric='rgb'), None, 'olour'),
    'a stack': (lambda f: write(f, np.stack([pixels(k) for k in 'abc']), metadata=dict(axes='ZYX')), None, 'z planes'),
    'of another field': (lambda f: shutil.copy(f.with_name('C02_s1_ER.tif'), f), 'duplicate', 'The same pixels as ER of P1/C02_s1_ER.tif'),
    'of another channel': (lambda f: shutil.copy(f.with_name('C02_s2_DNA.tif'), f), 'duplicate', 'The same pixels as')}

@pytest.mark.parametrize('kind', files)
def test_a_damaged_file_is_named(root, kind):
    damage,problem,words = files[kind]
    s = opened(root)
    assert s.check().empty
    damage(root/spot)
    found = s.check()
    assert len(found) == 1
    row = found.iloc[0]
    assert problem in (None, row.problem) and words in row.cure and row.cure.endswith('.')
    assert (row.plate, row.well, row.site) == ('P1', 'C02', '2')
    assert row.file == spot or problem == 'duplicate' and row.file.startswith('P1/C02_s2')

@pytest.mark.parametrize('kind', ['absent', 'empty', 'cut short', 'a web page', 'NaN', 'in colours', 'of half the size'])
def test_a_damaged_file_is_refused_where_it_is_read(root, kind):
    s = opened(root)
    at = s.table.index[(s.table[['plate', 'well', 'site']] == ['P1', 'C02', '2']).all(axis=1)][0]
    files[kind][0](root/spot)
    with pytest.raises(ImageError, match='plate P1, well C02, site 2'): s[at]
    assert s[0].dtype == np.uint8

@pytest.mark.parametrize('error,words', [
    (PermissionError(13, 'Permission denied'), 'Ask its owner for the right to read it'),
    (OSError(5, 'Input/output error'), 'Input/output error'), (OSError(116, 'Stale file handle'), 'Stale file handle')])
def test_a_file_that_the_system_will_not_read(root, monkeypatch, error, words):
    s = opened(root)
    monkeypatch.setattr('builtins.open', refusing(open, error))
    row, = s.check().to_dict('records')
    assert row['file'] == spot and words in row['cure']

def refusing(real, error):
    def fake(f, *args, **kw):
        if str(f).endswith(spot): raise error
        return real(f, *args, **kw)
    return fake

@pytest.mark.parametrize('suffix,encode', [
    ('png', imagecodecs.png_encode), ('jp2', imagecodecs.jpeg2k_encode), ('jxl', lambda x: imagecodecs.jpegxl_encode(x, lossless=True))])
def test_other_formats_cut_short(tmp_path, suffix, encode):
    for w in wells: (tmp_path/f'{w}_DNA.{suffix}').write_bytes(encode(pixels(w)))
    s = Screen.from_pattern(tmp_path, '{well}_{channel}.'+suffix)
    assert set(s.check().problem) == {'no controls', 'no perturbation'}
    f = tmp_path/f'C02_DNA.{suffix}'
    f.write_bytes(f.read_bytes()[:f.stat().st_size//3])
    assert s.check().iloc[-1][['problem', 'well']].tolist() == ['unreadable', 'C02']

# --- the folder holds more, or less

def test_what_lies_beside_the_images_is_left_out_and_counted(root, capsys):
    for f in ('P1/._B03_s1_DNA.tif', 'P1/.DS_Store', 'P1/Thumbs.db', '@eaDir/B03_s1_DNA.tif'):
        (root/f).parent.mkdir(exist_ok=True); (root/f).write_bytes(b'\0\5\x16\7')
    for f in ('P1/B03_s1_DNA_thumb.tif', 'P1/B03_s1_DNA_Thumb.tif', 'P1/overview.tif'): write(root/f, pixels(f, (8, 8)))
    s = opened(root)
    said = capsys.readouterr().out
    assert len(s) == 16 and s.channels == stains and s.table.plate.nunique() == 2 and s.check().empty
    assert 'overview.tif' in said and 'hidden files and thumbnails' in said

@pytest.mark.parametrize('plate,channel', [('Gr\xf6\xdfe 5 \xb5m', '\u03b2-actin'), ('\u677f 1', 'DNA (405 nm) #1'), ("It's 100% <b>", '$x_1$')])
def test_names_in_any_letters(tmp_path, plate, channel):
    for w in wells: write(tmp_path/f'{plate}/{w}_s1_{channel}.tif', pixels(w))
    s = Screen.from_pattern(tmp_path, '{plate}/{well}_s{site}_{channel}.tif')
    assert s.table.plate.unique().tolist() == [plate] and len(s.channels) == 1
    (tmp_path/f'{plate}/C02_s1_{channel}.tif').unlink()
    row = s.check().iloc[-1]
    assert (row.problem, row.plate, row.file) == ('missing', plate, f'{plate}/C02_s1_{channel}.tif')
    page = s.report(tmp_path/'page.html').read_text(encoding='utf-8')
    assert html.escape(plate) in page and '<b>' not in page

def test_a_channel_that_a_field_lacks(root):
    (root/spot).unlink()
    s = opened(root)
    assert len(s) == 16
    row, = s.check().to_dict('records')
    assert (row['problem'], row['well'], row['site'], row['channel']) == ('missing', 'C02', '2', 'ER')
    with pytest.raises(ImageError, match="No file of .'ER'.*well C02"): s.read(int(s.table.index[(s.table.file_ER == '')][0]))

def test_a_channel_that_a_plate_lacks(root):
    for f in (root/'P2').glob('*_ER.tif'): f.unlink()
    rows = opened(root).check()
    assert rows.iloc[0][['problem', 'plate', 'channel']].tolist() == ['missing channel', 'P2', 'ER']
    assert rows.problem.tolist()[1:] == ['missing']*8 and set(rows.plate) == {'P2'}

def test_a_field_that_a_well_lacks(root):
    for c in stains: (root/f'P1/G11_s2_{c}.tif').unlink()
    row, = opened(root).check().to_dict('records')
    assert (row['problem'], row['plate']) == ('missing fields', 'P1') and '1 of 4 wells have fewer than 2: G11 (1)' in row['cure']

def test_a_folder_that_was_copied_under_two_names(root):
    shutil.copytree(root/'P1', root/'P1 copy')
    found = opened(root).check().query('problem=="duplicate"')
    assert len(found) == 16 and set(found.plate) == {'P1 copy'}

# --- the table is wrong

def test_a_well_that_is_listed_twice(root):
    t = opened(root).table
    s = Screen(pd.concat([t, t.iloc[[4]]], ignore_index=True), root=root)
    assert s.check().problem.tolist()[0] == 'duplicate' and 'two rows' in s.check().cure[0]

def test_a_file_that_is_listed_for_two_wells(root):
    t = opened(root).table.copy()
    t.loc[3, 'file_DNA'] = t.loc[0, 'file_DNA']
    row, = Screen(t, root=root).check().to_dict('records')
    assert row['problem'] == 'duplicate' and row['cure'].startswith(f'The same pixels as DNA of {t.loc[0, "file_DNA"]}')

def test_a_plate_map_of_another_screen(root):
    with pytest.raises(ValueError, match='None of 16 sites is in the plate map'):
        Screen.from_pattern(root, '{plate}/{well}_s{site}_{channel}.tif', meta=pd.DataFrame(dict(well=['A01'], perturbation=['x'])))

def test_a_plate_map_that_contradicts_itself(root):
    meta = pd.DataFrame(dict(well=wells+['B03'], perturbation=list('abcde')))
    with pytest.raises(ValueError, match='two rows for well B03'):
        Screen.from_pattern(root, '{plate}/{well}_s{site}_{channel}.tif', meta=meta)

def test_paths_of_another_machine(root, tmp_path, capsys):
    t = pd.DataFrame([dict(Metadata_Plate=p, Metadata_Well=w, Metadata_Site=s, **{
        f'{k}_Orig{c}': v for c in stains for k,v in (('PathName', f'/home/ubuntu/bucket/{p}'), ('FileName', f'{w}_s{s}_{c}.tif'))})
        for p in ('P1', 'P2') for w in wells for s in '12'])
    t.to_csv(tmp_path/'load_data.csv', index=False)
    s = Screen.open(tmp_path/'load_data.csv')
    assert (s.read(0)[0] == pixels('P1/B03_s1_DNA.tif')).all() and 'below' in capsys.readouterr().out
    (tmp_path/'far').mkdir(); (tmp_path/'load_data.csv').rename(tmp_path/'far/load_data.csv')
    s = Screen.open(tmp_path/'far/load_data.csv')
    said = capsys.readouterr().out
    assert said.count('/home/ubuntu/bucket') <= 3 and ('root=' in said or 'replace=' in said) # once, not once per file
    assert set(s.check().query('site!=""').problem) == {'missing'}
    s = Screen.open(tmp_path/'far/load_data.csv', replace={'/home/ubuntu/bucket': str(root)})
    assert (s.read(0)[0] == pixels('P1/B03_s1_DNA.tif')).all()

# --- what instruments leave behind

mlf = '<bts:MeasurementData xmlns:bts="http://www.yokogawa.co.jp/BTS/BTSSchema/1.0">{}</bts:MeasurementData>'
record = ('<bts:MeasurementRecord bts:Type="{}" bts:Row="{}" bts:Column="{}" bts:TimePoint="1" bts:FieldIndex="1" bts:ZIndex="1" '
          'bts:TimelineIndex="1" bts:ActionIndex="1" bts:Action="2D" bts:X="0" bts:Y="0" bts:Z="0" bts:Ch="{}">{}</bts:MeasurementRecord>')

def cv7000(root):
    "Wells B03 and C02, two channels; one record is an error, one names a file that was not copied"
    rows = []
    for r,c in ((2, 3), (3, 2)):
        for k in (1, 2):
            f = f'A_{"ABC"[r-1]}{c:02d}_T0001F001L01A01Z01C0{k}.tif'
            err,gone = (r, k) == (3, 1),(r, k) == (2, 2)
            rows.append(record.format('ERR' if err else 'IMG', r, c, k, 'Autofocus failed' if err else f))
            if not err and not gone: write(root/f, pixels(f))
    write(root/'DC_sCMOS_C1.tif', pixels('dark')); write(root/'SC_BP445-45_C1.tif', pixels('shading'))
    (root/'MeasurementData.mlf').write_text(mlf.format(''.join(rows)))

def test_errors_in_the_records_of_a_microscope(tmp_path, capsys):
    cv7000(tmp_path)
    s = Screen.open(tmp_path)
    said = capsys.readouterr().out
    assert s.wells.well.tolist() == ['B03', 'C02'] and len(s) == 2 and len(s.channels) == 2
    assert (s.table[[f'file_{c}' for c in s.channels]].to_numpy() == '').tolist() == [[False, True], [True, False]]
    assert '1' in said and 'not there' in said
    assert s.check().query('site!=""')[['problem', 'well', 'channel']].values.tolist() == [
        ['missing', 'B03', s.channels[1]], ['missing', 'C02', s.channels[0]]]

def hcs(root, names=('DAPI', 'Actin')):
    "An OME-Zarr plate of wells B/3 and C/2, written with zarr"
    import zarr
    g = zarr.open_group(root, mode='w', zarr_format=2)
    g.attrs['plate'] = dict(version='0.4', rows=[dict(name=o) for o in 'BC'], columns=[dict(name=o) for o in '23'],
                            wells=[dict(path=p, rowIndex=r, columnIndex=c) for p,r,c in (('B/3', 0, 1), ('C/2', 1, 0))])
    for p in ('B/3', 'C/2'):
        g.require_group(p).attrs['well'] = dict(images=[dict(path='0')])
        im = g.require_group(f'{p}/0')
        im.attrs.update(multiscales=[dict(version='0.4', axes=[dict(name=a) for a in 'cyx'], datasets=[dict(path='0')])],
                        omero=dict(channels=[dict(label=n) for n in names]))
        a = im.create_array('0', shape=(2, 40, 48), chunks=(1, 20, 48), dtype='u2', fill_value=0)
        a[:] = np.stack([pixels(p+n) for n in names])

def chunks(root, well): return [f for f in sorted((root/well/'0/0').rglob('*')) if f.is_file() and not f.name.startswith('.')]

@pytest.mark.parametrize('gone,channels', [(1, ['actin']), (2, ['actin']), (4, ['DNA', 'actin'])])
def test_a_zarr_that_was_copied_by_half(tmp_path, gone, channels):
    pytest.importorskip('zarr')
    z = tmp_path/'plate.zarr'
    hcs(z)
    s = Screen.open(z)
    assert s.wells.well.tolist() == ['B03', 'C02'] and (s.read(1)[0] == pixels('C/2DAPI')).all()
    assert not len(s.check().query('site!=""'))
    for f in chunks(z, 'C/2')[-gone:]: f.unlink()
    found = s.check().query('site!=""')
    assert found[['problem', 'well', 'channel']].values.tolist() == [['missing', 'C02', c] for c in channels]
    assert found.cure.str.contains('chunks do not exist or are cut short').all()

def test_a_zarr_without_its_metadata(tmp_path):
    pytest.importorskip('zarr')
    z = tmp_path/'plate.zarr'
    hcs(z)
    s = Screen.open(z)
    (z/'C/2/0/0/.zarray').unlink()
    found = s.check().query('site!=""')
    assert set(found.well) == {'C02'} and found.cure.str.len().gt(20).all()

def test_names_that_contradict_those_of_the_file(tmp_path):
    pytest.importorskip('zarr')
    hcs(tmp_path/'plate.zarr')
    assert Screen.open(tmp_path/'plate.zarr').channels == ['DNA', 'actin']
    with pytest.raises(ValueError, match='(?i)actin'): Screen.open(tmp_path/'plate.zarr', channels=['DNA', 'mito'])

def test_a_folder_without_images(tmp_path):
    (tmp_path/'notes.txt').write_text('nothing')
    with pytest.raises(FileNotFoundError, match='no images.*1 .txt'): Screen.open(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match='gone'): Screen.open(tmp_path/'gone')
