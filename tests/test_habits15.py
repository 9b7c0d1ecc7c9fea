"""What was found by doing to training what users do, and what happens now

Numbers are those of the findings. Tested elsewhere are, in `test_border_training.py`: 1.1, 1.2, 1.4 to 1.6 (sweeps, fits after a run, rates, loaders, fastai's calls),
1.3 (`test_what_callbacks_remember_is_resumed`), 1.7 (`test_curves_right_after_resume`), 2.2 (`test_damaged_checkpoint`, `test_checkpoint_of_another_version`),
2.3 (`test_two_processes_in_one_folder`), 2.4 (`test_out_cannot_be_written`, `test_other_things_in_the_way_are_found_at_once`), 2.6 (`test_clock_set_back`,
`test_values_out_of_range_are_refused_by_name`); part files of their own names in `nbs/00_files.ipynb` (2.3); kills in `test_kill.py`.
"""
import io, os, re, shutil, signal, sys, time
from contextlib import redirect_stdout, suppress
from pathlib import Path

import numpy as np, pandas as pd, pytest, torch
from fastai.callback.core import Callback
from safetensors.torch import load_file

from cellmae.images import ImageError
from cellmae.train import fit_mae
from cellmae.wsl import fit_wsl
from cellmae.zoo import load_model
from commands import call, content
from test_border_training import Stop, damage, files, make_screen, same, stains, tiny, weights
from test_faults14 import mounted, own_disks, refused, run as program, size

own = dict(bs=4, crop=32, save_every=0, device='cpu', bf16=False)

def mae(screen, out, **kw): return fit_mae(screen, tiny(), out, **{**own, 'epochs':2, 'n_pictures':0, **kw})
def wsl(screen, out, **kw): return fit_wsl(screen, tiny(), out, **{**own, 'epochs':2, 'apart':None, 'valid':.2, **kw})
kinds = dict(mae=mae, wsl=wsl)
both = pytest.mark.parametrize('kind', kinds)

@pytest.fixture(scope='module')
def screen(tmp_path_factory): return make_screen(tmp_path_factory.mktemp('screen'), n=20)

@pytest.fixture(scope='module')
def whole(screen, tmp_path_factory):
    "Undisturbed runs, and what is in their folders"
    out = tmp_path_factory.mktemp('whole')
    return {k: (f(screen, out/k), content(out/k)) for k,f in kinds.items()}

def result(out):
    "What a run ends with: its model and its history"
    return {k:v for k,v in content(out).items() if k in ('model/model.safetensors','model/last.safetensors','history.csv')}

def like(out, whole): return result(out)=={k: whole[k] for k in result(out)} and len(result(out))>1

def finite(out):
    state = torch.load(out/'checkpoint.pth', weights_only=True)
    numbers = [*state['model'].values(), *(v for o in state['opt']['state'].values() for v in o.values() if isinstance(v, torch.Tensor))]
    numbers += load_file(out/'model/model.safetensors').values() if (out/'model').exists() else []
    return len(numbers)>9 and all(torch.isfinite(o).all() for o in numbers if o.is_floating_point())

# --- 2.1 a step that is not finite changes nothing

class Spoil(Callback):
    "Make the loss, or one number of the gradient of one weight, `value` at steps `at`"
    order,run_valid = 15,False
    def __init__(self, what, at, value=float('nan'), weight=0): self.what,self.at,self.value,self.weight = what,at,value,weight
    def here(self): return self.epoch*self.n_iter+self.iter in self.at
    def after_loss(self):
        if self.what=='loss' and self.here(): self.learn.loss = self.loss*self.value
    def after_backward(self):
        if self.what=='gradient' and self.here(): [*self.model.parameters()][self.weight].grad.view(-1)[0] = self.value

def said_of(capsys, recwarn):
    "All that was said, in print or as a warning"
    o = capsys.readouterr()
    return o.out+o.err+'\n'.join(str(w.message) for w in recwarn)

