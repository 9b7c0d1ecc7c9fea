"Whatever people have opens in one line: right, or refused with the question that helps"
import json
import os
import re
import subprocess
import sys
import zipfile
from itertools import product

import numpy as np
import pandas as pd
import pytest
import tifffile

from cellmae.images import ImageError
from cellmae.layouts import LAYOUTS, Scan, layout
from cellmae.screen import SITE, WELL, Screen, open_screen

def plane(name, shape=(6, 8)):
    "Pixels that belong to a name"
    return np.random.default_rng(list(name.encode())).integers(100, 4000, shape, np.uint16)

def write(root, *names, **kw):
    "One image per name"
    for n in names:
        (root/n).parent.mkdir(parents=True, exist_ok=True)
        tifffile.imwrite(root/n, plane(n), photometric='minisblack', **kw)
    return root

def holds(screen, names):
    "Is site after site, channel after channel, what these files hold?"
    x = np.stack([plane(n) for n in names]).reshape(len(screen), len(screen.channels), 6, 8)
    assert all((screen.read(i) == x[i]).all() for i in range(len(screen)))

def same(capsys, **known):
    "The screen that the printed call gives"
    calls = re.findall('^The same: (.*)$', capsys.readouterr().out, re.M)
    assert len(calls) == 1, calls
    return eval(calls[0], dict(Screen=Screen, **known))

places = [('B', '03'), ('C', '02')] # neither square nor symmetric

# --- what lies in ../shared/data, made anew in small: the names are theirs

cytation = [f'images/{w}_01_{i}_{f}_{c}_001.tif' for w,f in (('B7', 3), ('D6', 2), ('H12', 1))
            for i,c in enumerate(('DAPI', 'GFP', 'RFP'), 1)]
phenix = [f'pe-20x/r0{r}c{c}f01p03-ch{i}sk1fk1fl1.tiff' for r,c in ((1, '11'), (2, '03')) for i in '12345']
tiles = [f'Timepoint001_Row0{r}_Well0{c}_{s}_zstack001_r00{y}_c001.tif' for r,c in ((2, 4), (3, 2)) for y in (0, 2)
         for s in ('Alexa488', 'DAPI', 'mCherry')]
human = [f'AS_09125_050116030001_{w}f{f}d{d}.tif' for w in ('C07', 'D03') for f in ('00', '01') for d in '012']

def test_cytation_with_masks(tmp_path, capsys):
    write(tmp_path, *cytation, *[n.replace('images/', 'masks/').replace('.tif', '_MaskCells.tiff') for n in cytation[2::3]])
    (tmp_path/'map.csv').write_text('well_position,genotype\nB7,Null\nD6,WT\nH12,WT\n')
    s = Screen.open(tmp_path, meta=tmp_path/'map.csv', well='well_position', perturbation='genotype', controls='WT')
    assert s.wells[['well', 'control']].values.tolist() == [['B07', False], ['D06', True], ['H12', True]]
    assert s.channels == ['DNA', 'GFP', 'RFP']
    holds(s, cytation)
    assert same(capsys).fingerprint() == s.fingerprint()

@pytest.mark.parametrize('channels', [None, {'1': 'DNA', '2': 'AGP', '3': 'RNA', '4': 'ER', '5': 'mito'}, ['mito', 'DNA'], 'jump_source_2'])
def test_phenix_names(tmp_path, capsys, channels):
    if isinstance(channels, list):
        with pytest.raises(ValueError, match="No channel .*found .'1', '2'.*channels="): Screen.open(write(tmp_path, *phenix), channels=channels)
        return
    s = Screen.open(write(tmp_path, *phenix), channels=channels)
    holds(s, phenix)
    assert s.table[['plate', 'well', 'site']].values.tolist() == [['pe-20x', 'A11', '1'], ['pe-20x', 'B03', '1']]
    assert same(capsys).fingerprint() == s.fingerprint() and same_channels(s, channels)

def same_channels(s, channels):
    named = {None: list('12345'), 'jump_source_2': ['DNA', 'ER', 'RNA', 'AGP', 'mito']}
    return s.channels == (list(channels.values()) if isinstance(channels, dict) else named[channels])

