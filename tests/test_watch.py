"A run that is watched, reported and drawn is the run that it would have been"
import numpy as np, pandas as pd, pytest, torch
from torch import nn
from fastai.callback.core import Callback
from fastai.callback.tracker import SaveModelCallback
from cellmae.blocks import compile_blocks
from cellmae.data import screen_dls
from cellmae.encoders import as_encoder
from cellmae.synth import synth_screen
from cellmae.train import fit_mae
from cellmae.watch import (Live, Watch, effective_rank, looks_at_most, report_to, tiles_at_a_time,
                           untouched, wells_of_run)
from cellmae.wsl import fit_wsl
from cellmae.zoo import create_model, load_model
from processes import all_well

kw = dict(epochs=3, bs=16, crop=32, device='cpu', bf16=False, accumulate=1, save_every=0)
wsl = dict(n_watch=9, arch='densenet_t', apart=None, **{**kw, 'epochs':2, 'bs':32})
columns = ['effective_rank', 'nn_accuracy', 'recall']

@pytest.fixture(scope='module')
def screen(tmp_path_factory):
    out = tmp_path_factory.mktemp('watched')/'screen'
    return synth_screen(out, n_pathways=4, genes_per_pathway=6, n_inactive=0, n_batches=2, controls_per_batch=4, size=64, n_workers=0)

@pytest.fixture(scope='module')
def pairs(screen): return screen.root/'relationships.csv'

def tiny():
    torch.manual_seed(0)
    return create_model('mae_vitt8', in_chans=6, img_size=32, depth=1, embed_dim=48)

def fit(screen, out, **more):
    often = dict(n_watch=9) if 'watch' in more else {}
    return fit_mae(screen, tiny(), out, **{**kw, **often, 'n_pictures':0, **more})
def history(learn): return pd.read_csv(learn.path/'history.csv')
def of_run(learn): return next(o for o in learn.records if isinstance(o, Watch))
def weights(learn): return [p.detach().clone() for p in learn.model.state_dict().values()]
def same(a, b): return all(torch.equal(x, y) for x,y in zip(weights(a), weights(b), strict=True))

class Stops(Callback):
    "Ends a run as a kill would, but that the test goes on"
    order = 99
    def __init__(self, epoch, batch): self.at = epoch,batch
    def after_batch(self):
        if self.training and (self.epoch,self.iter)==self.at: raise KeyboardInterrupt

@pytest.fixture(scope='module')
def watched(screen, pairs, tmp_path_factory): return fit(screen, tmp_path_factory.mktemp('run')/'watched', watch=pairs)

def test_a_look_leaves_no_trace(screen, watched, tmp_path):
    alone = fit(screen, tmp_path/'alone')
    assert same(alone, watched)
    assert [float(o) for o in alone.recorder.losses]==[float(o) for o in watched.recorder.losses]
    a,b = history(alone),history(watched)
    assert list(b)==[*a, *columns] and a.equals(b[list(a)])
    assert b[columns].notna().all().all()

def test_a_look_leaves_no_trace_in_a_classifier(screen, tmp_path):
    "whose batch norm adapts to what it embeds"
    alone,seen = (fit_wsl(screen, out=tmp_path/f'{w}', watch=w, **wsl) for w in (None, True))
    assert same(alone, seen)
    assert history(seen)[columns[:2]].notna().all().all()

def looks_at_compiled(rank):
    compile,made = nn.Module.compile,[]
    def backend(graph, inputs): made.append(graph); return graph
    nn.Module.compile = lambda self, **how: compile(self, backend=backend, **how)
    model,x = tiny(),torch.randint(256, (4,6,32,32), dtype=torch.uint8)
    compile_blocks(model)
    def look():
        with torch.autocast('cpu', torch.bfloat16): as_encoder(model).encode(x[:1])
        return len(made)
    model(x)
    n = len(made)
    with untouched(model): assert look()==n>0
    assert look()>n # where nothing keeps it from it

def test_a_look_compiles_nothing():
    "of blocks that are compiled, in bfloat16, whatever the size of its batches (alone, as after compiling nobody can fork and train)"
    all_well(1, looks_at_compiled)

@pytest.mark.parametrize('at', [(0,1), (1,0)])
def test_history_of_a_killed_run(screen, pairs, watched, tmp_path, at):
    with pytest.raises(KeyboardInterrupt): fit(screen, tmp_path/'run', watch=pairs, cbs=Stops(*at))
    again = fit(screen, tmp_path/'run', watch=pairs, cbs=Stops(9, 9))
    assert (again.path/'history.csv').read_bytes()==(watched.path/'history.csv').read_bytes()
    assert same(again, watched)

