"Embed and the commands at their border: who a row is, what a screen allows, what an error says"
import sys

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import tifffile
import torch

from cellmae.cli import (cellmae_check, cellmae_demo, cellmae_embed, cellmae_fit, cellmae_recall,
                         own_screen)
from cellmae.demo import usable
from cellmae.explore import strongest
from cellmae.story import findings, rehearse
from cellmae.embed import embed
from cellmae.report import Aside, to_html
from cellmae.screen import Screen
from commands import start as call

SMALL = 40


def plates(folder, table, size=SMALL, **columns):
    "A screen of noise with one row per row of `table`"
    g = np.random.default_rng(0)
    table = pd.DataFrame(table).assign(**columns)
    table['file'] = [f'{i}.tif' for i in range(len(table))]
    folder.mkdir(exist_ok=True)
    for f in table.file:
        x = g.integers(100, 4000, (2,size,size)).astype('u2')
        tifffile.imwrite(folder/f, x, photometric='minisblack')
    return Screen(table, ['DNA','ER'], folder)


def wells(n, **columns):
    names = [f'{"ABCDEFGHIJKLMNOP"[i//24]}{i%24+1:02d}' for i in range(n)]
    return pd.DataFrame(dict(batch='B1', plate='P1', well=names)).assign(**columns)


keys = dict(batch=['B1','B2'], plate=['P1','P2'], well=['A01','A02'])

@pytest.mark.parametrize('key,values', keys.items())
def test_rows_are_known_by_batch_plate_and_well(tmp_path, key, values):
    "Wells that agree in all but one part of their key stay apart"
    t = wells(1).iloc[[0,0]].assign(site='1', perturbation=['TP53','MYC']).assign(**{key:values})
    e = embed('intensity', plates(tmp_path, t), progress=False)
    assert e.obs.perturbation.tolist() == ['TP53','MYC'] and e.obs_names.is_unique


def test_names_of_rows_are_unique_however_labels_are_spelt(tmp_path):
    t = dict(batch=['a_b','a'], plate=['c','b_c'], well='A01', site='1', perturbation='x')
    assert embed('intensity', plates(tmp_path, t), progress=False).obs_names.is_unique


@pytest.mark.parametrize('column,values', [
    ('perturbation',['TP53','MYC']), ('perturbation',['DMSO','KIF11']),
    ('perturbation',['TP53','']), ('control',['yes','no'])])
def test_well_that_contradicts_itself(tmp_path, column, values):
    t = wells(1).iloc[[0,0]].assign(site=['1','2'], perturbation='TP53').assign(**{column: values})
    s = plates(tmp_path, t)
    with pytest.warns(UserWarning, match='A01'): e = embed('intensity', s, progress=False)
    assert e.obs.perturbation.tolist() == [''] and not e.obs.control.any()
    assert embed('intensity', s, level='site', progress=False).n_obs == 2


def test_whole_plate_map_travels(tmp_path):
    own = dict(dose=[.5,.5,1], guide=['g1','g1',None], type='crispr', tile=7, x=[1,2,3], cell='HeLa')
    t = pd.DataFrame(dict(plate='P1', well=['A01','A01','A02'], site=['1','2','1']))
    t = t.assign(perturbation=['NA','NA','TP53'], when=pd.Timestamp('2026-01-02'))
    e = embed('intensity', plates(tmp_path, t, **own), progress=False)
    assert e.obs.perturbation.tolist() == ['NA','TP53'] and e.obs.guide.tolist() == ['g1','']
    assert e.obs.dose.tolist() == [.5,1] and set(e.obs.type) == {'crispr'}
    assert e.obs.when.str.startswith('2026-01-02').all()
    assert 'x' not in e.obs and e.uns['cellmae']['left_out'] == ['x']
    assert set(e.obs.cell) == {'HeLa'} and e.obs.n_tiles.tolist() == [2,1]
    e.write_h5ad(tmp_path/'a.h5ad')
    assert ad.read_h5ad(tmp_path/'a.h5ad').obs.dose.tolist() == [.5,1]


def rows_short(x): return x[1:].float().mean((2,3))
def rows_many(x): return torch.cat([x,x]).float().mean((2,3))
def flat(x): return x.float().mean((1,2,3))
def nan(x): return x.float().mean((2,3))*torch.tensor([1,float('nan')])
def infinite(x): return x.float().mean((2,3))/0
def no_numbers(x): return ['a']*len(x)
def nothing(x): return None