@both
@pytest.mark.parametrize('what,weight,when', [('loss',0,'first'), ('gradient',-1,'first'), ('gradient',0,'middle'), ('loss',0,'last'), ('gradient',-1,'last')])
def test_a_step_that_is_not_finite_is_left_out(screen, whole, tmp_path, capsys, recwarn, kind, what, weight, when):
    n = len(whole[kind][0].recorder.losses)
    at = dict(first=0, middle=n//2, last=n-1)[when]
    spoil = lambda: Spoil(what, [at], weight=weight)
    learn = kinds[kind](screen, tmp_path/'run', cbs=spoil())
    said = said_of(capsys, recwarn)
    assert re.search(r'plate P\d', said) and re.search(r'A\d\d', said) and re.search(r'skip|left out', said), said
    assert finite(tmp_path/'run') and np.isfinite(pd.read_csv(tmp_path/'run/history.csv')[['train_loss']]).all(axis=None)
    assert not same(weights(learn), weights(whole[kind][0]))
    with pytest.raises(KeyboardInterrupt): kinds[kind](screen, tmp_path/'killed', cbs=[spoil(), Stop(min(at+2, n-2))])
    kinds[kind](screen, tmp_path/'killed', cbs=spoil())
    assert like(tmp_path/'killed', content(tmp_path/'run')), 'it is left out of a run that was stopped and goes on, too'

@both
def test_two_are_left_out_and_the_third_stops(screen, tmp_path, capsys, recwarn, kind):
    kinds[kind](screen, tmp_path/'two', cbs=Spoil('gradient', [1,3]))
    assert finite(tmp_path/'two')
    for _ in range(2): # the same call again stops as well
        with pytest.raises(FloatingPointError, match='(?s)plate P.*lower `lr`'): kinds[kind](screen, tmp_path/'three', cbs=Spoil('gradient', [1,3,6]))
    assert finite(tmp_path/'three') and not (tmp_path/'three/model').exists()

def test_a_spike_of_the_loss_is_left_out(screen, tmp_path, capsys, recwarn):
    spiking = dict(bs=1, epochs=5, save_every=30)
    calm,spiked = tmp_path/'calm',tmp_path/'spiked'
    mae(screen, calm, **spiking)
    assert not re.search('spike', said_of(capsys, recwarn))
    mae(screen, spiked, **spiking, cbs=Spoil('loss', [80], 1e3))
    assert re.search(r'(?s)plate P\d', said := said_of(capsys, recwarn)) and re.search('skip|left out', said)
    losses = torch.load(spiked/'checkpoint.pth', weights_only=True)['curve']['losses']
    assert max(losses)<100

def test_what_is_left_out_is_left_out_of_the_average(screen, tmp_path):
    learn = mae(screen, tmp_path/'run', ema=.5, cbs=Spoil('gradient', [4]))
    assert finite(tmp_path/'run') and all(torch.isfinite(o).all() for o in load_file(tmp_path/'run/model/last.safetensors').values())
    assert same(weights(learn), load_model(tmp_path/'run/model').state_dict().values())
    assert not same(load_model(tmp_path/'run/model', average=False).state_dict().values(), weights(learn))

@both
def test_a_step_spoilt_where_the_last_checkpoint_is_damaged(screen, tmp_path, recwarn, kind):
    "Going back needs a checkpoint too: the one before is taken, or the run ends in words"
    class Damage(Callback):
        run_valid,order = False,-50
        def __init__(self, *names): self.names = names
        def before_batch(self):
            if self.epoch*self.n_iter+self.iter==6:
                for f in self.names: (self.learn.path/f).write_bytes(b'\x07'*99)
    with pytest.warns(UserWarning, match='checkpoint.pth is damaged'):
        kinds[kind](screen, tmp_path/'one', cbs=[Damage('checkpoint.pth'), Spoil('loss', [6])])
    assert finite(tmp_path/'one')
    with pytest.raises(ValueError, match='checkpoint.pth is damaged .*resume=False'):
        kinds[kind](screen, tmp_path/'two', cbs=[Damage('checkpoint.pth','checkpoint.old.pth'), Spoil('loss', [6])])

# --- 1.3 what callbacks know

class Count(Callback):
    "State of its own, that is neither number nor list"
    order,run_valid = 30,False
    def __init__(self): self.seen = torch.zeros(1)
    def after_step(self): self.seen += float(self.loss)
    def state_dict(self): return dict(seen=self.seen)
    def load_state_dict(self, state): self.seen = state['seen']

@both
@pytest.mark.parametrize('options', [dict(ema=.9), dict(accumulate=2), dict(ema=.5, accumulate=2)], ids=str)
def test_state_of_callbacks_of_ours_and_of_users(screen, tmp_path, kind, options):
    a,b = Count(),Count()
    kinds[kind](screen, tmp_path/'a', cbs=a, **options)
    with pytest.raises(KeyboardInterrupt): kinds[kind](screen, tmp_path/'b', cbs=[Count(), Stop(3)], **options)
    kinds[kind](screen, tmp_path/'b', cbs=b, **options)
    assert torch.equal(a.seen, b.seen) and like(tmp_path/'b', content(tmp_path/'a'))

@both
@pytest.mark.parametrize('there,now', [({}, dict(ema=.9)), (dict(ema=.9), {}), (dict(ema=.9), dict(ema=.99))])
def test_an_average_that_was_not_kept_cannot_be_taken_up(screen, tmp_path, kind, there, now):
    "A run that goes on with another average would end with neither"
    with pytest.raises(KeyboardInterrupt): kinds[kind](screen, tmp_path/'run', cbs=Stop(3), **there)
    before = files(tmp_path/'run')
    with pytest.raises(ValueError, match='ema=.* there and .* now.*resume=False'): kinds[kind](screen, tmp_path/'run', **now)
    assert files(tmp_path/'run')==before

@both
def test_parts_may_change(screen, tmp_path, kind):
    "How a batch is cut up is no part of what makes a run this run"
    with pytest.raises(KeyboardInterrupt): kinds[kind](screen, tmp_path/'run', cbs=Stop(3))
    kinds[kind](screen, tmp_path/'run', accumulate=2)
    assert (tmp_path/'run/model').exists()

# --- 1.7 curves and history of a run that is opened again

@both
def test_a_finished_run_opened_again_is_never_shorter(screen, tmp_path, kind):
    run = lambda **kw: kinds[kind](screen, tmp_path/'run', epochs=4, **kw)
    run()
    before = files(tmp_path/'run')
    class Looks(Callback):
        order = 100
        def look(self): seen.append((self.learn.path/'history.csv').read_bytes())
        before_fit = before_epoch = after_batch = after_epoch = after_fit = look
    seen = []
    learn = run(cbs=Looks())
    assert set(seen)=={before['history.csv']} and files(tmp_path/'run')['history.csv']==before['history.csv']
    assert len(learn.recorder.values)==4

# --- 2.2 checkpoints that are damaged, cut short, or of another version

@pytest.mark.parametrize('harm', ['half','folder','gone'])
def test_a_damaged_checkpoint_in_the_middle_of_a_run(screen, whole, tmp_path, harm):
    with pytest.raises(KeyboardInterrupt): mae(screen, tmp_path/'run', cbs=Stop(6))
    f = tmp_path/'run/checkpoint.pth'
    raw = f.read_bytes(); f.unlink()
    if harm=='half': f.write_bytes(damage['half'](raw))
    if harm=='folder':
        f.mkdir()
        with pytest.raises(FileExistsError, match='checkpoint.pth is something else'): mae(screen, tmp_path/'run')
        f.rmdir()
    mae(screen, tmp_path/'run')
    assert like(tmp_path/'run', whole['mae'][1])

def test_a_damaged_checkpoint_by_the_command(tmp_path, capsys):
    from cellmae.cli import cellmae_fit
    make_screen(tmp_path/'s').save(tmp_path/'s')
    how = tmp_path/'s','--out',tmp_path/'run','--model','mae_vitt8','--epochs',1,'--crop',32,'--bs',4,'--workers',0
    assert call(cellmae_fit, *how)==0
    for f in tmp_path.glob('run/checkpoint*.pth'): f.write_bytes(f.read_bytes()[:-9])
    said = refused(capsys, cellmae_fit, *how)
    assert 'checkpoint.pth is damaged' in said and '--restart' in said and 'resume=False' not in said
    assert call(cellmae_fit, *how, '--restart')==0

def test_a_checkpoint_of_the_release_before(screen, tmp_path):
    "Of a version that kept less: refused in words, or gone on with, and never torch's words"
    with pytest.raises(KeyboardInterrupt): mae(screen, tmp_path/'run', cbs=Stop(6))
    for f in tmp_path.glob('run/checkpoint*.pth'):
        s = torch.load(f, weights_only=True)
        torch.save({k:v for k,v in s.items() if k in ('settings','at','model','opt','curve')}, f)
    with pytest.raises(ValueError, match='of another version.*resume=False'): mae(screen, tmp_path/'run')

# --- 2.3 two in one folder

def test_the_second_process_in_a_folder(tmp_path, capsys):
    "While another trains there, the command is refused in one line, and the other ends as if alone"
    from cellmae.cli import cellmae_fit
    s = make_screen(tmp_path/'s')
    s.save(tmp_path/'s')
    class Second(Callback):
        order = 100
        def before_validate(self): said.append(refused(capsys, cellmae_fit, tmp_path/'s', '--out', tmp_path/'run', '--model', 'mae_vitt8', '--crop', 32, '--bs', 4, '--epochs', 1))
    said = []
    mae(s, tmp_path/'run', cbs=Second())
    mae(s, tmp_path/'alone')
    assert len(said)==2 and all(f'in use by process {os.getpid()}' in o for o in said)
    assert like(tmp_path/'run', content(tmp_path/'alone'))

# --- 2.4 folders and disks

class At(Callback):
    "Do something before a step"
    order,run_valid = -50,False
    def __init__(self, step, do): self.step,self.do = step,do
    def before_batch(self):
        if self.epoch*self.n_iter+self.iter==self.step: self.do(self.learn.path)

@both
def test_a_folder_removed_in_mid_run(screen, whole, tmp_path, kind):
    "It is made again, and the run ends with all that it was to end with"
    learn = kinds[kind](screen, tmp_path/'run', cbs=At(7, shutil.rmtree))
    assert like(tmp_path/'run', whole[kind][1])

@both
def test_a_file_in_the_place_of_the_folder(screen, tmp_path, kind):
    def swap(out): shutil.rmtree(out); out.write_text('mine')
    with pytest.raises(OSError, match='run'): kinds[kind](screen, tmp_path/'run', cbs=At(7, swap))
    assert (tmp_path/'run').read_text()=='mine'

def told(screen, out, fit=mae, **kw):
    "How many steps are taken before it ends, and what is said on the way and at the end"
    taken,said = [],io.StringIO()
    class Taken(Callback):
        run_valid = False
        def after_step(self): taken.append(self.iter)
    try:
        with redirect_stdout(said): fit(screen, out, cbs=[Taken(), *kw.pop('cbs', [])], **kw)
    except OSError as e: return len(taken),said.getvalue(),str(e)
    return len(taken),said.getvalue(),''

def fill(disk):
    "Leave no room"
    with suppress(OSError): (disk/'others').write_bytes(bytes(10**8))

def room_again(disk): (disk/'others').unlink()

def undisturbed(screen, disk, fit=mae, **kw):
    fit(screen, out := disk.with_name(f'{disk.name} undisturbed'), **kw)
    return content(out)

def trains_where_nothing_fits(screen, disk):
    "Refused before the first step"
    mounted(disk, '200k')
    taken,_,words = told(screen, disk/'run')
    assert taken==0 and re.search('needs up to .* MB .*make room, or choose another `out`', words), (taken, words)

def trains_on_a_disk_that_is_full_for_a_while(screen, disk):
    "It goes on, says so, and says when it writes again"
    want = undisturbed(screen, disk)
    mounted(disk, '64m')
    taken,said,words = told(screen, disk/'run', cbs=[At(2, lambda out: fill(disk)), At(4, lambda out: room_again(disk))])
    assert not words and taken==10 and said.count('could not be written')==1 and 'Training goes on' in said and 'is written again' in said, said
    assert like(disk/'run', want) and not list(disk.rglob('.*part*'))

def trains_on_a_disk_that_becomes_full(screen, disk, fit=mae):
    "What is there is whole, and the same call goes on"
    want = undisturbed(screen, disk, fit)
    mounted(disk, '64m')
    for at in (2, 6): # in the first epoch, in the second
        taken,said,words = told(screen, disk/'run', fit, cbs=[At(at, lambda out: fill(disk))])
        assert 'could not be written' in said and not list(disk.rglob('.*part*')), said
        if words: assert re.search('[Nn]o room', words) and str(disk) in words and 'make' in words, words
        else: assert (disk/'run/model/config.json').exists() # in the room of the checkpoint before
        assert torch.load(disk/'run/checkpoint.pth', weights_only=True)['at']
        room_again(disk)
    taken,_,words = told(screen, disk/'run', fit)
    assert 0<=taken<=10 and not words and like(disk/'run', want), (taken, words)

def classifies_on_a_disk_that_becomes_full(screen, disk): trains_on_a_disk_that_becomes_full(screen, disk, wsl)

def trains_where_the_model_does_not_fit(screen, disk):
    "The checkpoint of the end is there: only the model is to be written, in the place of the checkpoint before or another time"
    want = undisturbed(screen, disk)
    mounted(disk, '64m')
    class Last(Callback):
        order = 100
        def after_fit(self):
            fill(disk)
            if self.gone: (self.learn.path/'checkpoint.old.pth').unlink(); fill(disk)
    first,then = Last(),Last()
    first.gone,then.gone = True,False
    taken,_,words = told(screen, disk/'run', cbs=[first])
    if words: # the room of the checkpoint before was taken, too
        assert taken==10 and re.search('[Nn]o room', words) and f'{disk}/run' in words and 'make' in words, words
        room_again(disk)
        taken,_,words = told(screen, disk/'run')
        assert taken==0
    assert not words and like(disk/'run', want)

def trains_where_history_or_pictures_do_not_fit(screen, disk):
    want = undisturbed(screen, disk, n_pictures=2)
    mounted(disk, '64m')
    class Full(Callback):
        order = 50
        def after_epoch(self): fill(disk)
    _,said,_ = told(screen, disk/'run', cbs=[Full()], n_pictures=2)
    assert re.search('history.csv could not be written .[Nn]o room', said), said
    room_again(disk)
    assert not told(screen, disk/'run', n_pictures=2)[2] and len(list(disk.glob('run/reconstructions/*.png')))==2 and like(disk/'run', want)

def trains_on_a_disk_that_became_read_only(screen, disk):
    mounted(disk, '64m')
    with suppress(KeyboardInterrupt): told(screen, disk/'run', cbs=[Stop(4)])
    size(disk, 'ro')
    taken,_,words = told(screen, disk/'run')
    assert taken==0 and re.search('cannot be written.*choose another `out`', words), words
    taken,_,words = told(screen, disk/'other')
    assert taken==0 and re.search('(cannot be written|Read-only).*', words), words
    size(disk, 'rw')
    assert not told(screen, disk/'run')[2]

on_disks = ['trains_where_nothing_fits','trains_on_a_disk_that_is_full_for_a_while','trains_on_a_disk_that_becomes_full','trains_where_the_model_does_not_fit',
            'trains_where_history_or_pictures_do_not_fit','trains_on_a_disk_that_became_read_only','classifies_on_a_disk_that_becomes_full']

@pytest.mark.skipif(not own_disks(), reason='needs disks of its own')
def test_disks(tmp_path):
    "In one process, which takes longer to start than to do this"
    (tmp_path/'disks').mkdir()
    lines = [f'attempt({f}, Path(sys.argv[1])/"disks/{f}")' for f in on_disks]
    code = 'from test_habits15 import *\nscreen = make_screen(Path(sys.argv[1])/"s", n=20)\n' + attempts + '\n'.join(lines)
    said = program(code, tmp_path, lead=['unshare','-rm'])
    bad = said.split('FAILED ')[1:]
    assert not bad, '\n'.join(bad)

attempts = '''
import traceback
def attempt(f, disk):
    try: f(screen, disk)
    except BaseException: print('FAILED', f.__name__, traceback.format_exc()[-1500:])
'''

# --- an image that vanishes

@both
@pytest.mark.parametrize('workers', [0, 2])
def test_an_image_deleted_in_mid_run(tmp_path, kind, workers):
    "It is named with its well, and once it is back the run goes on to what it would have been"
    s = make_screen(tmp_path/'s', n=20)
    fit = lambda out,**kw: kinds[kind](s, tmp_path/out, num_workers=workers, **kw)
    fit('whole')
    real = tmp_path/'s/3.tif'
    raw = real.read_bytes()
    with pytest.raises(ImageError, match='3.tif: missing.*plate P1, well A04'): fit('run', cbs=At(2, lambda out: real.unlink()))
    with pytest.raises(ValueError, match='other images, or some are missing.*check'): fit('run')
    real.write_bytes(raw)
    fit('run')
    assert like(tmp_path/'run', content(tmp_path/'whole'))

# --- signals

signals = '''
from test_habits15 import *
from cellmae.cli import cellmae_fit
from commands import start
import atexit, traceback
root = Path(sys.argv[1])
make_screen(root/'s', n=12).save(root/'s')
def command(out): start(cellmae_fit, root/'s', '--out', root/out, '--model', 'mae_vitt8', '--epochs', 3, '--crop', 32, '--bs', 4, '--workers', 2)
def ready(out):
    "The first epoch is done"
    for _ in range(600):
        if (root/out/'history.csv').exists(): return
        time.sleep(.01)
def forked(out):
    if pid := os.fork(): return pid
    log = os.open(root/f'{out}.log', os.O_WRONLY|os.O_CREAT|os.O_TRUNC)
    os.dup2(log, 1); os.dup2(log, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    code = 0
    try: command(out)
    except SystemExit as e: code = e.code or 0
    except BaseException: traceback.print_exc(); code = 1
    sys.stderr.flush()
    if code: atexit._run_exitfuncs()
    os._exit(code)
os.waitpid(forked('whole'), 0)
for name,sent in dict(term=signal.SIGTERM, int=signal.SIGINT).items():
    pid = forked(name)
    ready(name)
    os.kill(pid, sent); since = time.monotonic()
    end = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    took = time.monotonic()-since
    shutil.copy(root/f'{name}.log', root/f'{name}.said')
    os.waitpid(forked(name), 0)
    print('ended', name, end, round(took, 2), flush=True)
'''

@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')
def test_signals(tmp_path):
    "Ctrl-C and a cluster's SIGTERM end the command at once, in one line or without a word, and it goes on exactly"
    out = program(signals, tmp_path)
    ends = {o.split()[1]: (int(o.split()[2]), float(o.split()[3])) for o in out.splitlines() if o.startswith('ended ')}
    assert ends['int'][0]==130 and ends['term'][0] in (-15,143) and max(o[1] for o in ends.values())<3, out
    said = (tmp_path/'int.said').read_text()
    assert said.rstrip().endswith('cellmae_fit: stopped') and 'Traceback' not in said+(tmp_path/'term.said').read_text()
    for name in ends: assert like(tmp_path/name, content(tmp_path/'whole'))

# --- 2.6 values that make no sense

senseless = [('epochs',0), ('epochs',-1), ('epochs',1.5), ('seconds',0), ('seconds',-1), ('seconds','long'), ('seconds',float('nan')), ('seconds',float('inf')),
    ('ema',0), ('ema',1), ('ema',1.5), ('ema',-.1), ('ema',True), ('ema','yes'), ('accumulate',0), ('accumulate',-1), ('accumulate',1.5), ('accumulate',True),
    ('recompute','yes'), ('compile',1), ('shard','no'), ('n_watch',0), ('n_watch',2.5), ('tracker','tensorbord'), ('tracker',True), ('watch','nofile.csv'), ('watch',3)]

@both
@pytest.mark.parametrize('name,value', senseless, ids=lambda o: str(o))
def test_senseless_values(screen, tmp_path, kind, name, value):
    "Refused by name before anything is written"
    own = {name:value} | (dict(epochs=None) if name=='seconds' else {}) | (dict(watch=True) if name=='n_watch' else {})
    with pytest.raises((ValueError, TypeError, FileNotFoundError), match=f'{name}=|{value}|relationships are'): kinds[kind](screen, tmp_path/'run', **own)
    assert not (tmp_path/'run').exists()

@both
def test_epochs_and_seconds(screen, tmp_path, kind):
    with pytest.raises(ValueError, match='epochs.*seconds|seconds.*epochs'): kinds[kind](screen, tmp_path/'run', epochs=2, seconds=3)
    assert not (tmp_path/'run').exists()

@both
def test_relationships_without_their_columns(screen, tmp_path, kind):
    with pytest.raises(ValueError, match='entity1'): kinds[kind](screen, tmp_path/'run', watch=pd.DataFrame(dict(a=['x'], b=['y'], c=['z'])))
    assert not (tmp_path/'run').exists()

@pytest.mark.parametrize('flag,value,words', [
    ('epochs','0','epochs'), ('seconds','-1','seconds'), ('ema','1','ema'), ('ema','2','ema'), ('accumulate','0','accumulate'),
    ('watch','nofile.csv','nofile.csv'), ('tracker','tensorbord','tensorbord')])
def test_senseless_flags(tmp_path, capsys, flag, value, words):
    from cellmae.cli import cellmae_fit
    make_screen(tmp_path/'s').save(tmp_path/'s')
    said = refused(capsys, cellmae_fit, tmp_path/'s', '--out', tmp_path/'run', '--model', 'mae_vitt8', '--crop', 32, '--bs', 4, f'--{flag}', value)
    assert words in said and 'TypeError' not in said and 'NotImplementedError' not in said and not (tmp_path/'run').exists()

@both
@pytest.mark.parametrize('clock', [-1e9, 0., 1e12])
def test_a_clock_that_is_set_while_a_budget_runs(screen, tmp_path, monkeypatch, kind, clock):
    "A budget of seconds is measured by a clock that nobody sets"
    began = time.monotonic()
    def set_clock(out): monkeypatch.setattr(time, 'time', lambda: clock)
    kinds[kind](screen, tmp_path/'run', epochs=None, seconds=1.5, cbs=At(3, set_clock))
    assert time.monotonic()-began<15 and (tmp_path/'run/model').exists() and len(pd.read_csv(tmp_path/'run/history.csv'))>=1

@both
def test_a_budget_of_seconds_goes_on(screen, tmp_path, kind):
    "What was spent is spent; the schedule ends where it was to end"
    spend = lambda **kw: kinds[kind](screen, tmp_path/'run', epochs=None, seconds=2, **kw)
    with pytest.raises(KeyboardInterrupt): spend(cbs=Stop(8))
    began = time.monotonic()
    learn = spend()
    assert time.monotonic()-began<15 and learn.recorder.lrs[-1]<learn.lr/100
    steps = len(learn.recorder.losses)
    assert len(spend().recorder.losses)==steps, 'a run that is over stays over'
