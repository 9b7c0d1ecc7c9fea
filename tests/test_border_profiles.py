"""Profiles at the border: whatever holds vectors of wells is taken in rightly, or refused with its place and the cure"""
import re, subprocess, sys, warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData, read_h5ad
from scipy import sparse
from sklearn.exceptions import NotFittedError
from sklearn.utils.estimator_checks import parametrize_with_checks

from cellmae.arms import arm_bias, correct_arms
from cellmae.features import regress_features
from cellmae.profiles import aggregate, codes, genes_of, labelled, read_profiles, to_parquet, wells_of
from cellmae.recall import recall
from cellmae.tvn import TVN, CenterScale, PCACenterScale, Sphere, load_correction

TFMS = [CenterScale(), CenterScale(None), Sphere(), Sphere('pca'), PCACenterScale(), PCACenterScale(3), TVN(), TVN(0),
        TVN(n_components=3), *(TVN(variant=v) for v in ('efaar', 'efaar_2023', 'efaar_2024'))]
every = pytest.mark.parametrize('tfm', TFMS, ids=str)

@pytest.fixture
def wells():
    "3 batches of 10 controls and 12 genes, 6 features with names that sort otherwise"
    g = np.random.default_rng(0)
    names = ['DMSO']*10+[f'g{i}' for i in range(12)]
    obs = pd.DataFrame(dict(perturbation=names*3, batch=np.repeat([*'abc'], 22)), index=[f'w{i}' for i in range(66)])
    var = pd.DataFrame(dict(channel=[*'xyxyxy']), index=[f'emb_{i}' for i in (0, 10, 2, 3, 4, 5)])
    X = g.normal(size=(66, 6))*np.where(obs.perturbation=='DMSO', 1, 2)[:, None]
    return AnnData(X.astype('f4'), obs=obs.assign(control=obs.perturbation=='DMSO'), var=var)

def told(f, *args, **kw):
    "Result and warnings"
    with warnings.catch_warnings(record=True) as ws:
        warnings.simplefilter('always')
        return f(*args, **kw), ' | '.join(str(w.message) for w in ws)

def quiet(f, *args, **kw): return told(f, *args, **kw)[0]


# cost

@pytest.mark.parametrize('room', ['profiles', 'tvn', 'recall', 'arms', 'features', 'rxrx3'])
def test_rooms_are_light(room):
    "Neither torch nor pictures, and below 250 MB"
    if not Path('/proc/self/status').exists(): pytest.skip('no /proc: the peak of a child counts that of its parent')
    heavy = ('torch', 'torchvision', 'timm', 'fastai', 'matplotlib')
    code = f'import sys, cellmae.{room}; print(open("/proc/self/status").read(), "heavy", [m for m in {heavy} if m in sys.modules])'
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout
    assert int(re.search(r'VmHWM:\s+(\d+)', out)[1])/1024 < 250 and out.endswith('heavy []\n')


# containers of numbers

def backed(x, folder):
    x.write_h5ad(folder/'x.h5ad')
    return read_h5ad(folder/'x.h5ad', backed='r')

def sparse_on_disk(x, folder): return backed(AnnData(sparse.csr_matrix(x.X), obs=x.obs, var=x.var), folder)