bad = {rows_short:'shape', rows_many:'shape', flat:'shape', nan:'NaN', infinite:'NaN',
       no_numbers:'not numbers', nothing:'not numbers'}

@pytest.mark.parametrize('f,said', bad.items(), ids=[f.__name__ for f in bad])
def test_what_an_encoder_gives_is_looked_at(tmp_path, f, said):
    s = plates(tmp_path, wells(3, perturbation='TP53'))
    with pytest.raises(ValueError, match=f'Encoder {f.__name__} gave.*{said}') as e:
        embed(f, s, progress=False)
    assert said=='not numbers' or 'well A01' in str(e.value)


@pytest.mark.parametrize('form', [lambda v: v.numpy(), lambda v: v.double(), lambda v: v.tolist(),
                                  lambda v: v.requires_grad_()])
def test_encoders_may_give_arrays_tensors_and_lists(tmp_path, form):
    s = plates(tmp_path, wells(2, perturbation='TP53'))
    e = embed(lambda x: form(x.float().mean((2,3))), s, progress=False)
    assert e.X.dtype == np.float32 and e.shape == (2,2)


@pytest.mark.parametrize('kw', [dict(level='gene'), dict(size=0), dict(size=-8), dict(size=48)])
def test_options_out_of_range(tmp_path, kw):
    with pytest.raises(ValueError, match='level must|size must|No tile of 48.*well A01'):
        embed('intensity', plates(tmp_path, wells(2, perturbation='TP53')), progress=False, **kw)


def screen_of(genes, controls=0, **columns):
    "Wells of genes and of controls"
    names = [*genes, *['DMSO']*controls]
    controls = [o=='DMSO' for o in names]
    return wells(len(names), perturbation=names, control=controls).assign(**columns)

many,alone = [f'G{i:02d}' for i in range(24)],{'Batch correction','Hits','Recall'}
limits = {
    'no labels': (screen_of(['']*4), alone),
    'no controls': (screen_of(many), {'Batch correction','Hits'}),
    'no controls, but replicates': (screen_of(many*2), {'Batch correction'}),
    'one control': (screen_of(many, 1), {'Batch correction','Hits'}),
    'none in one batch': (screen_of(many, 6, batch=['B1']*2+['B2']*28), {'Batch correction','Hits'}),
    'one perturbation': (screen_of(['TP53'], 4), {'Hits','Recall'}),
    'two perturbations': (screen_of(['TP53','MYC'], 4), {'Hits','Recall'}),
    'one well': (screen_of(['TP53']), alone|{'The map'}),
    'no replicates': (screen_of(many, 6), {'Hits'}),
    'all there is': (screen_of(many*2, 6), set())}
pairs = pd.DataFrame(dict(entity1=many[::2], entity2=many[1::2]))

@pytest.mark.parametrize('table,missing', limits.values(), ids=limits)
def test_what_a_screen_does_not_allow_is_known_beforehand(table, missing):
    "The rehearsal on labels alone says what the real findings will miss, with a reason for each"
    said = rehearse(table, pairs)
    assert {k.split(' of ')[0] for k in said} == missing and all(said.values())
    X = np.random.default_rng(1).normal(size=(len(table),16)).astype(np.float32)
    profiles = {'trained MAE': ad.AnnData(X, obs=table.set_axis(table.index.astype(str)))}
    assert set(findings(profiles, pairs, n_boot=2, n_perm=2).missing) == set(said)


def test_without_pairs_recall_is_left_out():
    assert '--relationships' in rehearse(limits['all there is'][0])['Recall of known relationships']


def test_of_many_perturbations_the_strongest_are_compared():
    obs = pd.DataFrame(dict(perturbation=[f'G{i}' for i in range(9000)]), index=[*map(str, range(9000))])
    X = np.random.default_rng(0).normal(size=(9000,4)).astype(np.float32)
    X[:3] *= 50
    few = strongest(ad.AnnData(X, obs=obs))
    assert len(few) == 500 and {'0','1','2'} <= set(few.obs_names)


@pytest.mark.parametrize('spoil,said', [
    (lambda f: f.write_bytes(f.read_bytes()[:60]), 'unreadable'), (lambda f: f.unlink(), 'missing'),
    (lambda f: tifffile.imwrite(f, np.full((2,SMALL,12), 9, 'u2')), '12 pixels')])
