"Every kind of bad input stops with the file or the well, and the cure"
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from tifffile import imwrite

from cellmae.images import ImageError, check_input, fit_range, read_image, standardise, tile, to_uint8
from cellmae.screen import Screen, open_screen, split

stains = ['DNA', 'ER']

@pytest.fixture
def root(tmp_path):
    "Two plates of four wells, one file per stain"
    g = np.random.default_rng(0)
    for p in 'ab':
        for w in ('B02', 'B03', 'C02', 'C03'):
            for c in stains: write(tmp_path/f'{p}/{w}_{c}.tif', g.integers(300, 4000, (16, 20)).astype(np.uint16))
    return tmp_path

def write(f, x):
    f.parent.mkdir(exist_ok=True)
    imwrite(f, x, photometric='minisblack')

def screen(root):
    meta = pd.DataFrame(dict(well=['B02', 'B03', 'C02', 'C03'], perturbation=['DMSO', 'TP53', 'DMSO', 'DMSO']))
    return Screen.from_pattern(root, '{plate}/{well}_{channel}.tif', channels=stains, meta=meta)

def change(to): return lambda f: write(f, to(read_image(f)[0]))

spoil = {
    'missing': lambda f: f.unlink(),
    'unreadable': lambda f: f.write_bytes(f.read_bytes()[:300]),
    'wrong size': change(lambda x: x[:8]),
    'wrong channel count': change(lambda x: np.stack([x]*3)),
    'wrong type': change(lambda x: (x>>4).astype(np.uint8)),
    'float in 0..1': change(lambda x: np.float32(x)/65535),
    'not finite': change(lambda x: np.where(x==x.max(), np.nan, np.float32(x))),
    'constant': change(np.zeros_like),
    'duplicate': lambda f: shutil.copy(f.with_name('B03_DNA.tif'), f)}

def test_good_screen_has_no_problems(root): assert screen(root).check().empty

@pytest.mark.parametrize('kind', spoil)
def test_check_names_the_file(root, kind):
    s,f = screen(root),root/'b/C02_ER.tif'
    spoil[kind](f)
    found = s.check()
    row = found[found.problem==kind].iloc[0]
    assert (row.plate, row.well, row.site, row.channel, row.file) == ('b', 'C02', '1', 'ER', 'b/C02_ER.tif')
    assert row.cure.endswith('.') and len(row.cure) > 20
    assert len(found) == 1 and s.subset(s.table.well!='C02').check().problem.tolist() == ['two controls']*2

@pytest.mark.parametrize('kind', [k for k in spoil if k not in ('constant', 'duplicate')])
def test_reading_names_the_file_and_the_well(root, kind):
    s,f = screen(root),root/'b/C02_ER.tif'
    spoil[kind](f)
    with pytest.raises(ImageError, match=r'C02_ER\.tif.*plate b, well C02, site 1'): s[6]
    assert s[5].dtype == np.uint8 # the others are not touched

@pytest.mark.parametrize('bad', [np.float32([[0, .5]]), np.float32([[0, np.nan]]), np.float32([[5, np.inf]])])
def test_pixels_that_are_no_intensities(root, bad):
    "Where all channels are float, the pixels are looked at"
    for c in stains: write(root/f'b/C02_{c}.tif', np.resize(bad, (16, 20)))
    with pytest.raises(ImageError, match='bad pixels.*(Export|multiply).*well C02'): screen(root)[6]

def test_a_screen_in_0_to_1_is_refused(root):
    for f in root.rglob('*.tif'): spoil['float in 0..1'](f)
    with pytest.raises(ImageError, match=r'float in 0\.\.1.*65535.*well'): screen(root)[0]

def test_bad_sites_do_not_spoil_the_ranges(root):
    good = screen(root).fit_ranges()
    write(root/'c/B02_DNA.tif', np.full((16, 20), np.nan, np.float32))
    write(root/'c/B02_ER.tif', np.full((16, 20), np.nan, np.float32))
    assert (screen(root).fit_ranges() == good).all()

def test_batch_without_controls(root):
    s = screen(root)
    s.table.loc[s.table.plate=='b', 'control'] = False
    found = s.check()
    assert found.problem.tolist() == ['no controls'] and found.plate[0] == 'b'
    assert 'Batch b' in found.cure[0] and 'controls=' in found.cure[0]

def test_site_listed_twice(root):
    s = screen(root)
    found = s.subset([0, 1, 1]).check()
    assert found[['problem', 'plate', 'well']].iloc[0].tolist() == ['duplicate', 'a', 'B03'] and 'two rows' in found.cure[0]

def test_empty_screen(root, tmp_path):
    s = screen(root).subset([])
    assert s.check().problem.tolist() == ['empty']
    with pytest.raises(ValueError, match='no sites'): Screen(s.table, stains, root).fit_ranges()
    with pytest.raises(ValueError, match='Split by something smaller'): split(s)
    (tmp_path/'none').mkdir()
    with pytest.raises(ValueError, match='none: no images'): Screen.from_pattern(tmp_path/'none', '{well}.tif')
    with pytest.raises(FileNotFoundError, match='none: no images.*Check the path'): open_screen(tmp_path/'none')
    (tmp_path/'s.csv').write_text('plate,well,file_DNA\n')
    with pytest.raises(ValueError, match=r's\.csv: no rows'): open_screen(tmp_path/'s.csv')

def test_one_file_per_site_with_too_few_names(root):
    write(root/'all.tif', np.random.default_rng(1).integers(0, 99, (3, 16, 20)).astype(np.uint16))
    s = Screen(pd.DataFrame(dict(well=['B02'], file=['all.tif'], perturbation=['DMSO'])), stains, root)
    assert s.check()[['problem', 'file']].iloc[-1].tolist() == ['wrong channel count', 'all.tif']
    with pytest.raises(ImageError, match=r'all\.tif: wrong channel count. 3 planes.*well B02'): s.read(0)

@pytest.mark.parametrize('x,match', [
    (torch.rand(1, 2, 8, 8), 'multiply by 255'), (torch.full((1, 2, 8, 8), float('nan')), r'screen\.check'),
    (torch.full((1, 2, 8, 8), float('inf')), r'screen\.check'), (torch.zeros(2, 8, 8), r'x\[None\]')])
def test_models_refuse(x, match):
    for f in (check_input, standardise):
        with pytest.raises(ValueError, match=match): f(x)

def test_small_and_odd_arrays():
    with pytest.raises(ValueError, match='smaller tiles'): tile(np.zeros((1, 8, 8)), 9)
    with pytest.raises(ValueError, match='2 channels, but ranges for 1'): to_uint8(np.zeros((2, 8, 8), np.uint16), [[0, 9]])
    with pytest.raises(ValueError, match='empty'): fit_range([])