def test_harmony_tiles_and_their_times(tmp_path, capsys):
    s = Screen.open(write(tmp_path/'one', *tiles))
    holds(s, tiles)
    assert s.channels == ['Alexa488', 'DNA', 'mCherry'] and s.wells.well.tolist() == ['B04', 'C02']
    later = [n.replace('Timepoint001', f'Timepoint00{i}') for i in (1, 2, 3) for n in tiles]
    write(tmp_path/'three', *later)
    with pytest.raises(ValueError, match=r"{t} is one of .'1', '2', '3'.*`t=1`.*`t='first'`, `'last'`.*`t='all'`"):
        Screen.open(tmp_path/'three')
    for t,names in ((2, later[12:24]), ('last', later[24:])): holds(Screen.open(tmp_path/'three', t=t), names)
    s = Screen.open(tmp_path/'three', t='all')
    assert len(s) == 12 and s.table.t.nunique() == 3 and len(s.wells) == 2
    capsys.readouterr(); Screen.open(tmp_path/'three', t='all'); assert same(capsys).fingerprint() == s.fingerprint()

def test_channels_without_a_well(tmp_path, capsys):
    write(tmp_path, 'Ch1.tif', 'Ch2.tif', 'Ch3.tif')
    with pytest.raises(FileNotFoundError, match=r"3 images, such as Ch1\.tif.*Screen.from_pattern.*`well='A01'`"): Screen.open(tmp_path)
    s = Screen.from_pattern(tmp_path, 'Ch{channel}.tif', well='C2')
    holds(s, ['Ch1.tif', 'Ch2.tif', 'Ch3.tif'])
    assert s.wells.well.tolist() == ['C02'] and s.channels == ['1', '2', '3']

def test_arrayscan_has_nothing_between_well_and_field(tmp_path, capsys):
    s = Screen.open(write(tmp_path, *human))
    holds(s, human)
    assert s.table[['plate', 'well', 'site']].drop_duplicates().values.tolist() == [
        ['AS_09125_050116030001', w, f] for w in ('C07', 'D03') for f in '01']
    assert same(capsys).fingerprint() == s.fingerprint()

def test_positions_are_no_wells_but_are_kept_apart(tmp_path, capsys):
    names = [f'01_POS{p}_{c}.TIF' for p in ('002', '076', '218') for c in 'DF']
    s = Screen.open(write(tmp_path, *names))
    holds(s, names)
    assert s.wells.well.tolist() == ['POS002', 'POS076', 'POS218']
    out = capsys.readouterr().out
    assert '3 of 3 wells are no place on a plate, such as POS002' in out

@pytest.mark.parametrize('shape,wells', [((8, 12), ['B01', 'C01']), ((16, 24), ['A13', 'B01'])])
def test_wells_that_are_running_numbers(tmp_path, shape, wells, capsys):
    names = [f'W00{w}F0001T0001Z000C{c}.tif' for w in ('13', '25') for c in '12']
    with pytest.raises(ValueError, match='wells are numbers, such as 0013.*plate_shape'): Screen.open(write(tmp_path, *names))
    s = Screen.open(tmp_path, plate_shape=shape)
    holds(s, names)
    assert s.wells.well.tolist() == wells and same(capsys).fingerprint() == s.fingerprint()

def test_names_in_a_zip_open_as_the_folder_does(tmp_path, capsys):
    write(tmp_path/'plates', *phenix)
    with zipfile.ZipFile(tmp_path/'plates.zip', 'w') as z:
        for n in phenix: z.write(tmp_path/'plates'/n, n)
    a,b = Screen.open(tmp_path/'plates'),Screen.open(tmp_path/'plates.zip')
    holds(b, phenix)
    assert a.table[SITE].astype(str).equals(b.table[SITE].astype(str))

def test_a_folder_on_the_web(tmp_path, monkeypatch, capsys):
    fs = pytest.importorskip('fsspec').filesystem('memory')
    monkeypatch.setenv('CELLMAE_CACHE', str(tmp_path/'cache'))
    write(tmp_path/'here', *human)
    fs.put(str(tmp_path/'here')+'/', '/away/run7', recursive=True)
    s = Screen.open('memory://away/run7')
    holds(s, human)
    assert same(capsys).fingerprint() == s.fingerprint()
    holds(open_screen(s.save(tmp_path/'saved')), human)

@pytest.mark.parametrize('pack', [False, True])
def test_a_plate_without_a_name_is_called_as_what_was_opened(tmp_path, pack):
    write(tmp_path/'run7', 'B03_s1_w1.tif', 'C02_s1_w1.tif')
    if pack:
        with zipfile.ZipFile(tmp_path/'run7.zip', 'w') as z:
            for n in ('B03_s1_w1.tif', 'C02_s1_w1.tif'): z.write(tmp_path/'run7'/n, n)
    assert Screen.open(tmp_path/('run7.zip' if pack else 'run7')).table.plate.tolist() == ['run7']*2

