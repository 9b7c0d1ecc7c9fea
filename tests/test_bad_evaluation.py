"""Dirty tables and poor screens: what the user sees

Each either stops with an error that says what, where and the cure, or gives a finite result with a warning that says what was done."""
import gzip, warnings

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData

from cellmae.features import regress_features
from cellmae.recall import check_names, compare_recall, read_complexes, read_relationships, recall
from cellmae.files import download
from cellmae.retrieval import average_precision, consistency, magnitude, match, mean_average_precision, probe
from cellmae.rxrx3 import compound_gene_ap, read_rxrx3
from cellmae.tvn import TVN, CenterScale, PCACenterScale, Sphere
from cellmae.profiles import aggregate
from cellmae.arms import arm_bias, correct_arms
from cellmae.diagnose import batch_leak, diagnose

every = [CenterScale(), Sphere(), PCACenterScale(), TVN(), TVN(0), *(TVN(variant=v) for v in ('efaar', 'efaar_2023', 'efaar_2024'))]
ids = [str(o) for o in every]

@pytest.fixture
def screen():
    "4 batches of 12 controls and 10 genes, 8 features"
    g = np.random.default_rng(0)
    names = ['DMSO']*12+[f'g{i}' for i in range(10)]
    obs = pd.DataFrame(dict(perturbation=names*4, batch=np.repeat([*'ABCD'], 22)), index=[f'well{i}' for i in range(88)])
    return AnnData(g.normal(size=(88, 8)), obs=obs.assign(control=obs.perturbation=='DMSO'))

@pytest.fixture
def genes(): return pd.DataFrame(np.random.default_rng(0).normal(size=(30, 5)), index=[f'G{i}' for i in range(30)])

pairs = pd.DataFrame([(f'G{i}', f'G{i+1}') for i in range(0, 20)], columns=['entity1', 'entity2'])

def told(f, *args, **kw):
    "Result and warnings"
    with warnings.catch_warnings(record=True) as ws:
        warnings.simplefilter('always')
        return f(*args, **kw), ' | '.join(str(w.message) for w in ws)


# tables

@pytest.mark.parametrize('encoding', ['latin-1', 'utf-8', 'utf-8-sig'])
def test_encodings(tmp_path, encoding):
    "The same names whatever program wrote them, with or without a byte order mark"
    (tmp_path/'p.csv').write_bytes('entity1,entity2\nTNF\u00e4,IL6\n'.encode(encoding))
    assert read_relationships(tmp_path/'p.csv').values.tolist() == [['IL6', 'TNF\u00e4']]

def test_latin1_complexes(tmp_path):
    (tmp_path/'c.tsv').write_bytes('na\u00efve complex\tA B\n'.encode('latin-1'))
    assert list(read_complexes(tmp_path/'c.tsv')) == ['na\u00efve complex']

def test_relationships_with_blanks_repeats_and_self_pairs():
    df = pd.DataFrame([['A', 'B'], ['B', 'A'], [' A', 'B '], ['A', 'A'], ['', 'B'], [None, 'B']], columns=['entity1', 'entity2'])
    rel = read_relationships(df)
    assert rel.values.tolist() == [['A', 'B']]
    assert {k: rel.attrs[k] for k in ('n_rows', 'n_empty', 'n_self', 'n_duplicates')} == dict(n_rows=6, n_empty=2, n_self=1, n_duplicates=2)

def test_relationships_of_other_shapes(tmp_path):
    with pytest.raises(ValueError, match='no column entity1 and entity2 .it has a, b, c.*name its two'): read_relationships(pd.DataFrame([[1, 2, 3]], columns=[*'abc']))
    with pytest.raises(ValueError, match=r'no \.txt, \.csv'): recall((np.eye(20), range(20)), tmp_path)
    (tmp_path/'c.tsv').write_text('one\tA B\nno tab here\n')
    with pytest.raises(ValueError, match='line 2 of c.tsv'): read_complexes(tmp_path/'c.tsv')
    with gzip.open(tmp_path/'p.txt', 'wt') as f: f.write('entity1,entity2\nA,B\n')
    assert read_relationships(tmp_path/'p.txt').values.tolist() == [['A', 'B']] # zipped, under a plain name
    (tmp_path/'q.txt').write_bytes(b'PK\0\0')
    with pytest.raises(ValueError, match='q.txt: no text'): read_relationships(tmp_path/'q.txt')

def test_checksum_too_short():
    with pytest.raises(ValueError, match='12 characters'): download('http://127.0.0.1:9', 'x', 'abc')


# names