holders = dict(
    sparse=lambda x, d: AnnData(sparse.csr_matrix(x.X), obs=x.obs, var=x.var),
    sparse_array=lambda x, d: AnnData(sparse.csc_array(x.X), obs=x.obs, var=x.var),
    backed=backed, sparse_on_disk=sparse_on_disk,
    view=lambda x, d: AnnData(np.r_[x.X, x.X], obs=pd.concat([x.obs, x.obs.rename('{}b'.format)]), var=x.var)[:len(x)],
    fortran=lambda x, d: AnnData(np.asfortranarray(x.X), obs=x.obs, var=x.var),
    double=lambda x, d: AnnData(x.X.astype(float), obs=x.obs, var=x.var),
    pair=lambda x, d: (x.X, x.obs), frame_pair=lambda x, d: (x.to_df(), x.obs),
    sparse_pair=lambda x, d: (sparse.csr_matrix(x.X), x.obs),
    columns=lambda x, d: (x.X, dict(x.obs)),
    frame=lambda x, d: pd.concat([x.obs, x.to_df()], axis=1),
    metadata=lambda x, d: pd.concat([x.to_df(), x.obs.add_prefix('Metadata_')], axis=1),
    nullable=lambda x, d: pd.concat([x.obs, x.to_df()], axis=1).convert_dtypes(),
    arrow=lambda x, d: pd.concat([x.obs, x.to_df()], axis=1).convert_dtypes(dtype_backend='pyarrow'),
    objects=lambda x, d: pd.concat([x.obs, x.to_df().astype(object)], axis=1),
    categories=lambda x, d: AnnData(x.X, obs=x.obs.astype(dict(perturbation='category', batch='category')), var=x.var),
    yes_no=lambda x, d: AnnData(x.X, obs=x.obs.assign(control=np.where(x.obs.control, 'yes', 'no')), var=x.var),
    ones=lambda x, d: AnnData(x.X, obs=x.obs.assign(control=x.obs.control.astype(float)), var=x.var),
    file=lambda x, d: to_parquet(x, d/'x.parquet'), text=lambda x, d: str(to_parquet(x, d/'x.csv')))
held = pytest.mark.parametrize('holder', holders)

def values(y): return np.asarray(wells_of(y).X)

@held
def test_any_holder_is_corrected_alike(wells, holder, tmp_path):
    x = holders[holder](wells, tmp_path)
    np.testing.assert_allclose(values(TVN().fit_transform(x)), TVN().fit_transform(wells).X, atol=1e-4)

@held
def test_any_holder_is_averaged_alike(wells, holder, tmp_path):
    a,b = aggregate(holders[holder](wells, tmp_path)),aggregate(wells)
    np.testing.assert_allclose(a.X, b.X, atol=1e-5)
    assert a.obs_names.tolist() == b.obs_names.tolist() and a.obs.control.tolist() == b.obs.control.tolist()

def test_halves_integers_and_masks():
    x = np.arange(12.).reshape(4, 3)
    for o in (x.astype('f2'), x.astype(int), x.astype(np.uint8), np.ma.array(x), np.asmatrix(x), x.tolist(), sparse.coo_matrix(x)):
        np.testing.assert_array_equal(wells_of(o).X, x)
    with pytest.raises(ValueError, match='row 1, column 0: drop'): wells_of(np.ma.array(x, mask=x==3))
    with pytest.raises(ValueError, match='row 1, column 0: drop'): wells_of(pd.DataFrame(x).mask(x==3).convert_dtypes())
    with pytest.raises(ValueError, match='Complex'): wells_of(x*1j)
    with pytest.raises(ValueError, match='Complex'): wells_of(pd.DataFrame(x*1j))
    with pytest.raises(ValueError, match='must be numbers'): wells_of(np.array([['a', 'b']]))
    with pytest.raises(ValueError, match='2D array'): wells_of(x[0])
    with pytest.raises(ValueError, match='has no X'): wells_of(AnnData(obs=pd.DataFrame(index=['a'])))

def test_rows_that_do_not_fit(wells):
    with pytest.raises(ValueError, match='66 profiles do not fit a table of 65 rows'): aggregate((wells.X, wells.obs[1:]))
    with pytest.raises(ValueError, match='another order'): aggregate((wells.to_df(), wells.obs[::-1]))
    with pytest.raises(ValueError, match='another order'): TVN().fit(wells.to_df(), controls=wells.obs.control[::-1])
    with pytest.raises(ValueError, match=r'control has shape \(65,\) but X has 66 rows'): TVN().fit(wells.X, controls=wells.obs.control[1:])
    with pytest.raises(ValueError, match='another order'): regress_features(wells, wells.to_df()[::-1], n_folds=3)