# --- what went wrong without a word

def test_plates_that_are_numbered_anew_in_every_experiment(tmp_path, capsys):
    names = [f'images/{b}/Plate{p}/{w}_s{s}_w{c}.png' for b,p,w,s,c in product(
        ('HEPG2-01', 'HUVEC-01'), '12', ('B02', 'B03', 'C02'), '12', '123456')]
    import imagecodecs
    for n in names:
        (tmp_path/n).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path/n).write_bytes(imagecodecs.png_encode(plane(n)))
    s = Screen.open(tmp_path, channels='rxrx')
    holds(s, names)
    assert len(s) == 24 and len(s.wells) == 12 and not s.wells.duplicated(WELL).any()
    assert s.channels == ['DNA', 'ER', 'actin', 'RNA', 'mito', 'golgi']
    assert same(capsys).fingerprint() == s.fingerprint()

def ome(f, x, axes='CYX', names=None):
    f.parent.mkdir(parents=True, exist_ok=True)
    meta = dict(axes=axes, **({'Channel': {'Name': names}} if names else {}))
    tifffile.imwrite(f, x, metadata=meta, ome=True, photometric='minisblack')

def stack(seed, *shape): return np.random.default_rng(seed).integers(100, 4000, shape, np.uint16)

@pytest.mark.parametrize('shape,axes,said', [
    ((3, 6, 8), 'ZYX', "3 z planes. Choose: `z=0` to `z=2`, or `z='max'`"),
    ((3, 6, 8), 'TYX', "3 times. Choose: `t=0` to `t=2`"),
    ((2, 3, 6, 8), 'TZYX', "2 times and 3 z planes")])
def test_z_and_times_are_no_channels(tmp_path, shape, axes, said):
    for n in ('B03', 'C02'): ome(tmp_path/f'{n}.ome.tif', stack(1, *shape), axes)
    t = pd.DataFrame(dict(well=['B03', 'C02'], file=['B03.ome.tif', 'C02.ome.tif']))
    with pytest.raises(ImageError) as e: Screen(t, ['DNA', 'ER', 'actin'], tmp_path).read(0)
    assert all(o in str(e.value) for o in said.split('. ')) and 'well B03' in str(e.value)
    t.to_csv(tmp_path/'list.csv', index=False)
    with pytest.raises(ImageError, match='a stack'): Screen.open(tmp_path/'list.csv', channels=['DNA', 'ER', 'actin'])

def test_an_overlay_is_no_stack_of_channels(tmp_path):
    x = np.random.default_rng(0).integers(0, 255, (6, 8, 3), np.uint8)
    tifffile.imwrite(tmp_path/'a.tif', x, photometric='rgb')
    t = pd.DataFrame(dict(well=['B03'], file=['a.tif']))
    with pytest.raises(ImageError, match='in colours'): Screen(t, ['DNA', 'ER', 'actin'], tmp_path).read(0)

@pytest.mark.parametrize('channels,want', [
    (None, ['actin', 'DNA', 'ER']), (['actin', 'DNA', 'ER'], ['actin', 'DNA', 'ER']),
    ({'Hoechst': 'DNA', 'Actin': 'AGP', 'ConA': 'ER'}, None), (['DNA', 'ER', 'actin'], None), (['DNA', 'ER'], None)])
def test_names_are_those_of_the_file(tmp_path, channels, want):
    for i,n in enumerate(('B03', 'C02')): ome(tmp_path/f'{n}.tif', stack(i, 3, 6, 8), names=['Actin', 'Hoechst', 'ConA'])
    t = pd.DataFrame(dict(well=['B03', 'C02'], file=['B03.tif', 'C02.tif']))
    if want is None:
        with pytest.raises(ValueError, match="Actin.*Hoechst.*ConA"): Screen(t, channels, tmp_path)
    else:
        s = Screen(t, channels, tmp_path)
        assert s.channels == want and (s.read(1) == stack(1, 3, 6, 8)).all()

def test_plates_whose_files_name_their_channels_otherwise_are_refused(tmp_path):
    ome(tmp_path/'B03.tif', stack(0, 2, 6, 8), names=['Hoechst', 'ConA'])
    ome(tmp_path/'C02.tif', stack(0, 2, 6, 8), names=['ConA', 'Hoechst'])
    t = pd.DataFrame(dict(well=['B03', 'C02'], file=['B03.tif', 'C02.tif']))
    with pytest.raises(ValueError, match=r"B03.tif are .'Hoechst', 'ConA'.*C02.tif .'ConA', 'Hoechst'.*two screens"):
        Screen(t, None, tmp_path)

