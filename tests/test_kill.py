"A run that is killed without warning goes on where it was, and leaves nothing broken"
import os, signal, subprocess, sys, time
import pandas as pd, pytest
from safetensors.torch import load_file
from cellmae.synth import synth_screen

@pytest.fixture(scope='module')
def screen(tmp_path_factory):
    return synth_screen(tmp_path_factory.mktemp('kill')/'screen', n_pathways=4, genes_per_pathway=2, n_inactive=0, n_batches=2, controls_per_batch=4, size=64).root

def fit(screen, out):
    code = f"from cellmae.cli import cellmae_fit; cellmae_fit({str(screen)!r}, {str(out)!r}, model='mae_vitt8', epochs=6, crop=32, bs=8, crops=8)"
    return subprocess.Popen([sys.executable, '-W', 'ignore', '-c', code], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

def finish(screen, out):
    p = fit(screen, out)
    assert p.wait(300)==0, p.stderr.read().decode()[-2000:]
    return load_file(out/'model/model.safetensors')

def kill_in_second_epoch(screen, out):
    p = fit(screen, out)
    while not (out/'checkpoint.pth').exists():
        assert p.poll() is None, p.stderr.read().decode()[-2000:]
        time.sleep(.02)
    time.sleep(.3)
    p.send_signal(signal.SIGKILL); p.wait()

def test_killed_run_resumes(screen, tmp_path):
    kill_in_second_epoch(screen, tmp_path/'killed')
    assert not (tmp_path/'killed/model').exists(), 'the run was over before it could be killed'
    resumed,straight = finish(screen, tmp_path/'killed'),finish(screen, tmp_path/'straight')
    assert all((resumed[k]==straight[k]).all() for k in straight)
    a,b = (pd.read_csv(tmp_path/d/'history.csv') for d in ('killed','straight'))
    pd.testing.assert_frame_equal(a, b)
    assert len(a)==6 and not [f for f in os.listdir(tmp_path/'killed') if '.part' in f]
