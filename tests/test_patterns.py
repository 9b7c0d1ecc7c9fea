"Names of files: listed once, matched as they are meant, or refused with what differs"
from itertools import product
import os
import re
from zipfile import ZipFile

import numpy as np
import pytest
from tifffile import imwrite

from cellmae.patterns import PRESETS, Listing, guess_pattern, instrument_pattern, long_by_names, preset_of, sites_by_names
from cellmae.screen import Screen

def touch(root, *names):
    for n in names:
        (root/n).parent.mkdir(parents=True, exist_ok=True)
        (root/n).write_bytes(b'x')
    return root

# --- listings

ASIDE = ['P/._B02.tif', '.DS_Store', 'P/B02_thumb.tif', 'P/B02_w1_Thumb.TIF', 'P/Thumbs.db']

def test_a_listing_is_sorted_and_knows_what_lies_aside(tmp_path):
    l = Listing(touch(tmp_path, 'b/B03.tif', 'b/B02.TIF', 'a.csv', 'map.CSV', '@eaDir/B02.tif', '.git/x.tif', *ASIDE))
    assert l.names == ['a.csv', 'b/B02.TIF', 'b/B03.tif', 'map.CSV'] and l.images == ['b/B02.TIF', 'b/B03.tif']
    assert l.passed == sorted([*ASIDE, '@eaDir', '.git']) and dict(l.other) == {'.csv': 1, '.CSV': 1}
    assert l.beside('b/B02.TIF') == l.images and l.beside('a.csv') == ['a.csv', 'map.CSV']
    assert l.path('b/B02.TIF') == tmp_path/'b/B02.TIF'

def test_flat_fields_are_passed_over_beside_an_mlf_only(tmp_path):
    l = Listing(touch(tmp_path, 'P/a.mlf', 'P/DC_1.tif', 'P/SC_1.tif', 'P/B03.tif', 'Q/DC_1.tif'))
    assert l.images == ['P/B03.tif', 'Q/DC_1.tif'] and l.passed == ['P/DC_1.tif', 'P/SC_1.tif']

def test_flat_fields_of_yokogawa_are_known_without_its_records(tmp_path):
    image = 'A_B03_T0001F001L01A01Z01C01.tif'
    assert Listing(touch(tmp_path, image, 'DC_CAM1.tif', 'SC_BP445-45.tif')).images == [image]


@pytest.mark.parametrize('globs,names', [
    (['Index*.xml'], ['p/Index.idx.xml', 'p/index.xml']), (['*.htd'], ['p/a.HTD']), (['index.XML'], ['p/index.xml']),
    (['*.htd', '*.mlf'], ['b.mlf', 'p/a.HTD']), (['a.*'], ['p/a.HTD']), (['README'], ['README']), (['*.none'], [])])
def test_names_are_asked_for_by_their_last_part_in_any_case(tmp_path, globs, names):
    l = Listing(touch(tmp_path, 'p/Index.idx.xml', 'p/index.xml', 'p/a.HTD', 'b.mlf', 'README', 'x.htd/b.tif'))
    assert l.named(*globs) == names

@pytest.mark.parametrize('store', ['p.zarr/A/1/0/.zattrs', 'q/p.ZARR/zarr.json', 'plain/.zgroup', 'other/zarr.json'])
def test_a_store_is_one_name(tmp_path, store):
    l = Listing(touch(tmp_path, store, 'a/b.tif', 'a/c.zip'))
    name = next(store[:i+5] for i in [store.lower().find('.zarr')] if i > 0) if '.zarr' in store.lower() else store.split('/')[0]
    assert l.names == sorted(['a/b.tif', 'a/c.zip', name])
    assert Listing(tmp_path/name).names == [name.split('/')[-1]]

def test_a_file_is_a_folder_with_one_name(tmp_path):
    l = Listing(touch(tmp_path, 'p/a.nd2', 'p/b.nd2')/'p/a.nd2')
    assert l.names == ['a.nd2'] and l.root == tmp_path/'p'

def test_a_zip_is_a_folder(tmp_path):
    with ZipFile(tmp_path/'x.zip', 'w') as z:
        for n in ('P/B03.tif', 'P/', '__MACOSX/P/._B03.tif', 'P/map.csv', '.x/a.tif'): z.writestr(n, 'well\nB03')
    l = Listing(tmp_path/'x.zip')
    assert l.names == ['P/B03.tif', 'P/map.csv'] and l.text('P/map.csv') == 'well\nB03'
    assert l.path('P/B03.tif') == f'{tmp_path}/x.zip#P/B03.tif' and l.passed == ['.x', '__MACOSX/P']

