"""The report and the map: whatever names say, whatever a screen lacks, five thousand wells

Speed in a browser is measured by hand (`chromium --headless --virtual-time-budget`), not here."""
import re
import numpy as np, pandas as pd, pytest, tifffile
from anndata import AnnData
from html.parser import HTMLParser
from cellmae.explore import explore_map, map_points, nearest_names, place_alike
from cellmae.overview import jpeg_uri
from cellmae.report import Aside
from cellmae.screen import Screen
from cellmae.story import SECTIONS, Story, findings, sections_of, write_story
from cellmae.zoo import create_model

pytestmark = pytest.mark.filterwarnings('ignore')
hostile = ['<img src=x onerror=alert(1)>', '</script><script>alert(1)</script>', '$x_$', '$$x_2$$', '"\'&@name{safe}',
           'x'*300, '\u9577\u3044\u540d\u524d', '{0}', r'\(a\)']


def profiles(names=None, n=60, controls=12, batches=2, each=2, seed=0, **columns):
    "Wells of random profiles, some of each perturbation, and controls"
    g = np.random.default_rng(seed)
    names = names or [f'G{i}' for i in range(n//each)]
    p = [*names*each, *['DMSO']*controls]
    obs = pd.DataFrame(dict(perturbation=p, control=[o == 'DMSO' for o in p]))
    i = np.arange(len(obs))
    obs['plate'] = obs['batch'] = [f'B{k}' for k in i%batches]
    obs['well'] = [f'{"ABCDEFGH"[k//batches%8]}{k//batches//8+1:02d}' for k in i]
    signal = dict(zip(names, g.normal(size=(len(names),8))))
    X = g.normal(size=(len(obs),8))+np.stack([signal.get(o, np.zeros(8)) for o in p])
    return AnnData(np.float32(X), obs=obs.assign(**columns).set_axis(obs.index.astype(str)))

def images(x, root, side=40):
    "A screen of the wells of `x`, of noise"
    g = np.random.default_rng(0)
    root.mkdir()
    for i in range(len(x)):
        tifffile.imwrite(root/f'{i}.tif', g.integers(100, 4000, (2,side,side)).astype('u2'), photometric='minisblack')
    return Screen(x.obs.assign(file=[f'{i}.tif' for i in range(len(x))]).reset_index(drop=True), ['DNA','ER'], root)

def mae():
    m = create_model('mae_vitt8', in_chans=2, img_size=32, depth=1, embed_dim=48)
    m.channels = ['DNA','ER']
    return m


class Tags(HTMLParser):
    "Elements of a page, and attributes that would run"
    def __init__(self, text):
        super().__init__()
        self.tags,self.runs,self.away = [],[],[]
        self.feed(text)
    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.runs += [k for k,_ in attrs if k.startswith('on')]
        self.away += [v for k,v in attrs if k in ('src','href') and v and not v.startswith(('data:','#'))]

def left_out(page):
    "Title -> why it is left out"
    return dict(re.findall(r'<tr>\s*<td>([^<]*)</td>\s*<td>([^<]*)</td>', page.partition('What is left out</h2>')[2]))


def test_a_run_is_told_whole_and_needs_nothing_else(tmp_path):
    x = profiles()
    screen = images(x, tmp_path/'s')
    (tmp_path/'history.csv').write_text('epoch,train_loss,valid_loss\n0,2,2.1\n1,1.5,1.7\n')
    pairs = pd.DataFrame(dict(entity1=[f'G{i}' for i in range(0, 30, 2)], entity2=[f'G{i}' for i in range(1, 30, 2)]))
    page = write_story(tmp_path/'r.html', x, screen, pairs, mae(), tmp_path, problems=screen.check(), seed=7,
                       why='Replicates say so.').read_text()
    t = Tags(page)
    assert not left_out(page) and not t.away and not t.runs
    assert page.count('class=how>') == t.tags.count('section') == len(SECTIONS)
    assert '<td>seed</td>' in page and '<td>7</td>' in page and 'Replicates say so.' in page
    assert all(f'href="#{a}"' in page for a in re.findall('<h2 id="([^"]*)"', page))
    assert not re.search(r'<img (?!alt="[^"]+)', page.split('<script')[0]), 'a picture that says nothing'


def test_names_are_text_wherever_they_stand(tmp_path):
    x = profiles(hostile, controls=6, **{hostile[0]: hostile[1], 'x@y $z': np.arange(24.)})
    x.obs['batch'] = x.obs['plate'] = [hostile[i%2] for i in range(len(x))]
    screen = images(x, tmp_path/'s')
    plain = Tags(write_story(tmp_path/'a.html', profiles(n=18, controls=6), screen).read_text())
    t = Tags(page := write_story(tmp_path/'b.html', x, screen, title=hostile[1]).read_text())
    assert t.tags.count('script') == plain.tags.count('script') and not t.runs and not t.away
    assert '<img src=x' not in page and 'alert(1)</script' not in page and 'Error' not in ''.join(left_out(page).values())


lacks = {
    'no controls': (dict(controls=0), {'Batch correction'}),
    'one batch': (dict(batches=1), set()),
    'one plate': (dict(plate='P'), set()),
    'no places': (dict(well=[f'spot {i}' for i in range(72)]), {'Plates before and after'}),
    'no perturbations': (dict(perturbation=''), {'Hits','Nearest neighbours'}),
    'two perturbations': (dict(names=['A','B']), {'Nearest neighbours'})}
always = {s.title for s in SECTIONS} & {'What is wrong with it','Training','Reconstructions','What the model cannot draw',
                                        'Recall of known relationships'}

@pytest.mark.parametrize('how,missing', lacks.values(), ids=lacks)
def test_embeddings_alone_give_what_their_labels_allow(how, missing):
    x = {'a model': profiles(**how)}
    left = {k: o for k,o in sections_of(Story(x, findings(x, n_null=20))).items() if isinstance(o, Aside)}
    assert set(left) == missing | always
    assert all(o.startswith('Left out: ') and len(o) > 15 and 'Error' not in o for o in left.values()), left

def test_a_command_reports_a_table(tmp_path, capsys):
    from cellmae.cli import cellmae_report
    x = profiles(n=6, controls=4)
    pd.concat([x.obs, x.to_df().add_prefix('emb_')], axis=1).to_csv(tmp_path/'x.csv', index=False)
    cellmae_report(str(tmp_path/'x.csv'), out=str(tmp_path/'r.html'))
    assert 'Report: ' in capsys.readouterr().out and '10 wells' in (tmp_path/'r.html').read_text()

def test_an_array_of_one_well(tmp_path):
    page = write_story(tmp_path/'r.html', np.ones((1,4))).read_text()
    assert 'The map' in left_out(page) and '1 well, 4 features' in page and 'Error' not in ''.join(left_out(page).values())


def test_images_that_are_gone(tmp_path):
    x = profiles(n=12)
    screen = images(x, tmp_path/'s')
    screen.fit_ranges()
    for i in range(0, len(x), 2): (tmp_path/f's/{i}.tif').unlink()
    left = left_out(write_story(tmp_path/'r.html', x, screen, model=mae()).read_text())
    assert set(left) == always - {'Reconstructions','What the model cannot draw'}


def test_five_thousand_wells_make_a_page_to_mail(tmp_path):
    x = profiles(n=4920, controls=80, batches=13, each=8)
    x.obs['well'] = [f'{"ABCDEFGHIJKLMNOP"[i//13%16]}{i//13//16+1:02d}' for i in range(len(x))]
    found = findings(x := {'a model': x}, n_null=20)
    g = np.random.default_rng(0)
    pictures = [jpeg_uri(g.integers(0, 255, (112,112,3)).astype('u1')) for _ in range(20)]
    page = write_story(tmp_path/'r.html', x, found=found)
    assert len(found.hits) == 615 and page.stat().st_size < 5e6 and max(map(len, pictures))*300 < 5e6


def test_neighbours_and_places():
    x = map_points(profiles())
    assert np.array_equal(place_alike(x.X), place_alike(x.X)) and len(set(x.obs['name'])) == 30
    near = nearest_names(x.X, x.obs['name'], 2)
    assert all(x.obs['name'].iloc[i] not in o.replace(',', '').split() for i,o in enumerate(near))

def test_a_map_shows_the_columns_it_is_given():
    also = pd.DataFrame(dict(hit=['yes','no']*15), [f'G{i}' for i in range(30)])
    m = explore_map(profiles(), also=also, by='hit')
    assert m.columns[0] == 'hit' and set(m.data()['c0']) == {'yes','no'}