def test_sites_that_cannot_be_used_stay_out(tmp_path, spoil, said):
    s = plates(tmp_path, wells(4, perturbation='TP53'))
    spoil(tmp_path/'2.tif')
    kept,why = usable(s, s.check(), 32)
    assert len(kept)==3 and len(why)==1 and said in why[0] and 'A03' not in set(kept.table.well)


def test_no_site_can_be_used(tmp_path):
    s = plates(tmp_path, wells(4, perturbation='TP53'))
    with pytest.raises(ValueError, match='None of the sites.*40x40.*crop is 64'):
        usable(s, s.check(), 64)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "A folder of images, with a plate map beside it"
    root,g = tmp_path_factory.mktemp('plates'),np.random.default_rng(0)
    (root/'images').mkdir()
    for w in ('A01','A02','A03'):
        for c in '12':
            x = g.integers(0, 4000, (SMALL,SMALL)).astype('u2')
            tifffile.imwrite(root/'images'/f'x_{w}_c{c}.tif', x)
    (root/'pairs.csv').write_text('entity1,entity2\nTP53,MYC\n')
    (root/'map.csv').write_text('well;gene;dose\nA01;TP53;0,5\nA02;DMSO;0\nA03;MYC;1\n')
    return root

PATTERN = 'x_{well}_c{channel}.tif'

def test_options_open_plates(folder):
    said = dict(channels='1=DNA,2=ER', controls='DMSO', columns='perturbation=gene')
    s = own_screen(str(folder/'images'), PATTERN, str(folder/'map.csv'), **said)
    assert s.channels == ['DNA','ER'] and 'dose' in s.table
    assert s.wells.control.tolist() == [False,True,False]
    saved = s.save(folder/'saved')
    for path in (saved, saved/'screen.parquet'): assert own_screen(str(path)).channels == ['DNA','ER']


def run(command, *args):
    "The exit code of a command"
    with pytest.raises(SystemExit) as e: call(command, *args)
    return e.value.code or 0

def images(d, *options): return [d/'images', '--pattern', PATTERN, *options]
def demo(d, *options): return ['--out', d/'demo', '--screen', *images(d), *options]

wrong = {
    'no folder': (cellmae_fit, lambda d: [d/'nowhere'], 1, 'missing'),
    'no pattern': (cellmae_fit, lambda d: [d/'images'], 1, '--pattern'),
    'other names': (cellmae_fit, lambda d: [d/'images', '--pattern', 'y{well}.tif'], 1, 'matches'),
    'another model': (cellmae_fit, lambda d: images(d, '--model', 'mae_vitt9'), 1, 'mae_vit'),
    'no such controls': (cellmae_fit, lambda d: images(d, '--controls', 'NTC'), 1, 'NTC'),
    'columns without =': (cellmae_fit, lambda d: images(d, '--columns', 'gene'), 1, 'name=value'),
    'no pairs': (cellmae_demo, lambda d: demo(d, '--relationships', d/'pears.csv'), 1, 'pears.csv'),
    'other pairs': (cellmae_demo, lambda d: demo(d, '--relationships', d/'map.csv'), 1, 'map.csv'),
    'pairs for the simulation': (cellmae_demo, lambda d: ['--relationships', d/'pairs.csv'], 1, 'add --screen'),
    'small sites': (cellmae_demo, demo, 1, 'crop is 64'),
    'no model': (cellmae_embed, lambda d: [d/'nothing', *images(d)], 1, 'nothing'),
    'a spreadsheet': (cellmae_embed, lambda d: ['a', *images(d, '--out', 'x.xlsx')], 1, '.parquet'),
    'no profiles': (cellmae_recall, lambda d: [d/'no.parquet', d/'pairs.csv'], 1, 'no.parquet'),
    'a level': (cellmae_embed, lambda d: ['a', 'b', '--level', 'gene'], 2, 'level'),
    'a correction': (cellmae_recall, lambda d: ['a', 'b', '--correct', 'all'], 2, 'tvn'),
    'an option': (cellmae_fit, lambda d: ['a', '--epoch5', '3'], 2, 'epoch5'),
    'no number': (cellmae_fit, lambda d: ['a', '--epochs', 'three'], 2, 'three')}