XML = '<?xml version="1.0" encoding="{}"?>\n<a xmlns="http://x/V5" xmlns:b="http://y"><c b:Row="2">\xb5m</c></a>'

@pytest.mark.parametrize('declared,written', [
    ('utf-8', 'utf-8-sig'), ('utf-8', 'utf-8'), ('ISO-8859-1', 'latin-1'), ('utf-16', 'utf-16'), ('utf-16', 'utf-8'),
    ('utf-8', 'latin-1'), ('windows-1252', 'cp1252')])
def test_xml_in_any_encoding_without_namespaces(tmp_path, declared, written):
    (tmp_path/'i.xml').write_bytes(XML.format(declared).encode(written))
    o = Listing(tmp_path).xml('i.xml').find('c')
    assert o.text == '\xb5m' and o.attrib == {'Row': '2'}

@pytest.mark.parametrize('raw', [b'', b'<a><b></a>', b'\x00\x01', b'<a>'+b'x'*50])
def test_damaged_xml_is_named(tmp_path, raw):
    (tmp_path/'i.xml').write_bytes(raw)
    with pytest.raises(ValueError, match=r'i\.xml: damaged XML'): Listing(tmp_path).xml('i.xml')

def test_a_closed_folder_is_named(tmp_path, capsys, monkeypatch):
    touch(tmp_path, 'a/B02.tif', 'b/B02.tif')
    scan = os.scandir
    def closed(d):
        if str(d).endswith('b'): raise PermissionError(13, 'Permission denied', str(d))
        return scan(d)
    monkeypatch.setattr(os, 'scandir', closed)
    assert Listing(tmp_path).images == ['a/B02.tif'] and 'b is left out: Permission denied' in capsys.readouterr().out

# --- patterns

def read(root, pattern, *columns, **kw):
    t = long_by_names(Listing(root), pattern, **kw)
    return t[list(columns)].values.tolist() if columns else t

@pytest.mark.parametrize('name,pattern,fields', [
    ('AS_09125_0501_D03f00d0.tif', '{plate}_{well}f{site}d{channel}.tif',
     dict(plate='AS_09125_0501', well='D03', site='0', channel='0')),
    ('x_B02_w10_s1.tif', '{_}_{well}_w{channel}_s{site}.tif', dict(well='B02', channel='10', site='1')),
    ('x_B02_w10.tif', 'x_{well}_w{channel}{_}.tif', dict(channel='10')),
    ('x_B02_w1Conf640.tif', 'x_{well}_w{channel}{_}.tif', dict(channel='1')),
    ('B02_wDAPI.tif', '{well}_w{channel}.tif', dict(channel='DAPI')),
    ('B02_s12x3.tif', '{well}_s{site}x{z}.tif', dict(site='12', z='3')),
    ('a/b/c/B02_1.tif', '**/{well}_{channel}.tif', dict(well='B02')),
    ('B02_1.tif', '**/{well}_{channel}.tif', dict(well='B02')),
    ('p1/x/y/B02_1.tif', '{plate}/**/{well}_{channel}.tif', dict(plate='p1', well='B02')),
    ('B02_t003_1.tif', '{well}_t{time}_{channel}.tif', dict(t='3')),
    ('r02c11.tif', 'r{row}c{col}.tif', dict(row='02', col='11')),
    ('B11.tif', '{row}{col}.tif', dict(row='B', col='11')),
    ('002011003.tif', '{row:3}{col:3}{site:3}.tif', dict(row='002', col='011', site='3')),
    ('U10--V01.tif', 'U{col+1}--V{row+1}.tif', dict(col='11', row='2')),
    ('B0212.tif', '{well}{site}.tif', dict(well='B02', site='12')),
    ('AB12_1.tif', '{well}_{channel}.tif', dict(well='AB12')),
    ('B02_1_2.tif', '{well}_{channel}_{cycle}.tif', dict(channel='1_cycle2')),
    ('B02_c3.tif', '{well}_c{cycle}.tif', dict(channel='cycle3')),
    ('B02_1.TIF', '{well}_{channel}.tif', dict(well='B02')),
    ('B02_1.tif', '{well}_{channel}.TIF', dict(well='B02')),
    ('B02 [x] (1).tif', '{well} [x] ({site}).tif', dict(site='1'))])
def test_holes_take_what_is_meant(tmp_path, name, pattern, fields):
    row = read(touch(tmp_path, name), pattern).iloc[0]
    assert {k: row[k] for k in fields} == fields and row.file == name

