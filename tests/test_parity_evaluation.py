"""The same numbers as other packages, on screens made by formula

Stored values are from copairs 0.5.5 (an empty cache folder, seed 0, 1000 random rankings), pycytominer 1.7.1 and proxbias 0.11.0.
Where these packages are installed, they are also run and compared on a random screen. Nothing is skipped in an environment of its own:

    python -m venv /some/where && /some/where/bin/pip install . pytest copairs 'pycytominer>=1.7.1'
    /some/where/bin/pip install --no-deps proxbias efaar-benchmarking
    /some/where/bin/python -m pytest -v tests/test_parity_evaluation.py
"""
import sys, types, warnings

import numpy as np
import pandas as pd
import pytest

from cellmae.recall import recall
from cellmae.retrieval import average_precision, mean_average_precision
from cellmae.tvn import TVN, CenterScale, Sphere
from cellmae.profiles import aggregate
from cellmae.arms import correct_arms


@pytest.fixture
def screen():
    "48 wells of 4 plates, 6 features"
    i,j = np.arange(48)[:,None],np.arange(6)
    X = ((37*i+101*j+13*i*j)%97)/97 - .5 + .4*np.cos((i%6+1)*(j+1))
    obs = pd.DataFrame(dict(perturbation=[f'p{k%6}' if k%6 else 'DMSO' for k in range(48)], plate=np.arange(48)//12))
    return X,obs.assign(control=obs.perturbation=='DMSO', gene=[f'g{k%6//2}' for k in range(48)], well=np.arange(48)%12)

def rules(*o): return dict(zip(('pos_sameby', 'pos_diffby', 'neg_sameby', 'neg_diffby'), o))

across = rules('perturbation', 'plate', 'plate', 'control')
siblings = rules('gene', ['perturbation', 'well'], [], 'gene')
replicates = rules('perturbation', [], [], 'control')
copairs = [
    (across, 'perturbation', [.915079, 1, 1, .930556, .915079, 1, .494383, .915079, .97619, 1, .817857, 1],
     [.929712, .987599, .948512, .885714, .990575], [.627413, .934265, .727068, .394185, .950041],
     [.176823, .040959, .105894, .276723, .040959], [.221029, .102398, .176490, .276723, .102398]),
    (siblings, 'gene', [.374933, .168674, .131421, .185903, .177427, .377331, .29715, .244502, .226281, .170234, .204809, .151798],
     [.350002, .189838, .241282], [.112931, -.10565, -.035443], [.170829, .817183, .522478], [.512488, .817183, .783716]),
    (replicates, 'perturbation', [.489299, .982143, .937925, .776623, .852041, .844104, .247738, .880612, .895465, 1, .685204, .947846],
     [.764432, .949844, .821537, .771311, .93801], [.470657, .887295, .598977, .486115, .860703],
     [.068931, .000999, .02997, .060939, .000999], [.068931, .002498, .04995, .068931, .002498])]

@pytest.mark.parametrize('rule,by,ap,mean,normalised,p,q', copairs, ids=['across plates', 'siblings', 'replicates'])
def test_stored_values_of_copairs(screen, rule, by, ap, mean, normalised, p, q):
    t = average_precision(screen, **rule)
    np.testing.assert_allclose(t.average_precision[:12], ap, atol=1e-6)
    t = t[~t.control]
    res = mean_average_precision(t, by, n_null=1000)
    np.testing.assert_allclose(res.mean_average_precision, mean, atol=1e-6)
    np.testing.assert_allclose(((t.average_precision-t.chance)/(1-t.chance)).groupby(t[by]).mean(), normalised, atol=1e-6)
    np.testing.assert_allclose(res.p, p, atol=1e-6)
    np.testing.assert_allclose(res.q, q, atol=1e-6)

@pytest.mark.parametrize('rule', [across, siblings, replicates], ids=['across plates', 'siblings', 'replicates'])
@pytest.mark.parametrize('digits', [None, 0], ids=['', 'tied'])
def test_live_copairs(tmp_path, rule, digits):
    "Ties included, when positives are put first as that package does"
    cm = pytest.importorskip('copairs.map')
    g = np.random.default_rng(1)
    obs = pd.DataFrame(dict(plate=np.arange(960)//96, well=np.arange(960)%96, perturbation=g.integers(0, 40, 960)))
    obs['control'],obs['gene'] = obs.perturbation==0,obs.perturbation//3
    X = g.normal(size=(960, 16)) + .5*g.normal(size=(40, 16))[obs.perturbation]
    if digits is not None: X = np.sign(X.round(digits))+.5
    lists = [[o] if isinstance(o, str) else list(o) for o in rule.values()]
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        ref = cm.average_precision(obs, X, *lists, progress_bar=False)
        m = cm.mean_average_precision(ref[~ref.control], lists[0], null_size=500, threshold=.05, seed=0, progress_bar=False, cache_dir=tmp_path)
    t = average_precision((X, obs), **rule, ties='first')
    assert t.n_pos.tolist() == ref.n_pos_pairs.tolist() and t.n_total.tolist() == ref.n_total_pairs.tolist()
    np.testing.assert_allclose(t.average_precision, ref.average_precision, atol=1e-12 if digits is None else 1e-6)
    res = mean_average_precision(t[~t.control], lists[0], n_null=500)
    np.testing.assert_allclose(res.mean_average_precision, m.mean_average_precision, atol=1e-12 if digits is None else 1e-6)
    np.testing.assert_allclose(res.p, m.p_value, atol=1e-12 if digits is None else .01)

spherize = {
    'PCA': ([1.98687, .711487, .461712, .529919], [4.947856, .170501, 1.428076, 1.621533, -.262758, 3.707117]),
    'ZCA': ([1.244546, 1.399887, .922475, .76702], [4.947856, .170501, 1.428076, 1.621533, -.262758, 3.707117]),
    'PCA-cor': ([2.043466, .637183, .555307, .240289], [4.94786, .170501, 1.428077, 1.621535, -.262758, 3.70712]),
    'ZCA-cor': ([1.26052, 1.406249, .910824, .742841], [4.94786, .170501, 1.428077, 1.621535, -.262758, 3.70712])}

def sphere(name): return Sphere(name[:3].lower(), shrink=0, scaled=name.endswith('cor'))

@pytest.mark.parametrize('name', spherize)
def test_stored_values_of_pycytominer(name):
    "Components may be mirrored, so sizes and inner products are compared"
    i,j = np.arange(60)[:,None],np.arange(4)
    X = (37*i+101*j+13*i*j)%97/97 + .3*(i//20==1)
    Y = sphere(name).fit_transform(X, controls=np.arange(60)%3==0)
    np.testing.assert_allclose(np.abs(Y[0]), spherize[name][0], atol=1e-5)
    np.testing.assert_allclose((Y[:3]@Y[:3].T)[np.triu_indices(3)], spherize[name][1], atol=2e-5)

@pytest.mark.parametrize('name', spherize)
def test_live_pycytominer(name):
    op = pytest.importorskip('pycytominer.operations', reason='pycytominer>=1.7.1 is not installed', exc_type=ImportError)
    g = np.random.default_rng(0)
    X,c = 5+g.normal(size=(300, 20))@g.normal(size=(20, 20)),np.arange(300)<200
    ref = op.Spherize(method=name, epsilon=0).fit(pd.DataFrame(X[c])).transform(pd.DataFrame(X)).to_numpy()
    Y = sphere(name).fit_transform(X, controls=c)
    np.testing.assert_allclose(Y@Y.T, ref@ref.T, atol=1e-7)
    if 'ZCA' in name: np.testing.assert_allclose(Y, ref, atol=1e-7)

@pytest.fixture
def arm_map():
    "120 genes of four arms, one of them small, 5 features"
    i,j = np.arange(120)[:,None],np.arange(5)
    X = pd.DataFrame(((41*i+23*j+17*i*j)%101)/101 + .5*(i//40==1), index=[f'g{k}' for k in range(120)])
    return X,pd.DataFrame(dict(gene=X.index, arm=np.repeat(['1p', '3q', '7q', 'Xp'], [40, 40, 30, 10]), zfpkm=np.where(np.arange(120)%3==0, 0., -4.)))

proxbias = [[-.492765, -.274943, -.057121, .160701, .378522], [-.203154, .423542, .087275, -.286029, .414741]]

def test_stored_values_of_proxbias(arm_map):
    "Arm centring on genes that are not expressed (zFPKM below -3), where there are more than 20 of them"
    X,arms = arm_map
    with pytest.warns(UserWarning, match='2 arms, such as 7q'): Y = correct_arms(X, arms.assign(expressed=arms.zfpkm>=-3))
    np.testing.assert_allclose(Y.iloc[[0, 50]], proxbias, atol=1e-6)
    np.testing.assert_allclose(Y.iloc[80:], X.iloc[80:])

def test_live_proxbias(arm_map):
    pb = pytest.importorskip('proxbias.arm_centering', exc_type=ImportError)
    X,arms = arm_map
    df = X.rename(columns=str).assign(chromosome_arm=arms.arm.to_numpy(), zfpkm=arms.zfpkm.to_numpy())
    meta = ['chromosome_arm', 'zfpkm']
    ref = pb.perform_arm_centering(df, meta, pb.build_arm_centering_df(df, meta)).drop(columns=meta)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        np.testing.assert_allclose(correct_arms(X, arms.assign(expressed=arms.zfpkm>=-3)), ref, atol=1e-12)

@pytest.fixture
def efaar(monkeypatch):
    "The reference evaluation; what it imports for other parts and is not installed is an empty module"
    for name,attr in (('scvi.model', 'SCVI'), ('geomloss', 'SamplesLoss')):
        monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(**{attr: None}, __name__=name, __spec__=None))
    pytest.importorskip('efaar_benchmarking', exc_type=ImportError)
    import efaar_benchmarking.benchmarking as b, efaar_benchmarking.efaar as e
    yield types.SimpleNamespace(**{k: getattr(o, k) for o,ks in ((e, ('tvn_on_controls', 'centerscale_on_controls', 'aggregate')), (b, ('known_relationship_benchmark',))) for k in ks})
    for k in [k for k in sys.modules if k.startswith('efaar_benchmarking')]: del sys.modules[k]

def test_live_efaar_corrections(efaar):
    g = np.random.default_rng(0)
    X = g.normal(size=(400, 12))@g.normal(size=(12, 12))+3*g.normal(size=(5, 12))[np.arange(400)//80]
    meta = pd.DataFrame(dict(pert=np.where(np.arange(400)%4==0, 'NTC', 'x'), batch=(np.arange(400)//80).astype(str)))
    c,b = (meta.pert=='NTC').to_numpy(),meta.batch.to_numpy()
    for tfm,f in ((TVN(variant='efaar'), efaar.tvn_on_controls), (CenterScale(), efaar.centerscale_on_controls)):
        ref,Y = f(X.copy(), meta, 'pert', 'NTC', 'batch').real,tfm.fit_transform(X, controls=c, batches=b)
        np.testing.assert_allclose(Y@Y.T, ref@ref.T, atol=1e-8)

def test_live_efaar_recall(efaar):
    from efaar_benchmarking.constants import BENCHMARK_DATA_DIR, BENCHMARK_SOURCES
    from sklearn.utils import Bunch
    sets = {k: f'{BENCHMARK_DATA_DIR}/{k}.txt' for k in BENCHMARK_SOURCES}
    genes = pd.unique(pd.read_csv(sets['CORUM'], dtype=str).to_numpy().ravel())[:700]
    X = np.random.default_rng(0).normal(size=(700, 20))
    ref = efaar.known_relationship_benchmark(Bunch(features=pd.DataFrame(X), metadata=pd.DataFrame(dict(gene=genes))), 'gene').set_index('source')
    res = recall((X, genes), sets, n_boot=0, n_perm=0).pivot(index='source', columns='low', values='recall').loc[BENCHMARK_SOURCES]
    np.testing.assert_array_equal(res, ref.loc[BENCHMARK_SOURCES].filter(like='recall'))
