"""Corrections: robust scaling, weights from replicates, and the choice among them, on screens with a known answer"""
import warnings

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from scipy.stats import median_abs_deviation
from sklearn.pipeline import make_pipeline

from cellmae.choose import ReplicateWeights, choose_correction, moments, units_of
from cellmae.tvn import TVN, CenterScale, load_correction


def screen(n=60, D=8, batches=3, hits=0., seed=0):
    "Half of the features repeat what a gene does, the others are loud and do not; a share of the genes may be far stronger"
    g = np.random.default_rng(seed)
    does = g.normal(size=(n, D//2))*np.where(np.arange(n)<hits*n, 30, 2)[:, None]
    parts,rows = [],[]
    for b in range(batches):
        treated = np.c_[does+g.normal(size=does.shape), 4*g.normal(size=(n, D-D//2))]
        parts.append(np.r_[treated, g.normal(size=(20, D))]*np.exp(.2*b)+5*b)
        rows += [(f'b{b}', f'g{i}', False) for i in range(n)]+[(f'b{b}', 'control', True)]*20
    obs = pd.DataFrame(rows, columns=['batch', 'perturbation', 'control'], index=map(str, range(len(rows))))
    return AnnData(np.concatenate(parts), obs=obs)

def quiet(f, *args, **kw):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return f(*args, **kw)

def test_robust_is_median_and_mad():
    x = screen()
    y = CenterScale(robust=True).fit_transform(x)
    one = (x.obs.batch=='b1').to_numpy()
    c = x.X[one&x.obs.control.to_numpy()]
    np.testing.assert_allclose(y.X[one], (x.X[one]-np.median(c, 0))/median_abs_deviation(c, scale='normal'), rtol=1e-3, atol=1e-3)

def test_weights_do_not_depend_on_units_of_features(tmp_path):
    x = screen()
    t = ReplicateWeights().fit(x)
    y = ReplicateWeights().fit_transform(AnnData(x.X*np.logspace(-3, 3, 8), obs=x.obs))
    np.testing.assert_allclose(y.X@y.X.T, t.transform(x).X@t.transform(x).X.T, atol=1e-3)
    np.testing.assert_allclose(load_correction(t.save(tmp_path/'t')).transform(x).X, t.transform(x).X, atol=1e-5)

def test_signal_is_what_batches_agree_in():
    g = np.random.default_rng(0)
    mu = g.normal(size=(4000, 2))*[2, 0]
    S,T = moments(np.r_[mu, mu]+g.normal(size=(8000, 2)), np.tile(np.arange(4000), 2), np.arange(8000))
    np.testing.assert_allclose(S/4000, np.diag([4, 0]), atol=.2)
    np.testing.assert_allclose(T/4000, np.diag([5, 1]), atol=.2)

def test_a_place_on_the_plate_makes_no_second_unit():
    assert units_of([*'AAAA'], [*'1234'], ['C3', 'C3', 'D4', 'D4'])[0].tolist() == [0, 0, 1, 1]
    assert units_of([*'AAAA'], [*'1234'], ['C3']*4)[1] == 'batch'

def test_chosen_is_what_repeats():
    x = screen()
    choice = choose_correction(x, {'CenterScale':CenterScale(), 'ReplicateWeights':ReplicateWeights()}, n_boot=200)
    assert choice.name=='ReplicateWeights' and choice.table.loc['CenterScale', 'behind_low']>0 and 'clearly worse: CenterScale' in choice.why
    assert choice.correction.transform(x).shape==x.shape

def test_shares_are_shares():
    t = quiet(choose_correction, screen(hits=1), {'CenterScale':CenterScale(), 'TVN':TVN()}, n_boot=200).table
    assert (t.low>=0).all() and (t.low<=t.found).all() and (t.found<=t.high).all() and (t.high<=1).all()

@pytest.mark.parametrize('steps', [['passthrough'], [CenterScale(arcsinh=True), TVN()], [CenterScale(), make_pipeline(TVN(1), 'passthrough')]])
def test_a_pipeline_that_was_chosen_is_kept(tmp_path, steps):
    x = screen()
    choice = choose_correction(x, {'best':make_pipeline(*steps)}, n_boot=20)
    back = load_correction(choice.save(tmp_path/'t'))
    np.testing.assert_allclose(back.transform(x).X, choice.correction.transform(x).X, atol=1e-5)

def test_what_the_chosen_warns_of_is_said_and_not_printed():
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        choice = choose_correction(screen(hits=.1), {'TVN':TVN()}, n_boot=20)
    assert 'leans by' in choice.why

def test_labels_at_random_are_found_by_chance():
    x = screen(n=100)
    for b in ('b0', 'b1', 'b2'):
        m = ((x.obs.batch==b)&~x.obs.control).to_numpy()
        x.obs.loc[m, 'perturbation'] = np.random.default_rng(ord(b[1])).permutation(x.obs.perturbation[m])
    t = choose_correction(x, {'ReplicateWeights':ReplicateWeights(.1), 'CenterScale':CenterScale()}, n_boot=200).table
    assert (t.found<.12).all() # .05 by chance; weights that had seen these perturbations find far more

def test_tvn_leans_where_few_are_strong():
    with pytest.warns(UserWarning, match='leans by .* towards CenterScale'): t = TVN().fit(screen(hits=.1))
    assert t.shrinkage_['blend']>.5
    assert 'blend' not in quiet(TVN().fit, screen()).shrinkage_
