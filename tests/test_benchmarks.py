"The benchmark scripts run, and the plain readings compute what our models compute"
import importlib.util, runpy, sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np, pandas as pd, pytest, torch
from anndata import AnnData

root = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(root/'benchmarks')) # scripts import each other

@pytest.mark.parametrize('script,args', [
    ('train_step','--model mae_vitt8 --bf16'), ('train_step','--model camae_vitt8 --small-decoder --as-used'),
    ('train_step','--model mae_vitt8 --part loss --size 256'), ('train_step','--model mae_vitt8 --part lion'),
    ('embed','--model mae_vitt8'), ('embed','--model camae_vitt8 --bf16 --as-used'), ('embed','--model camae_vitt8 --split 1 2')])
def test_script(script, args, tmp_path, monkeypatch, capsys):
    args = [*f'--size 32 --depth 1 --bs 2 --rounds 1 --threads {torch.get_num_threads()}'.split(), *args.split(), '--out', str(tmp_path/'r.json')]
    monkeypatch.setattr(sys, 'argv', [script, *args])
    import timing
    monkeypatch.setattr(timing, 'peak_rate', partial(timing.peak_rate, n=256, rounds=1))
    runpy.run_path(str(root/'benchmarks'/f'{script}.py'), run_name='__main__')
    assert '| 1.0 |' in capsys.readouterr().out and (tmp_path/'r.json').exists()