def test_no_gene_is_known(genes):
    with pytest.raises(ValueError, match='none of the 30 genes.*symbols'): recall(genes, pairs.replace('G', 'X', regex=True))
    with pytest.raises(ValueError, match='upper case in both'): recall(genes, pairs.map(str.lower))
    assert check_names(genes.index, pairs.map(str.lower)).problem.unique().tolist() == ['case']

def test_some_genes_are_absent(genes):
    res = recall(genes, pd.concat([pairs, pairs.replace('G', 'X', regex=True)]), n_boot=0, n_perm=0)
    assert res.n_pairs.tolist() == [20, 20] and res.n_named.tolist() == [21, 21] and res.unnamed[0].startswith('G21')

def test_two_genes(genes):
    with pytest.raises(ValueError, match='the map has 2 genes, recall needs at least 20'): recall(genes[:2], pairs)
    with pytest.raises(ValueError, match='share 2 genes'): compare_recall(genes[:22], genes.set_axis([*'ab', *genes.index[20:22], *[f'x{i}' for i in range(26)]]), pairs)

def test_known_genes_without_a_known_pair(genes):
    res,said = told(recall, genes, pd.DataFrame(dict(entity1=['G1'], entity2=['other'])))
    assert 'relates no two of them: its recall is NaN' in said and res.recall.isna().all()


# profiles

@pytest.mark.parametrize('tfm', every, ids=ids)
def test_nan(screen, tfm):
    screen.X[25, 3] = np.nan
    with pytest.raises(ValueError, match=r'row well25 \(batch B\), column 3: drop'): tfm.fit(screen)
    for f in (average_precision, consistency, magnitude, aggregate):
        with pytest.raises(ValueError, match=r'row well25 \(batch B\), column 3: drop'): f(screen)

@pytest.mark.parametrize('tfm', every, ids=ids)
def test_constant_feature(screen, tfm):
    screen.X[:, 2] = 7
    y,said = told(tfm.fit_transform, screen)
    assert np.isfinite(y.X).all()
    if not isinstance(tfm, (Sphere, PCACenterScale)): assert 'constant' in said or 'show 7 of 8 dimensions' in said

def test_constant_feature_and_no_shrinkage(screen):
    screen.X[:, 2] = 7
    with pytest.raises(ValueError, match='show 7 of 8 dimensions.*shrink'): Sphere(shrink=0).fit(screen)

@pytest.mark.parametrize('tfm', every, ids=ids)
@pytest.mark.parametrize('left', [0, 1])
def test_batch_with_no_or_one_control(screen, tfm, left):
    few = screen[~((screen.obs.batch=='C')&screen.obs.control&(np.arange(88)%22>=left)).to_numpy()]
    with pytest.raises(ValueError, match=f'{left} in batch C: mark its controls, drop it, or merge'): tfm.fit(few)

@pytest.mark.parametrize('tfm', every, ids=ids)
def test_all_controls_the_same(screen, tfm):
    screen.X[screen.obs.control.to_numpy()] = 1
    try: y,said = told(tfm.fit_transform, screen)
    except ValueError as e: assert 'controls' in str(e)
    else: assert np.isfinite(y.X).all() and 'constant' in said

@pytest.mark.parametrize('tfm', every, ids=ids)
def test_fewer_controls_than_features(tfm):
    g = np.random.default_rng(0)
    X,c,b = g.normal(size=(40, 50)),np.arange(40)%4==0,np.repeat([*'ab'], 20)
    y,_ = told(tfm.fit_transform, X, controls=c, batches=b)
    assert np.isfinite(y).all()

def test_controls_as_text(screen):
    c = screen.obs.control.to_numpy()
    a,b = (TVN().fit_transform(screen.X, controls=o) for o in (c, c.astype(str)))
    np.testing.assert_allclose(a, b)
    with pytest.raises(ValueError, match='neither yes nor no'): TVN().fit(screen.X, controls=np.where(c, 'P', 'Q'))

def test_duplicated_wells(screen):
    "A well listed twice is its own best replicate, and a warning; the rule that replicates are on other plates leaves it out"
    two = AnnData(np.r_[screen.X, screen.X[12:22]], obs=pd.concat([screen.obs, screen.obs[12:22]]).reset_index(drop=True).rename(str))
    a = average_precision(screen, pos_diffby='batch', neg_diffby=['control', 'batch'])
    b,said = told(average_precision, two, pos_diffby='batch', neg_diffby=['control', 'batch'])
    assert '10 profiles are copies of others, such as row 88 of row 12' in said
    np.testing.assert_allclose(a.average_precision[12:22], b.average_precision[12:22])
    assert average_precision(two).average_precision[12:22].mean() > average_precision(screen).average_precision[12:22].mean()
    E = pd.DataFrame(dict(well_id=['a', 'a'], feature_0=[1., 2.]))
    M = pd.DataFrame(dict(well_id=['a'], experiment_name='e', treatment='t', concentration=1., perturbation_type='CRISPR'))
    with pytest.raises(ValueError, match='well a twice'): read_rxrx3(E, M)

