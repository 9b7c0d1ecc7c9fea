"Rules of any columns, several labels in a cell, similarities, MODZ, neighbours and sets: the numbers of other packages, and forms people have"
import time, warnings

import numpy as np, pandas as pd, pytest
from anndata import AnnData
from scipy.stats import hypergeom, ks_2samp
from sklearn.metrics.pairwise import cosine_similarity

from cellmae.neighbours import cluster_test, enrichment, nearest
from cellmae.profiles import aggregate, read_profiles, to_parquet
from cellmae.recall import read_complexes, read_gene_sets
from cellmae.retrieval import activity, average_precision, consistency, magnitude, match, mean_average_precision
from cellmae.tvn import TVN, PCACenterScale


@pytest.fixture
def screen():
    "24 wells of 12 features by formula, with one or two mechanisms each"
    i,j = np.arange(24)[:,None],np.arange(12)
    X = ((37*i+101*j+13*i*j)%97)/97 - .5 + .4*np.cos((i%6+1)*(j+1))
    moa = [sorted({'abcde'[k%5], 'abcde'[k//3%5]}) for k in range(24)]
    k = np.arange(24)
    return X,pd.DataFrame(dict(moa=moa, plate=k//6, target=[f't{o}' for o in k%4], kind=[f'k{o}' for o in k%3]))


# check values of copairs 0.5.5 and pycytominer 1.7.1

@pytest.mark.parametrize('rules,ap,n_pos,n_total,means', [
    (('moa', (), (), 'moa'), [.273102, .354047, .678709, .498637, .570766, .352457, .64651, .703869, .631593], [8]*9,
     [23, 16, 16, 16, 16, 23, 16, 16, 16], [.523299, .566551, .477223, .452485, .439356]),
    (('moa', 'plate', (), ['moa','plate']), [.238214, .275913, .664444, .475108, .59731, .29421, .545406, .656187, .666588],
     [5, 5, 5, 5, 8, 6, 6, 6, 8], [18, 13, 11, 13, 14, 18, 11, 12, 14], [.490376, .566147, .472474, .448396, .37314])],
    ids=['anywhere', 'across plates'])
def test_several_labels_as_in_copairs(screen, rules, ap, n_pos, n_total, means):
    t = average_precision(screen, *rules, ties='first')
    assert len(t)==43
    np.testing.assert_allclose(mean_average_precision(t, 'moa', n_null=10).mean_average_precision, means, atol=1e-6)
    t = t[t.moa=='a']
    np.testing.assert_allclose(t.average_precision, ap, atol=1e-6)
    assert t.n_pos.tolist()==n_pos and t.n_total.tolist()==n_total

either = dict(any=['target', 'kind'])
@pytest.mark.parametrize('rules,ap,n_pos', [
    ((either, 'plate', (), ['target', 'kind']), [.699166, .678372, .858124, .575306, .631378, .605408], [9, 9, 10, 10, 9, 9]),
    ((dict(all='plate', **either), (), (), dict(all=['plate'], **either)), [.173611, .122378, .066667, .142857, .211111, .094017],
     [2, 2, 1, 1, 2, 2])], ids=['any', 'all and any'])
def test_any_of_these_columns_as_in_copairs(screen, rules, ap, n_pos):
    t = average_precision(screen, *rules, ties='first')
    np.testing.assert_allclose(t.average_precision[:6], ap, atol=1e-6)
    assert t.n_pos[:6].tolist()==n_pos

@pytest.mark.parametrize('similarity,ap', dict(
    pearson=[.42127, .244286, .328751, .210511, .333954, .315833], abs_cosine=[.39716, .280987, .342965, .317698, .457632, .307244],
    euclidean=[.488889, .229883, .383896, .226999, .307143, .240835], manhattan=[.552367, .225439, .371667, .220677, .282918, .283117]).items())
def test_similarities_as_in_copairs(screen, similarity, ap):
    t = average_precision(screen, 'target', (), (), 'target', ties='first', similarity=similarity)
    np.testing.assert_allclose(t.average_precision[:6], ap, atol=1e-6)

def test_modz_as_in_pycytominer(screen):
    res = aggregate(screen, 'target', how='modz')
    np.testing.assert_allclose(res.X[:,:6], [
        [-.157867, -.373534, -.440494, -.052078, .02602, .185718], [.002164, .276296, .380397, -.257403, .009133, .058513],
        [.05604, -.320135, -.331362, .162329, -.102711, .218932], [-.060964, .229635, .250879, -.09051, .019076, .234087]], atol=1.5e-6)
    assert res.obs.n.tolist()==[6]*4 and np.isfinite(res.layers['se']).all()


# several labels

@pytest.mark.parametrize('form', [list, tuple, set, frozenset, np.array, '|'.join, ' ; '.join, lambda o: [*o, *o, None]])
def test_forms_of_several_labels(screen, form):
    X,obs = screen
    sep = {'|'.join:'|', ' ; '.join:';'}.get(form)
    expected = average_precision(screen, 'moa', neg_diffby='moa')
    pd.testing.assert_frame_equal(average_precision((X, obs.assign(moa=obs.moa.map(form))), 'moa', neg_diffby='moa', sep=sep), expected)

@pytest.mark.parametrize('f', [consistency, lambda x, **kw: activity(x, max_controls=50, **kw), magnitude])
def test_a_well_of_several_labels_is_in_several_groups(screen, f):
    X,obs = screen
    g = np.random.default_rng(0)
    X,obs = np.r_[X, g.normal(size=(40, 12))],pd.concat([obs, pd.DataFrame(dict(moa=['']*40, plate=g.integers(0, 4, 40)))], ignore_index=True)
    obs['control'] = np.arange(64)>23
    t = f((X, obs), by='moa', batch=None, n_null=20)
    assert t.index.tolist()==[*'abcde'] and t.n.sum()==43
    one = obs.assign(moa=['a' if 'a' in o else '' for o in obs.moa])
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        assert f((X, one), by='moa', batch=None, n_null=20).value['a']==pytest.approx(t.value['a'], abs=1e-9)

def test_a_gap_among_any_columns(screen):
    "A well takes part by the columns it has; with none of them it does not, and that is said"
    X,obs = screen
    obs.loc[3, 'target'] = None
    obs.loc[5, ['target','kind']] = ''
    with warnings.catch_warnings(record=True) as ws:
        warnings.simplefilter('always')
        t = average_precision((X, obs), dict(all='plate', any=['target','kind']), neg_diffby='plate')
    assert ['1 of 24 rows have no target or kind: they are left out']==[str(w.message) for w in ws]
    assert t.n_pos[3]==1 and t.n_total[5]==0

@pytest.mark.parametrize('name', ['a.parquet', 'a.csv', 'a.h5ad', 'a.feather'])
def test_several_labels_in_files(screen, tmp_path, name):
    X,obs = screen
    to_parquet(AnnData(X.astype(np.float32), obs=obs.rename(str)), tmp_path/name)
    back = read_profiles(tmp_path/name)
    assert [o.split('|') for o in back.obs.moa]==obs.moa.tolist()
    a,b = (average_precision(o, 'moa', neg_diffby='moa', **kw).n_pos.tolist() for o,kw in ((screen, {}), (back, dict(sep='|'))))
    assert a==b

def test_a_parquet_file_with_lists(screen, tmp_path):
    X,obs = screen
    pd.concat([obs.add_prefix('Metadata_'), pd.DataFrame(X).add_prefix('emb_')], axis=1).to_parquet(tmp_path/'l.parquet')
    assert average_precision(read_profiles(tmp_path/'l.parquet'), 'moa', neg_diffby='moa').n_pos.max()==10

def test_labels_travel_through_aggregate(screen):
    X,obs = screen
    obs['moa'] = [('a', 'b') if o in ('t0', 't1') else 'c' for o in obs.target]
    assert aggregate((X, obs), 'target').obs.moa.tolist()==[('a', 'b')]*2+['c']*2


# neighbours and sets

@pytest.fixture
def genes():
    g = np.random.default_rng(0)
    return pd.DataFrame(g.normal(size=(60, 8))+g.normal(size=(12, 8)).repeat(5, 0), index=[f'G{i:02}' for i in range(60)])

def test_nearest_is_the_order_of_cosines(genes):
    c = pd.Series(cosine_similarity(genes)[7], genes.index).drop('G07').sort_values(ascending=False)
    t = nearest(genes, 'G07', n=59)
    assert t.index.tolist()==c.index.tolist() and t['rank'].tolist()==[*range(1, 60)]
    np.testing.assert_allclose(t.similarity, c, atol=1e-9)
    assert nearest(genes, 'G07', n=3, opposite=True).index.tolist()==c.index[:-4:-1].tolist()
    assert nearest(genes, 'G07', others=['G01','G59'])['rank'].tolist()==[c.index.get_loc(o)+1 for o in ('G01','G59')]

def test_clusters_as_scipy_has_them(genes, tmp_path):
    sets = {f's{i}': genes.index[5*i:5*i+4] for i in range(3)}
    t = cluster_test(genes, sets, ks=True).loc[[*sets]]
    C = cosine_similarity(genes)
    for i,row in enumerate(t.itertuples()):
        own = np.arange(5*i, 5*i+4)
        inside,outside = C[np.ix_(own, own)][np.triu_indices(4, 1)],np.delete(C[own], own, 1).ravel()
        ks = ks_2samp(inside, outside)
        assert (row.within, row.between, row.ks, row.ks_p)==pytest.approx((inside.mean(), outside.mean(), ks.statistic, ks.pvalue), abs=1e-6)
    (tmp_path/'s.gmt').write_text(''.join(f'{k}\tnote\t'+'\t'.join(v)+'\n' for k,v in sets.items()))
    (tmp_path/'s.tsv').write_text(''.join(f'{k}\t'+' '.join(v)+'\n' for k,v in sets.items()))
    for same in (tmp_path/'s.gmt', str(tmp_path/'s.tsv'), read_gene_sets(tmp_path/'s.gmt'), read_complexes(tmp_path/'s.tsv')):
        assert cluster_test(genes, same).loc[[*sets], 'p'].tolist()==t.p.tolist()

def test_enrichment_is_the_hypergeometric_tail(genes):
    sets = dict(a=['G00','G01','G02','elsewhere'], b=['G03','G04','G05','G06'])
    mine = ['G00','G01','G04','G50']
    for background in (genes, list(genes.index), genes.index, set(genes.index), (genes.to_numpy(), genes.index), AnnData(genes)):
        t = enrichment(mine, sets, background)
        assert t.p['a']==pytest.approx(hypergeom.sf(1, 60, 3, 4)) and t.p['b']==pytest.approx(hypergeom.sf(0, 60, 4, 4))
        assert t.genes.tolist()==['G00, G01', 'G04'] and t.n.tolist()==[3, 4]

def test_a_large_map_is_quick():
    X = np.random.default_rng(0).normal(size=(10_000, 512))
    start = time.process_time()
    nearest((X, [f'G{i}' for i in range(10_000)]), 'G7')
    assert time.process_time()-start<2 # .25 s on one core

@pytest.mark.parametrize('n', [-1, 0, 1.5, True, 'all', np.nan, 99])
@pytest.mark.parametrize('tfm', [TVN, PCACenterScale])
def test_senseless_numbers_of_components(tfm, n):
    X = np.random.default_rng(0).normal(size=(60, 8))
    with pytest.raises(ValueError, match='n_components is a number of components up to 8, a share'): tfm(n_components=n).fit(X)