# names

gaps = pytest.mark.parametrize('none', ['', ' ', None, np.nan, pd.NA], ids=repr)

@gaps
def test_wells_without_a_name_are_counted_and_left_out(wells, none):
    wells.obs['perturbation'] = wells.obs.perturbation.astype(object).where(wells.obs.perturbation!='g3', none)
    y,said = told(aggregate, wells)
    assert y.n_obs == 12 and '' not in y.obs_names and '3 of 66 rows have no perturbation' in said
    (_,names),said = told(genes_of, wells)
    assert len(names) == 11 and '3 of 36 rows have no perturbation' in said

def test_no_labels_at_all(wells):
    wells.obs['perturbation'] = ''
    for f in (aggregate, genes_of):
        with pytest.raises(ValueError, match='no row has a perturbation: join the plate map'): f(wells)

def test_stray_spaces_are_no_other_gene(wells):
    wells.obs['perturbation'] = [n+' '*(i%2) for i,n in enumerate(wells.obs.perturbation)]
    assert aggregate(wells).n_obs == 13 and len(genes_of(wells)[1]) == 12

@pytest.mark.parametrize('name', ['NA', 'nan', 'None', 'null', 'N/A', 'NaN'])
def test_genes_called_na(wells, name, tmp_path):
    wells.obs['perturbation'] = wells.obs.perturbation.replace('g3', name)
    for f in ('x.csv', 'x.tsv', 'x.parquet', 'x.csv.gz'):
        assert name in genes_of(read_profiles(to_parquet(wells, tmp_path/f)))[1]

@pytest.mark.parametrize('kind', ['object', 'boolean', 'text', 'float'])
def test_controls_with_gaps(wells, kind):
    c = wells.obs.control.astype(object)
    if kind=='text': c = c.map({True:'yes', False:'no'})
    if kind=='float': c = c.astype(float)
    c.iloc[40:60] = '' if kind=='text' else None
    wells.obs['control'] = c.astype('boolean') if kind=='boolean' else c
    for f in (TVN().fit, aggregate, genes_of):
        with pytest.raises(ValueError, match='`control` is empty in 20 of 66 rows'): f(wells)

def test_batches_with_gaps(wells):
    wells.obs['batch'] = wells.obs.batch.where(np.arange(66)!=7, '')
    with pytest.raises(ValueError, match='1 wells have no batch, first row w7'): TVN().fit(wells)
    wells.obs['batch'] = '' # a screen without batches is one
    assert quiet(TVN().fit, wells).n_controls_ == {'':30}

def test_integer_names(wells):
    "Plates and genes that are numbers, and became 1.0 beside a gap"
    wells.obs['perturbation'] = pd.factorize(wells.obs.perturbation)[0].astype(float)
    assert sorted(aggregate(wells).obs_names, key=int) == [*map(str, range(13))]

def test_codes_of_gaps():
    t = pd.DataFrame(dict(a=['x', '', 'y', None], b=[1., np.nan, 1, 2], batch=''))
    assert (codes(t, ['a'])>=0).tolist() == [True, False, True, False]
    assert (codes(t, ['a', 'b'])>=0).tolist() == [True, False, True, False] and codes(t, ['batch']).tolist() == [0]*4

def test_two_columns_of_one_name(wells):
    obs = pd.concat([wells.obs, wells.obs[['batch']]], axis=1)
    with pytest.raises(ValueError, match='two columns `batch`'): aggregate((wells.X, obs))


# features by name

def shuffled(x): return x[:, [3, 0, 5, 1, 4, 2]]