def test_measured_now_and_then(screen, tmp_path, capsys):
    best = SaveModelCallback(monitor='nn_accuracy', fname='best') # callbacks see what is measured
    learn = fit(screen, tmp_path/'run', epochs=4, watch=True, n_watch=2, cbs=best)
    assert history(learn)['effective_rank'].notna().tolist()==[False, True, False, True]
    assert (tmp_path/'run/models/best.pth').exists()
    lines = capsys.readouterr().out.splitlines()
    assert ['effective_rank' in o for o in lines if o.startswith('epoch')]==[False, True, False, True]
    assert [o.rpartition(' (this costs up to ')[1]!='' for o in lines if o.startswith('Watching')]==[True] # it was asked for
    assert len([o for o in lines if 'By chance' in o])==1

def test_a_short_run_is_looked_at_less_often(screen, tmp_path, capsys):
    learn = fit(screen, tmp_path/'run', epochs=2, watch=True, n_watch=None)
    assert history(learn)['effective_rank'].notna().tolist()==[False, True]
    assert ' once in so short a run' in capsys.readouterr().out
    for images,n in ((100,1), (5e3,2), (2e4,9), (1e6,10)): assert looks_at_most(images)==n
    assert all(looks_at_most(n)*tiles_at_a_time(n/looks_at_most(n))<=.03*n for n in range(2200, 10**6, 997))

def test_measured_where_a_run_ends_by_the_clock(screen, tmp_path):
    learn = fit(screen, tmp_path/'run', epochs=None, seconds=1.5, watch=True, n_watch=2)
    measured = history(learn)['effective_rank'].notna()
    assert measured.iloc[-1] and measured.sum()<=2

def test_the_average_is_watched(screen, tmp_path):
    learn = fit(screen, tmp_path/'run', epochs=2, watch=True, ema=.5)
    watch,last = of_run(learn),load_model(learn.path/'model', average=False)
    watch.learn = learn
    now = [effective_rank(watch.embedded(m)) for m in (learn.model, last)]
    assert abs(now[0]-history(learn)['effective_rank'].iloc[-1])<1e-4 and abs(now[1]-now[0])>1e-3

def test_what_cannot_be_measured_is_said(screen, tmp_path, capsys):
    def lost(**change):
        s = screen.subset(np.arange(len(screen)))
        s.table = s.table.assign(**change)
        return s
    learn = fit(lost(perturbation='', control=False), tmp_path/'nameless', epochs=1, watch=True)
    assert history(learn)[columns[:2]].notna().values.tolist()==[[True, False]]
    assert 'nn_accuracy is not measured: no row has a perturbation' in capsys.readouterr().out
    few = pd.DataFrame(dict(entity1=['a'], entity2=['b']))
    learn = fit(screen, tmp_path/'few', epochs=2, watch=few)
    assert history(learn)['recall'].isna().all() and learn.epoch==1
    assert capsys.readouterr().out.count('recall is not measured: none of the')==1