def script(name):
    "A benchmark script as a module"
    spec = importlib.util.spec_from_file_location(name, root/'benchmarks'/f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

def test_busy(monkeypatch):
    "Rows of each round, alone and beside a neighbour that ends with it"
    monkeypatch.syspath_prepend(root/'benchmarks')
    busy = script('busy')
    monkeypatch.setattr(busy.torch, 'set_num_threads', lambda n: None)
    a = SimpleNamespace(model='mae_vitt8', size=32, bs=1, threads=1, neighbours=[0,1], rounds=1, seconds=0, settle=0, way='always asleep')
    t = busy.table(pd.DataFrame(busy.measure(a), columns=['what','neighbours','round','median','longest']).assign(way='as it is'))
    assert len(t)==4 and (t['over as it is']==1).all() and (t.seconds>0).all()

@pytest.mark.filterwarnings('ignore')
def test_compare(tmp_path):
    "Every kind of run ends in rows of the tables"
    compare = script('compare')
    runs,usual = (compare.all_runs(size, compare.PARTS) for size in ('tiny','small'))
    assert all(k.replace('_', '').isalnum() for k in runs)
    assert {k for _,*ab in compare.CONTRASTS for k,_ in ab} <= set(usual)
    keys = 'baseline_baseline_oracle','scale_WSL_densenet_t','fourier_MAE_T_alpha_0','channels_MAE_MAE_trained_on_four','inactive_WSL_WSL_4_inactive'
    short = 'plateau_CA_MAE_CA_MAE_rate_0_0005_alpha_0_03'   # has a curve and no recall
    for k in (*keys,short): compare.execute(k, runs[k], tmp_path, 'tiny', 0)
    t = compare.write_tables(tmp_path, tmp_path/'tables', [0])
    assert set(t.label) == {runs[k]['label'] for k in keys}
    assert np.isfinite(t.recall).all() and (t.flops.dropna()>0).all()
    assert set(t[t.part=='channels']['view']) == {'four stains','all six stains'}   # an MAE that knows neither RNA nor golgi has no row for them
    assert {'runs.csv','curves.csv','contrasts.csv'} == {f.name for f in (tmp_path/'tables').iterdir()}
    curves = pd.read_csv(tmp_path/'tables/curves.csv')
    assert curves.valid_loss.notna().all() and set(curves.label) == {runs[k]['label'] for k in (*keys[1:],short)}

def test_stored_tables_are_of_these_runs():
    "What the tutorial reads was made by the scripts as they are"
    compare,real = script('compare'),pd.read_csv(root/'benchmarks/compare/real.csv')
    stored = pd.read_csv(root/'benchmarks/compare/runs.csv')
    for part,t in stored.groupby('part'):
        assert set(t.label.astype(str)) == {r['label'] for r in compare.all_runs('small', [part]).values()}
    assert set(compare.PARTS)-{'plateau'} == set(stored.part)
    assert set(real.encoder) == set(script('compare_real').ENCODERS)

def test_stored_tables_are_of_these_beds():
    beds = script('beds')
    legible,ladder = [pd.read_csv(root/f'benchmarks/beds/{k}.csv') for k in ('legible','ladder')]
    assert {k: list(t.name) for k,t in legible.groupby('bed')} == {k: list(b.params.index) for k,b in beds.BEDS.items()}
    assert set(ladder.bed) == set(beds.BEDS)
    for k in beds.BEDS: assert all(np.isfinite(o).all() for o in beds.one_site(0, k))

@pytest.mark.filterwarnings('ignore')
def test_slow_burn(tmp_path):
    "Every budget becomes a point, and what is there is not computed again"
    burn = script('slow_burn')
    go = lambda: burn.burn(tmp_path/'burn', 'plain', 'tiny', list(burn.RECIPES), tmp_path/'tables')
    go()
    t = pd.read_csv(tmp_path/'tables/results.csv')
    assert set(t.recipe) == {*burn.RECIPES,*burn.STATISTICS} and t.recall.between(0, 1).all()
    runs = t[t.minutes.notna()]
    assert (runs.cpu_s>0).all() and len(runs) == len(burn.RECIPES)*len(burn.SIZES['tiny']['minutes'])
    made = {f: f.stat().st_mtime_ns for f in (tmp_path/'burn').rglob('*.json')}
    go()
    assert made == {f: f.stat().st_mtime_ns for f in (tmp_path/'burn').rglob('*.json')}
    before = burn.Spent(next((tmp_path/'burn/runs').glob('*/cpu.json')))
    assert before.total() >= before.before > 0

@pytest.fixture
def recipes(monkeypatch):
    "The bench of recipes with a small screen and two small ones"
    module = script('recipes')
    small = dict(n_pathways=5, genes_per_pathway=4, n_inactive=2, n_batches=5, controls_per_batch=5)
    plain = dict(model='mae_vitt8', net=dict(depth=2, embed_dim=48), crop=32, epochs=1)
    monkeypatch.setattr(module, 'SCREENS', dict(tiny=dict(small, size=64)))
    monkeypatch.setattr(module, 'RECIPES', {'plain': plain, 'energies': dict(plain, energy=.5), 'channels': dict(plain, model='camae_vitt8_shared')})
    monkeypatch.setattr(module, 'BASES', {'plain': ['energies']})
    return module

@pytest.mark.filterwarnings('ignore')
def test_recipes(recipes, tmp_path, monkeypatch):
    "Every read-out of each recipe, beside statistics of equal tiles; one that is there is not run again"
    for k in recipes.RECIPES: recipes.execute(k, 'tiny', 0, tmp_path)
    argv = ['recipes', '--screens', 'tiny', '--out', str(tmp_path), '--tables', str(tmp_path/'t')]
    monkeypatch.setattr(sys, 'argv', argv)
    recipes.main()
    runs,gains = (pd.read_csv(tmp_path/f't/{k}.csv') for k in ('runs','gains'))
    for recipe,t in runs.groupby('recipe'):
        reads = [k+by for by in recipes.BY[:1+(recipe=='channels')] for k in recipes.READ]
        rows = {(k,of) for k in reads for of in ('alone','joined')}|{(k,'alone') for k in recipes.STATISTICS}
        assert {*zip(t.readout, t.of)}==rows and len(t)==len(rows)
    assert runs.recall.between(0, 1).all() and set(runs.recipe)=={'plain','energies','channels'}
    assert gains.recipe.tolist()==['energies'] and np.isfinite(gains.gain).all()

def test_a_channel_agnostic_model_is_read_by_channel_too(recipes):
    "The mean over all tokens is the mean of those of the channels"
    model = recipes.create_model('camae_vitt8_shared', in_chans=3, img_size=32, depth=2, embed_dim=48).eval()
    whole,own = recipes.tokens_pooled(model, torch.randint(0, 256, (2,3,32,32), dtype=torch.uint8))
    assert whole.shape==(2,4*48) and own.shape==(2,4*3*48)
    means = own[:,:2*3*48].reshape(2, 2, 3, 48).mean(2).flatten(1)
    torch.testing.assert_close(whole[:,:2*48], means)

def tiny_screen(data, cache):
    "40 genes in pairs on 3 plates: the first of 6 directions is noise alone, and large"
    g,genes = np.random.default_rng(0),[f'G{i:02}' for i in range(40)]
    push = np.r_[2*g.normal(size=(20,6)).repeat(2, 0), np.zeros((12,6))]
    X = np.concatenate([push+g.normal(size=push.shape)*[20,1,1,1,1,1] for _ in range(3)])
    obs = pd.DataFrame(dict(perturbation=[*genes, *['NTC']*12]*3, batch=np.repeat(['a','b','c'], 52)))
    turn = np.linalg.qr(g.normal(size=(6,6)))[0]
    return AnnData(np.float32(X@turn), obs=obs.assign(control=obs.perturbation=='NTC').rename(str))

def tiny_pairs(data, cache):
    return {'pairs': pd.DataFrame([(f'G{i:02}',f'G{i+1:02}') for i in range(0, 40, 2)],
                                  columns=['entity1','entity2'])}

@pytest.fixture
def corrections(monkeypatch):
    "The benchmark of corrections with a set of its own and three corrections"
    module = script('corrections')
    monkeypatch.setattr(module, 'SETS', {'tiny': (tiny_screen, tiny_pairs, [module.replicates])})
    some = 'none','CenterScale()','Sphere()'
    monkeypatch.setattr(module, 'CORRECTIONS', {k: module.CORRECTIONS[k] for k in some})
    return module

def test_corrections(corrections, tmp_path, monkeypatch, capsys):
    "Rows of every correction, compared with the base; a second run has nothing to do"
    argv = ['corrections', '--out', str(tmp_path), '--cache', str(tmp_path/'cache'), '--data', '.']
    monkeypatch.setattr(sys, 'argv', argv)
    corrections.main()
    t = pd.read_csv(tmp_path/'results.csv').set_index(['scale','correction','measure'])
    assert len(t)==18 and t.value.notna().all()
    r,base = t.loc[('raw','Sphere()','recall pairs')],t.loc[('raw','CenterScale()','recall pairs')]
    assert base.gain==0 and base.p==1 and base.gain_low==base.gain_high==0
    np.testing.assert_allclose(r.value-base.value, r.gain, atol=1e-3)
    assert r.gain_low>0 and r.p<.05 and r.low<r.value<r.high
    assert t.loc[('raw','Sphere()','mAP replicates')].gain_low>0
    assert '| tiny | recall pairs |' in (tmp_path/'results.md').read_text()
    corrections.main()
    assert capsys.readouterr().out.strip().splitlines()[-1].startswith('tiny: 0 rows')

def test_groups_are_drawn_whole(corrections):
    "Copies of a perturbation's wells add nothing to what is known"
    g = np.random.default_rng(0)
    a,b,who = g.random(30),g.random(30),np.arange(30)
    once,twice = corrections.compared(a, b, who),corrections.compared(*(np.repeat(o, 2) for o in (a,b,who)))
    for k in set(once)-{'n'}: np.testing.assert_allclose(once[k], twice[k], atol=1e-12)

def test_stored_corrections_are_those_of_the_benchmark():
    module,t = script('corrections'),pd.read_csv(root/'benchmarks/corrections/results.csv')
    assert set(t.correction)==set(module.CORRECTIONS) and set(t.set)==set(module.SETS)
