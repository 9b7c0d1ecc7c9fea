"Plates as people have them open by their path alone, every plane in its well"
import numpy as np, pytest

from cellmae.screen import Screen
from layouts import LAYOUTS, came_out


@pytest.mark.parametrize('name', LAYOUTS)
def test_layout(name, tmp_path, capsys):
    write,at,options = LAYOUTS[name]
    want = write(tmp_path/name)
    got = came_out(Screen.open(tmp_path/name/at, **options))
    assert got.keys() == want.keys()
    for k,x in want.items():
        if got[k] is None: continue # a file of this site is absent
        assert got[k].keys() == x.keys(), k
        assert all(np.array_equal(got[k][c], x[c]) for c in x), k
    assert 'The same: Screen.' in capsys.readouterr().out
