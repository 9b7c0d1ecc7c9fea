"What is to run on a lent GPU runs here in a tiny size, and a case that fails costs no other"
import json, os, subprocess, sys, time
from pathlib import Path

import pytest, torch

root = Path(__file__).resolve().parents[1]

@pytest.fixture
def gpu(monkeypatch, tmp_path):
    "The script as a module, with a folder of its own"
    monkeypatch.setenv('OUT', str(tmp_path)); monkeypatch.syspath_prepend(str(root/'benchmarks'))
    sys.modules.pop('gpu', None)
    import gpu
    return gpu

def test_tiny(tmp_path):
    res = subprocess.run(['bash',root/'benchmarks/gpu.sh','--tiny'], capture_output=True, text=True, env={**os.environ, 'OUT': str(tmp_path)})
    assert res.returncode==0, res.stderr
    made = json.loads((tmp_path/'speed.json').read_text())
    assert made['failed']==[] and all(r['same'] for r in made['check']), res.stdout
    cases = {(r['model'],r['what'],r['case'][:5],r['compiled']) for r in made['speed']}
    assert cases=={('camae_vits16',w,k,False) for w in ('train','embed') for k in ('cellm','plain')} | {('mae_vits16',w,'cellm',True) for w in ('train','embed')}
    assert '| planner, GB |' in res.stdout and 'passed' in (tmp_path/'tests.txt').read_text()
    check_training(tmp_path)

def check_training(folder):
    "Every part of the second script left its rows"
    made = json.loads((folder/'train.json').read_text())
    assert made['failed']==[]
    points = [r for r in made['recall'] if 'step' in r]
    assert points[0]['step']==0 and len(points)>=3 and points[-1]['flops']>0
    assert {r['encoder'] for r in made['recall'] if 'step' not in r}=={'intensity','spectrum','the truth'}
    assert all(r['ci_low']<=r['recall']<=r['ci_high'] for r in made['recall'])
    assert [r['contrast'] for r in made['contrast']]==[f'{k} -> trained' for k in ('untrained','intensity','spectrum')]
    for r in made['blocks']: assert r['breaks']==0 and r['graphs']<=3 and r['compiled']>0 # one is that of `check_compiler`
    assert {r['what'] for r in made['blocks']}=={'train','embed, autocast','embed, bf16 weights'}
    assert {r['source'] for r in made['fed']}=={'one batch','store','files'} and all(r['images_per_s']>0 for r in made['fed'])
    assert {(r['source'],r['by']) for r in made['alone']}=={(s,b) for s in ('store','files') for b in ('threads','processes')}
    assert all(r['operators'] for r in made['profile']) and {r['what'] for r in made['profile']}>={'train','embed, autocast'}
    assert (folder/'train.png').stat().st_size<1e5 and '## recall' in (folder/'train.md').read_text()

@pytest.fixture
def training(gpu, monkeypatch, tmp_path):
    "The second script, with screens made; autograd's engine starts before it, since one that starts within it has threads, and later tests fork"
    torch.ones(1, requires_grad=True).sum().backward()
    monkeypatch.setenv('WORK', str(tmp_path/'work'))
    for name in ('gpu_feed','gpu_train'): sys.modules.pop(name, None)
    import gpu_train
    gpu_train.screens(True)
    return gpu_train

def test_training_that_is_late_stops_and_is_measured(training):
    training.fit('mae_vitt4', 60, time.time(), True)
    assert [r['step'] for r in training.read('recall') if 'step' in r]==[0,1]

def test_batch_is_halved_until_it_fits(gpu):
    def fits(bs):
        if bs>3: raise torch.OutOfMemoryError('no')
        return 2*bs
    assert gpu.halving(fits, 24)==(3,6)
    with pytest.raises(torch.OutOfMemoryError): gpu.halving(lambda bs: fits(9), 24)

def test_a_failing_and_a_stuck_case_are_results(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, 'LEAST', 0)
    for name,text in dict(fails='raise ValueError("odd")', stuck='import time; time.sleep(60)').items():
        (tmp_path/f'{name}.py').write_text(text)
        monkeypatch.setattr(gpu, '__file__', str(tmp_path/f'{name}.py'))
        gpu.run(['x'], time.time()+(1 if name=='stuck' else 30))
    odd,stuck = [r['why'] for r in gpu.read('failed')]
    assert odd=='1: ValueError: odd' and 'still running' in stuck
