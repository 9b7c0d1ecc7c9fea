"How screens, models and corrections show themselves, and what the pictures of a screen say"
import html, re, warnings
from contextlib import redirect_stdout
from io import StringIO

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from tifffile import imwrite

import cellmae.screen
from cellmae.classifier import Classifier
from cellmae.interpret import what_changed
from cellmae.overview import LARGE, colours_of, composite
from cellmae.plots import plot_map
from cellmae.screen import Screen
from cellmae.store import pack
from cellmae.tvn import TVN, CenterScale, load_correction
from cellmae.zoo import create_model

hostile = '<script>alert(1)</script>$x_1$&"'

def make(root, channels, shape=(40, 40), dtype='u2', n=4, **columns):
    "A screen of noise, two wells of two plates, a file per site"
    root.mkdir(parents=True, exist_ok=True)
    g = np.random.default_rng(0)
    for i in range(n):
        x = (g.random((len(channels), *shape))*200).astype(dtype)
        imwrite(root/f'{i}.tif', x, photometric='minisblack', metadata={'axes': 'CYX'})
    t = dict(plate=[f'P{i%2+1}' for i in range(n)], well=[f'B{i//2+2:02d}' for i in range(n)],
             perturbation=['DMSO', hostile]*(n//2), file=[f'{i}.tif' for i in range(n)])
    with redirect_stdout(StringIO()): return Screen(pd.DataFrame({**t, **columns}), channels, root)

def safe(page):
    "Nothing of a name became markup"
    assert '<script' not in page and html.escape('<script>') in page
    return page

def drawn(fig):
    fig.canvas.draw()
    plt.close('all')
    return fig

@pytest.fixture
def screen(tmp_path): return make(tmp_path/'a', ['DNA', '<script>'])

# Wells by name

@pytest.mark.parametrize('well', ['B02', 'b2', 'B-02', 'Well B002', 'r02c02', ' B02 '])
def test_a_well_goes_by_any_spelling(screen, well):
    assert screen[well].table['file'].tolist() == ['0.tif', '1.tif']
    assert screen['P2', well].table['file'].tolist() == ['1.tif']

def test_a_well_that_is_not_there(screen):
    for key,says in (('B04', 'Did you mean'), ('P3', "No well 'P03': there are B02, B03"),
                     (('P3', 'B02'), "No plate 'P3': there are P1, P2"), (('P1', ''), 'No well')):
        with pytest.raises(ValueError, match=says): screen[key]
    assert screen[np.int64(1)].shape == (2, 40, 40) # a number is a site, as ever

# Screens and stores

def test_a_screen_shows_itself(screen, tmp_path):
    page = safe(screen._repr_html_())
    assert page.count('<img') == 2 and '40 x 40 uint16' in page and screen.ranges is None
    store = pack(screen, tmp_path/'store')
    page = safe(store._repr_html_())
    assert page.startswith('<div') and '>Store<' in page and 'source_' not in page

@pytest.mark.parametrize('what', ['gone', 'damaged', 'url'])
def test_images_that_cannot_be_read_do_not_break_it(screen, what, monkeypatch):
    f = screen.root/'0.tif'
    if what == 'gone': f.unlink()
    if what == 'damaged': f.write_bytes(f.read_bytes()[:300])
    if what == 'url':
        screen.table['file'] = 'https://no.such.host/a.tif'
        monkeypatch.setattr(Screen, 'read', None) # it is not even tried
    page = safe(screen._repr_html_())
    assert '<img' not in page and 'No pictures.' in page and 'DMSO' in page
    if what != 'url': drawn(screen.show(2))

def test_sites_that_are_large_are_not_read_in_passing(screen, monkeypatch):
    monkeypatch.setattr('cellmae.overview.LARGE', 100)
    assert 'are large' in screen._repr_html_() and LARGE > 6*2160**2

def test_a_large_screen_reads_one_site(tmp_path, monkeypatch):
    small = make(tmp_path, ['DNA'])
    big = small.subset(np.arange(4).repeat(500))
    read,seen = Screen.read,[]
    monkeypatch.setattr(Screen, 'read', lambda self, i, *a: seen.append(i) or read(self, i, *a))
    big._repr_html_()
    assert seen == [0]
    assert not len(small.subset([])) and 'No sites' in small.subset([])._repr_html_()

@pytest.mark.parametrize('channels,shape,dtype', [
    (['DNA'], (40, 40), 'u1'), ([f'c{i}' for i in range(12)], (30, 50), 'u2'),
    (['R', 'G', 'B'], (3, 5), 'u1'), (['DNA', 'ER'], (700, 300), 'f4')])
def test_sites_of_any_kind_are_shown(tmp_path, channels, shape, dtype):
    s = make(tmp_path, channels, shape, dtype)
    assert s._repr_html_().count('<img') == len(channels)
    fig = drawn(s.show(3, colour=True))
    assert len(fig.axes) == 3*(len(channels)+1)
    assert [a.get_title() for a in fig.axes[:len(channels)]] == channels
    assert 'DMSO (control)' in fig.axes[0].get_ylabel() and 'B0' in fig.axes[0].get_ylabel()

def test_colours_are_those_of_the_stains():
    assert colours_of(['Hoechst', 'x'])[0] == colours_of(['DAPI'])[0] != colours_of(['ER'])[0]
    assert len(set(colours_of('abcdef'))) == 6
    assert composite(np.ones((3, 2, 2)), ['R', 'G', 'B']).tolist() == np.ones((2, 2, 3)).tolist()

# Models and corrections

def test_models_show_themselves():
    m = create_model('camae_vitt8_shared', in_chans=2, img_size=32, depth=1, embed_dim=48)
    assert '2, without names' in m._repr_html_()
    m.channels,m.provenance = ['DNA', hostile],dict(epochs=3, data=hostile)
    page = safe(m._repr_html_())
    assert '32 px' in page and '8 px' in page and 'epochs 3' in page
    net = Classifier(m, 3)
    net.channels = m.channels
    assert 'Classifier on CAMAE' in safe(net._repr_html_()) and repr(net).startswith('Classifier(')

def test_corrections_show_themselves(tmp_path):
    g = np.random.default_rng(0)
    X,b = g.normal(size=(40, 12)),np.repeat([hostile, 'b'], 20)
    c = np.tile(np.arange(20) < 5, 2)
    assert 'Not fitted' in CenterScale()._repr_html_()
    with pytest.warns(UserWarning, match='shrunk'): t = TVN().fit(X, controls=c, batches=b)
    for o in (t, load_correction(t.save(tmp_path/'t.safetensors'))):
        page = safe(o._repr_mimebundle_()['text/html'])
        assert '12 in, 12 out' in page and '10, 5 in a batch' in page and 'towards a sphere' in page
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        with pytest.raises(UserWarning): TVN().fit(X, controls=c, batches=b)

# Maps

def test_a_map_without_its_control_and_in_groups():
    g = np.random.default_rng(0)
    t = pd.DataFrame(np.repeat(g.normal(size=(6, 30)), 5, 0)+.3*g.normal(size=(30, 30)),
                     index=[f'g{i}' for i in range(30)])
    t.loc['DMSO'] = 100
    fig = drawn(plot_map(t.sample(frac=1, random_state=0)))
    names = [o.get_text() for o in fig.axes[0].get_yticklabels()]
    groups = [int(o[1:])//5 for o in names]
    assert len(names) == 30 and sum(a != b for a,b in zip(groups, groups[1:])) == 5
    fig = drawn(plot_map(t, {'g1': '$a', 'g2': '$a', 'g7': 'b'}, max_names=5))
    assert [o.get_text() for o in fig.axes[0].get_yticklabels()] in (['\\$a', 'b'], ['b', '\\$a'])

# What a perturbation changed

def test_what_changed_finds_the_stain(tmp_path):
    "A stain that is blurred in some wells is found, whatever the others do; other wells show nothing"
    g,n = np.random.default_rng(0),48
    wells = [f'{"ABCD"[i//12]}{i%12+1:02d}' for i in range(n)]
    kind = np.array(['DMSO']*8+['blur']*4+['none']*4)[np.arange(n)%16]
    x = g.normal(size=(n, 3, 40, 40))
    x[kind == 'blur',1] = .9*(x+np.roll(x, 1, -1))[kind == 'blur',1]
    for i,o in enumerate(x): imwrite(tmp_path/f'{i}.tif', (1000+100*o).astype('u2'), photometric='minisblack')
    t = pd.DataFrame(dict(well=wells, perturbation=kind, batch=np.repeat(['1', '2', '3'], 16),
                          file=[f'{i}.tif' for i in range(n)]))
    s = Screen(t, ['a', 'b', 'c'], tmp_path)
    found = what_changed('spectrum', s, 'blur')
    assert found.channel == 'b' and found.channels.q['b'] < .05 < found.channels.q.drop('b').min()
    assert found.treated.scores.mean() > 3*abs(found.controls.scores.mean())
    assert what_changed('spectrum', s, 'none').channels.q.min() > .05
    with pytest.raises(ValueError, match='No perturbation'): what_changed('spectrum', s, 'x')
    drawn(found.show(3)), drawn(found.plot())