def test_a_plate_map_that_matches_nothing_is_an_error(tmp_path):
    write(tmp_path, *human)
    with pytest.raises(ValueError, match='None of 4 sites is in the plate map'):
        Screen.open(tmp_path, meta=pd.DataFrame(dict(well=['A01', 'H12'], perturbation=['x', 'y'])))

# --- planes, times and light

def test_every_plane_in_files_of_unequal_depth(tmp_path, capsys):
    xs = [stack(i, n, 6, 8) for i,n in enumerate((3, 1, 2))]
    for w,x in zip(('B03', 'C02', 'C11'), xs): ome(tmp_path/f'P_{w}_s1_w1.tif', x, 'ZYX')
    with pytest.raises(ImageError, match="3 z planes.*`z='max'`.*well B03"): Screen.open(tmp_path)
    s = Screen.open(tmp_path, z='all')
    assert s.table[['well', 'site']].values.tolist() == [
        ['B03', '1_z0'], ['B03', '1_z1'], ['B03', '1_z2'], ['C02', '1_z0'], ['C11', '1_z0'], ['C11', '1_z1']]
    assert all((s.read(i)[0] == x).all() for i,x in enumerate(np.concatenate(xs)))
    again = open_screen(s.save(tmp_path/'saved'))
    assert again.z == 'all' and (again.read(2) == s.read(2)).all() and again.fingerprint() == s.fingerprint()
    assert same(capsys).fingerprint() == s.fingerprint()

def test_every_time_in_files_is_a_row_of_its_own(tmp_path):
    for w in ('B03', 'C02'): ome(tmp_path/f'P_{w}_s1_w1.tif', stack(ord(w[0]), 4, 6, 8), 'TYX')
    s = Screen.open(tmp_path, t='all')
    assert len(s) == 8 and s.table.t.tolist() == list('0123')*2 and len(s.wells) == 2
    assert (s.read(6)[0] == stack(ord('C'), 4, 6, 8)[2]).all()

def test_channels_of_unequal_depth(tmp_path):
    ome(tmp_path/'P_B03_s1_w1.tif', stack(0, 3, 6, 8), 'ZYX')
    ome(tmp_path/'P_B03_s1_w2.tif', stack(0, 2, 6, 8), 'ZYX')
    with pytest.raises(ImageError, match='3 along z, but 2 in'): Screen.open(tmp_path, z='all')

@pytest.mark.parametrize('z', [None, 0, 2, 'max', 'mean', 'mid'])
def test_policies_are_kept(tmp_path, z, capsys):
    names = [f'P_{w}_s1_w{c}.tif' for w in ('B03', 'C02') for c in '12']
    for i,n in enumerate(names): ome(tmp_path/n, stack(i, 3, 6, 8), 'ZYX')
    if z is None:
        with pytest.raises(ImageError, match='a stack'): Screen.open(tmp_path)
        return
    s = Screen.open(tmp_path, z=z)
    assert same(capsys).fingerprint() == s.fingerprint()
    again = open_screen(s.save(tmp_path/'saved'))
    assert (again.z, again.t, again.illum) == (z, None, False) and (again.read(1) == s.read(1)).all()
    others = {Screen.open(tmp_path, z=o).fingerprint() for o in (0, 2, 'max', 'mean', 'mid')}
    assert again.fingerprint() == s.fingerprint() and len(others) == 5

def illuminated(tmp_path, dtype=np.uint16, light=None):
    "A LoadData table with illumination functions"
    rows = []
    for w in ('B03', 'C02'):
        for c in ('DNA', 'ER'):
            x = plane(w+c).astype(dtype)
            tifffile.imwrite(tmp_path/f'{w}_{c}.tif', x)
            np.save(tmp_path/f'{c}.npy', np.linspace(.5, 2, 48).reshape(6, 8) if light is None else light)
        rows.append({'Metadata_Well': w, **{f'FileName_Orig{c}': f'{w}_{c}.tif' for c in ('DNA', 'ER')},
                     **{f'FileName_Illum{c}': f'{c}.npy' for c in ('DNA', 'ER')}})
    return pd.DataFrame(rows)

