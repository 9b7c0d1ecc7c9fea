"Trials that are stopped"
import pandas as pd, pytest
from fastai.callback.core import Callback

from cellmae.synth import synth_screen
from cellmae.trials import finished_trials, trial_table, trials

size = dict(n_pathways=5, genes_per_pathway=4, n_inactive=0, n_batches=2, controls_per_batch=4, size=64)
tiny = dict(model='mae_vitt8', net=dict(depth=1, embed_dim=48, num_heads=3), crop=32, epochs=2, n_pictures=0, save_every=0)

class Shot(Callback):
    "Stop the process, as it were, at the second epoch of a recipe"
    def after_batch(self):
        if self.training and self.epoch==1: raise KeyboardInterrupt

@pytest.mark.filterwarnings('ignore')
def test_a_stopped_trial_goes_on_exactly(tmp_path):
    "What was finished stays, what was begun goes on, and the numbers are those of a run that nobody stopped"
    screen = synth_screen(tmp_path/'screen', n_workers=0, **size)
    known,how = tmp_path/'screen/relationships.csv',dict(seeds=[3], **tiny)
    shot = {'first': {}, 'second': dict(mask_ratio=.5, cbs=[Shot()])}
    with pytest.raises(KeyboardInterrupt): trials(screen, shot, known, out=tmp_path/'a', **how)
    assert [o.recipe for o in finished_trials(tmp_path/'a')] == ['first']
    kept = (tmp_path/'a/first/seed_3/trial.json').stat().st_mtime_ns
    recipes = {'first': {}, 'second': dict(mask_ratio=.5)}
    a,b = (trials(screen, recipes, known, out=tmp_path/k, **how) for k in 'ab')
    timed = ['seconds','cpu_s']
    pd.testing.assert_frame_equal(a.drop(columns=timed), b.drop(columns=timed))
    assert kept == (tmp_path/'a/first/seed_3/trial.json').stat().st_mtime_ns
    assert (a[timed]>0).all(axis=None) and len(trial_table(tmp_path/'a')) == 2