@every
@pytest.mark.parametrize('fresh', [True, False], ids=['fresh', 'loaded'])
@pytest.mark.parametrize('form', ['anndata', 'frame'])
def test_features_in_another_order(wells, tfm, fresh, form, tmp_path):
    x = wells if form=='anndata' else wells.to_df()
    kw = {} if form=='anndata' else dict(controls=wells.obs.control, batches=wells.obs.batch)
    t = quiet(tfm.fit, x, **kw)
    if not fresh: t = load_correction(t.save(tmp_path/'t.safetensors'))
    kw.pop('controls', None)
    y = shuffled(x) if form=='anndata' else x[x.columns[[3, 0, 5, 1, 4, 2]]]
    a,b = t.transform(x, **kw),t.transform(y, **kw)
    names = list(t.get_feature_names_out())
    assert list(a.var_names if form=='anndata' else a.columns) == names == list(b.var_names if form=='anndata' else b.columns)
    np.testing.assert_allclose(np.asarray(a.X if form=='anndata' else a), np.asarray(b.X if form=='anndata' else b), atol=1e-6)
    if form=='anndata' and not t._rotated: assert b.var.channel.tolist() == wells.var.channel.tolist()

@every
def test_other_features(wells, tfm, tmp_path):
    t = quiet(tfm.fit, wells)
    for o in (t, load_correction(t.save(tmp_path/'t.safetensors'))):
        other = wells.copy(); other.var_names = ['emb_0', 'emb_10', 'emb_2', 'area', 'emb_4', 'emb_5']
        with pytest.raises(ValueError, match=r'1 missing \(emb_3\), 1 unknown \(area\)'): o.transform(other)
        with pytest.raises(ValueError, match=r'1 missing \(emb_5\)'): o.transform(wells[:, :5])
        with pytest.raises(ValueError, match='X has 5 features, but .* is expecting 6'): o.transform(wells.X[:, :5], batches=wells.obs.batch)

def test_plain_arrays_go_by_number(wells):
    t = TVN().fit(wells)
    np.testing.assert_allclose(t.transform(wells.X, batches=wells.obs.batch), t.transform(wells).X, atol=1e-6)
    t = TVN().fit(wells.X, controls=wells.obs.control, batches=wells.obs.batch)
    assert t.transform(wells).var_names.tolist() == wells.var_names.tolist()

def test_names_with_and_without_prefix(wells, tmp_path):
    "An AnnData of `embed` has features 0, 1, ..; the file that was made of it emb_0, emb_1, .."
    x = AnnData(wells.X, obs=wells.obs)
    back = read_profiles(to_parquet(x, tmp_path/'x.parquet'))
    np.testing.assert_allclose(TVN().fit(x).transform(back[:, ::-1]).X, TVN().fit_transform(x).X, atol=1e-5)

def test_features_of_one_name(wells):
    two = AnnData(wells.X, obs=wells.obs, var=pd.DataFrame(index=[*'abcdea']))
    with pytest.raises(ValueError, match='1 features have the name of another, such as a'): TVN().fit(two)


# features that hardly vary in the controls

@every
@pytest.mark.parametrize('spread', [0, 1e-12, 1e-8, 1e-4, 1e-2])
def test_hardly_varying_feature(wells, tfm, spread):
    "It is named, and nothing explodes"
    c = wells.obs.control.to_numpy()
    before = np.abs(quiet(tfm.fit_transform, wells).X).max()
    wells.X[c, 3] *= spread
    y,said = told(tfm.fit_transform, wells)
    assert 'emb_3, hardly vary in the controls' in said
    assert np.abs(y.X).max() < 3*before

@every
def test_offset_units_and_constant_features(wells, tfm):
    "What is named does not depend on the unit; what is constant everywhere is named, too"
    X = wells.X.astype(float); X[wells.obs.control, 3] *= 1e-6
    kw = dict(controls=wells.obs.control, batches=wells.obs.batch)
    for unit in (1e-9, 1e9): assert '1 of 6 features, such as 3, hardly' in told(tfm.fit, X*np.where(np.arange(6)==3, unit, 1), **kw)[1]
    X[:, 3] = 1e6
    y,said = told(tfm.fit_transform, X, **kw)
    assert '1 of 6 features, such as 3, are constant' in said and np.isfinite(y).all()