def test_profiles_of_zeros(genes, screen):
    genes.iloc[4] = 0
    with pytest.raises(ValueError, match='1 profiles are zero or beyond all bounds .G4.: they have no direction, drop'): recall(genes, pairs)
    screen.X[3] = 0
    with pytest.raises(ValueError, match='1 profiles are zero or beyond all bounds .row 3.'): consistency(screen)

def test_tied_cosines(genes):
    "A collapsed encoder must not look perfect"
    same = pd.DataFrame(np.ones((30, 5)), index=genes.index)
    res = recall(same, pairs, n_boot=0, n_perm=0)
    assert res.recall.tolist() == [0, 0] == recall(same, pairs, n_boot=0, n_perm=0, max_pairs=0).recall.tolist()
    obs = pd.DataFrame(dict(perturbation=np.arange(40)//4, control=np.arange(40)<8))
    t = average_precision((np.ones((40, 3)), obs))
    assert (t.average_precision < t.chance).all() and mean_average_precision(t[~t.control], n_null=200).p.min() > .5


# groups

def test_no_replicates(screen):
    one = screen[:22]
    with pytest.raises(ValueError, match='no perturbation has two wells'): consistency(one)
    with pytest.raises(ValueError, match='no well has positives by the rules'): average_precision(one[~one.obs.control.to_numpy()], neg_diffby='perturbation')
    with pytest.raises(ValueError, match='2 controls: .*at least 3'): magnitude(screen[(~screen.obs.control|(np.arange(88)<2)).to_numpy()])

def test_columns_that_are_not_there(screen):
    with pytest.raises(ValueError, match='no column `plate`'): average_precision(screen, neg_sameby='plate')
    with pytest.raises(ValueError, match='no column `gene`'): aggregate(screen, by='gene')
    with pytest.raises(ValueError, match='no column `moa`'): match(screen)
    with pytest.raises(ValueError, match='has no column `batch`'): diagnose(AnnData(screen.X, obs=screen.obs[['control']]))

def test_missing_labels(screen):
    "A well without a name is nobody's replicate"
    screen.obs['perturbation'] = screen.obs.perturbation.where(screen.obs.perturbation!='g3')
    t = average_precision(screen)
    assert (t.n_pos[screen.obs.perturbation.isna().to_numpy()]==0).all() and t.average_precision.isna().sum() == 4

def test_too_few_groups_or_classes(screen):
    with pytest.raises(ValueError, match='5 folds need as many batch, there are 4'): probe(screen)
    with pytest.raises(ValueError, match='same perturbation'): probe(screen[screen.obs.control.to_numpy()], n_folds=2)
    with pytest.raises(ValueError, match='there are 4: lower n_folds'): regress_features(screen, pd.DataFrame(screen.X))
    with pytest.raises(ValueError, match='too few for 5 neighbours'): batch_leak(screen[:16])

def test_unknown_arms_and_targets(genes):
    with pytest.raises(ValueError, match='no gene of the map'): arm_bias(genes, pd.DataFrame(dict(gene=['x'], arm=['1p'])))
    arms = pd.DataFrame(dict(gene=genes.index, arm=['1p']*25+['Yq']*5))
    y,said = told(correct_arms, genes, arms)
    assert '1 arms, such as Yq' in said and np.allclose(y[25:], genes[25:]) and np.allclose(y[:25].mean(), 0)
    cpds = pd.DataFrame(np.eye(2, 5), index=pd.MultiIndex.from_tuples([('c', 1.), ('d', 1.)]))
    with pytest.raises(ValueError, match='same names in both'): compound_gene_ap(cpds, genes, pd.DataFrame(dict(treatment=['z'], gene_symbol=['G1'], nM_value=[3.])))

def test_new_batch_and_other_width(screen):
    tfm = TVN().fit(screen)
    with pytest.raises(ValueError, match='batch Z was not there'): tfm.transform(screen.X, batches=['Z']*88)
    with pytest.raises(ValueError, match=r'TVN learnt, there are 1 missing \(7\)'): tfm.transform(screen[:, :7])