@pytest.mark.parametrize('name,pattern,said', [
    ('B02_s1_DAPI.tif', '{well}_s{site}-{channel}.tif', 'up to `{well}_s`, then `1_DAPI.tif` against `{site}-{channel}.tif`'),
    ('exp/B02_1.tif', '{well}_{channel}.tif', r'1 folders deep, the pattern 0; `\*\*/`'),
    ('B02_dapi.tif', '{well}_DAPI.tif', 'upper and lower case only'),
    ('B02_1.tif', '{well}_{channel}.png', 'then `1.tif` against `{channel}.png`'),
    ('x/B02_1.tif', 'y/{well}_{channel}.tif', 'up to ``, then `x/B02_1.tif` against `y/{well}'),
    ('B02_13.tif', '{well}_{site}{channel}.tif', 'where does {site} end and {channel} begin.*{site:3}'),
    ('B02_13.tif', '{well}_{when}.tif', 'unknown field {when}'),
    ('B02_13.tif', '{_}_{channel}.tif', "names no {well}.*well='A01'")])
def test_patterns_that_fail_say_what_differs(tmp_path, name, pattern, said):
    touch(tmp_path, name, name.replace('B02', 'C03'))
    with pytest.raises(ValueError, match=said): read(tmp_path, pattern)

def test_the_nearest_name_is_the_one_that_gets_furthest(tmp_path):
    touch(tmp_path, 'aaa.tif', 'P1/overview.tif', 'P1/B02_s1_w1.tif')
    with pytest.raises(ValueError, match='P1/B02_s1_w1.tif matches up to `{plate}/{well}_s`, then `1_w1.tif` against `{site}_c'):
        read(tmp_path, '{plate}/{well}_s{site}_c{channel}.tif')

@pytest.mark.parametrize('shape,names,wells', [
    ((16, 24), ('W0013', 'W0097', 'W0384'), ['A13', 'E01', 'P24']), ((8, 12), ('W0013', 'W0096'), ['B01', 'H12']),
    ((32, 48), ('W1536',), ['AF48'])])
def test_a_running_number_is_a_well_of_a_plate(tmp_path, shape, names, wells):
    touch(tmp_path, *[f'{n}F0001C1.tif' for n in names])
    assert read(tmp_path, 'W{well}F{site}C{channel}.tif', 'well', plate_shape=shape) == [[w] for w in wells]

@pytest.mark.parametrize('name,shape,said', [
    ('W0013', None, r'wells are numbers, such as 0013.*plate_shape=\(8,12\)'), ('W0097', (8, 12), 'no well 0097 on a plate of 8 x 12'),
    ('W0000', (8, 12), r'no well 0000.*{well\+1}')])
def test_a_running_number_without_its_plate_is_a_question(tmp_path, name, shape, said):
    touch(tmp_path, f'{name}C1.tif')
    with pytest.raises(ValueError, match=said): read(tmp_path, 'W{well}C{channel}.tif', plate_shape=shape)
    assert read(touch(tmp_path/'0', 'W0000C1.tif'), 'W{well+1}C{channel}.tif', 'well', plate_shape=(8, 12)) == [['A01']]

def test_positions_are_wells_of_a_plate_where_its_shape_is_given(tmp_path):
    touch(tmp_path, '01_POS002_D.TIF', '01_POS218_D.TIF')
    assert read(tmp_path, '01_{well}_{channel}.TIF', 'well') == [['POS002'], ['POS218']]
    assert read(tmp_path, '01_{well}_{channel}.TIF', 'well', plate_shape=(16, 24)) == [['A02'], ['J02']]
    assert read(touch(tmp_path/'x', 'B03_1.tif', 'B04_1.tif'), '{well}_{channel}.tif', 'well', plate_shape=(16, 24)) == [['B03'], ['B04']]

def test_folders_without_wells_have_one(tmp_path):
    touch(tmp_path, 'Ch1.tif', 'Ch2.tif')
    assert read(tmp_path, 'Ch{channel}.tif', 'well', 'channel', well='B03') == [['B03', '1'], ['B03', '2']]
    with pytest.raises(ValueError, match='names wells, so that'): read(tmp_path, '{well}.tif', well='B03')