@pytest.mark.parametrize('command,args,code,said', wrong.values(), ids=wrong)
def test_errors_of_commands_are_one_line(folder, capsys, monkeypatch, command, args, code, said):
    monkeypatch.setattr(sys, 'argv', sys.argv)
    assert run(command, *args(folder)) == code
    out,err = capsys.readouterr()
    assert said in err and 'Traceback' not in err
    if code==1: assert err.startswith(f'{command.__name__}: ') and err.strip().count('\n')==0
    assert '2/5' not in out


def test_debug_and_ctrl_c(folder, capsys, monkeypatch):
    monkeypatch.setattr(sys, 'argv', sys.argv)
    with pytest.raises((FileNotFoundError,ValueError)):
        call(cellmae_recall, folder/'no.parquet', folder/'pairs.csv', '--debug')
    def stop(*args, **kwargs): raise KeyboardInterrupt
    monkeypatch.setattr('cellmae.profiles.read_profiles', stop)
    assert run(cellmae_recall, folder/'no.parquet', folder/'pairs.csv') == 130
    assert capsys.readouterr().err == 'cellmae_recall: stopped\n'


commands = [cellmae_demo, cellmae_fit, cellmae_embed, cellmae_recall]

@pytest.mark.parametrize('command', commands, ids=lambda f: f.__name__)
def test_help_explains_every_option(command, capsys, monkeypatch):
    monkeypatch.setattr(sys, 'argv', sys.argv)
    assert run(command, '--help') == 0
    text = capsys.readouterr().out
    assert '--debug' in text and (command is cellmae_recall or '--pattern' in text)


@pytest.mark.parametrize('o', ['<b>', Aside('<b>'), pd.DataFrame({'<b>':['<b>']}),
                               pd.DataFrame({'<b>':['<b>']*99}), [['<b>']]])
def test_reports_escape_everything(o):
    assert '<b>' not in to_html(o)


def microscope(folder, wells=('B03','C02'), names=('w1','w2')):
    "A folder as a microscope names its files, one of them black"
    g = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for w in wells:
        for s in (1,2):
            for c in names:
                x = g.integers(100, 4000, (SMALL,SMALL)).astype('u2')
                tifffile.imwrite(folder/f'{w}_s{s}_{c}.tif', 0*x if (w,s,c)==('C02',2,'w2') else x)
    return folder


@pytest.mark.parametrize('n', [None, 2])
def test_check_command(tmp_path, capsys, n):
    "A folder by its path alone: what it is, what is wrong, a table and a page"
    cellmae_check(str(microscope(tmp_path/'P1')), out=str(tmp_path/'out'), n=n)
    said,t = capsys.readouterr().out,pd.read_csv(tmp_path/'out/problems.csv')
    assert '2 wells' in said and 'no controls' in said and 'Page: ' in said
    if n is None: assert t[t.problem=='constant'].well.tolist() == ['C02']
    assert (tmp_path/'out/screen.html').stat().st_size > 1000


@pytest.mark.parametrize('text,want', [
    (None,None), ('DNA,ER',['DNA','ER']), ('1=DNA, 2=ER',{'1':'DNA','2':'ER'}), ('rxrx','rxrx')])
def test_channels_of_a_command(tmp_path, monkeypatch, text, want):
    "What a command passes on to `Screen.open`"
    given = {}
    monkeypatch.setattr(Screen, 'open', lambda path, **kw: given.update(kw))
    own_screen('somewhere', channels=text, plate_shape='16x24', replace='/a=/b', z='3', t='last')
    assert given.get('channels') == want and given['plate_shape'] == (16,24)
    assert given['replace'] == {'/a':'/b'} and given['z'] == 3 and given['t'] == 'last'
    with pytest.raises(ValueError, match='16x24'): own_screen('somewhere', plate_shape='384')


def test_check_does_not_write_into_a_file(tmp_path):
    (tmp_path/'full').write_text('x')
    with pytest.raises(OSError, match='Name a folder'): cellmae_check(str(tmp_path), out=str(tmp_path/'full'))


def test_cures_of_commands_are_options(tmp_path, capsys):
    for z in (1,2): tifffile.imwrite(tmp_path/f'A01_s1_z{z}_DNA.tif', np.ones((8,8), 'u2'))
    with pytest.raises(SystemExit):
        cellmae_check(str(tmp_path), pattern='{well}_s{site}_z{z}_{channel}.tif', debug=False)
    assert '--z 1' in (said := capsys.readouterr().err) and "z='" not in said