def test_feature_without_spread_in_one_batch(wells):
    wells.X[(wells.obs.batch=='b')&wells.obs.control, 3] *= 1e-6
    y,said = told(CenterScale().fit_transform, wells)
    assert 'such as emb_3, hardly vary in the controls of batch b' in said and np.abs(y.X).max() < 30

def test_most_features_hardly_vary(wells):
    wells.X[np.ix_(wells.obs.control, range(4))] *= 1e-7
    for tfm in (CenterScale(), Sphere(), TVN(0), TVN(variant='efaar'), PCACenterScale()):
        y,said = told(tfm.fit_transform, wells)
        assert '4 of 6 features' in said and np.abs(y.X).max() < 100

def test_ordinary_screens_are_left_alone(wells):
    for tfm in TFMS: assert 'hardly' not in told(tfm.fit, wells)[1]


# scikit-learn

@parametrize_with_checks([CenterScale(), CenterScale(None), Sphere(), PCACenterScale(), TVN(), TVN(variant='efaar')])
def test_estimator(estimator, check): quiet(check, estimator) # none is waived

@every
def test_fitted_and_not(wells, tfm, tmp_path):
    with pytest.raises(NotFittedError): tfm.__class__().transform(wells)
    with pytest.raises(NotFittedError): tfm.__class__().save(tmp_path/'t.safetensors')
    t = quiet(tfm.fit, wells)
    assert t.n_features_in_ == 6 and list(t.feature_names_in_) == wells.var_names.tolist()

@pytest.mark.parametrize('tfm', [TVN, PCACenterScale, lambda n_components: TVN(variant='efaar', n_components=n_components)])
def test_components(wells, tfm):
    n = [quiet(tfm(n_components=k).fit_transform, wells).n_vars for k in (1, 6, .5, .9, .999)]
    assert n[:2] == [1, 6] and 1 <= n[2] < n[3] <= n[4] <= 6
    for k in (-1, 0, 7, 1.5, -.5):
        with pytest.raises(ValueError, match='n_components is a number of components up to 6, a share'): tfm(n_components=k).fit(wells)

@pytest.mark.parametrize('tfm,word', [(CenterScale('plate'), "'batch' or None"), (Sphere('pcaa'), "'zca' or 'pca'"), (Sphere(shrink=2), 'between 0 and 1'),
                                      (TVN(wells=-1), 'between 0 and 1'), (TVN(wells=np.nan), 'between 0 and 1'), (TVN(variant='x'), 'variant is one of')])
def test_options_outside_their_range(wells, tfm, word):
    with pytest.raises(ValueError, match=word): tfm.fit(wells)

@every
def test_frames_out(wells, tfm):
    x,kw = wells.to_df(),dict(controls=wells.obs.control, batches=wells.obs.batch)
    y = quiet(tfm.fit_transform, x, **kw)
    assert isinstance(y, pd.DataFrame) and y.index.equals(x.index) and list(y.columns) == list(tfm.get_feature_names_out())
    t = type(tfm)(**tfm.get_params()).set_output(transform='pandas')
    for o in (wells, wells.X): assert isinstance(quiet(t.fit_transform, o, **kw), pd.DataFrame)


# tables of other programs

n = 24
names = [f'G{i}' for i in range(n)]
V = np.random.default_rng(1).normal(size=(n, 3)).astype('f4')

def frame(*features, **meta): return pd.concat([pd.DataFrame(meta, index=range(n)), pd.DataFrame(V, columns=features)], axis=1)