def test_a_running_number_over_channels_is_a_site_by_its_rank(tmp_path):
    names = [f'WellB03_Channel{c}_Seq{i:04d}.tif' for i,c in enumerate(['DAPI', 'GFP']*3)]
    touch(tmp_path, *names, *[f'WellC02_Channel{c}_Seq{i+6:04d}.tif' for i,c in enumerate(['DAPI', 'GFP']*2)])
    pattern = 'Well{well}_Channel{channel}_Seq{seq}.tif'
    t = sites_by_names(tmp_path, pattern)[0]
    assert t.well.tolist() == ['B03']*3+['C02']*2 and t.file_GFP[1] == 'WellB03_ChannelGFP_Seq0003.tif'
    for gone in (names[3], names[5]):
        (tmp_path/gone).unlink()
        with pytest.raises(ValueError, match='does not run evenly'): sites_by_names(tmp_path, pattern)
        touch(tmp_path, gone)

def test_a_pattern_reaches_what_has_an_opener(tmp_path):
    np.save(tmp_path/'B03.npy', np.ones((2, 4, 6), np.uint16)); np.save(tmp_path/'C02.npy', np.zeros((2, 4, 6), np.uint16))
    s = Screen.from_pattern(tmp_path, '{well}.npy', channels=['DNA', 'ER'])
    assert s.table.well.tolist() == ['B03', 'C02'] and (s.read(0) == 1).all() and s.read(0).shape == (2, 4, 6)

# --- instruments

WELLS = [('B', 3), ('C', 2), ('H', 12)]

def index(row, col, n): return (ord(row)-65)*n+col

NAMES = { # of row, column, site 1 or 2, channel 1 or 2; and what channel 1 is called
    'Opera Phenix, Operetta': (lambda r,c,s,k: f'P1/Images/r{ord(r)-64:02d}c{c:02d}f{s:02d}p01-ch{k}sk1fk1fl1.tiff', '1'),
    'Opera Phenix, Operetta, short': (lambda r,c,s,k: f'P1/r{ord(r)-64:02d}c{c:02d}f{s:02d}p01-ch{k}.tiff', '1'),
    'Operetta, Columbus': (lambda r,c,s,k: f'{ord(r)-64:03d}{c:03d}-{s}-001001{k:03d}.tif', '001'),
    'Cytation, planes': (lambda r,c,s,k: f'{r}{c}_01_{k}_{s}Z0_{["DAPI", "GFP"][k-1]}_001.tif', 'DNA'),
    'Micro-Manager, wells': (lambda r,c,s,k: f'{r}{c}/Pos{s-1}/img_000000000_{["DAPI", "GFP"][k-1]}_000.tif', 'DNA'),
    'plain names, f': (lambda r,c,s,k: f'P1/{r}{c:02d}_f{s:02d}_{["DAPI", "GFP"][k-1]}.tif', 'DNA'),
    'plain names, field': (lambda r,c,s,k: f'P1/{r}{c:02d}_field{s}_{["DAPI", "GFP"][k-1]}.tif', 'DNA'),
    'plain names, site': (lambda r,c,s,k: f'P1/{r}{c:02d}_site{s}_{["DAPI", "GFP"][k-1]}.tif', 'DNA'),
    'plain names, planes': (lambda r,c,s,k: f'P1/{r}{c:02d}_s{s}_z01_{["DAPI", "GFP"][k-1]}.tif', 'DNA'),
    'plain names, times': (lambda r,c,s,k: f'P1/{r}{c:02d}_s{s}_t1_{["DAPI", "GFP"][k-1]}.tif', 'DNA'),
    'RxRx': (lambda r,c,s,k: f'HUVEC-01/Plate1/{r}{c:02d}_s{s}_w{k}.png', '1'),
    'ImageXpress': (lambda r,c,s,k: f'P/2023-02-21/1334/P_{r}{c:02d}_s{s}_w{k}{s}B{k}915F6-0679-4494-82D1-F80894B3{c:02d}66.tif', '1'),
    'CellVoyager': (lambda r,c,s,k: f'A_1/A/A_{r}{c:02d}_T0001F{s:03d}L01A01Z01C{k:02d}.tif', '01'),
    'CQ1, CQ3K': (lambda r,c,s,k: f'Image/W{index(r, c, 12):04d}F{s:04d}T0001Z000C{k}.tif', '1'),
    'InCell': (lambda r,c,s,k: f'{r} - {c}(fld {s} wv {["DAPI - DAPI", "FITC - FITC"][k-1]}).tif', 'DNA'),
    'InCell, planes': (lambda r,c,s,k: f'{r} - {c:02d}(fld {s:02d} wv {["DAPI - DAPI", "TL-Brightfield - Cy3"][k-1]} z 01).tif', 'DNA'),
    'ScanR': (lambda r,c,s,k: f'data/{r}{c}--W{index(r, c, 12):05d}--P{s:05d}--Z00000--T00000--{[405, 488][k-1]} nm #1.tif', '405 nm #1'),
    'ArrayScan': (lambda r,c,s,k: f'MFG_0912_77_{r}{c:02d}f{s-1:02d}d{k-1}.tif', '0'),
    'ArrayScan, kinetic': (lambda r,c,s,k: f'MFGcx7_1707020900i3t001{r}{c:02d}f{s-1:02d}d{k-1}.tif', '0'),
    'Cytation': (lambda r,c,s,k: f'{r}{c}_01_{k}_{s}_{["DAPI", "GFP"][k-1]}_001.tif', 'DNA'),
    'Harmony, tiles': (lambda r,c,s,k: f'x/Timepoint001_Row{ord(r)-64:02d}_Well{c:02d}_{["DAPI", "GFP"][k-1]}_zstack001_r00{s-1}_c000.tif', 'DNA'),
    'Nikon JOBS': (lambda r,c,s,k: f'Well{r}{c:02d}_Channel{["DAPI", "GFP"][k-1]}_Seq{(index(r, c, 12)*2+s)*2+k:04d}.tif', 'DNA'),
    'Nikon JOBS, points': (lambda r,c,s,k: f'Well{r}{c:02d}_Point{r}{c:02d}_000{s}_Channel{["DAPI", "GFP"][k-1]}_Seq0{s}{c}.tif', 'DNA'),
    'Nikon': (lambda r,c,s,k: f'{r}{c:02d}xy{s:02d}c{k}.tif', '1'),
    'Leica Matrix Screener': (lambda r,c,s,k: f'slide--S00/chamber--U{c-1:02d}--V{ord(r)-65:02d}/field--X0{s-1}--Y00/image--L00--S00--U{c-1:02d}'
        f'--V{ord(r)-65:02d}--J20--E00--O00--X0{s-1}--Y00--T00--Z00--C0{k-1}.ome.tif', '00'),
    'Micro-Manager, plate': (lambda r,c,s,k: f'{r}{c}-Site_{s-1}/img_000000000_{["DAPI", "GFP"][k-1]}_000.tif', 'DNA'),
    'CellProfiler, Vitra': (lambda r,c,s,k: f'Channel_{k}-{index(r, c, 12):02d}-{r}-{c:02d}-0{s-1}.tif', '1'),
    'plain names': (lambda r,c,s,k: f'P1/{r}{c:02d}_s{s}_{["DAPI", "GFP"][k-1]}.tif', 'DNA'),
    'plain names with a plate': (lambda r,c,s,k: f'P1_{r}{c:02d}_s{s}_{["DAPI", "GFP"][k-1]}.tif', 'DNA')}

