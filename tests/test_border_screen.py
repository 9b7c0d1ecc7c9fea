"What people really have: folders, plate maps, tables of other machines; read, or refused with the cure"
import os
import signal
import subprocess
import sys
import time
from functools import partial
from itertools import product

import numpy as np
import pandas as pd
import pytest
from tifffile import imwrite

from cellmae.images import ImageError
from cellmae.screen import SITE, WELL, Screen, open_screen, split

rng = np.random.default_rng(0)

def image(f, kind='u2', top=4000, shape=(8, 8)):
    f.parent.mkdir(parents=True, exist_ok=True)
    imwrite(f, rng.integers(top//20, top, shape).astype(kind), photometric='minisblack')

def images(root, *names):
    for n in names: image(root/n)
    return root

def listed(**columns):
    "A screen that is only a table"
    return Screen(pd.DataFrame({'well': ['B02', 'B03', 'C02'], 'file': list('abc'), **columns}), ['DNA'])

# --- who is who

site_names = 'Plate{plate}/{well}_s{site}_w{channel}.tif'

@pytest.fixture
def rxrx(tmp_path):
    "Two experiments that both call their plates 1 and 2"
    for b,p,w,s,c in product(('HUVEC-01', 'U2OS-01'), '12', ('B02', 'B03', 'C02'), '12', '12'):
        image(tmp_path/f'{b}/Plate{p}/{w}_s{s}_w{c}.tif')
    return Screen.from_pattern(tmp_path, '{batch}/'+site_names, channels={'1': 'DNA', '2': 'ER'})

def test_plates_that_are_numbered_anew_in_every_batch_stay_apart(rxrx):
    assert len(rxrx) == 24 and len(rxrx.wells) == 12 and (rxrx.wells.sites == 2).all()
    assert 'plates=4' in repr(rxrx) and not (rxrx.check().problem == 'duplicate').any()
    assert not rxrx.wells.duplicated(WELL).any() and rxrx.wells.duplicated(['plate', 'well']).any()

@pytest.mark.parametrize('by,unit', [('well', WELL), ('plate', WELL[:2]), ('batch', WELL[:1])])
def test_groups_of_a_split_are_those_of_their_batch(rxrx, by, unit):
    train,valid = [{tuple(o) for o in rxrx.table[unit].to_numpy()[ids]} for ids in split(rxrx, .5, by)]
    n = len(rxrx.table[unit].drop_duplicates())
    assert not train&valid and len(train)+len(valid) == n and abs(len(train)-len(valid)) <= 1

def test_a_plate_map_is_joined_by_all_that_both_know(rxrx, tmp_path):
    meta = rxrx.wells[WELL].assign(perturbation=['P%02d' % i for i in range(12)])
    s = Screen.from_pattern(tmp_path, '{batch}/'+site_names, meta=meta)
    assert s.wells.perturbation.nunique() == 12
    with pytest.raises(ValueError, match="two rows for plate 1, well B02: .*batch 'HUVEC-01' and 'U2OS-01'"):
        Screen.from_pattern(tmp_path/'HUVEC-01', site_names, meta=meta)

def test_the_place_of_an_error_names_the_batch(rxrx, tmp_path):
    (tmp_path/'U2OS-01/Plate1/B02_s1_w2.tif').unlink()
    i = rxrx.table.index[(rxrx.table[SITE] == ['U2OS-01', '1', 'B02', '1']).all(axis=1)][0]
    with pytest.raises(ImageError, match='batch U2OS-01, plate 1, well B02, site 1'): rxrx.read(i)
    assert rxrx.check().query('problem=="missing"')[SITE].values.tolist() == [['U2OS-01', '1', 'B02', '1']]

@pytest.mark.parametrize('perturbation,control,problem', [
    (['TP53', 'MYC', 'A'], None, 'two perturbations'), (['DMSO', 'KIF11', 'A'], None, 'two perturbations'),
    (['TP53', '', 'A'], None, 'two perturbations'), (['X', 'X', 'A'], ['yes', 'no', 'no'], 'control and not')])
def test_a_well_that_contradicts_itself(perturbation, control, problem):
    more = {} if control is None else dict(control=control)
    s = listed(well=['B02', 'B02', 'C02'], site=['1', '2', '1'], perturbation=perturbation, **more)
    row = s.check().query('problem==@problem').iloc[0]
    assert row.well == 'B02' and all((p or 'none') in row.cure for p in perturbation[:2])
    assert s.wells[['perturbation', 'control']].values.tolist()[0] == ['', False]

# --- labels

def test_only_a_column_control_is_yes_or_no():
    assert not listed(perturbation=[1, 2, 0]).table.control.any()
    assert not listed(perturbation=['true', 'yes', '1.0']).table.control.any()
    t = listed(perturbation=[1, 2, 1138]).table
    for named in (1138, '1138', [1138.]):
        assert Screen(t, ['DNA'], controls=named).table.control.tolist() == [False, False, True]

def controls(**kw): return listed(**kw).table.control.tolist()

@pytest.mark.parametrize('values', [[True, False, False], ['yes', 'NO', 'n'], [1., 0., 0.], ['T', 'f', 'False'],
                                    ['negcon', 'trt', 'trt']])
def test_a_column_control_in_any_spelling(values): assert controls(control=values) == [True, False, False]

@pytest.mark.parametrize('values', [[True, None, False], pd.array([True, pd.NA, False], dtype='boolean'),
                                    ['yes', ' ', 'no']])
@pytest.mark.parametrize('labels', [{}, dict(perturbation=['A', 'B', 'C'])])
def test_gaps_in_a_column_control_are_counted(values, labels):
    with pytest.raises(ValueError, match='control.*1 of 3'): listed(control=values, **labels)
    assert controls(control=values, perturbation=['A', '', 'C']) == [True, False, False] # an empty well

def test_names_of_genes_are_kept_and_blanks_are_none():
    names = ['NA', 'None', 'nan']
    assert listed(perturbation=names).table.perturbation.tolist() == names
    s = listed(perturbation=[' TP53 ', None, np.nan], well=['A01 ', ' A - 2', 'r1c3'])
    assert s.table[['well', 'perturbation']].values.tolist() == [['A01', 'TP53'], ['A02', ''], ['A03', '']]

@pytest.mark.parametrize('names,problem,said', [
    (['TP53', '', ' '], 'no perturbation', '2 of 3 wells, such as .*well B03.*plate map'),
    (['1-Sep', '2023-03-01', 'A'], 'dates for names', '1-Sep, 2023-03-01.*SEPTIN')])
def test_check_says_what_is_odd_about_names(names, problem, said):
    row = listed(perturbation=names).check().query('problem==@problem')
    assert len(row) == 1 and row.cure.str.contains(said, regex=True).all()

@pytest.mark.parametrize('n', range(4))
def test_check_says_what_so_few_controls_allow(n):
    t = pd.DataFrame(dict(well=[f'A{i:02d}' for i in range(1, 6)], file='a', perturbation=['DMSO']*n+['X']*(5-n)))
    found = Screen(pd.concat([t, t.assign(site='2')]).assign(site=np.repeat(['1', '2'], 5)), ['DNA']).check()
    found = found[found.problem.str.contains('control')]
    assert found.problem.tolist() == [['no controls'], ['one control'], ['two controls'], []][n]
    assert found.cure.str.contains('centr').all() and found.batch.tolist() == found.plate.tolist()

def test_unlabelled_wells_stay_in_training():
    s = listed(perturbation=['X', 'Y', ''])
    assert set(split(s, .5, 'perturbation')[0]) >= {2}

# --- plate maps

@pytest.fixture
def plate(tmp_path): return images(tmp_path/'plate', *[f'{w}_DNA.tif' for w in ('A01', 'A02', 'B01')])

def opened(plate, meta, **kw): return Screen.from_pattern(plate, '{well}_{channel}.tif', meta=meta, **kw).table

def test_the_whole_plate_map_travels(plate, tmp_path):
    rows = ['Well ;gene;dose;guide;type', 'A1;DMSO;0,5;001;neg', 'A2;TP53;1;002;trt', 'B1;NA;2;003;trt']
    (tmp_path/'map.csv').write_text('\n'.join(rows))
    s = Screen.from_pattern(plate, '{well}_{channel}.tif', meta=tmp_path/'map.csv', perturbation='gene')
    again = open_screen(s.save(tmp_path/'saved'))
    for t in (s.table, again.table):
        assert t[['gene', 'guide', 'type']].agg(' '.join, axis=1).tolist() == ['DMSO 001 neg', 'TP53 002 trt', 'NA 003 trt']
        assert t.perturbation.tolist() == ['DMSO', 'TP53', 'NA'] and t.control.tolist() == [True, False, False]
    assert again.table.equals(s.table.assign(file_DNA=again.table.file_DNA))

def test_what_a_name_displaces_is_kept(plate):
    meta = pd.DataFrame(dict(well=['A01', 'A02', 'B01'], perturbation=['c1', 'c2', 'c3'], gene=['X', 'Y', 'Z']))
    t = opened(plate, meta, perturbation='gene')
    assert t.perturbation.tolist() == ['X', 'Y', 'Z'] and t.given_perturbation.tolist() == ['c1', 'c2', 'c3']

@pytest.mark.parametrize('text', [
    'row,col,perturbation\nA,1,X\nA,2,Y\nB,1,Z\n', 'Metadata_Row,Metadata_Col,perturbation\n1,1,X\n1,2,Y\n2,1,Z\n',
    ',1,2\nA,X,Y\nB,Z,\n', 'well,perturbation\nA01 ,X\na2,Y\nB-1,Z\n', 'well,perturbation\nA1,X\nA2,Y\nB1,Z\nA1,X\n',
    'Plate,Well,perturbation\n,A1,X\n,A2,Y\n,B1,Z\n', 'well,perturbation\nA1,X\nA2,Y\nB1,Z\n,total: 3\n'])
def test_plate_maps_of_every_form(plate, tmp_path, text):
    (tmp_path/'map.csv').write_text(text)
    assert opened(plate, tmp_path/'map.csv').perturbation.tolist() == ['X', 'Y', 'Z']

@pytest.mark.parametrize('end', ['.parquet', '.xlsx', '.tsv'])
def test_plate_maps_of_every_kind_of_file(plate, tmp_path, end):
    df = pd.DataFrame(dict(well=['A01', 'A02', 'B01'], perturbation=['X', 'Y', 'NA'], guide=['001', '002', '003']))
    write = {'.parquet': pd.DataFrame.to_parquet, '.xlsx': pd.DataFrame.to_excel, '.tsv': partial(pd.DataFrame.to_csv, sep='\t')}
    write[end](df, f := tmp_path/f'map{end}', index=False)
    assert opened(plate, f)[['perturbation', 'guide']].equals(df[['perturbation', 'guide']].astype(object))

@pytest.mark.parametrize('meta,said', [
    (dict(well=['D01', 'D02'], perturbation='X'), 'None of 3 sites.*files say well A01, the map says well D01'),
    (dict(plate='P9', well=['A01', 'A02'], perturbation='X'), 'files say plate plate, well A01, the map says plate P9'),
    (dict(well=['A01', 'A01'], perturbation=['X', 'Y']), "two rows for well A01: perturbation 'X' and 'Y'"),
    (dict(plate=['plate', ''], well=['A01', 'A02'], perturbation='X'), 'Plate map: 1 of 2 rows name no plate.*merged'),
    (dict(well=['A01', 'A02', 'B01'], control=['yes', '', 'no']), 'Plate map: .*control.*1 of 3'),
    (dict(well=[], perturbation=[]), 'Plate map: no rows')])
def test_plate_maps_that_are_refused(plate, meta, said):
    folder = '{plate}' if 'plate' in meta else 'plate'
    with pytest.raises(ValueError, match=said):
        Screen.from_pattern(plate.parent, folder+'/{well}_{channel}.tif', meta=pd.DataFrame(meta))

def test_a_plate_map_that_misses_some(plate, capsys):
    meta = pd.DataFrame(dict(well=['A01', 'A02', 'H12'], perturbation=['X', 'Y', 'Z'], control=['no', 'yes', 'no']))
    t = opened(plate, meta)
    assert '1 of 3 sites are not in the plate map: well B01' in capsys.readouterr().out
    assert t[['perturbation', 'control']].values.tolist() == [['X', False], ['Y', True], ['', False]]

@pytest.mark.parametrize('names,said', [
    (dict(pertubation='gene'), 'No option pertubation. Did you mean perturbation'),
    (dict(perturbation='genes'), "No column .'genes'"), (dict(perturbation='dose'), 'Two columns are called dose')])
def test_names_of_columns_that_are_refused(plate, names, said):
    meta = pd.DataFrame([['A01', 'X', 1, 2]], columns=['well', 'gene', 'dose', 'dose'])
    if 'dose' not in names.values(): meta = meta.iloc[:,:3]
    with pytest.raises(ValueError, match=said): opened(plate, meta, **names)

def test_sites_that_the_map_misses_are_of_the_batch_of_their_plate(tmp_path, capsys):
    images(tmp_path, 'P1/A01_DNA.tif', 'P1/A02_DNA.tif', 'P2/A01_DNA.tif')
    meta = dict(plate=['P1'], well=['A01'], batch=['week 1'], perturbation=['X'], guide=['001'], dose=[2])
    t = Screen.from_pattern(tmp_path, '{plate}/{well}_{channel}.tif', meta=pd.DataFrame(meta)).table
    assert t.batch.tolist() == ['week 1', 'week 1', 'unknown'] and '2 of 3 sites' in capsys.readouterr().out
    assert t.perturbation.tolist() == ['X', '', ''] and t.guide.tolist() == ['001', '', '']

# --- names of files

def wells(root, pattern, **kw): return Screen.from_pattern(root, pattern, **kw).table.well.tolist()

@pytest.mark.parametrize('name,pattern,plate,well,channel', [
    ('AS_09125_0501_D03f00d0.tif', '{plate}_{well}f{site}d{channel}.tif', 'AS_09125_0501', 'D03', '0'),
    ('Exp_x1_B02_DAPI.tif', '{_}_{well}_{channel}.tif', None, 'B02', 'DNA'),
    ('x_B02_w10_y.tif', '{_}_{well}_w{channel}{_}.tif', None, 'B02', '10'),
    ('x_B02_w101FFA79D-B670-BE49-009C-919D09CE92E8.tif', '{_}_{well}_w{channel}{_}.tif', None, 'B02', '1'),
    ('x_B02_w1001FFA79D-B670-BE49-009C-919D09CE92E8.tif', '{_}_{well}_w{channel}{_}.tif', None, 'B02', '10'),
    ('B02_DAPI-old.tif', '{well}_{channel}{_}.tif', None, 'B02', 'DNA'),
    ('B02_s12x_DAPI.tif', '{well}_s{site}{_}_{channel}.tif', None, 'B02', 'DNA'),
    ('B02_DAPI.TIF', '{well}_{channel}.tif', None, 'B02', 'DNA'),
    ('B02_DAPI.tif', '{well}_{channel}.TIF', None, 'B02', 'DNA')])
def test_holes_take_what_is_meant(tmp_path, name, pattern, plate, well, channel):
    s = Screen.from_pattern(images(tmp_path, name), pattern)
    assert s.table.well[0] == well and s.channels == [channel] and (plate is None or s.table.plate[0] == plate)
    if 's12x' in name: assert s.table.site[0] == '12'

@pytest.mark.parametrize('name,pattern,said', [
    ('AS_09125_D03f00d0.tif', 'AS_{well}f{site}d{channel}.tif', "would be '09125_D03'.*{plate} or {_}"),
    ('exp/A01_dna.tif', 'EXP/{well}_{channel}.tif', 'upper and lower case only'),
    ('a/b/A01_dna.tif', '{plate}/{well}_{channel}.tif', '2 folders deep, the pattern 1'),
    ('A01_t1_dna.tif', '{well}_t{when}_{channel}.tif', 'unknown field {when}'),
    ('A01_t1_dna.tif', '{plate}_{channel}.tif', 'names no {well}')])
def test_patterns_that_are_refused(tmp_path, name, pattern, said):
    with pytest.raises(ValueError, match=said): Screen.from_pattern(images(tmp_path, name), pattern)

def test_wells_that_are_no_place_are_mentioned(tmp_path, capsys):
    assert wells(images(tmp_path, '01_POS002_D.tif', '01_A01_D.tif'), '01_{well}_{channel}.tif') == ['A01', 'POS002']
    assert '1 of 2 wells are no place on a plate, such as POS002' in capsys.readouterr().out

@pytest.mark.parametrize('end', ['C01', 'flex', 'xyz'])
def test_folders_of_other_formats_are_told_from_empty_ones(tmp_path, end):
    for w in ('A01', 'A02'): (tmp_path/f'{w}.{end}').write_bytes(b'x')
    with pytest.raises(ValueError, match=rf'no images.*2 \.{end}( \(\w+\))?\.$'): Screen.from_pattern(tmp_path, '{well}.'+end)
    (tmp_path/'p.zarr/A/1').mkdir(parents=True)
    with pytest.raises(ValueError, match=r'1 \.zarr'): Screen.from_pattern(tmp_path, '{well}.'+end)
    with pytest.raises(ValueError, match='no such folder'): Screen.from_pattern(tmp_path/'none', '{well}.tif')

def test_hidden_files_and_thumbnails_are_counted(tmp_path, capsys):
    images(tmp_path, 'P/A01_1.tif', 'P/A02_1.tif', 'P/._A01_1.tif', 'P/A01_thumb_1.tif', 'P/A02_1_Thumb.tif')
    images(tmp_path, '.Trashes/A09_1.tif', '@eaDir/A09_1.tif')
    assert wells(tmp_path, '{plate}/{well}_{channel}.tif') == ['A01', 'A02']
    assert '5 hidden files and thumbnails are left out' in capsys.readouterr().out

@pytest.mark.parametrize('links', [
    {'all/P2': 'disk/P2'}, {'all/P1/up': 'all'}, {'all/again': 'all/P1'}, {'all/A_first': 'all/P1'},
    {'all/P2': 'disk/P2', 'disk/P2/back': 'all'}, {'all/P2': 'disk/P2', 'all/P3': 'disk/P2'}])
def test_links_are_followed_once(tmp_path, links):
    images(tmp_path, 'all/P1/A01_1.tif', 'disk/P2/A01_1.tif')
    for a,b in links.items(): (tmp_path/a).symlink_to(tmp_path/b)
    plates = Screen.from_pattern(tmp_path/'all', '{plate}/{well}_{channel}.tif').table.plate.tolist()
    assert plates == (['P1', 'P2'] if 'all/P2' in links else ['P1'])

@pytest.mark.parametrize('z,want', [('max', np.max), ('mean', np.mean), (2, None), ('02', None)])
def test_planes_in_separate_files(tmp_path, z, want):
    images(tmp_path, *[f'A01_z{i:02d}_{c}.tif' for i in (1, 2, 10) for c in ('DNA', 'ER')])
    s = Screen.from_pattern(tmp_path, '{well}_z{z}_{channel}.tif', z=z)
    plane = lambda i: Screen.from_pattern(tmp_path, f'{{well}}_z{i:02d}_{{channel}}.tif').read(0)
    stack = np.stack([plane(i) for i in (1, 2, 10)])
    assert (s.read(0) == (stack[1] if want is None else want(stack, 0).round())).all()
    again = open_screen(s.save(tmp_path/'saved'))
    assert (again.read(0) == s.read(0)).all() and again.fingerprint() == s.fingerprint()
    assert s.check().problem.tolist() == again.check().problem.tolist() == ['no controls', 'no perturbation']

@pytest.mark.parametrize('kw', [{}, dict(z=7)])
def test_planes_and_times_must_be_chosen(tmp_path, kw):
    images(tmp_path, 'A01_z01_DNA.tif', 'A01_z02_DNA.tif')
    with pytest.raises(ValueError, match=r"\{z\} is one of \['1', '2'\].*z=1.*z='max'"):
        Screen.from_pattern(tmp_path, '{well}_z{z}_{channel}.tif', **kw)
    with pytest.raises(ValueError, match=r'\{t\} is one of.*t=1'):
        Screen.from_pattern(tmp_path, '{well}_z{time}_{channel}.tif')
    assert len(Screen.from_pattern(tmp_path, '{well}_z{time}_{channel}.tif', t=2)) == 1

def test_channels_of_unequal_depth_are_named(tmp_path):
    images(tmp_path, 'A01_z1_a.tif', 'A01_z2_a.tif', 'A01_z1_b.tif')
    s = Screen.from_pattern(tmp_path, '{well}_z{z}_{channel}.tif', z='max')
    with pytest.raises(ImageError, match='unequal depth.*well A01'): s.read(0)

# --- tables of other machines

def load_data(ways, kind='PathName'):
    t = pd.DataFrame(dict(Metadata_Plate=list(ways), Metadata_Well='A01'))
    if kind == 'URL': return t.assign(URL_OrigDNA=[w.rstrip('/')+'/a.tif' for w in ways.values()])
    return t.assign(FileName_OrigDNA='a.tif', PathName_OrigDNA=list(ways.values()))

@pytest.mark.parametrize('lead', ['/home/ubuntu/bucket/x/', 's3://gallery/x/', 'D:\\scope\\', 'https://host/x/',
                                  '\\\\server\\share\\'])
@pytest.mark.parametrize('kind', ['PathName', 'URL'])
def test_paths_of_another_machine_are_found_below_root(tmp_path, lead, kind):
    images(tmp_path, 'P1/Images/a.tif', 'P2/Images/a.tif')
    t = load_data({p: f'{lead}{p}/Images/' for p in ('P1', 'P2')}, kind=kind)
    for end in ('csv', 'csv.gz'): t.to_csv(tmp_path/f'load_data.{end}', index=False)
    t.to_parquet(tmp_path/'load_data.parquet')
    for f in tmp_path.glob('load_data.*'):
        s = Screen.from_csv(f)
        assert s.table.file_DNA.tolist() == ['P1/Images/a.tif', 'P2/Images/a.tif'] and s.read(1).shape == (1, 8, 8)

def test_two_plates_are_never_found_in_one_place(tmp_path):
    t = load_data({p: f'/home/x/{p}/Images' for p in ('P1', 'P2')})
    with pytest.raises(ValueError, match='would both be a.tif'): Screen(t, root=images(tmp_path, 'a.tif'))
    deep = images(tmp_path/'deep', 'Images/a.tif')
    with pytest.raises(ValueError, match='would both be Images/a.tif'): Screen(t, root=deep)

def test_paths_that_lead_nowhere_are_mentioned(tmp_path, capsys):
    s = Screen(load_data({'P1': '/home/x/P1'}), root=tmp_path)
    assert 'Not on this machine: /home/x/P1/a.tif. Say where the images are now: `root=`' in capsys.readouterr().out
    with pytest.raises(ImageError, match='missing'): s.read(0)
    s._ranges = np.float32([[0, 99]])
    assert open_screen(s.save(tmp_path/'saved')).table.file_DNA[0] == '/home/x/P1/a.tif'
    away = Screen(load_data({'P1': 's3://gallery/x/P1'}), root=tmp_path, ranges=[[0, 99]])
    assert open_screen(away.save(tmp_path/'away')).table.file_DNA[0] == 's3://gallery/x/P1/a.tif'

def test_paths_of_this_machine_stay(tmp_path):
    t = load_data({'P1': str(images(tmp_path/'here', 'a.tif'))})
    assert Screen(t, root=images(tmp_path/'other', 'a.tif')).files(0) == [str(tmp_path/'here/a.tif')]

@pytest.mark.parametrize('columns', [('Metadata_Well', 'Well'), ('Image_Metadata_Well',), ('well_position',), (' WELL ',)])
def test_columns_under_the_names_of_others(columns):
    t = Screen(pd.DataFrame({**{c: ['b2'] for c in columns}, 'Image_FileName_DNA': ['a.tif']})).table
    assert t.well[0] == 'B02' and t.file_DNA[0] == 'a.tif'

@pytest.mark.parametrize('column', ['plate', 'batch', 'site', 'well'])
def test_gaps_in_what_a_site_is_known_by(column):
    values = {'well': ['B02', '', 'C02']}.get(column, ['1', '', '1'])
    with pytest.raises(ValueError, match=f'1 of 3 rows name no {column}'): listed(**{column: values})

# --- a folder, a table

@pytest.mark.parametrize('name', [
    'P1/Images/r01c0{}f01p01-ch1sk1fk1fl1.tiff', 'exp/Plate1/B0{}_s1_w1.png',
    'x/y/Exp_B0{}_s1_w166923EBB-9960-4952-8955-D1721D112EE2.tif', 'x_B0{}_T0001F001L01A01Z01C01.tif',
    'B - 0{}(fld 1 wv DAPI - DAPI).tif', 'data/B{}--W00014--P00001--Z00000--T00000--DAPI.tif',
    'AS_0912_B0{}f00d0.tif', 'B{}_01_1_3_DAPI_001.tif', 'P1/B0{}_s1_DAPI.tif'])
def test_folders_of_known_instruments_open(tmp_path, name, capsys):
    images(tmp_path, name.format(2), name.format(3))
    for s in (Screen(tmp_path), open_screen(tmp_path), Screen.from_pattern(tmp_path)):
        assert len(s) == len(s.wells) == 2 and len(s.channels) == 1 and s.table.well.str.fullmatch('[AB]0[123]').all()
    assert capsys.readouterr().out.count('2 wells, 2 sites') == 2

@pytest.mark.parametrize('folders,plates', [
    (('P1', 'P2'), ['P1', 'P2']), (('b1/P1', 'b1/P2', 'b2/P1'), ['P1', 'P2', 'P1']),
    (('b1/P1/Images', 'b2/P1/Images'), ['P1', 'P1'])])
def test_the_folder_of_images_is_the_plate_and_the_next_the_batch(tmp_path, folders, plates):
    t = Screen(images(tmp_path, *[f'{d}/B02_s1_DAPI.tif' for d in folders])).table
    assert t.plate.tolist() == plates and len(t[WELL].drop_duplicates()) == len(folders)

@pytest.mark.parametrize('open_', [Screen, open_screen])
def test_other_folders_say_how_to_open_them(tmp_path, open_):
    images(tmp_path, 'a/x1.tif', 'a/x2.tif')
    with pytest.raises(FileNotFoundError, match=r'2 images, such as a/x1\.tif.*Screen\.from_pattern'): open_(tmp_path)
    with pytest.raises(FileNotFoundError, match='missing'): open_(tmp_path/'none.csv')
    with pytest.raises(FileNotFoundError, match='missing'): open_(tmp_path/'none')

def test_a_table_and_a_saved_screen_open_by_their_path(tmp_path):
    images(tmp_path, 'a.tif')
    (tmp_path/'list.csv').write_text('well,file_DAPI\nB2,a.tif\n')
    s = Screen(tmp_path/'list.csv')
    assert s.read(0).shape == (1, 8, 8) and Screen(str(s.save(tmp_path/'out'))).channels == ['DNA']
    (tmp_path/'bad.csv').write_text('x,file_DAPI\nB2,a.tif\n')
    with pytest.raises(ValueError, match=r'bad\.csv: No column `well`'): Screen(tmp_path/'bad.csv')

def test_other_channels_do_not_get_the_ranges_saved(tmp_path):
    image(tmp_path/'a.tif'); image(tmp_path/'b.tif', top=60000)
    s = Screen(pd.DataFrame(dict(well=['B2'], file_DNA=['a.tif'], file_ER=['b.tif'])), root=tmp_path)
    both = Screen(s.save(tmp_path/'out')).ranges
    assert (Screen(tmp_path/'out', channels=['ER']).fit_ranges() == both[1:]).all()

# --- pixels

@pytest.mark.filterwarnings('ignore:.*these set the ranges')
@pytest.mark.parametrize('odd,others', [
    (('u1', 255), ('u2', 4000)), (('u2', 4000), ('u1', 255)), (('u1', 255), ('f4', 4000))])
def test_a_site_of_another_depth_has_no_say(tmp_path, odd, others):
    for i in range(12): image(tmp_path/f'A{i+1:02d}_DNA.tif', *(odd if i == 7 else others))
    s = Screen.from_pattern(tmp_path, '{well}_{channel}.tif')
    good = s.subset(np.arange(12) != 7)
    assert s.fit_ranges()[0,1] > others[1]*.9 and good[3].max() > 200 and good[3].mean() < 200
    for o in (s, Screen(s.save(tmp_path/'saved'))):
        with pytest.raises(ImageError, match=r'A08_DNA\.tif: .*wrong type.*one bit depth.*well A08'): o[7]
    assert s.check().query('problem=="wrong type"').well.tolist() == ['A08']

# --- masks, saving, stopping

@pytest.mark.parametrize('idx,said', [
    ([True, False], 'mask of 2 for 3'), ([1.5], 'row numbers'), (['B02'], 'row numbers'),
    (np.array([True, None, False]), 'row numbers')])
def test_subsets_that_are_refused(idx, said):
    with pytest.raises(ValueError, match=said): listed().subset(idx)

def test_what_is_saved_is_of_one_screen(tmp_path, monkeypatch):
    images(tmp_path, 'A01_DNA.tif')
    s = Screen.from_pattern(tmp_path, '{well}_{channel}.tif')
    s.save(tmp_path/'out')
    monkeypatch.setattr(pd.DataFrame, 'to_parquet', lambda *a, **k: 1/0)
    with pytest.raises(ZeroDivisionError): s.save(tmp_path/'out')
    with pytest.raises(ZeroDivisionError): s.save(tmp_path/'new')
    assert [f.name for f in (tmp_path/'out').iterdir()] == ['screen.parquet']
    assert not (tmp_path/'new/screen.json').exists()

def test_a_fingerprint_is_that_of_the_data(tmp_path):
    images(tmp_path, 'A01_DNA.tif', 'A01_ER.tif', 'A02_DNA.tif', 'A02_ER.tif')
    def opened(**kw): return Screen.from_pattern(tmp_path, '{well}_{channel}.tif', **kw)
    s = opened()
    same = [s.fingerprint(), opened().fingerprint(), open_screen(s.save(tmp_path/'saved')).fingerprint()]
    other = [opened(channels=['ER', 'DNA']), s.subset([0]), Screen(s.table.assign(perturbation='X'), root=tmp_path)]
    image(tmp_path/'A01_ER.tif')
    assert len(set(same)) == 1 and len({same[0], opened().fingerprint(), *[o.fingerprint() for o in other]}) == 5

stop = '''
import pandas as pd, signal, sys, time
from cellmae.screen import Screen
signal.signal(signal.SIGINT, signal.default_int_handler) # a process in the background may ignore it
s = Screen(pd.DataFrame(dict(well=['A01']*9999, site=range(9999), file='x.tif')), ['DNA'])
Screen._look = lambda self, i: (time.sleep(.005), ([], []))[1]
print('ready', flush=True); s.check()
'''

@pytest.mark.skipif(os.name == 'nt', reason='signals')
@pytest.mark.parametrize('after', [0, .05, .3])
def test_check_stops_when_it_is_interrupted(after):
    p = subprocess.Popen([sys.executable, '-c', stop], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    p.stdout.readline(); time.sleep(after)
    p.send_signal(signal.SIGINT)
    assert 'KeyboardInterrupt' in p.communicate(timeout=20)[1]
