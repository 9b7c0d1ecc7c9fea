"One table of sites: planes and times chosen, channels named, files found, plate maps joined"
import os
import time

import numpy as np
import pandas as pd
import pytest
from tifffile import imwrite

from cellmae.images import canonical_stain, suggested
from cellmae.screen import Screen, open_screen, split
from cellmae.sites import KEYS, SITE, agreed, arranged, at_home, choose, join_plate_map, name_channels, site_key, tidy, wide

# --- planes and times

def long(z='', t='', wells=('B03', 'C02'), channels=('DAPI', 'GFP'), sites=('1', '2')):
    "Rows of every combination, in an order that is none"
    rows = [dict(well=w, site=s, channel=c, z=p, t=o, file=f'{w}_s{s}_{c}_z{p}_t{o}.tif') for w in wells for s in sites
            for c in channels for p in (z or ['']) for o in (t or [''])]
    df = pd.DataFrame(rows).sample(frac=1, random_state=0)
    return df.drop(columns=[k for k,v in dict(z=z, t=t).items() if not v])

@pytest.mark.parametrize('z,planes,left', [
    (2, ['02'], None), ('02', ['02'], None), ('mid', ['02'], None), ('max', ['01', '02', '10'], 'max'), ('mean', ['01', '02', '10'], 'mean')])
def test_a_plane_or_all_of_them(z, planes, left):
    rows,still = choose(long(z=['01', '02', '10']), z)
    t = wide(rows)
    assert t.well.tolist() == ['B03', 'B03', 'C02', 'C02'] and still == dict(z=left, t=None)
    assert t.file_GFP[1] == '|'.join(f'B03_s2_GFP_z{p}_t.tif' for p in planes)

def test_every_plane_may_be_a_site_of_the_same_well():
    t = wide(choose(long(z=['01', '02', '10']), 'all')[0])
    assert len(t) == 12 and t.site.tolist()[:4] == ['1_z01', '1_z02', '1_z10', '2_z01'] and t.well.nunique() == 2

@pytest.mark.parametrize('n,middle', [(1, 0), (2, 1), (3, 1), (4, 2)])
def test_the_middle_plane_is_that_of_each_image(n, middle):
    df = long(z=[str(i) for i in range(n)])
    df = pd.concat([df, long(z=['0', '1', '2', '3', '4'], wells=['H12'])])
    t = wide(choose(df, 'mid')[0])
    assert t.file_DAPI[0] == f'B03_s1_DAPI_z{middle}_t.tif' and t.file_DAPI[4] == 'H12_s1_DAPI_z2_t.tif'

@pytest.mark.parametrize('t,times', [(0, '0'), ('first', '0'), ('last', '10')])
def test_a_point_in_time(t, times):
    rows,still = choose(long(t=['0', '2', '10']), t=t)
    assert wide(rows).file_DAPI[0] == f'B03_s1_DAPI_z_t{times}.tif' and still == dict(z=None, t=None)

def test_the_last_time_is_that_of_each_site():
    df = long(t=['0', '1'])
    df = df[~((df.well == 'C02') & (df.t == '1'))]
    assert wide(choose(df, t='last')[0]).file_GFP.tolist()[::3] == ['B03_s1_GFP_z_t1.tif', 'C02_s2_GFP_z_t0.tif']

def test_every_time_may_be_a_site_that_stays_with_its_well():
    t = wide(choose(long(t=['0', '2', '10']), t='all')[0])
    assert site_key(t) == [*SITE, 't'] and t.t.tolist() == ['0', '2', '10']*4
    s = Screen(t, root='.')
    assert len(s) == 12 and len(s.wells) == 2 and s.table.columns[:7].tolist() == [*SITE, 't', *KEYS[4:]]
    train,valid = split(s, .5)
    assert not set(s.table.well[train]) & set(s.table.well[valid])