def value(r, c, s, k): return ord(r)*100+c*4+s*2+k

@pytest.mark.parametrize('instrument', NAMES)
def test_folders_of_instruments_open_with_every_pixel_in_its_well(tmp_path, instrument):
    name,first = NAMES[instrument]
    for r,c in WELLS:
        for s in (1, 2):
            for k in (1, 2):
                f = tmp_path/name(r, c, s, k)
                f.parent.mkdir(parents=True, exist_ok=True)
                imwrite(f.with_suffix('.tif'), np.full((4, 6), value(r, c, s, k), np.uint16))
                f.with_suffix('.tif').rename(f)
    there = Listing(tmp_path)
    assert guess_pattern(there).preset[0] == instrument
    shape = (8, 12) if instrument.startswith('CQ') else None
    t,left = sites_by_names(there, instrument_pattern(there), plate_shape=shape)
    s = Screen(t, root=tmp_path)
    assert left == dict(z=None, t=None) and s.channels[0] == first and len(s) == 6 and len(s.wells) == 3
    assert s.table.well.tolist() == [w for w in ('B03', 'C02', 'H12') for _ in range(2)]
    for i,((r,c),n) in enumerate((w, n) for w in WELLS for n in (1, 2)):
        assert s.read(i)[:,0,0].tolist() == [value(r, c, n, 1), value(r, c, n, 2)]

def test_incell_of_one_field(tmp_path):
    l = Listing(touch(tmp_path, *[f'{w}(wv {k} - {k}).tif' for w in ('B - 03', 'C - 02') for k in ('DAPI', 'FITC')]))
    assert sites_by_names(l, instrument_pattern(l))[0].well.tolist() == ['B03', 'C02']

