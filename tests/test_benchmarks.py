"The benchmark scripts run, and the plain readings compute what our models compute"
import os, subprocess, sys
from pathlib import Path

import pytest

root = Path(__file__).resolve().parents[1]

@pytest.mark.parametrize('script,args', [('train_step','--model mae_vits16 --bf16'), ('train_step','--model camae_vits16 --small-decoder'), ('train_step','--part loss --size 256'),
                                         ('train_step','--part lion'), ('embed','--model mae_vits16'), ('embed','--model camae_vits16 --bf16')])
def test_script(script, args, tmp_path):
    args = [*'--size 32 --depth 1 --bs 2 --rounds 1 --threads 1'.split(), *args.split(), '--out', str(tmp_path/'r.json')]
    res = subprocess.run([sys.executable, root/'benchmarks'/f'{script}.py', *args], capture_output=True, text=True, env={**os.environ, 'PYTHONPATH': str(root)})
    assert res.returncode == 0, res.stderr
    assert '| 1.0 |' in res.stdout and (tmp_path/'r.json').exists()