@pytest.mark.parametrize('df,kw,said', [
    (long(z=['01', '02']), {}, r"{z} is one of \['01', '02'\].*`z=1`.*'max'.*'mean'.*'mid'.*'all'"),
    (long(z=['01', '02']), dict(z=3), r"{z} is one of \['01', '02'\]"), (long(z=['01']), dict(z=3), r"{z} is one of \['01'\]"),
    (long(t=['0', '1']), {}, r"{t} is one of \['0', '1'\].*`t=0`.*'first'.*'last'.*'all'"), (long(t=['0', '1']), dict(t=2), '{t} is one'),
    (long(z=['1', '']), {}, r"{z} is one of \['projection', '1'\].*z='projection'")])
def test_several_and_none_chosen_is_a_question(df, kw, said):
    with pytest.raises(ValueError, match=said): choose(df, **kw)

@pytest.mark.parametrize('z', [None, 1, '01', 'max', 'mean', 'mid', 'all'])
def test_a_single_plane_needs_no_choice(z):
    t = wide(choose(long(z=['01'], t=['3']), z)[0])
    assert len(t) == 4 and '|' not in t.file_DAPI[0] and ('z01' in t.site[0]) == (z == 'never')

def test_projections_are_other_images_than_planes():
    "As in an ImageXpress folder: w1 to w3 projected, w1, w2 and w4 in steps"
    df = pd.concat([long(z=['1', '2'], channels=['w1', 'w2', 'w4']), long(channels=['w1', 'w2', 'w3']).assign(z='')])
    def channels(z): return [c[5:] for c in wide(choose(df, z)[0]) if c.startswith('file_')]
    assert channels('projection') == ['w1', 'w2', 'w3'] and channels('max') == channels(2) == channels('mid') == ['w1', 'w2', 'w4']
    assert (wide(choose(df, 1)[0]).filter(like='file_') != '').all(axis=None)
    with pytest.raises(ValueError, match='two files for one site and channel'): wide(df.drop(columns='z'))

# --- one row per site

def test_rows_of_any_order_become_sites_in_natural_order():
    df = long(wells=['B10', 'B9', 'AA1', 'c2'], sites=['10', '9'])
    t = wide(df)
    assert t.well.tolist() == [w for w in ('AA01', 'B09', 'B10', 'C02') for _ in range(2)] and t.site.tolist() == ['9', '10']*4
    for _,o in t.iterrows(): assert o.file_GFP.lower().startswith({'AA01': 'aa1', 'B09': 'b9', 'B10': 'b10', 'C02': 'c2'}[o.well])

@pytest.mark.parametrize('site', [['01', '2'], ['001', '002'], [1., 2.], [1, 2]])
def test_sites_have_one_spelling_whatever_their_padding(site):
    assert tidy(pd.DataFrame(dict(well='B03', site=site, t=site)), {})[['site', 't']].values.tolist() == [['1', '1'], ['2', '2']]

def test_sites_that_are_no_numbers_stay_as_they_are():
    assert tidy(pd.DataFrame(dict(well='B03', site=['r000_c001', 'X08--Y00', 's01'])), {})['site'].tolist() == ['r000_c001', 'X08--Y00', 's01']

@pytest.mark.parametrize('row,col', [([2, 3], [3, 2]), (['2', '3'], ['3', '2']), (['B', 'C'], ['03', '2'])])
def test_rows_and_columns_are_not_swapped(row, col):
    t = wide(pd.DataFrame(dict(row=row, col=col, channel='1', file=['b03.tif', 'c02.tif'])))
    assert t[['well', 'file_1']].values.tolist() == [['B03', 'b03.tif'], ['C02', 'c02.tif']]

def test_a_channel_that_is_absent_leaves_its_cell_empty():
    df = long()
    t = wide(df[~((df.well == 'C02') & (df.channel == 'GFP'))])
    assert t.file_GFP.tolist()[2:] == ['', ''] and t.file_DAPI.tolist()[3] == 'C02_s2_DAPI_z_t.tif'

@pytest.mark.parametrize('keys', [['batch', 'plate'], ['plate'], ['batch']])
def test_plates_and_batches_stay_apart(keys):
    parts = [long().assign(**{k: v for k in keys}) for v in ('1', '2')]
    t = wide(pd.concat(parts))
    assert len(t) == 8 and t[keys[0]].tolist() == ['1']*4+['2']*4