def test_plates_in_folders_of_unequal_depth_are_proposed_as_one(tmp_path):
    l = Listing(touch(tmp_path, *[f'{d}/{w}_s1_DAPI.tif' for d in ('P1', 'batch2/P2') for w in ('B03', 'C02', 'H12')]))
    with pytest.raises(FileNotFoundError) as e: instrument_pattern(l)
    pattern = re.search("'([*]{2}.*?)'", str(e.value))[1]
    assert sites_by_names(l, pattern)[0][['plate', 'well']].values.tolist() == [[p, w] for p in ('P1', 'P2') for w in ('B03', 'C02', 'H12')]

def test_letters_are_no_columns_of_a_fixed_width(tmp_path):
    l = Listing(touch(tmp_path, 'sample-1-bluestain.tif', 'mutant-2-bluestain.tif'))
    assert not guess_pattern(l)['preset'].str.contains('Columbus').any()

def test_every_preset_is_tried_or_needs_a_word():
    alike = {'InCell, one field', 'ImageXpress, one site', 'ImageXpress, one channel', 'InCell, planes, times', 'InCell, times', 'CellProfiler, Fly',
             'EVOS', 'EVOS, planes', 'a file per site', 'a file per well', 'Micro-Manager 2, plate', 'Micro-Manager, stacks'} # in the other tests
    assert {p.name for p in PRESETS} == {*NAMES, *alike, *NO_WELLS}

NO_WELLS = {'Leica LAS X': 'x/Series009_z00_ch0{}.tif', 'Leica LAS X, times': 'Pos008_t000_z00_ch0{}.tif', 'Zeiss, split': 'plate1_S00001_T00009_C0000{}.tiff',
            'Micro-Manager': 'img_channel00{}_position008_time000000000_z000.tif'}

@pytest.mark.parametrize('preset', NO_WELLS)
def test_names_without_wells_are_a_question_with_its_answer(tmp_path, preset):
    l = Listing(touch(tmp_path, *[NO_WELLS[preset].format(i) for i in (0, 1)]))
    with pytest.raises(FileNotFoundError, match=r"Screen\.from_pattern.*well='A01'"): instrument_pattern(l)
    t = sites_by_names(l, instrument_pattern(l, 'A01'), well='A01')[0]
    assert t.well.tolist() == ['A01'] and len([c for c in t if c.startswith('file_')]) == 2

@pytest.mark.parametrize('names,pattern', [
    (['P1/B02_s1_w1.png', 'P2/B02_s1_w1.png'], '{plate}/{well}_s{site}_w{channel}.png'),
    (['A_B02_w1.tif', 'A_B03_w1.tif'], '{plate}_{well}_w{channel}{_}.tif'),
    (['A_B02_s1.tif', 'A_B03_s2.tif'], '{plate}_{well}_s{site}{_}.tif'),
    (['x/TimePoint_1/A_B02_s1_w1.TIF', 'x/TimePoint_2/A_B02_s1_w1.TIF'], '{_}/TimePoint_{t}/{plate}_{well}_s{site}_w{channel}{_}.TIF'),
    (['x/ZStep_1/A_B02_s1_w1.TIF', 'x/ZStep_2/A_B02_s1_w1.TIF'], '{_}/ZStep_{z}/{plate}_{well}_s{site}_w{channel}{_}.TIF'),
    (['i/B7_01_1_3_DAPI_001.tif', 'masks/B7_01_1_3_DAPI_001_MaskNuclei.tif'], '{plate}/{well}_{_}_{_}_{site}_{channel}_{t}.tif'),
    (['A - 1(fld 1 wv DAPI - DAPI time 1 z 2).tif'], '{well}(fld {site} wv {channel} time {t} z {z}).tif'),
    (['A - 1(fld 1 wv DAPI - DAPI time 2).tif'], '{well}(fld {site} wv {channel} time {t}).tif'),
    (['P1/B03/B03_s1_DAPI.tif', 'P1/C02/C02_s1_DAPI.tif'], '{plate}/{well}/{well}_s{site}_{channel}.tif'),
    (['P1/B03_s1_DAPI.tif', 'P2/C02_s1_DAPI.tif'], '{plate}/{well}_s{site}_{channel}.tif'),
    (['P1/B03_s1_DAPI.tif'], '{plate}/{well}_s{site}_{channel}.tif'),
    (['A_B03_s1.tif', 'A_C02_s1.tif'], '{plate}_{well}_s{site}{_}.tif'),
    (['01_POS002_D.TIF', '01_POS076_D.TIF'], '{_}_{well}_{channel}.TIF')])
