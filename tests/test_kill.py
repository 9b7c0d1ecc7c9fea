"Runs that are killed without warning go on where they were, and leave nothing broken; `benchmarks/kills_train.py` does more of it"
import os, subprocess, sys, time
import pandas as pd, pytest
from safetensors.torch import load_file
from cellmae.cli import cellmae_fit
from cellmae.synth import synth_screen
from processes import ended, in_processes

forks = pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')

@pytest.fixture(scope='module')
def screen(tmp_path_factory):
    return synth_screen(tmp_path_factory.mktemp('kill')/'screen', n_pathways=4, genes_per_pathway=2, n_inactive=0, n_batches=2, controls_per_batch=4, size=64).root

def fit(screen, out):
    "Begin `cellmae_fit` in a process of its own, forked, so that it needs no imports"
    kw = dict(model='mae_vitt8', epochs=3, crop=32, bs=8, crops=4)
    return in_processes(1, lambda rank: cellmae_fit(str(screen), str(out), **kw))

def finish(screen, out):
    codes,said = ended(*fit(screen, out), 300)
    assert codes==[0], said
    return load_file(out/'model/model.safetensors')

def kill_in_second_epoch(screen, out):
    [p],reads = fit(screen, out)
    while not (out/'history.csv').exists():
        assert p.is_alive(), ended([p], reads)
        time.sleep(.02)
    time.sleep(.1)
    p.kill()
    ended([p], reads)

@forks
def test_killed_run_resumes(screen, tmp_path):
    kill_in_second_epoch(screen, tmp_path/'killed')
    assert not (tmp_path/'killed/model').exists(), 'the run was over before it could be killed'
    resumed,straight = finish(screen, tmp_path/'killed'),finish(screen, tmp_path/'straight')
    assert all((resumed[k]==straight[k]).all() for k in straight)
    a,b = (pd.read_csv(tmp_path/d/'history.csv') for d in ('killed','straight'))
    pd.testing.assert_frame_equal(a, b)
    assert len(a)==3 and not [f for f in os.listdir(tmp_path/'killed') if '.part' in f]

def python(*args):
    env = {**os.environ, 'PYTHONPATH': os.pathsep.join([os.getcwd(), f'{os.getcwd()}/benchmarks']), 'OMP_NUM_THREADS': '1'}
    p = subprocess.run([sys.executable, '-W', 'ignore', *map(str, args)], capture_output=True, text=True, env=env, timeout=300)
    assert p.returncode==0, p.stdout[-3000:]+p.stderr[-3000:]
    return p.stdout

@forks
def test_kills():
    "All that a run leaves is that of an undisturbed one: weights, averages, optimiser, curves, history, pictures, provenance"
    some = 'fit_mae, spoilt','fit_mae, 2 processes, watched','fit_wsl, 2 processes, average'
    assert 'After all of 3 kills' in python('benchmarks/kills_train.py', '--n', 3, '--jobs', *some)

others = '''
import random, sys
from pathlib import Path
from kills_train import *

def numbers(out):
    "All numbers of a model and of the history"
    return {**load_file(out/'model/model.safetensors'), **{c: torch.tensor(t) for c,t in pd.read_csv(out/'history.csv').items()}}

of = Path(sys.argv[1])
os.waitpid(fork(sources, of), 0)
for o in ('undisturbed','killed'): (of/o).mkdir()
for name in ('fit_mae, plain','fit_mae, 2 processes, plain'): finish(name, of, of/'undisturbed'/name)
for first,then in (('fit_mae, plain','fit_mae, 2 processes, plain'), ('fit_mae, 2 processes, plain','fit_mae, plain')):
    out = of/'killed'/'run'
    while not (kill(first, of, out, .5, 'change') and reached(out)>(0,0)): clear(out)
    finish(then, of, out)
    a,b = numbers(of/'undisturbed'/first),numbers(out)
    print('farthest', max(float((a[k]-b[k]).abs().max()) for k in a), steps_of(out), flush=True)
    clear(out)
'''

@forks
def test_another_number_of_processes_goes_on(tmp_path):
    "One goes on where two were killed, and two where one was; sums of floats may differ in their last digits"
    lines = [o.split() for o in python('-c', 'from safetensors.torch import load_file\n'+others, tmp_path/'of').splitlines() if o.startswith('farthest')]
    assert len(lines)==2 and all(float(far)<1e-3 and 0<int(steps)<12 for _,far,steps in lines)

dead = '''
import socket, sys, time
from pathlib import Path
from kills_train import *

def member(r, port, of, out):
    here = dict(RANK=r, LOCAL_RANK=r, WORLD_SIZE=2, LOCAL_WORLD_SIZE=2, MASTER_ADDR='localhost', MASTER_PORT=port)
    os.environ.update({k: str(v) for k,v in here.items()})
    log = os.open(beside(out, f'log{r}'), os.O_WRONLY|os.O_CREAT)
    os.dup2(log, 1); os.dup2(log, 2)
    JOBS['fit_mae, 2 processes, plain'](of, out)

of = Path(sys.argv[1])
os.waitpid(fork(sources, of), 0)
for lost in (0, 1):
    out = of/str(lost)
    with socket.socket() as o: o.bind(('', 0)); port = o.getsockname()[1]
    pids = [fork(member, r, port, of, out) for r in (0, 1)]
    while not (out/'history.csv').exists(): time.sleep(.005)
    os.kill(pids[lost], 9); since = time.monotonic()
    ends = [os.waitstatus_to_exitcode(os.waitpid(p, 0)[1]) for p in pids]
    print('ended', ends[lost], ends[1-lost], time.monotonic()-since<30, beside(out, f'log{1-lost}').read_text().splitlines()[-1])
'''

@forks
def test_a_process_that_dies_ends_all(tmp_path):
    "The other one does not wait for ever, and its last words say which was lost, and what to do"
    lines = [o for o in python('-c', dead, tmp_path/'of').splitlines() if o.startswith('ended')]
    assert len(lines)==2
    for lost,line in enumerate(lines):
        assert line.startswith('ended -9 1 True') and f'Process {lost} of 2 ended without a word' in line and 'start again to go on' in line