def test_two_files_of_one_place_are_named():
    with pytest.raises(ValueError, match=r'Q: two files for one site and channel, B03_s1_DAPI_z_t\.tif and B03_s2_DAPI_z_t\.tif'):
        wide(long().drop(columns='site'), 'Q')

def test_many_files_take_no_time():
    n = 200_000
    i = np.arange(n)
    df = pd.DataFrame(dict(plate=(i//3840).astype(str), well=np.array([f'{chr(65+k//24)}{k%24+1}' for k in range(384)])[i//10%384],
                           channel=(i%5).astype(str), site=(i//5%2).astype(str), file=i.astype(str))).astype(object)
    start = time.process_time()
    t = wide(df)
    assert time.process_time()-start < 1.5 and len(t) == n/5 and t.notna().all(axis=None)

# --- channels

PHENIX = {'1': 'HOECHST 33342', '2': 'Alexa 647', '3': '488 long'}

@pytest.mark.parametrize('raw,channels,names,want', [
    (['DAPI', 'GFP'], None, None, {'DAPI': 'DNA', 'GFP': 'GFP'}),
    (['DAPI', 'ConA'], ['ER', 'DNA'], None, {'ConA': 'ER', 'DAPI': 'DNA'}),
    (['1', '2', '3'], None, PHENIX, {'1': 'DNA', '2': 'Alexa 647', '3': '488 long'}),
    (['HOECHST 33342', 'Alexa 647', '488 long'], {'1': 'DNA', '3': 'RNA'}, PHENIX, {'HOECHST 33342': 'DNA', '488 long': 'RNA'}),
    (['HOECHST 33342', 'Alexa 647', '488 long'], {1: 'DNA'}, PHENIX, {'HOECHST 33342': 'DNA'}),
    (['1', '2', '3'], {'alexa-647': 'actin'}, PHENIX, {'2': 'actin'}),
    (['1', '2', '3'], ['DNA', 'mito', 'RNA'], PHENIX, {'1': 'DNA', '2': 'mito', '3': 'RNA'}),
    (['01', '02'], {1: 'DNA', '2': 'ER'}, None, {'01': 'DNA', '02': 'ER'}),
    (['DNA', 'ER'], {'ER': 'AGP', 'DNA': 'DNA'}, None, {'ER': 'AGP', 'DNA': 'DNA'}), # by the file's own name one may
    (['HOECHST 33342', 'Phalloidin'], {'1': 'DNA', '2': 'AGP'}, {'1': 'HOECHST 33342', '2': 'Phalloidin'}, {'HOECHST 33342': 'DNA', 'Phalloidin': 'AGP'}),
    (['1', '2', '3', '4', '5', '6'], 'rxrx', None, dict(zip('123456', ['DNA', 'ER', 'actin', 'RNA', 'mito', 'golgi']))),
    (['1', '2', '3', '4', '5'], 'jump_source_10', None, dict(zip('12345', ['DNA', 'ER', 'RNA', 'AGP', 'mito']))),
    (['1', '2', '3', '4', '5'], 'jump_source_9', None, dict(zip('12345', ['ER', 'mito', 'AGP', 'DNA', 'RNA']))),
    (['1', '2', '3'], 'rxrx', None, dict(zip('123', ['DNA', 'ER', 'actin']))), (['ch6', '1'], 'jump_source_2', None, {'1': 'DNA'}),
    (['DAPI', 'Hoechst'], None, None, {'DAPI': 'DAPI', 'Hoechst': 'Hoechst'}), (['DAPI', 'Hoechst'], ['DAPI', 'Hoechst'], None, {'DAPI': 'DAPI', 'Hoechst': 'Hoechst'}),
    (['file'], 'rxrx', None, dict(zip('123456', ['DNA', 'ER', 'actin', 'RNA', 'mito', 'golgi']))),
    (['file'], ['DNA', 'ER'], None, {'DNA': 'DNA', 'ER': 'ER'}), (['file'], None, ['Actin', 'DAPI'], {'Actin': 'actin', 'DAPI': 'DNA'}),
    (['file'], ['actin', 'mito', 'DNA'], ['Actin', 'Cy5', 'DAPI'], {'Actin': 'actin', 'Cy5': 'mito', 'DAPI': 'DNA'}),
    (['DAPI_cycle1', 'DAPI_cycle2', 'GFP_cycle1'], None, None, {k: k for k in ('DAPI_cycle1', 'DAPI_cycle2', 'GFP_cycle1')})])
def test_channels_are_named(raw, channels, names, want):
    new = name_channels(raw, channels, names)
    assert new == want and [*new] == [*want]

@pytest.mark.parametrize('raw,channels,names,said', [
    (['1', '2'], ['DNA', 'ER'], None, r"No channel \['DNA', 'ER'\]: found \['1', '2'\].*channels={'1': '...', '2': '...'}"),
    (['1', '2', '3'], ['mito', 'DNA', 'RNA'], PHENIX, "found .*HOECHST 33342.* and 'HOECHST 33342' is no mito.*'1': 'DNA', '2': 'mito', '3': 'RNA'"),
    (['1', '2', '3'], {'2': 'DNA', '1': 'ER'}, PHENIX, r"Channel 1 is 'HOECHST 33342' in the files, not 'ER'.*channels={'HOECHST 33342': 'ER'}"),
    (['1', '2', '3'], {'7': 'DNA'}, PHENIX, r"No channel \['7'\]: found \['HOECHST 33342', 'Alexa 647', '488 long'\]"),
    (['Alexa 488', 'Alexa 647'], ['ER', 'mito'], None, "No channel .*'Alexa 488': 'ER', 'Alexa 647': 'mito'"),
    (['file'], ['DNA', 'ER', 'actin'], ['Actin', 'Hoechst', 'ConA'], r"planes of a file are \['Actin', 'Hoechst', 'ConA'\].*channels=\['actin', 'DNA', 'ER'\]"),
    (['file'], ['DNA'], ['Actin', 'Hoechst'], 'in this order'), (['file'], None, None, 'name its planes'),
    (['1', '2'], 'jump_source12', None, 'No panel .*Did you mean jump_source'), (['a', 'b'], {'a': 'DNA', 'b': 'DNA'}, None, 'Two channels have one name')])
def test_names_that_contradict_the_files_are_refused(raw, channels, names, said):
    with pytest.raises(ValueError, match=said): name_channels(raw, channels, names)

@pytest.mark.parametrize('name,stain', [
    ('DAPI', 'DNA'), ('HOECHST 33342', 'DNA'), ('Brightfield high', 'BF'), ('TL-Brightfield', 'BF'), ('TL-Brightfield - DAPI', 'BF'),
    ('bright field', 'BF'), ('Digital Phase Contrast', 'phase'), ('Phase', 'phase'), ('S-phase', 'S-phase'), ('Alexa 647', 'Alexa 647'),
    ('FITC - FITC', 'FITC - FITC'), ('488 long', '488 long'), ('Cy5', 'Cy5'), ('WGA/Syto-14', 'WGA/Syto-14'), ('405 nm #1', '405 nm #1')])
def test_dyes_are_no_stains(name, stain): assert canonical_stain(name) == stain

@pytest.mark.parametrize('name,idea', [
    ('Alexa 647', 'mito or AGP'), ('Alexa 568', 'AGP or actin'), ('FITC', 'ER'), ('488 long', 'RNA'), ('488 650', 'RNA'), ('Cy5 - Cy5 wix 4', 'mito or AGP'),
    ('405 nm #1', 'DNA'), ('405ex, 570-630-em)', None), ('BP445/45', None), ('DAPI', None), ('Brightfield high', None), ('1', None), ('w3', None)])
def test_dyes_suggest(name, idea): assert suggested([name]) == ({name: idea} if idea else {})

def test_suggestions_are_said_and_not_taken(capsys):
    assert [*name_channels(['DAPI', 'Alexa 647']).values()] == ['DNA', 'Alexa 647']
    assert "Alexa 647 may be mito or AGP. Name them: `channels={'DAPI': 'DNA', 'Alexa 647': 'mito'}`" in capsys.readouterr().out

def test_channels_that_a_panel_does_not_name_are_said(capsys):
    name_channels(['1', '2', '6'], 'jump_source_2')
    assert "jump_source_2 has no name for ['6']: left out" in capsys.readouterr().out

def test_two_channels_of_one_stain_survive_saving(tmp_path):
    for c in ('DAPI', 'Hoechst'): imwrite(tmp_path/f'{c}.tif', np.full((4, 6), len(c), np.uint16))
    s = Screen(pd.DataFrame(dict(well=['B03'], file_DAPI='DAPI.tif', file_Hoechst='Hoechst.tif')), root=tmp_path)
    again = open_screen(s.save(tmp_path/'out'))
    assert s.channels == again.channels == ['DAPI', 'Hoechst'] and again.read(0)[:,0,0].tolist() == [4, 7]

# --- files of another machine

def touch(root, *names):
    for n in names:
        (root/n).parent.mkdir(parents=True, exist_ok=True)
        (root/n).write_bytes(b'x')
    return root

@pytest.mark.parametrize('f,replace,want', [
    ('/home/ubuntu/bucket/projects/P1/a.tif', {'/home/ubuntu/bucket/projects': 'D:/cpg'}, 'D:/cpg/P1/a.tif'),
    ('/home/ubuntu/bucket/projects/P1/a.tif', {'/home/ubuntu/bucket/projects/': ''}, 'P1/a.tif'),
    ('s3://gallery/x/P1/a.tif#c=1', {'s3://gallery/x': 'C:\\data\\'}, 'C:/data/P1/a.tif#c=1'),
    ('old/a.tif|old/b.tif', {'old': 'new'}, 'new/a.tif|new/b.tif'), ('older/a.tif', {'old': 'new'}, 'older/a.tif'),
    ('a.tif', {'': 'images'}, 'images/a.tif'), ('x/a.tif', {'y': 'z', 'x': 'w'}, 'w/a.tif'), ('', {'x': 'y'}, '')])
def test_other_beginnings(tmp_path, f, replace, want):
    assert at_home({'DNA': [f]}, tmp_path, replace) == {'DNA': [want]}

def told(capsys, files, root):
    at_home(files, root)
    return capsys.readouterr().out

@pytest.mark.parametrize('f,there,old,new', [
    ('plates/BR1/a.tif', 'images/BR1/a.tif', 'plates', 'images'), ('a.tif', 'images/BR1/a.tif', '', 'images/BR1'),
    ('x/y/a.tif', 'a.tif', 'x/y', ''), ('x/BR1/a.tif#series=2', 'BR1/a.tif', 'x', '')])
def test_where_files_are_is_said_once(tmp_path, capsys, f, there, old, new):
    files = {c: [f.replace('a.tif', n) for n in ('a.tif', 'b.tif', 'c.tif')] for c in ('DNA', 'ER')}
    out = told(capsys, files, touch(tmp_path, there))
    assert out.count('Not on this machine') == 1 and f'replace={ {old: new} }' in out
    assert at_home(files, tmp_path, {old: new})['DNA'][0].partition('#')[0] == there

def test_files_that_are_there_or_on_the_web_are_not_mentioned(tmp_path, capsys):
    touch(tmp_path, 'a.tif', 'b #1.tif', 'p.zarr/A/1/.zattrs')
    for f in ('a.tif', 'a.tif#c=1,z=2', 'b #1.tif', 'a.tif|b #1.tif', str(tmp_path/'a.tif'), 'p.zarr/A/1#c=0', 's3://b/x.tif', 'https://h/x.tif'):
        assert told(capsys, {'DNA': [f]}, tmp_path) == ''
    assert told(capsys, {'DNA': ['x.tif']}, 's3://bucket/plate') == ''

def test_a_name_that_lies_in_two_folders_is_not_guessed(tmp_path, capsys):
    assert 'replace' not in told(capsys, {'DNA': ['a.tif']}, touch(tmp_path, 'P1/a.tif', 'P2/a.tif'))
    assert "replace={'x': ''}" in told(capsys, {'DNA': ['x/P1/a.tif']}, tmp_path)

def test_three_files_are_looked_at_and_not_a_million(tmp_path, monkeypatch):
    touch(tmp_path, 'a.tif')
    looks = []
    exists = os.path.exists
    monkeypatch.setattr('pathlib.Path.exists', lambda p: looks.append(p) or exists(p))
    at_home({c: ['a.tif']*1000 for c in 'abc'}, tmp_path)
    assert 0 < len(looks) <= 6

def test_replaced_files_are_read(tmp_path):
    (tmp_path/'images/BR1').mkdir(parents=True)
    imwrite(tmp_path/'images/BR1/a.tif', np.full((4, 6), 7, np.uint16))
    t = pd.DataFrame(dict(well=['B03'], file_DNA=['/far/away/plate/a.tif']))
    s = Screen(t, root=tmp_path, replace={'/far/away/plate': 'images/BR1'})
    assert s.read(0).shape == (1, 4, 6) and (open_screen(s.save(tmp_path/'out')).read(0) == 7).all()

# --- the table

def test_keys_are_categories_and_labels_text():
    t = Screen(pd.DataFrame(dict(well=['B10', 'B9']*3, site=list('112233'), perturbation='x', file='a.tif')), ['DNA']).table
    assert all(isinstance(t[k].dtype, pd.CategoricalDtype) for k in SITE) and t.perturbation.dtype == object
    assert [*t.well.cat.categories] == ['B09', 'B10'] and t.perturbation[0] is t.perturbation[5]

def test_a_groupby_that_forgets_what_is_observed_is_an_error():
    t = pd.DataFrame(dict(plate=pd.Categorical(['1']), x=[1]))
    with pytest.raises(FutureWarning): t.groupby('plate').x.sum()

def test_subsets_count_only_what_they_have():
    t = pd.DataFrame(dict(plate=['1', '1', '2'], well=['B03', 'C02', 'B03'], perturbation=['DMSO', 'X', 'Y'], file='a.tif'))
    s = Screen(t, ['DNA']).subset([0, 2])
    assert len(s.wells) == 2 and 'plates=2' in repr(s) and len(s.subset([0]).wells) == 1
    assert s.wells.values.tolist() == [['1', '1', 'B03', 'DMSO', True, 1], ['2', '2', 'B03', 'Y', False, 1]]

def test_half_a_million_sites_are_a_small_table():
    n = 100_000
    df = pd.DataFrame(dict(plate=[f'plate{i//3456}' for i in range(n)], well=[f'{"ABCDEFGHIJKLMNOP"[i//9%16]}{i//144%24+1:02d}' for i in range(n)],
                           site=[str(i%9) for i in range(n)], perturbation=[f'gene{i%5000}' for i in range(n)]))
    t = arranged(tidy(df, {}), {}, None, 'x')
    assert t[SITE].memory_usage(deep=True).sum() < 2e6 and len({*map(id, t.perturbation)}) == 5000

# --- plate maps

sites = pd.DataFrame(dict(well=[w for w in ('B03', 'C02', 'D04', 'E05', 'F06') for _ in range(2)], site=list('12')*5, file_DNA='a.tif'))

def test_a_map_that_meets_nothing_shows_three_of_each_side():
    meta = pd.DataFrame(dict(well=['A1', 'A2', 'A3', 'A4'], perturbation='X'))
    with pytest.raises(ValueError, match='None of 10 sites.*files say well B03, the map says well A01. Next are well C02; well D04, '
                                         'in the map well A02; well A03'): join_plate_map(sites, meta, {})

def test_a_map_that_meets_some_lists_the_first_others(capsys):
    t = join_plate_map(sites, pd.DataFrame(dict(well=['B3'], perturbation='X')), {})
    assert t.perturbation.tolist() == ['X']*2+['']*8
    assert '8 of 10 sites are not in the plate map: well C02; well D04; well E05, and 1 other places' in capsys.readouterr().out

def test_a_map_by_time():
    t = wide(choose(long(t=['0', '1']), t='all')[0])
    meta = pd.DataFrame(dict(well=['B03', 'B03', 'C02', 'C02'], t=['0', '1', '0', '1'], perturbation=list('abcd')))
    assert join_plate_map(t, meta, {}).perturbation.tolist() == ['a', 'b']*2+['c', 'd']*2

def test_a_well_of_two_perturbations_has_none():
    t = arranged(tidy(sites.assign(perturbation=['x', 'y']+['z']*8), {}), {}, None, 'p')
    assert agreed(t).perturbation.tolist() == ['', '']+['z']*8