def test_what_is_guessed(tmp_path, names, pattern):
    assert instrument_pattern(Listing(touch(tmp_path, *names))) == pattern

def test_two_layouts_in_one_folder_are_listed_and_refused(tmp_path):
    touch(tmp_path, *[f'm/A_{w}_s1_w1.tif' for w in ('B02', 'C03')], *[f'm/ZStep_1/A_{w}_s1_w{c}.tif' for w in ('B02', 'C03') for c in '12'])
    with pytest.raises(FileNotFoundError, match=r"'{_}/ZStep_1/{plate}_\S+' or \S+ or \S*'{_}/{plate}_|'{_}/{plate}_") as e:
        instrument_pattern(Listing(tmp_path))
    assert str(e.value).count('Screen.from_pattern') == 2
    assert guess_pattern(tmp_path).share.round(2).tolist()[:1] == [.67]

@pytest.mark.parametrize('names,said', [
    (['B03_thumb.tif'], 'no images.*1 hidden files and thumbnails, such as B03_thumb.tif. Check the path'),
    (['x.flex', 'y.flex'], r'Export them as TIFF or convert them with bioformats2raw: 2 \.flex \(Opera\)'), (['x'], 'Check the path')])
def test_folders_without_images_say_what_is_there(tmp_path, names, said):
    with pytest.raises(FileNotFoundError, match=said): instrument_pattern(Listing(touch(tmp_path, *names)))

def test_folders_that_instruments_make_are_no_plates(tmp_path):
    l = Listing(touch(tmp_path, *[f'{p}/data/B{i}--W00015--P00001--Z00000--T00000--DAPI.tif' for p in ('P1', 'P2') for i in (2, 3)]))
    assert sites_by_names(l, instrument_pattern(l))[0].plate.tolist() == ['P1']*2+['P2']*2

def test_few_strays_do_not_hide_an_instrument(tmp_path, capsys):
    touch(tmp_path, 'overview.tif', *[f'B{i:02d}_s1_w1.tif' for i in range(1, 13)])
    assert instrument_pattern(Listing(tmp_path)) == '{well}_s{site}_w{channel}.tif'
    assert preset_of('{well}_s{site}_w{channel}.tif') == 'RxRx' and preset_of('x/{plate}_{well}_s{site}_w{channel}{_}.tif') == 'ImageXpress'

def test_two_hundred_thousand_names_are_read_in_seconds(tmp_path):
    import time
    l = Listing(tmp_path)
    l.names = [f'P{p}/{w}{c:02d}_s{s}_w{k}.tif' for p in range(10) for w in 'ABCDEFGHIJKLMNOP' for c in range(1, 25)
               for s in range(1, 10) for k in range(1, 7)]
    t = time.process_time()
    df = sites_by_names(l, '{plate}/{well}_s{site}_w{channel}.tif')[0]
    assert len(df) == 34560 and time.process_time()-t < 3

@pytest.mark.parametrize('names,wells', [
    (['E01/plate1_S00001_T00001_C00001.tiff', 'E02/plate1_S00001_T00001_C00001.tiff'], ['E01', 'E02']),
    (['x/E01/Series009_z00_ch00.tif', 'x/F02/Series009_z00_ch00.tif'], ['E01', 'F02']),
    (['E01/Pos008_t000_z00_ch00.tif'], ['E01']), (['E01/img_channel000_position008_time000000000_z000.tif'], ['E01']),
    (['B03_s1.ome.tif', 'C02_s1.ome.tif'], ['B03', 'C02']), (['B03.tif', 'C02.tif'], ['B03', 'C02']), (['P/B03.npy', 'P/C02.npy'], ['B03', 'C02']),
    (['x_R_p00_0_B03f00d0.TIF', 'x_R_p00_0_C02f00d0.TIF'], ['B03', 'C02'])])
def test_wells_are_in_the_name_or_in_the_folder(tmp_path, names, wells):
    l = Listing(touch(tmp_path, *names))
    assert sites_by_names(l, instrument_pattern(l))[0].well.tolist() == wells

@pytest.mark.parametrize('folders', [('P01', 'P02', 'P03'), ('A1', 'A2', 'B1'), ('P1', 'A1')])
def test_plates_that_are_called_like_wells_stay_plates(tmp_path, folders):
    l = Listing(touch(tmp_path, *[f'{p}/{w}_s1_w1.png' for p in folders for w in (*folders, 'B03', 'C02', 'D04', 'E05', 'H12')]))
    assert instrument_pattern(l) == '{plate}/{well}_s{site}_w{channel}.png'