tables = dict(
    ours=frame('emb_0', 'emb_1', 'emb_2', Metadata_perturbation=names, Metadata_n_sites=4),
    cellprofiler=frame('Cells_AreaShape_Area', 'Nuclei_Texture_Contrast_DNA_3', 'Cytoplasm_X', Metadata_Plate='001', ImageNumber=range(n)),
    pycytominer=frame('Cells_A', 'Cells_B', 'Nuclei_C', Metadata_Well='A01', Metadata_Count_Cells=7),
    deepprofiler=frame('efficientnet_0', 'efficientnet_1', 'efficientnet_2', Metadata_Plate='P', n_cells=3),
    rxrx=frame('feature_0', 'feature_1', 'feature_2', well_id=names, plate=1, dose=.5),
    capitals=frame('EMB_0', 'EMB_1', 'EMB_2', PERTURBATION=names),
    prefixless=frame('area', 'mean_dna', 'round', Metadata_Gene=names, model='vit'),
    numbered=frame('X1', 'X2', 'X3', gene=names, well='A01'), plain=frame('0', '1', '2', gene=names))

suffixes = '.parquet', '.pq', '.parquet.gzip', '.feather', '.csv', '.csv.gz', '.tsv', '.de.csv', '.xlsx'

def write(t, f):
    end = ''.join(f.suffixes[-2:])
    if 'parquet' in end or end.endswith('.pq'): t.to_parquet(f)
    elif end.endswith('.feather'): t.to_feather(f)
    elif end.endswith('.xlsx'): pytest.importorskip('openpyxl'); t.to_excel(f, index=False)
    elif '.de' in end: t.to_csv(f, index=False, sep=';', decimal=',')
    else: t.to_csv(f, index=False, sep='\t' if '.tsv' in end else ',')
    return f

@pytest.mark.parametrize('suffix', suffixes)
@pytest.mark.parametrize('tool', tables)
def test_tables_of_other_programs(tool, suffix, tmp_path):
    t = tables[tool]
    x = read_profiles(write(t, tmp_path/f'{tool}{suffix}'))
    assert x.var_names.tolist() == t.columns[-3:].tolist() or tool=='prefixless' and x.n_vars==3
    np.testing.assert_allclose(x.X, V, rtol=1e-6)
    assert {c.removeprefix('Metadata_') for c in t.columns[:-3]} <= set(x.obs)
    np.testing.assert_allclose(wells_of(t).X, V, rtol=1e-6) # in memory as from a file

@pytest.mark.parametrize('suffix', ['.csv', '.parquet', '.xlsx'])
@pytest.mark.parametrize('name', [None, 'index', 'gene'])
def test_an_index_is_no_feature(name, suffix, tmp_path):
    t,f = tables['prefixless'].rename_axis(name),tmp_path/f'p{suffix}'
    t.to_csv(f) if suffix=='.csv' else t.to_parquet(f) if suffix=='.parquet' else t.to_excel(f)
    assert read_profiles(f).n_vars == 3

@pytest.mark.parametrize('names', [[12., ' DMSO', None], [b'12', b'DMSO', b''], ['12.0', 'DMSO\xa0', ' ']], ids=str)
def test_names_of_any_type(names):
    obs = wells_of((np.eye(3), dict(perturbation=names, other=names))).obs
    assert obs.perturbation.tolist() == obs.other.tolist() == ['12', 'DMSO', '']

def test_vectors_in_a_column(tmp_path):
    t = pd.DataFrame(dict(gene=names, embedding=list(V)))
    t.to_parquet(tmp_path/'p.parquet')
    for prefix in (None, 'embedding'): np.testing.assert_array_equal(read_profiles(tmp_path/'p.parquet', prefix).X, V)
    pd.DataFrame(dict(gene=names, embedding=[*V[1:], V[0,:2]])).to_parquet(tmp_path/'r.parquet')
    with pytest.raises(ValueError, match='r.parquet: column embedding has vectors of 3 numbers, but of 2 in row 24'): read_profiles(tmp_path/'r.parquet')
    pd.DataFrame(dict(gene=names, a=list(V), b=list(V))).to_parquet(tmp_path/'two.parquet')
    with pytest.raises(ValueError, match=r'begin with a_ \(3\), b_ \(3\)'): read_profiles(tmp_path/'two.parquet')
    assert read_profiles(tmp_path/'two.parquet', 'b').n_vars == 3
    pd.DataFrame(dict(gene=names, v=[None, *V[1:]])).to_parquet(tmp_path/'gap.parquet')
    with pytest.raises(ValueError, match='gap.parquet: column v .*row 1'): read_profiles(tmp_path/'gap.parquet')

