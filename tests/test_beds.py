"Simulated screens: the first is what it always was, the second is one of its own"
import json

import numpy as np, pandas as pd, pytest
from cellmae.synth import BEDS, draw_cells, make_genes, render_site, synth_screen

few = dict(n_pathways=6, genes_per_pathway=2, n_inactive=2, n_batches=2, controls_per_batch=3, size=96,
           sites_per_well=2, n_workers=0)

@pytest.fixture(scope='module')
def plain(tmp_path_factory): return synth_screen(tmp_path_factory.mktemp('beds')/'plain', **few)

def test_the_plain_bed_is_what_it_was(plain):
    "Pixels of a screen made before there were two beds, but for rounding"
    assert len(plain)==68
    assert np.abs(plain.read(5)[:,40,40].astype(int)-[417,790,1168,2321,3792,2170]).max() <= 2
    means = [957.41, 1350.11, 1352.25, 1691., 2926.94, 1368.59]
    assert np.allclose(plain.read(5).mean((1,2)), means, atol=.1)

def test_a_folder_made_before_there_were_beds_is_plain(plain):
    file = plain.root/'synth.json'
    said = json.loads(file.read_text())
    assert said.pop('bed')=='plain'
    file.write_text(json.dumps(said))
    assert synth_screen(plain.root, **few).table.equals(plain.table)
    with pytest.raises(FileExistsError, match='bed=plain and not form'): synth_screen(plain.root, bed='form', **few)

def test_a_screen_of_the_second_bed(tmp_path):
    size = few | dict(size=64, sites_per_well=1)
    s,again = [synth_screen(tmp_path/k, bed='form', **size) for k in 'ab']
    assert all((s.read(i)==again.read(i)).all() for i in range(0, len(s), 7))
    truth = pd.read_csv(s.root/'truth.csv').filter(like='Truth_').columns.str.removeprefix('Truth_')
    assert list(truth)==list(BEDS['form'].params.index)

def test_few_pathways_are_strong():
    length = lambda bed: np.linalg.norm(make_genes(n_inactive=0, bed=bed)[BEDS[bed].params.index].to_numpy(float), axis=1)
    share = lambda x: np.sort(x**2)[-len(x)//4:].sum()/(x**2).sum()
    assert share(length('form')) > .6 > share(length('plain'))

def rings(x):
    "Power per ring of patches in which all is drawn, without masks"
    power = np.abs(np.fft.rfft2(x-x.mean((1,2), keepdims=True)))**2
    k = np.hypot(np.fft.fftfreq(64)[:,None], np.fft.rfftfreq(64))*64
    return np.stack([power[:,(k>=a)&(k<a+2)].mean(1) for a in range(3, 20, 2)], 1)

@pytest.mark.parametrize('name,texture', [('chromatin_clumps','clumps'), ('er_threads','threads')])
def test_forms_have_one_spectrum(name, texture):
    b,power = BEDS['form'],[]
    for by in (-2,2):
        rng = np.random.default_rng(0)
        d = draw_cells(6, rng, by*(b.params.index==name), b.params)
        power.append(rings(getattr(b.cells(d, rng, 128), texture)).mean(0))
    assert np.allclose(*power, rtol=.05)

@pytest.mark.parametrize('follows,followed,name', [(4,1,'mito_on_er'), (2,1,'granules_on_er')])
def test_stains_follow_each_other(follows, followed, name):
    b,r = BEDS['form'],[]
    for by in (-3,3):
        rng = np.random.default_rng(1)
        x = render_site(draw_cells(12, rng, by*(b.params.index==name), b.params), rng, cells=b.cells)
        x = x-np.stack([np.roll(x, s, (1,2)) for s in (-4,4)]).mean(0) # what is fine
        r.append(np.corrcoef(x[follows].ravel(), x[followed].ravel())[0,1])
    assert r[1] > r[0]+.1
