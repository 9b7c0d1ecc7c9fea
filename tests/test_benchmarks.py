"The benchmark scripts run, and the plain readings compute what our models compute"
import os, subprocess, sys
from pathlib import Path

import pytest

root = Path(__file__).resolve().parents[1]

@pytest.mark.parametrize('script,model', [('train_step','mae_vits16'), ('train_step','camae_vits16'), ('embed','mae_vits16'), ('embed','camae_vits16')])
def test_script(script, model, tmp_path):
    args = ['--model', model, '--size', '32', '--depth', '1', '--bs', '2', '--rounds', '1', '--threads', '1', '--out', tmp_path/'r.json']
    if script == 'train_step': args += ['--small-decoder']
    res = subprocess.run([sys.executable, root/'benchmarks'/f'{script}.py', *map(str, args)], capture_output=True, text=True, env={**os.environ, 'PYTHONPATH': str(root)})
    assert res.returncode == 0, res.stderr
    assert 'plain' in res.stdout and (tmp_path/'r.json').exists()