def test_unclear_tables(tmp_path):
    frame('area', 'dna', 'dose', gene=names).to_csv(tmp_path/'p.csv', index=False)
    with pytest.raises(ValueError, match=r'p.csv: no column of numbers is clearly a feature.*area \(1\), dna \(1\), dose \(1\): pass'): read_profiles(tmp_path/'p.csv')
    x = read_profiles(tmp_path/'p.csv', ['area', 'dna'])
    assert x.var_names.tolist() == ['area', 'dna'] and x.obs.columns.tolist() == ['gene', 'dose']
    with pytest.raises(ValueError, match="begins with 'emb_'"): read_profiles(tmp_path/'p.csv', 'emb_')

@pytest.mark.parametrize('bad', ['#DIV/0!', '12 um', '1.5.2', '1,234.5'])
def test_a_value_that_is_no_number(bad, tmp_path):
    t = tables['ours'].astype({'emb_1':object}); t.loc[4, 'emb_1'] = bad
    t.to_csv(tmp_path/'p.csv', index=False)
    with pytest.raises(ValueError, match='p.csv: column emb_1, row 5 holds'): read_profiles(tmp_path/'p.csv')

@pytest.mark.parametrize('blank', ['', 'NA', '#N/A', 'NaN', 'null'])
def test_empty_cells_are_refused_where_they_matter(blank, tmp_path):
    t = tables['ours'].astype({'emb_1':object}); t.loc[4, 'emb_1'] = blank
    t.to_csv(tmp_path/'p.csv', index=False)
    x = read_profiles(tmp_path/'p.csv')
    assert np.isnan(x.X).sum() == 1
    with pytest.raises(ValueError, match='row 4.*column emb_1'): aggregate(x)

@pytest.mark.parametrize('value', ['1,234', '#DIV/0!', '1.234,5'])
def test_a_whole_column_of_such(value, tmp_path):
    "Thousands or decimals? It is not guessed; and no feature becomes metadata because all of it is damaged"
    pd.DataFrame(dict(gene=names, emb_0=[value]*n, emb_1=['2.5']*n)).to_csv(tmp_path/'p.csv', index=False)
    with pytest.raises(ValueError, match=f"column emb_0, row 1 holds '{value}'"): read_profiles(tmp_path/'p.csv')

def test_words_among_features_are_metadata(tmp_path):
    tables['ours'].assign(emb_model='vit').to_csv(tmp_path/'p.csv', index=False)
    x = read_profiles(tmp_path/'p.csv')
    assert x.n_vars == 3 and x.obs.emb_model[0] == 'vit'

@pytest.mark.parametrize('name', ['x.rds', 'x.npy', 'x.pkl', 'x.json', 'x'])
def test_files_that_are_no_tables(name, tmp_path):
    (tmp_path/name).write_bytes(b'\x93NUMPY\x01\0 and more')
    with pytest.raises(ValueError, match=f'{name} is no table of profiles: give'): read_profiles(tmp_path/name)
    with pytest.raises(FileNotFoundError, match='none.csv: missing'): read_profiles(tmp_path/'none.csv')
    with pytest.raises(ValueError, match='is no table'): read_profiles(tmp_path)


# round trips