@pytest.mark.parametrize('dtype', [np.uint8, np.uint16, np.float32])
def test_images_are_divided_by_their_illumination(tmp_path, dtype, capsys):
    t = illuminated(tmp_path, dtype)
    plain,even = Screen(t, root=tmp_path),Screen(t, root=tmp_path, illum=True)
    assert capsys.readouterr().out.count('`illum=True` divides') == 1
    x = plain.read(1)/np.linspace(.5, 2, 48).reshape(6, 8)
    if np.dtype(dtype).kind == 'u': x = np.clip(np.rint(x), 0, np.iinfo(dtype).max)
    assert even.read(1).dtype == dtype and np.allclose(even.read(1), x, rtol=1e-5)
    again = open_screen(even.save(tmp_path/'saved'))
    assert again.illum and (again.read(1) == even.read(1)).all() and again.fingerprint() == even.fingerprint()
    assert plain.fingerprint() != even.fingerprint()

@pytest.mark.parametrize('light,said', [(np.zeros((6, 8)), 'bad illumination'), (np.ones((3, 4)), 'wrong size')])
def test_illumination_that_cannot_be(tmp_path, light, said):
    s = Screen(illuminated(tmp_path, light=light), root=tmp_path, illum=True)
    with pytest.raises(ImageError, match=said+'.*well B03'): s.read(0)

def test_no_illumination_to_divide_by(tmp_path):
    with pytest.raises(ValueError, match='illum=True.*illum_<channel>'): Screen.open(write(tmp_path, *human), illum=True)

# --- which layout

@pytest.fixture
def acme():
    "An invented microscope"
    @layout('acme', 'Acme', 'run.acme')
    def scan(listing, found, cycle='1'):
        df = pd.DataFrame([line.split() for line in listing.text(found[0]).splitlines()],
                          columns=['file', 'well', 'site', 'channel'])
        return Scan(df.assign(channel=df.channel+'_'+str(cycle)), said=['Said once'])
    yield
    del LAYOUTS['acme']

def run_acme(folder):
    write(folder, '1.tif', '2.tif', '3.tif')
    (folder/'run.acme').write_text('1.tif B03 1 GFP\n2.tif C02 1 GFP\n')
    return folder

def test_a_layout_of_ones_own(tmp_path, acme, capsys):
    for opened in (Screen.open, Screen, open_screen):
        s = opened(run_acme(tmp_path))
        out = capsys.readouterr().out
        assert out.count('Acme: 1 plate, 2 wells, 2 sites') == out.count('Said once') == 1
        assert 'Left out: 1 .tif files, such as 3.tif' in out and f"Screen.open({str(tmp_path)!r}, layout='acme'" in out
        holds(s, ['1.tif', '2.tif'])
    assert Screen.open(tmp_path, cycle=2).channels == ['GFP_2']
    with pytest.raises(ValueError, match='cycles is no option.*takes cycle'): Screen.open(tmp_path, cycles=2)

def test_two_layouts_are_a_question(tmp_path, acme):
    run_acme(tmp_path); (tmp_path/'a.xdce').write_text('<ImageStack/>')
    with pytest.raises(ValueError, match="several layouts.*InCell.*layout='incell'.*Acme, by run.acme.*layout='acme'"):
        Screen.open(tmp_path)
    assert len(Screen.open(tmp_path, layout='acme')) == 2
    with pytest.raises(ValueError, match="Did you mean acme"): Screen.open(tmp_path, layout='acne')

@pytest.mark.parametrize('names', [['P1_B03_s1_DAPI.tif', 'P1_C02_s1_DAPI.tif'],
    [f'P1_{w}_s{s}_{c}.tif' for w in ('B03', 'C02') for s in '12' for c in ('DAPI', 'GFP')]])
def test_a_plate_in_the_name(tmp_path, names):
    s = Screen.open(write(tmp_path, *names))
    holds(s, names)
    assert s.channels == ['DNA', 'GFP'][:len(s.channels)] and s.table.plate.unique().tolist() == ['P1']

def test_a_layout_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match='no images with metadata of this microscope'):
        Screen.open(write(tmp_path, *human), layout='phenix')

def test_a_slip_in_an_option(tmp_path):
    write(tmp_path, *human)
    for slip,meant in dict(chanels='channels', pertubation='perturbation', plateshape='plate_shape').items():
        with pytest.raises(ValueError, match=f'{slip} is no option here. Did you mean {meant}'): Screen.open(tmp_path, **{slip: 'x'})

def test_folders_called_like_stains_are_a_question(tmp_path):
    names = [f'{c}/{w}.tif' for w in ('B03', 'C02') for c in ('DAPI', 'GFP')]
    with pytest.raises(ValueError, match="is DAPI a plate.*from_pattern.*'{channel}/{well}.tif'"):
        Screen.open(write(tmp_path, *names), channels=['DNA'])
    s = Screen.from_pattern(tmp_path, '{channel}/{well}.tif')
    holds(s, names)
    assert s.channels == ['DNA', 'GFP']