def test_folders_called_p1_are_plates_and_no_wells(tmp_path):
    l = Listing(touch(tmp_path, 'P1/Series009_z00_ch00.tif', 'P2/Series009_z00_ch00.tif'))
    with pytest.raises(FileNotFoundError, match=r"{plate}/\S*Series{site}.*well='A01'"): instrument_pattern(l)

def test_a_running_number_that_channels_share_is_the_site(tmp_path):
    touch(tmp_path, *[f'WellE01_Channel{c}_Seq{i:04d}.tif' for c in ('DAPI', 'GFP') for i in (9, 10)])
    (tmp_path/'WellE01_ChannelGFP_Seq0009.tif').unlink()
    t = sites_by_names(tmp_path, 'Well{well}_Channel{channel}_Seq{seq}.tif')[0]
    assert t.site.tolist() == ['0009', '0010'] and t.file_GFP.tolist() == ['', 'WellE01_ChannelGFP_Seq0010.tif']

def test_where_some_sites_are_numbers_the_others_are_left_out(tmp_path, capsys):
    touch(tmp_path, 'B03_s1.tif', 'C02_s2.tif', 'C02_s2_mask.tif')
    assert sites_by_names(tmp_path, '{well}_s{site}.tif')[0].site.tolist() == ['1', '2']
    assert '1 of 3 images do not match the pattern, such as C02_s2_mask.tif' in capsys.readouterr().out
    touch(tmp_path/'x', 'B03_sa.tif', 'B03_sb.tif')
    assert sites_by_names(tmp_path/'x', '{well}_s{site}.tif')[0].site.tolist() == ['a', 'b']
    assert '{site} is no number, such as a' in capsys.readouterr().out

@pytest.mark.parametrize('names', [['B03_s1-DAPI.tif', 'B03_s1-GFP.tif'], ['B03-DAPI.tif'], ['B03_DAPI.tif', 'B03_GFP.tif']])
def test_channels_are_never_taken_for_sites(tmp_path, names):
    with pytest.raises(FileNotFoundError, match='Say how they are named'): instrument_pattern(Listing(touch(tmp_path, *names)))

def test_a_folder_on_the_web_is_listed_and_its_stores_are_names(tmp_path, monkeypatch):
    fsspec = pytest.importorskip('fsspec')
    monkeypatch.setenv('CELLMAE_CACHE', str(tmp_path))
    fs = fsspec.filesystem('memory')
    for n in ('P1/B03_s1_w1.tif', 'P1/._B03_s1_w1.tif', 'x.zarr/A/1/.zattrs', 'map.csv'): fs.pipe(f'/plates/{n}', b'well\nB03')
    try:
        l = Listing('memory://plates/')
        assert l.names == ['P1/B03_s1_w1.tif', 'map.csv', 'x.zarr'] and l.passed == ['P1/._B03_s1_w1.tif']
        assert l.path('map.csv') == 'memory://plates/map.csv' and l.text('map.csv') == 'well\nB03'
        assert sites_by_names(l, instrument_pattern(l))[0].file_1.tolist() == ['P1/B03_s1_w1.tif']
    finally: fs.rm('/plates', recursive=True)

def test_a_long_list_says_how_far_it_is(tmp_path, capsys):
    from cellmae.patterns import _noted
    assert len([*_noted([('.', ['a'], [])]*3, 'root', every=0)]) == 3
    assert '3 files listed below root' in capsys.readouterr().out

def test_micro_manager_stacks_of_a_plate(tmp_path):
    x = np.random.default_rng(0).integers(0, 99, (2,2,2,4,6)).astype('u2')
    for i,s in product(range(2), range(2)):
        imwrite(tmp_path/f"run_1_MMStack_{('B03','C02')[i]}-Site_{s}.ome.tif", x[i,s],
                metadata=dict(axes='CYX', Channel=dict(Name=['WGA','DAPI'])))
    s = Screen.open(tmp_path)
    assert s.channels==['golgi','DNA'] and list(s.table['well'])==['B03']*2+['C02']*2
    for i in range(4): np.testing.assert_array_equal(s.read(i), x[i//2,i%2])

def test_micro_manager_files_of_a_plate_are_asked_with_their_wells(tmp_path):
    l = Listing(touch(tmp_path, *[f'{w}-Site_{s}/img_channel00{c}_position00{s}_time000000000_z000.tif'
                                  for w,s,c in product(('B03','C02'), range(2), range(2))]))
    with pytest.raises(FileNotFoundError, match=r'\{well\}-Site_\{site\}/img_channel'): instrument_pattern(l)