@pytest.mark.parametrize('suffix', ['.parquet', '.csv', '.csv.gz', '.tsv', '.feather', '.h5ad'])
def test_round_trip(suffix, wells, tmp_path):
    wells.obs = wells.obs.assign(plate='001', well='B07', site=[f'{i:02}' for i in range(66)], batch=['01']*33+['1']*33,
                                 dose=[.1, np.nan]*33, guide=['7', '']*33, barcode='1E5', n_cells=range(66), moa='kinase ')
    x = read_profiles(to_parquet(wells, tmp_path/f'x{suffix}'))
    np.testing.assert_array_equal(x.X, wells.X)
    for k in ('plate', 'well', 'site', 'batch', 'perturbation', 'guide', 'barcode'): assert x.obs[k].astype(str).tolist() == wells.obs[k].tolist(), k
    assert x.obs.control.tolist() == wells.obs.control.tolist() and x.obs.n_cells.tolist() == list(range(66))
    np.testing.assert_array_equal(x.obs.dose.to_numpy(float), wells.obs.dose)

@pytest.mark.parametrize('name', ['x.xlsx', 'x.txt', 'x', 'x.parquet.gz'])
def test_unknown_endings_are_refused(wells, name, tmp_path):
    with pytest.raises(ValueError, match=f'{name}: profiles are written to a file that ends in'): to_parquet(wells, tmp_path/name)
    assert not any(tmp_path.iterdir())


# up a level

def test_the_plate_map_travels(wells):
    moa = pd.Series(wells.obs.perturbation).map(lambda o: f'moa of {o}').to_numpy(dtype=object)
    wells.obs = wells.obs.assign(plate=wells.obs.batch, well=[f'A{i%22+1:02}' for i in range(66)], moa=moa, dose=np.where(wells.obs.control, np.nan, 1.5),
                                 type=pd.Categorical(np.where(wells.obs.control, 'vehicle', 'CRISPR')), expressed=True)
    wells.obs.loc['w10', 'moa'] = '' # a gap is no other value
    wells.obs.loc['w11', 'moa'] = 'another' # this is
    y = aggregate(wells)
    assert y.obs.columns.tolist() == ['perturbation', 'well', 'moa', 'dose', 'type', 'expressed', 'n', 'control']
    assert y.obs.moa['g0'] == 'moa of g0' and y.obs.moa['g1'] == '' and y.obs.dose['g5'] == 1.5 and y.obs.type['g5'] == 'CRISPR'
    assert 'batch' not in y.obs and y.uns['mixed']['moa'] == 1 and y.uns['mixed']['batch'] == 13

def test_one_row_and_sparse(wells):
    one = AnnData(sparse.csr_matrix(wells.X[20:23]), obs=wells.obs[20:23])
    y = aggregate(one)
    assert y.n_obs == 3 and np.isnan(y.layers['se'][0]).all() and y.obs.batch.tolist() == ['b', 'a', 'a']

def test_groups_whose_names_join_to_one():
    obs = pd.DataFrame(dict(plate=['P_1', 'P', 'P_1', 'P'], well=['A', '1_A']*2))
    y = aggregate((np.arange(8.).reshape(4, 2), obs), ['plate', 'well'])
    assert y.obs.n.tolist() == [2, 2] and y.obs_names.is_unique

def test_arms_of_tables_that_people_have():
    g = np.random.default_rng(0)
    genes = pd.DataFrame(g.normal(size=(60, 4)), index=[f'G{i}' for i in range(60)])
    arms = pd.DataFrame(dict(gene=genes.index+' ', chromosome=[17.]*30+[3.]*30, position=1e6, expressed=['False', 'True']*30))
    a,b = arm_bias(genes, arms, n_perm=9),arm_bias(AnnData(sparse.csr_matrix(genes.to_numpy()), obs=pd.DataFrame(index=genes.index)), arms, n_perm=9)
    assert a.index.tolist() == ['17p', '3p', 'all'] and np.allclose(a.cosine, b.cosine)
    y = quiet(correct_arms, genes, arms, min_genes=10)
    np.testing.assert_allclose(y[:30].to_numpy()[::2].mean(0), 0, atol=1e-9) # of those that are not expressed
