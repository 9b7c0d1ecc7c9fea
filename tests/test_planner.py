"What a step needs, how a batch is cut to fit, and what is said when memory runs out"
import math, pytest, torch
from fastcore.test import expect_fail
from cellmae.data import screen_dls
from cellmae.device import MemoryRanOut
from cellmae.learner import mae_learner
from cellmae.scale import _how, _shape, fit_parts, needs, plan
import cellmae.scale as scale
from test_border_training import make_screen, tiny

def made(folder, bs=8, **kwargs):
    dls = screen_dls(make_screen(folder/'screen', n=10), 32, bs, device='cpu')
    return mae_learner(dls, tiny(), folder/'run', {}, n_pictures=0, **kwargs)

def room_for(learn, n):
    need = needs(learn.model, 32, _how(learn), in_chans=2)
    return (need.gb(n)-need.weights/2**30)/.65+1e-9

@pytest.mark.parametrize('n', [1000,8,4,1])
def test_as_many_parts_as_memory_asks_for(tmp_path, capsys, n):
    learn = made(tmp_path)
    need,gb = needs(learn.model, 32, _how(learn), in_chans=2),room_for(learn, n)
    parts = math.ceil(8/min(8, need.most(gb*.65+need.weights/2**30)))
    assert fit_parts(learn, gb) == parts and (parts>1 or n>1)
    said = capsys.readouterr().out
    assert (f'in {parts} parts of {math.ceil(8/parts)}, as' in said) if parts>1 else not said

def test_one_image_too_many_is_refused_with_the_cure(tmp_path):
    with expect_fail(MemoryError, contains='recompute=True'): fit_parts(made(tmp_path), 1e-6)

@pytest.mark.parametrize('most', [8,3,1,0])
def test_a_trial_doubles_the_parts_until_a_step_runs_through(tmp_path, monkeypatch, most):
    learn,forward = made(tmp_path),None
    forward = learn.model.forward
    def tight(x, *args):
        if len(x)>most: raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 20.00 MiB')
        return forward(x, *args)
    monkeypatch.setattr(learn.model, 'forward', tight)
    parts = scale._tried(learn, 1)
    assert parts is None if most==0 else math.ceil(8/parts)<=most and (parts==1 or math.ceil(16/parts)>most)
    assert [p.grad for p in learn.model.parameters() if p.grad is not None] == []

def test_nothing_stays_of_a_trial(tmp_path):
    learn = made(tmp_path, bf16=True)
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    for p in learn.model.parameters(): p.grad = torch.ones_like(p)
    state = lambda: [*learn.model.state_dict().values(), *(p.grad for p in learn.model.parameters()), torch.get_rng_state(),
                     *(v for s in learn.opt.state_dict()['state'].values() for v in s.values() if torch.is_tensor(v))]
    before = [t.clone() for t in state()]
    scale._trial(learn, 3)
    assert all(torch.equal(a, b) for a,b in zip(before, state(), strict=True))

@pytest.mark.parametrize('error', [torch.OutOfMemoryError('CUDA out of memory. Tried'), RuntimeError('CUDA error: CUBLAS_STATUS_ALLOC_FAILED'),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), MemoryError()])
def test_running_out_in_the_run_says_where_and_what_to_do(tmp_path, monkeypatch, error):
    learn = made(tmp_path)
    def fail(x, *args): raise error
    monkeypatch.setattr(learn.model, 'forward', fail)
    with pytest.raises(MemoryRanOut) as e:
        with learn.no_bar(), learn.no_logging(): learn.fit(1)
    for words in ('epoch 1, step 1', 'of 2 x 32 x 32', 'accumulate=2', 'recompute=True', 'crop'): assert words in str(e.value)

def test_options_change_memory_as_they_should():
    at = dict(bs=256, crop=64, memory_gb=100)
    gb = lambda **kw: plan('mae_vitt8', 1000, **at, **kw).memory_gb.iloc[0]
    assert gb(recompute=True)<.6*gb()<gb()<gb(ema=.9)
    assert gb(bf16=False)>gb()
    two = plan('mae_vitt8', 1000, **at, devices=2).iloc[0]
    assert (two.bs, two.steps, two.accumulate) == (128, 4, 1)

def test_what_does_not_fit_is_told_what_to_change():
    advice = lambda **kw: plan('mae_vitg8', 1000, **kw).advice.iloc[0]
    assert 'shard=True' in advice(memory_gb=24, devices=8)
    assert 'larger card' in advice(memory_gb=2)
    assert advice(memory_gb=80, devices=8) == ''