def test_a_plate_may_be_called_like_a_stain_where_channels_have_names(tmp_path):
    names = [f'DNA/{w}_s1_{c}.tif' for w in ('B03', 'C02') for c in ('DAPI', 'GFP')]
    s = Screen.open(write(tmp_path, *names))
    holds(s, names)
    assert s.table.plate.unique().tolist() == ['DNA']

@pytest.mark.parametrize('n', [1, 3])
def test_planes_without_names_are_counted(tmp_path, n):
    for w in ('B03', 'C02'): tifffile.imwrite(tmp_path/f'{w}.tif', stack(n, *((n, 6, 8) if n > 1 else (6, 8))), photometric='minisblack')
    said = re.escape(str(['...']*n))
    with pytest.raises(ValueError, match=f'holds {n} channels? without names.*channels={said}'): Screen.open(tmp_path)
    assert (Screen.open(tmp_path, channels=['DNA', 'ER', 'RNA'][:n]).read(1) == stack(n, *((n, 6, 8) if n > 1 else (6, 8)))).all()

def test_channels_that_some_sites_lack_are_said(tmp_path, capsys):
    write(tmp_path, *[n for n in human if 'C07f01d2' not in n])
    s = Screen.open(tmp_path)
    assert 'No file of channel 2: 1 of 4 sites, such as plate AS_09125_050116030001, well C07, site 1\n' in capsys.readouterr().out
    with pytest.raises(ImageError, match="No file of .'2'.*well C07, site 1"): s.read(1)

@pytest.mark.parametrize('name', ['scan_{}_s{}_z{}_w1.tif', 'scan_{}_s{}_t{}_w1.tif', '{}_s{}_DAPI_z{}.tif', '{}_s{}_z{}_DAPI.tif',
                                  '{}_s{}_DAPI_Z0{}.tif', '{}_s{}_time{}_DAPI.tif', '{}_s{}_p{}_w1.tif'])
def test_planes_and_times_in_names_are_no_sites_nor_channels(tmp_path, name):
    names = [name.format(w, s, i) for w in ('B03', 'C02') for s in '12' for i in '01']
    try: s = Screen.open(write(tmp_path, *names))
    except FileNotFoundError as e: assert 'Say how they are named' in str(e)
    except ValueError as e: assert re.search('{[zt]} is one of|Add {site}, {z} or {t}', str(e))
    else: assert len(s) == 4 and len(s.channels) == 1

def test_two_ways_to_read_names_are_a_question(tmp_path):
    write(tmp_path, *[f'{r}{c}_{w}_s1_DAPI.tif' for r,c in places for w in ('D04', 'E05')])
    try: s = Screen.open(tmp_path)
    except FileNotFoundError as e: assert 'Say how they are named' in str(e)
    else: assert s.wells.well.tolist() == ['D04', 'E05']*2 and s.table.plate.nunique() == 2

@pytest.mark.parametrize('end,cure', [('flex', 'Opera'), ('C01', 'Cellomics'), ('oib', 'Olympus'), ('xyz', 'xyz')])
def test_formats_that_are_not_read_are_named(tmp_path, end, cure):
    for w in ('B03', 'C02'): (tmp_path/f'{w}.{end}').write_bytes(b'x')
    with pytest.raises(FileNotFoundError, match=f'no images.*2 .{end}.*') as e: Screen.open(tmp_path)
    assert cure in str(e.value)

def test_a_folder_of_tables_says_so(tmp_path):
    (tmp_path/'profiles.csv.gz').write_bytes(b'x'); (tmp_path/'README.md').write_text('x')
    with pytest.raises(FileNotFoundError, match='no images.*Only tables and texts, 1 .*read_profiles'): Screen.open(tmp_path)

@pytest.mark.parametrize('path', ['none', 'none.csv', 'a/none.zarr'])
def test_what_is_missing(tmp_path, path):
    with pytest.raises(FileNotFoundError, match='missing'): Screen.open(tmp_path/path)

# --- tables and what was saved

