"Corrections, aggregation and recall against check values of the reference evaluation"
import json, os
from pathlib import Path

import numpy as np, pytest

from cellmae.recall import recall
from cellmae.tvn import CenterScale, TVN
from cellmae.profiles import aggregate

anndata = pytest.importorskip('anndata')
tfms = dict(centerscale_all=CenterScale(None), centerscale_batch=CenterScale(), tvn=TVN(variant='efaar'), tvn_batch=TVN(variant='efaar'))


@pytest.fixture(scope='module')
def gold():
    "Folder of check values: CELLMAE_GOLDEN, or `golden` beside CELLMAE_DATA"
    where = os.environ.get('CELLMAE_GOLDEN') or (Path(os.environ['CELLMAE_DATA']).parent/'golden' if 'CELLMAE_DATA' in os.environ else None)
    if where is None or not (Path(where)/'tvn.npz').exists(): pytest.skip('no check values: set CELLMAE_GOLDEN')
    return Path(where)

@pytest.fixture(scope='module')
def screen(gold): return dict(np.load(gold/'tvn.npz', allow_pickle=True))

def corrected(screen, name):
    c,b = screen['gene']=='NTC',screen['batch']
    return tfms[name].fit_transform(screen['X'], controls=c, batches=None if name=='tvn' else b)

def unit(x): return x/np.linalg.norm(x, axis=1, keepdims=True)


@pytest.mark.parametrize('name', tfms)
def test_correction(screen, name):
    y,ref = corrected(screen, name),screen[name]
    np.testing.assert_allclose(unit(y)@unit(y).T, unit(ref)@unit(ref).T, atol=1e-8)
    np.testing.assert_allclose(y@y.T, ref@ref.T, rtol=1e-7, atol=1e-7)
    np.testing.assert_allclose(np.abs(y), np.abs(ref), rtol=1e-7, atol=1e-7)

@pytest.mark.parametrize('name', ['centerscale_batch','tvn','tvn_batch'])
def test_aggregate(screen, name):
    obs = {'perturbation':screen['gene'], 'control':screen['gene']=='NTC'}
    ad = aggregate(anndata.AnnData(screen[name], obs=obs))
    assert list(ad.obs.index[ad.obs['control']]) == ['NTC']
    np.testing.assert_allclose(ad[~ad.obs['control'].to_numpy()].X, screen['agg_'+name], rtol=1e-5, atol=1e-5)

@pytest.mark.parametrize('name', ['centerscale_batch','tvn','tvn_batch'])
def test_recall(gold, screen, name):
    ref,genes = json.loads((gold/'recall.json').read_text())[name],screen['gene']!='NTC'
    for x in (screen[name],corrected(screen, name)):
        res = recall((x[genes],screen['gene'][genes]), gold/'relationships.csv', n_boot=20, n_perm=20)
        assert list(res.recall) == [ref['recall_0.05_0.95'],ref['recall_0.1_0.9']]
        assert set(res.n_pairs) == {ref['query_distribution_size']}
        assert (res.ci_low<res.recall).all() and (res.recall<res.ci_high).all()
        assert len(set(res.n_genes))==1 and res.n_genes[0]*(res.n_genes[0]-1)//2 == ref['null_distribution_size']