def test_an_error_stops_nothing(screen, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr('cellmae.watch.embed', lambda *a, **k: 1/0)
    learn = fit(screen, tmp_path/'run', epochs=2, watch=True)
    assert history(learn)[columns[:2]].isna().all().all()
    assert capsys.readouterr().out.count('Nothing can be watched: division by zero')==1

def test_relationships_are_read_before_the_run(tmp_path):
    with pytest.raises(FileNotFoundError): Watch(tmp_path/'no.csv')
    with pytest.raises(TypeError, match='relationships are'): Watch(3)

def test_nothing_is_left_behind(watched, tmp_path, capsys):
    assert len(watched.validate())==3 # loss, mse, fourier
    assert not capsys.readouterr().out
    watched.fit(1)
    assert len(watched.recorder.values[0])==4 # a later fit is not watched, unless asked to be
    watched.fit(1, cbs=Watch())
    assert np.isfinite(watched.recorder.values[0][-2:]).all()

def test_held_out_wells_and_panels(screen):
    dls = screen_dls([screen, screen], 32, 16, device='cpu')
    wells = wells_of_run(dls)
    assert len(wells)==2*len(screen.wells)
    held = np.concatenate(wells.sites[wells.held].tolist())
    assert sorted(held)==sorted(dls.valid.ids)
    other = screen.subset(np.arange(len(screen)))
    other.channels = other.channels[::-1]
    assert set(wells_of_run(screen_dls([other, screen], 32, 16, device='cpu')).screen)=={0}

def in_two(screen, out, rank):
    for shard in (False, True): fit(screen, out/f'{shard}', epochs=1, watch=screen.root/'relationships.csv', shard=shard)

def test_two_processes_see_what_one_sees(screen, tmp_path):
    all_well(2, in_two, screen, tmp_path)
    alone = history(fit(screen, tmp_path/'alone', epochs=1, watch=True))
    for shard in (False, True):
        t = pd.read_csv(tmp_path/f'{shard}/history.csv')
        np.testing.assert_allclose(t['effective_rank'], alone['effective_rank'], rtol=1e-3)
        assert t[columns].notna().all().all()

# Trackers

def events(out):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    board = EventAccumulator(str(out/'tensorboard'))
    board.Reload()
    return board

def test_tensorboard(screen, tmp_path):
    run = dict(epochs=2, watch=True, tracker='tensorboard', n_pictures=1)
    learn = fit(screen, tmp_path/'whole', **run)
    board,n = events(learn.path),len(learn.recorder.losses)
    values = {k:[o.value for o in board.Scalars(k)] for k in board.Tags()['scalars']}
    assert np.allclose(values['train_loss'], [float(o) for o in learn.recorder.losses])
    assert {'lr_0', 'valid_loss', 'mse', 'effective_rank', 'nn_accuracy'}<=set(values)
    assert np.allclose(values['nn_accuracy'], history(learn)['nn_accuracy'])
    assert board.Tags()['images']==['reconstructions'] and n==2*len(learn.dls.train)
    with pytest.raises(KeyboardInterrupt): fit(screen, tmp_path/'run', **run, cbs=Stops(1, 1))
    again = events(fit(screen, tmp_path/'run', **run, cbs=Stops(9, 9)).path) # goes on in the same place
    for k in values: assert [(o.step, o.value) for o in board.Scalars(k)]==[(o.step, o.value) for o in again.Scalars(k)], k

def test_trackers_that_are_not_there(screen, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match='tracker=.mlflow.: it must be tensorboard or wandb'): fit(screen, tmp_path/'run', tracker='mlflow')
    monkeypatch.setattr('cellmae.watch.find_spec', lambda name: None)
    with pytest.raises(ImportError, match='pip install wandb'): fit(screen, tmp_path/'run', tracker='wandb')
    assert not (tmp_path/'run/checkpoint.pth').exists()
    monkeypatch.undo()
    monkeypatch.setattr('cellmae.watch.rank_distrib', lambda: 1)
    assert type(report_to('tensorboard', tmp_path, {})) is Callback # another process than the first

def test_wandb(screen, tmp_path, monkeypatch):
    wandb = pytest.importorskip('wandb')
    monkeypatch.setenv('WANDB_MODE', 'offline'); monkeypatch.setenv('WANDB_SILENT', 'true')
    run = dict(tracker='wandb', watch=True, n_pictures=1)
    logged = []
    true = wandb.Run.log
    monkeypatch.setattr(wandb.Run, 'log', lambda self, o, **k: (logged.append(o), true(self, o, **k)))
    with pytest.raises(KeyboardInterrupt): fit(screen, tmp_path/'run', **run, cbs=Stops(1, 1))
    kept = (tmp_path/'run/wandb_id.txt').read_text()
    learn = fit(screen, tmp_path/'run', **run, cbs=Stops(9, 9))
    assert (tmp_path/'run/wandb_id.txt').read_text()==kept and wandb.run is None
    assert len([*(tmp_path/'run/wandb').glob(f'offline-run-*-{kept}')])==2
    seen = {k for o in logged for k in o}
    assert {'train_loss', 'lr_0', 'valid_loss', 'nn_accuracy', 'reconstructions'}<=seen
    assert 'gather_args' not in vars(learn)

# Live

class Shown:
    "A notebook that counts what it is shown"
    def __init__(self): self.pages = []
    def update(self, page): self.pages.append(page)
    def first(self, page, display_id): self.update(page); return self

def test_live(screen, tmp_path, monkeypatch):
    seen,run = Shown(),dict(epochs=1, n_pictures=1)
    monkeypatch.setattr('IPython.display.display', seen.first)
    fit(screen, tmp_path/'terminal', **run, cbs=Live(0, 0))
    assert not seen.pages # no notebook
    monkeypatch.setattr('cellmae.watch.in_jupyter', lambda: True)
    with pytest.raises(KeyboardInterrupt): fit(screen, tmp_path/'run', **run, cbs=Stops(0, 1))
    assert not seen.pages # over before half a minute
    monkeypatch.setattr(Live.__init__, '__defaults__', (60, 0))
    fit(screen, tmp_path/'run', **run, cbs=Stops(9, 9))
    assert len(seen.pages)==2 # the first, and the last in its place
    assert seen.pages[-1].data.count('<img')==2 and len(seen.pages[-1].data)<300_000