def test_a_table_says_what_it_is(tmp_path, capsys):
    write(tmp_path, 'a.tif', 'b.tif')
    (tmp_path/'list.csv').write_text('well,gene,file_DAPI\nB3,DMSO,a.tif\nC2,X,b.tif\n')
    s = Screen.open(tmp_path/'list.csv', perturbation='gene')
    out = capsys.readouterr().out
    assert 'A table of sites: 1 plate, 2 wells, 2 sites' in out and 'Images: 6x8 uint16' in out
    assert eval(out.split('The same: ')[1], dict(Screen=Screen)).fingerprint() == s.fingerprint()
    holds(s, ['a.tif', 'b.tif'])

def test_saved_screens_of_all_ages(tmp_path, capsys):
    write(tmp_path, *human)
    s = Screen.open(tmp_path, meta=pd.DataFrame(dict(well=['C07', 'D03'], perturbation=['x', 'DMSO'], dose=[.5, 2.])))
    out = s.save(tmp_path/'out')
    again = Screen.open(out)
    assert 'A saved screen: 1 plate, 2 wells, 4 sites' in capsys.readouterr().out
    assert again.fingerprint() == s.fingerprint() and again.table.equals(s.table) and (again.ranges == s.ranges).all()
    s.table.to_csv(out/'screen.csv', index=False) # an older version saved anew
    how = json.loads((out/'screen.json').read_text())
    assert Screen.open(out).fingerprint() == s.fingerprint(), 'screen.json says which table it belongs to'
    (out/'screen.json').write_text(json.dumps({k: how[k] for k in ('channels', 'ranges')}))
    (out/'screen.csv').write_text((out/'screen.csv').read_text().replace(',AS_', ',../AS_'))
    old = Screen.open(out)
    assert len(old) == 4 and (old.read(2) == s.read(2)).all()
    (out/'screen.json').unlink()
    with pytest.raises(ValueError, match='no screen.json that says which'): Screen.open(out)
    (out/'screen.parquet').unlink()
    assert (Screen.open(out).read(2) == s.read(2)).all()

def test_a_saved_screen_moves_with_its_images(tmp_path):
    write(tmp_path/'here', *human)
    s = Screen.open(tmp_path/'here')
    s.save(tmp_path/'here/out')
    (tmp_path/'here').rename(tmp_path/'there')
    again = Screen(tmp_path/'there/out')
    holds(again, human)
    with pytest.raises(ImageError, match='missing'): s.read(0)

def test_a_saved_screen_with_other_channels_or_controls(tmp_path):
    s = Screen.open(write(tmp_path, *human), meta=pd.DataFrame(dict(well=['C07', 'D03'], perturbation=['x', 'DMSO'])))
    s.save(tmp_path/'out')
    assert Screen(tmp_path/'out', channels=['2', '0']).channels == ['2', '0']
    assert Screen(tmp_path/'out', controls='x').table.control.tolist() == [True]*2+[False]*2

def test_paths_of_another_machine_can_be_replaced(tmp_path, capsys):
    write(tmp_path/'images', *human)
    t = pd.DataFrame(dict(well=['C07', 'D03'], file_DNA=[f'/home/x/{human[0]}', f'/home/x/{human[6]}']))
    t.to_csv(tmp_path/'list.csv', index=False)
    s = Screen.open(tmp_path/'list.csv', replace={'/home/x': str(tmp_path/'images')})
    holds(s, [human[0], human[6]])
    again = Screen(s.save(tmp_path/'out'))
    assert again.replace == s.replace and (again.read(1) == s.read(1)).all()
    assert same(capsys).fingerprint() == s.fingerprint()

def test_a_table_takes_no_options_of_layouts(tmp_path):
    write(tmp_path, 'a.tif')
    (tmp_path/'list.csv').write_text('well,file_DAPI\nB3,a.tif\n')
    for o in (dict(plate_shape=(8, 12)), dict(pertubation='gene')):
        with pytest.raises(ValueError, match=f'{[*o][0]} is no option'): Screen.open(tmp_path/'list.csv', **o)

def test_a_table_in_memory(tmp_path, capsys):
    t = pd.DataFrame(dict(well=['B3', 'C2'], file_DAPI=['a.tif', 'b.tif']))
    s = Screen.open(t, root=write(tmp_path, 'a.tif', 'b.tif'))
    holds(s, ['a.tif', 'b.tif'])
    assert same(capsys, table=t).fingerprint() == s.fingerprint()

def test_another_choice_of_planes_than_was_saved(tmp_path):
    for w in ('B03', 'C02'): ome(tmp_path/f'P_{w}_s1_w1.tif', stack(ord(w[0]), 3, 6, 8), 'ZYX')
    s = Screen.open(tmp_path, z='max')
    s.save(tmp_path/'out')
    for z in (1, 'mean', 'all'):
        a,b = Screen(tmp_path/'out', z=z),Screen.open(tmp_path, z=z)
        assert a.z == z and len(a) == len(b) and all((a.read(i) == b.read(i)).all() for i in range(len(a)))

@pytest.mark.parametrize('channels,want', [(None, ['DNA', '2']), ({'1': 'DNA', '2': 'ER'}, ['DNA', 'ER']), ({'1': 'ER', '2': 'DNA'}, None)])
def test_a_file_per_channel_names_it_too(tmp_path, channels, want):
    for w,(c,n) in product(('B03', 'C02'), {1: 'Hoechst', 2: 'FITC'}.items()):
        ome(tmp_path/f'P_{w}_s1_w{c}.tif', stack(c, 6, 8), 'YX', n)
    if want: assert Screen.open(tmp_path, channels=channels).channels == want
    else:
        with pytest.raises(ValueError, match="Channel 1 is 'Hoechst' in the files, not 'ER'"): Screen.open(tmp_path, channels=channels)

def test_columns_of_ones_own_are_kept(tmp_path):
    t = pd.DataFrame(dict(well=['B03', 'C02'], file_DNA=['a.tif', 'b.tif'], dose=[.5, 2.], guide=['g1', None], mixed=[1, 'x'], ok=[True, False]))
    s = Screen(t, root=write(tmp_path, 'a.tif', 'b.tif'))
    again = open_screen(s.save(tmp_path/'out')).table
    assert again.dose.tolist() == [.5, 2.] and again.guide.tolist() == ['g1', ''] and again.mixed.tolist() == ['1', 'x']
    assert again.ok.tolist() == [True, False]

@pytest.mark.parametrize('kind', ['zarr', 'zip', 'npz'])
def test_a_fingerprint_knows_what_containers_hold(tmp_path, kind):
    def made(x):
        if kind == 'zarr':
            zarr = pytest.importorskip('zarr')
            zarr.create_array(tmp_path/'a.zarr', data=x, chunks=(1, 6, 8), overwrite=True)
            return 'a.zarr#axes=CYX'
        if kind == 'npz': np.savez(tmp_path/'a.npz', x=x); return 'a.npz#x,axes=CYX'
        tifffile.imwrite(tmp_path/'a.tif', x, photometric='minisblack')
        with zipfile.ZipFile(tmp_path/'a.zip', 'w') as z: z.write(tmp_path/'a.tif', 'in/a.tif')
        return 'a.zip#in/a.tif'
    def opened(x): return Screen(pd.DataFrame(dict(well=['B03'], file=[made(x)])), ['DNA', 'ER'], tmp_path)
    a = opened(stack(0, 2, 6, 8)).fingerprint()
    assert opened(stack(0, 2, 6, 8)).fingerprint() == a != opened(np.zeros((2, 6, 8), np.uint16)).fingerprint()

# --- scale

def test_a_fingerprint_looks_at_some_files_only(tmp_path, monkeypatch):
    n = 20000
    t = pd.DataFrame(dict(well=[f'{chr(65+i//24)}{i%24+1:02d}' for i in range(384)]*(n//384+1)))[:n]
    t['site'],t['file_DNA'],t['file_ER'] = np.arange(n)//384,'a.tif','b.tif'
    s,seen = Screen(t, root=write(tmp_path, 'a.tif', 'b.tif')),[]
    size = os.path.getsize
    monkeypatch.setattr('os.path.getsize', lambda f: seen.append(f) or size(f))
    before = s.fingerprint()
    assert 500 < len(seen) <= 2000
    assert s.subset(np.arange(n)[::-1]).fingerprint() != before

light = '''
import sys, cellmae.screen
print({'torch', 'matplotlib', 'zarr', 'h5py', 'pyarrow.parquet', 'fsspec', 'scipy', 'IPython'} & set(sys.modules) or '')
'''

def test_a_screen_needs_no_heavy_library_until_it_reads():
    res = subprocess.run([sys.executable, '-c', light], capture_output=True, text=True)
    assert res.returncode == 0 and not res.stdout.strip(), res.stdout+res.stderr

def test_the_size_of_pixels_is_kept(tmp_path):
    import layouts
    layouts.phenix_v7(tmp_path/'plate')
    s = Screen.open(tmp_path/'plate')
    assert (s.pixel_size, s.subset([0]).pixel_size)==(.598, .598)
    assert open_screen(s.save(tmp_path/'saved')).pixel_size==.598
    assert Screen(s.table, channels=s.channels, root=s.root).pixel_size is None
