"Crops at cells: somebody's table or masks, training, embedding; and what travels with a model"
import json, warnings
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.core import Callback
from tifffile import imwrite

from cellmae.cells import Cells, as_cells, cell_crop, centres_of, find_cells, site_sizes
from cellmae.data import Sites, check_size, how_read, screen_dls
from cellmae.embed import embed
from cellmae.screen import Screen, split
from cellmae.train import fit_mae
from cellmae.wsl import fit_wsl
from cellmae.zoo import create_model, load_model, save_model

places = [('B03', '1'), ('B03', '2'), ('C02', '1'), ('C02', '2'), ('D05', '1'), ('D05', '2')]
H,W = 48,64
# three cells on each site of well B03, two in C02, none on D05 site 2; y, x, side of a square
spots = {('B03', '1'): [(10,12,5), (30,50,7), (40,9,3)], ('B03', '2'): [(6,58,5), (24,30,5), (41,44,9)],
         ('C02', '1'): [(20,20,5), (33,55,7)], ('C02', '2'): [(8,8,3), (40,60,7)], ('D05', '1'): [(24,40,5)],
         ('D05', '2'): []}

def draw(where, value):
    m = np.zeros((H, W), np.uint16)
    for k,(y,x,s) in enumerate(where): m[y-s//2:y+s//2+1, x-s//2:x+s//2+1] = value(k)
    return m

@pytest.fixture(scope='module')
def root(tmp_path_factory):
    "Images whose cells are brighter than any background, each with a level of its own, and label images"
    root,g = tmp_path_factory.mktemp('cells'),np.random.default_rng(0)
    for d in ('images', 'labels', 'binary'): (root/d).mkdir()
    for n,p in enumerate(places):
        stem = f'{p[0]}_s{p[1]}'
        for c,ch in enumerate(['DNA', 'ER']):
            x = g.integers(100, 200, (H, W)).astype('u2')+draw(spots[p], lambda k: 1000*(n+1)+100*k+c)
            imwrite(root/f'images/{stem}_{ch}.tif', x)
        imwrite(root/f'labels/{stem}_DNA_cp_masks.tif', draw(spots[p], lambda k: 7+3*k))
        imwrite(root/f'binary/{stem}_DNA_mask.tif', (draw(spots[p], lambda k: 255)).astype('u1'))
    return root

@pytest.fixture(scope='module')
def screen(root):
    map = pd.DataFrame(dict(well=['B03', 'C02', 'D05'], perturbation=['DMSO', 'TP53', 'KIF11']))
    return Screen.from_pattern(root, 'images/{well}_s{site}_{channel}.tif', meta=map)

truth = pd.DataFrame([(w, s, y, x, d*d) for (w,s),o in spots.items() for y,x,d in o],
                     columns=['well', 'site', 'y', 'x', 'area'])

@pytest.fixture(scope='module')
def cells(screen): return find_cells(screen, masks='labels')

# Tables

prefixes = ['Nuclei_Location_Center_{}', 'Location_Center_{}', 'Nuclei_AreaShape_Center_{}', 'AreaShape_Center_{}',
            'Cells_Location_Center_{}', 'Metadata_Nuclei_Location_Center_{}', 'Center_{}', 'centroid_{}', 'x_centroid',
            'Centroid {} px', 'X', 'x', 'centroid-0', 'axis-0']

def titles(form):
    "Titles of `y` and `x`"
    if form[-2:]=='-0': return [form, form[:-1]+'1']
    if form=='x_centroid': return ['y_centroid', 'x_centroid']
    if form in ('X', 'x'): return ['Y', 'X'] if form=='X' else ['y', 'x']
    return [form.format('Y'), form.format('X')]

@pytest.mark.parametrize('form', prefixes)
def test_titles_of_positions(screen, cells, form):
    t = truth.rename(columns=dict(zip(['y', 'x'], titles(form))))
    again = find_cells(screen, table=t)
    assert (again.yx==cells.yx).all() and (again.counts==cells.counts).all()

keys = {'CellProfiler': dict(well='Metadata_Well', site='Metadata_Site'),
        'CytoTable': dict(well='Image_Metadata_Well', site='Image_Metadata_Site'),
        'plain': {}, 'position': dict(well='Metadata_well_position', site='Metadata_Site'),
        'field': dict(site='Field')}

@pytest.mark.parametrize('kind', keys)
@pytest.mark.parametrize('file', ['csv', 'csv.gz', 'parquet', 'tsv'])
def test_titles_of_sites_and_formats(screen, cells, tmp_path, kind, file):
    t,f = truth.rename(columns=keys[kind]).assign(other=0., label=np.arange(len(truth))),tmp_path/f'cells.{file}'
    if file=='parquet': t.to_parquet(f)
    else: t.to_csv(f, index=False, sep='\t' if file=='tsv' else ',')
    again = find_cells(screen, table=f)
    assert (again.yx==cells.yx).all() and again.table.area.tolist()==cells.table.area.tolist()
    assert sorted(again.table.label)==list(range(len(truth)))

@pytest.mark.parametrize('spell', [lambda s: f's{s}', lambda s: f'f0{s}', lambda s: f'{s}.0', int])
def test_spellings_of_sites(screen, cells, spell):
    t = truth.assign(site=truth.site.map(spell), well=truth.well.str.replace('0', '')) # B3
    assert (find_cells(screen, table=t.sample(frac=1, random_state=0).sort_values(['y'])).counts==cells.counts).all()

def test_numbers_for_names_and_gaps_in_labels(root, cells):
    wells,sites = zip(*places)
    files = [f'images/{w}_s{s}_DNA.tif' for w,s in places]
    t = pd.DataFrame(dict(plate='12', well=wells, site=sites, file_DNA=files))
    lost = pd.DataFrame(dict(plate=np.nan, well='B03', site=1, x=1, y=1, ObjectNumber=np.nan), index=[0])
    c = find_cells(Screen(t, root=root), table=pd.concat([truth.assign(plate=12., ObjectNumber=5.), lost]))
    assert (c.yx==cells.yx).all() and c.table.label.tolist()==[1, 2, 3]*2+[1, 2]*2+[1]

def test_rows_and_columns(screen, cells):
    rows,cols = truth.well.str[0].map(' ABCD'.index),truth.well.str[1:].astype(int)
    t = truth.assign(row=rows, col=cols).drop(columns='well')
    assert (find_cells(screen, table=t).yx==cells.yx).all()

def test_sites_by_names_of_images(screen, cells):
    name = 'C:\\data\\'+truth.well+'_s'+truth.site+'_ER.tif'
    t = truth.assign(Image_FileName_ER=name).drop(columns=['well', 'site'])
    assert (find_cells(screen, table=t).yx==cells.yx).all()

def test_cells_listed_in_a_row(screen, cells, tmp_path):
    "A row per image, as cell centres of the JUMP pilots were published"
    t = truth.assign(file=truth.well+'_s'+truth.site+'_DNA.tif').groupby('file', sort=False)[['x', 'y']].agg(list)
    t.to_csv(tmp_path/'cells.tsv', sep='\t')
    assert (find_cells(screen, table=tmp_path/'cells.tsv').yx==cells.yx).all()

def test_deepprofiler(screen, cells, tmp_path):
    folder = tmp_path/'inputs/locations'/screen.table.plate[0]
    folder.mkdir(parents=True)
    for (w,s),t in truth.groupby(['well', 'site']):
        t = t[['x', 'y']].set_axis(['Nuclei_Location_Center_X', 'Nuclei_Location_Center_Y'], axis=1)
        t.to_csv(folder/f'{w}-f0{s}-Nuclei.csv', index=False)
    for where in (folder.parent, folder): assert (find_cells(screen, table=where).yx==cells.yx).all()

def test_of_several_pairs_nuclei_win_and_others_can_be_named(screen, cells):
    t = truth.rename(columns=dict(y='Nuclei_AreaShape_Center_Y', x='Nuclei_AreaShape_Center_X'))
    t = t.assign(Cells_AreaShape_Center_Y=truth.y+1., Cells_AreaShape_Center_X=truth.x+1.)
    t = t.rename(columns=dict(well='place'))
    assert (find_cells(screen, table=t, well='place').yx==cells.yx).all()
    named = find_cells(screen, table=t, well='place', y='Cells_AreaShape_Center_Y', x='Cells_AreaShape_Center_X')
    assert (named.yx==cells.yx+1).all()

@pytest.mark.parametrize('size', [.5, .325])
def test_micrometers_need_the_size_of_a_pixel(screen, cells, size):
    t = truth.assign(x_um=truth.x*size, **{'y [\xb5m]': truth.y*size}).drop(columns=['y', 'x'])
    t = t.rename(columns={'y [\xb5m]': 'y_um'})
    with pytest.raises(ValueError, match='micrometers.*pixel_size'): find_cells(screen, table=t)
    np.testing.assert_allclose(find_cells(screen, table=t, pixel_size=size).yx, cells.yx, atol=1e-4)

def bad_tables():
    t = truth
    yield 'number', t.drop(columns=['well', 'site']).assign(ImageNumber=1), "merge.*on='ImageNumber'"
    yield 'no site said', t.drop(columns=['well', 'site']), 'Add a column `well`'
    yield 'site missing', t.drop(columns='site'), 'several sites of the screen. Add a column site'
    yield 'no positions', t.drop(columns='y'), 'No columns of positions'
    yield 'other wells', t.assign(well='H12'), 'None of 11 cells.*well H12.*well B03'
    yield 'other plate', t.assign(plate='BR00117006'), 'None of 11 cells.*plate BR00117006'
    yield 'exchanged', t.rename(columns=dict(x='y', y='x')).query('y>47'), 'exchanged'
    yield 'other unit', t.assign(x=t.x*10, y=t.y*10), 'upper left corner'
    yield 'middle is 0', t.assign(x=t.x-32., y=t.y-24.).query('x<0 or y<0'), 'upper left corner'
    two = t.assign(spots_Center_X=1, spots_Center_Y=1, dots_Center_X=2, dots_Center_Y=2)
    yield 'two objects', two.drop(columns=['x', 'y']), 'Say which'
    yield 'no such file', t.drop(columns='well').assign(FileName_DNA='Z09.tif'), \
        'None of 11.*image Z09.tif.*B03_s1_DNA.tif'
    yield 'two times', pd.concat([t.assign(t=0), t.assign(t=1)]), 'Cells of 2 times'
    yield 'empty', t.iloc[:0], 'no cell'
    yield 'no such option', t, 'No option wel. Did you mean well'
    yield 'no such column', t, "No column 'Nuclei_Y'"
    yield 'three axes', t.rename(columns=dict(y='centroid-0', x='centroid-1')).assign(**{'centroid-2': 3}), 'three'

@pytest.mark.parametrize('name,table,says', [pytest.param(*o, id=o[0]) for o in bad_tables()])
def test_tables_that_are_refused(screen, name, table, says):
    more = {'no such option': dict(wel='x'), 'no such column': dict(y='Nuclei_Y', x='x')}.get(name, {})
    with pytest.raises(ValueError, match=says): find_cells(screen, table=table, **more)

def test_what_is_left_out_is_said(screen, capsys):
    more = pd.DataFrame(dict(well=['B03', 'B03', 'H09'], site='1', y=[50, np.nan, 3], x=[1, 2, 3.], area=1))
    cells = find_cells(screen, table=pd.concat([truth, more]))
    said = capsys.readouterr().out
    assert len(cells)==len(truth) and '11 cells on 5 of 6 sites, 1 to 3 each' in said
    for o in ('1 of 14 rows have no position', '1 of 14 cells are on no site of the screen, such as well H09',
              '1 of 12 cells lie outside', 'y=50, x=1', '48x64', '1 sites have none, such as'): assert o in said, o

# Masks

masks = {'folder': 'labels', 'glob': 'labels/*_DNA_cp_masks.tif', 'pattern': 'labels/{well}_s{site}_{_}_cp_masks.tif'}

@pytest.mark.parametrize('kind', masks)
def test_masks(screen, kind):
    cells = find_cells(screen, masks=masks[kind])
    assert cells.table[['y', 'x', 'area']].to_numpy().tolist()==truth[['y', 'x', 'area']].to_numpy(float).tolist()
    assert cells.table.label.tolist()==[7, 10, 13]*2+[7, 10]*2+[7] and cells.counts.tolist()==[3, 3, 2, 2, 1, 0]

def test_masks_without_numbers_and_in_a_column(screen, cells, root):
    binary = find_cells(screen, masks='binary')
    order = lambda c: c.table.sort_values(['row', 'y'])[['row', 'y', 'x', 'area']].to_numpy().tolist()
    assert order(binary)==order(cells)
    t = screen.table.assign(mask=[f'labels/{w}_s{s}_DNA_cp_masks.tif' for w,s in places])
    assert order(find_cells(Screen(t, screen.channels, root), masks='mask'))==order(cells)

@pytest.mark.parametrize('write', [
    lambda f,m: np.save(f.with_suffix('.npy'), m), lambda f,m: imwrite(f, m.astype('i4')),
    lambda f,m: imwrite(f, m.astype('f4')), lambda f,m: imwrite(f, m, compression='zlib')])
def test_kinds_of_mask_files(screen, cells, tmp_path, write):
    for p in places: write(tmp_path/f'{p[0]}_s{p[1]}_DNA.tif', draw(spots[p], lambda k: 7+3*k))
    assert find_cells(screen, masks=tmp_path).table.equals(cells.table)

def test_labels_inside_of_ome_zarr(tmp_path):
    import zarr
    plate = zarr.open_group(tmp_path/'P.zarr', mode='w', zarr_format=2)
    wells = [dict(path='B/3', rowIndex=1, columnIndex=2), dict(path='C/2', rowIndex=2, columnIndex=1)]
    plate.attrs['plate'] = dict(wells=wells, rows=[dict(name=r) for r in 'ABC'], version='0.4',
                                columns=[dict(name=str(c)) for c in range(1, 5)])
    def scales(*axes):
        axes = [dict(name=a, type='channel' if a=='c' else 'space') for a in axes]
        return [dict(version='0.4', axes=axes, datasets=[dict(path='0')])]
    for k,where in enumerate(['B/3', 'C/2']):
        plate.create_group(where).attrs['well'] = dict(images=[dict(path='0')], version='0.4')
        g,n = plate.create_group(f'{where}/0'),plate.create_group(f'{where}/0/labels/nuclei')
        g.attrs['multiscales'],n.attrs['multiscales'] = scales('c', 'y', 'x'),scales('y', 'x')
        g.attrs['omero'] = dict(channels=[dict(label='DNA')])
        g['0'] = np.random.default_rng(k).integers(0, 999, (1, H, W)).astype('u2')
        n['0'] = draw(spots['B03', '1'][k:], lambda k: k+1)
    cells = find_cells(Screen.open(tmp_path/'P.zarr'), masks='labels/nuclei')
    assert cells.counts.tolist()==[3, 2] and cells.of(1).tolist()==[[30, 50], [40, 9]]

@pytest.mark.parametrize('where', ['{}/masks', 'masks/{}'])
def test_names_that_come_again_on_each_plate(tmp_path, where):
    "As on an Opera Phenix"
    for k,p in enumerate(['BR1', 'BR2']):
        for w,s in places[:3]:
            (tmp_path/p/'Images').mkdir(parents=True, exist_ok=True)
            (tmp_path/where.format(p)).mkdir(parents=True, exist_ok=True)
            imwrite(tmp_path/p/f'Images/{w}_s{s}_DNA.tif', np.ones((H, W), 'u2'))
            imwrite(tmp_path/where.format(p)/f'{w}_s{s}_DNA_masks.tif', draw(spots[w, s][k:], lambda k: k+1))
    screen = Screen.from_pattern(tmp_path, '{plate}/Images/{well}_s{site}_{channel}.tif')
    masks = '*/masks/*' if where[0]=='{' else 'masks'
    cells = find_cells(screen, masks=masks)
    assert cells.counts.tolist()==[3, 3, 2, 2, 2, 1]
    with pytest.raises(ValueError, match='could be the mask of 2 images'):
        imwrite(tmp_path/'B03_s1_DNA_masks.tif', np.eye(H, W).astype('u1'))
        find_cells(screen, masks='B03_s1_DNA_masks*')

def bad_masks():
    m = draw(spots['B03', '1'], lambda k: k+1)
    yield 'scale', m[::2, ::2], r'mask of \(24, 32\) for an image of \(48, 64\).*well B03'
    yield 'no background', m*0+1, 'no background'
    yield 'an image', np.stack([m, m, m//2]), 'B03_s1_DNA_mask'
    yield 'not whole', m/3, 'is no mask'

@pytest.mark.parametrize('name,mask,says', [pytest.param(*o, id=o[0]) for o in bad_masks()])
def test_masks_that_are_refused(screen, tmp_path, name, mask, says):
    imwrite(tmp_path/'B03_s1_DNA_mask.tif', mask.astype('f4') if name=='not whole' else mask.astype('u2'))
    with pytest.raises(ValueError, match=says): find_cells(screen, masks=tmp_path)

def test_two_masks_for_a_site_and_none(screen, root, tmp_path):
    (tmp_path/'none').mkdir()
    m = draw(spots['B03', '1'], lambda k: k+1)
    for kind in ('nuclei', 'cells'): imwrite(tmp_path/f'B03_s1_DNA_{kind}.tif', m)
    with pytest.raises(ValueError, match='B03_s1_DNA_cells.tif and B03_s1_DNA_nuclei.tif'):
        find_cells(screen, masks=tmp_path)
    assert len(find_cells(screen, masks=f'{tmp_path}/*_nuclei.tif'))==3
    with pytest.raises(ValueError, match='no images there'): find_cells(screen, masks=tmp_path/'none')
    with pytest.raises(ValueError, match='neither a column'): find_cells(screen, masks='nowhere')
    with pytest.raises(ValueError, match='no images there'): find_cells(screen, masks='images') # its own images

def test_touching_cells_without_numbers_are_said(screen, tmp_path, capsys):
    imwrite(tmp_path/'B03_s1_DNA_mask.tif', np.pad(np.full((30, 40), 255, 'u1'), ((9, 9), (12, 12))))
    find_cells(screen, masks=tmp_path)
    assert 'One cell covers 39% of its image' in capsys.readouterr().out

# Crops

def test_a_crop_shows_its_cell_wherever_it_is(screen, cells):
    for i in range(len(screen)):
        for y,x in cells.of(i):
            c = cell_crop(screen.read(i), (y, x), 16)
            assert c.shape==(2, 16, 16) and (c==screen.read(i)[:, int(y), int(x)][:, None, None]).any((1, 2)).all()

def test_cells_stay_with_their_sites(screen, cells, tmp_path):
    part = screen.subset([4, 2, 0])
    for c in (cells.on(part), as_cells(part, cells), as_cells(part, cells.save(tmp_path)), as_cells(part, tmp_path)):
        for k,i in enumerate([4, 2, 0]): assert (c.of(k)==cells.of(i)).all()

def test_plates_of_two_batches_with_one_name(root):
    "RxRx1 calls its plates 1 to 4 in each experiment"
    def at(**k): return pd.DataFrame(dict(k, plate='1', well='B03', site='1'))
    t = at(batch=['U2OS', 'HUVEC'], file_DNA=['images/B03_s1_DNA.tif', 'images/C02_s1_DNA.tif'])
    s = Screen(t, root=root)
    c = find_cells(s, table=at(batch=['HUVEC', 'U2OS', 'U2OS'], y=[1, 2, 3], x=1))
    assert c.counts.tolist()==[2, 1]
    twice = Screen(pd.concat([t, t]), root=root)
    with pytest.raises(ValueError, match='Leave one out'):
        find_cells(twice, table=at(batch=['HUVEC'], y=1, x=1))
    with pytest.raises(ValueError, match='Add a column batch'): find_cells(s, table=at(y=[1], x=1))

# Training

kw = dict(epochs=2, bs=2, crop=16, n_pictures=0, save_every=0, device='cpu', bf16=False, valid=.4, crops=2)

def tiny():
    torch.manual_seed(0)
    return create_model('mae_vitt8', in_chans=2, img_size=16, depth=1, embed_dim=48)

def fit(screen, out, **more):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return fit_mae(screen, tiny(), out, **{**kw, **more})
def weights(learn): return [p.detach().clone() for p in learn.model.state_dict().values()]
def same(a, b): return all(torch.equal(x, y) for x,y in zip(a, b, strict=True))

def test_every_training_crop_holds_a_cell(screen, cells):
    with pytest.warns(UserWarning, match='1 of 6 sites have no cells'):
        dls = screen_dls(screen, 16, bs=4, crops=2, valid=0, cells=cells, device='cpu')
    assert sorted(dls.train.ids)==[0, 1, 2, 3, 4]
    lo,hi = screen.fit_ranges()[0]
    for epoch in range(4):
        dls.train.epoch = epoch
        for x,ids in dls.train:
            for c,i in zip(x, ids):
                level = np.clip((1000*(int(i)+1)-lo)*255/(hi-lo), 0, 255)
                assert c[0].max()>=int(level)-1, (epoch, int(i))

def test_the_stream_is_a_function_of_its_number(screen, cells):
    make = lambda **k: screen_dls(screen, 16, bs=2, valid=0, cells=cells, device='cpu', **k).train
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        a,b,other,more = make(),make(num_workers=1),make(seed=1),make(crops=2)
    a_,b_ = list(a),list(b)
    assert all(torch.equal(x, y) for (x,_),(y,_) in zip(a_, b_, strict=True))
    assert not all(torch.equal(x, y) for (x,_),(y,_) in zip(a_, other))
    a.start = 2
    assert all(torch.equal(x, y) for (x,_),(y,_) in zip(a_[2:], a, strict=True))
    a.start,a.epoch = 0,1
    assert not all(torch.equal(x, y) for (x,_),(y,_) in zip(a_, a))
    for x,ids in more: # two different cells where there are two
        for k in range(0, len(ids), 2):
            if ids[k]!=4: assert not torch.equal(x[k], x[k+1])

def test_without_cells_nothing_changed(screen):
    "The same crops as before there were cells"
    from cellmae.data import CropLoader, random_crop
    dl = CropLoader(Sites(screen), range(6), size=16, bs=3, crops=2)
    for k,(x,ids) in enumerate(dl):
        rng = np.random.default_rng([0, 0, k])
        want = [random_crop(screen[int(i)], 16, rng) for i in ids]
        assert (x.numpy()==np.stack(want)).all()

class Stop(Callback):
    order,run_valid = 99,False
    def __init__(self, at): self.at = at
    def after_batch(self):
        if self.train_iter==self.at: raise KeyboardInterrupt

@pytest.fixture(scope='module')
def whole(screen, cells, tmp_path_factory):
    return weights(fit(screen, tmp_path_factory.mktemp('whole')/'run', cells=cells))

@pytest.mark.parametrize('at', [1, 4])
def test_exact_resume_at_cells(screen, cells, tmp_path, whole, at):
    with pytest.raises(KeyboardInterrupt): fit(screen, tmp_path/'run', cells=cells, cbs=Stop(at))
    assert same(weights(fit(screen, tmp_path/'run', cells=cells)), whole)

def test_other_cells_are_another_run(screen, cells, tmp_path):
    fit(screen, tmp_path/'run', cells=cells)
    moved = Cells(screen, cells.table.assign(x=cells.table.x+1))
    for other in (dict(cells=moved), {}):
        with pytest.raises(ValueError, match='other cells'): fit(screen, tmp_path/'run', **other)

def test_a_classifier_learns_from_cells(screen, cells, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        learn = fit_wsl(screen, 'densenet_t', tmp_path/'run', epochs=1, bs=6, crop=32, crops=2,
                        valid=0, apart=None, device='cpu', bf16=False, cells=cells)
    assert learn.model.provenance['cells'] and sorted(learn.dls.train.ids)==[0, 1, 2, 3, 4]

def test_cells_beside_loaders_are_refused(screen, cells, tmp_path):
    dls = screen_dls(screen, 16, bs=2, valid=0, device='cpu')
    for given in (cells, truth):
        with pytest.raises(ValueError, match='cells is settled by the loaders'):
            fit_mae(dls, tiny(), tmp_path/'run', cells=given)

def test_cells_of_several_screens(screen, cells):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        dls = screen_dls([screen, screen.subset([1, 2])], 16, bs=4, valid=0, cells=[cells, cells], device='cpu')
    assert sorted(dls.train.ids)==[0, 1, 2, 3, 4, 6, 7]
    assert (dls.train.sites.centres(7)==cells.of(2)).all()
    with pytest.raises(ValueError, match='2 screens, and cells for 1'): screen_dls([screen]*2, 16, cells=cells)

def test_a_split_never_divides_a_well_at_several_times(tmp_path):
    d = tmp_path/'P1'
    d.mkdir()
    for w in ('B03', 'C02', 'D05', 'D06', 'E01'):
        for t in (1, 2, 3): imwrite(d/f'{w}_s1_t{t}_DNA.tif', (100*t+np.arange(2000).reshape(40, 50)).astype('u2'))
    s = Screen.from_pattern(d, '{well}_s{site}_t{t}_{channel}.tif', t='all')
    well = s.table.well.astype(str).to_numpy()
    for seed in range(8):
        dls = screen_dls(s, 16, bs=4, valid=.4, seed=seed, device='cpu')
        a,b = set(well[dls.train.ids]),set(well[dls.valid.ids])
        assert len(dls.train.ids)+len(dls.valid.ids)==15 and not a & b and len(b)==2
    at = dict(well=['B03', 'B3', 'C02'], site='1', Metadata_Timepoint=[1, 3, 2], x=5, y=6)
    cells = find_cells(s, table=pd.DataFrame(at))
    assert cells.table.row.tolist()==[0, 2, 4]
    at = embed(mean_of_tiles, s, level='cell', size=16, cells=cells, progress=False)
    assert at.obs.t.astype(int).tolist()==[1, 3, 2] and at.uns['cellmae']['t']=='all'
    assert embed(mean_of_tiles, s, level='site', progress=False).n_obs==15

# Embedding

def mean_of_tiles(x): return x.float().mean((2, 3))

def test_a_row_for_each_cell(screen, cells):
    out = embed(mean_of_tiles, screen, level='cell', cells=cells, size=16, progress=False)
    want = [cell_crop(screen[i], c, 16).mean((1, 2)) for i in range(6) for c in cells.of(i)]
    np.testing.assert_allclose(out.X, want, rtol=1e-5)
    assert out.obs[['y', 'x', 'area']].to_numpy().tolist()==truth[['y', 'x', 'area']].to_numpy(float).tolist()
    assert out.obs.well.tolist()==truth.well.tolist() and out.obs.site.tolist()==truth.site.tolist()
    assert out.obs.perturbation.iloc[truth.well.tolist().index('C02')]=='TP53' and out.obs_names.is_unique
    assert out.uns['cellmae']['cut_at']=='cells' and out.X.dtype==np.float32

@pytest.mark.parametrize('level', ['site', 'well'])
def test_cells_are_averaged_as_tiles_are(screen, cells, level):
    each = embed(mean_of_tiles, screen, level='cell', cells=cells, size=16, progress=False)
    up = embed(mean_of_tiles, screen, level=level, cells=cells, size=16, progress=False)
    t = pd.DataFrame(each.X).assign(well=each.obs.well.to_numpy(), site=each.obs.site.to_numpy())
    mean = t.groupby(['well', 'site']).mean()
    if level=='well': mean = mean.groupby('well').mean()
    np.testing.assert_allclose(up.X, mean.to_numpy(), rtol=1e-4)
    assert up.obs.n_cells.tolist()==([3, 3, 2, 2, 1] if level=='site' else [6, 4, 1]) and 'n_tiles' not in up.obs

def test_embedded_in_parts_and_adapted(screen, cells, tmp_path):
    part = screen.subset([3, 0])
    out = embed(mean_of_tiles, part, level='cell', cells=cells, size=16, progress=False)
    whole = embed(mean_of_tiles, screen, level='cell', cells=cells.save(tmp_path), size=16, bs=2, progress=False)
    np.testing.assert_allclose(out.X, np.concatenate([whole.X[8:10], whole.X[:3]]), rtol=1e-5)
    out.write_h5ad(tmp_path/'cells.h5ad')

def test_no_more_crops_at_once_than_a_batch(screen):
    g = np.random.default_rng(0)
    rows,y,x = np.sort(g.integers(0, 6, 300)),g.random(300)*H,g.random(300)*W
    many = pd.DataFrame(dict(row=rows, label=1, y=y, x=x, area=1))
    sizes = []
    def encode(x):
        sizes.append(len(x))
        return mean_of_tiles(x)
    cells = Cells(screen, many)
    out = embed(encode, screen, level='cell', cells=cells, size=16, bs=7, progress=False)
    assert max(sizes)<=7 and sum(sizes)==300==out.n_obs
    want = embed(mean_of_tiles, screen, level='cell', cells=cells, size=16, progress=False)
    np.testing.assert_allclose(out.X, want.X)

# What travels

def opened(screen, **how):
    "The same screen as if it had been opened with these choices"
    np.save(screen.root/'flat.npy', np.ones((H, W)))
    flat = {f'illum_{c}': 'flat.npy' for c in screen.channels}
    s = Screen(screen.table.assign(**flat), screen.channels, screen.root)
    for k,v in how.items(): setattr(s, k, v)
    return s

def warned(f):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter('always')
        f()
    return [str(o.message) for o in told if 'trained on images' in str(o.message)]

def test_choices_go_into_checkpoint_bundle_card_and_embedding(screen, tmp_path):
    s = opened(screen, z='max', t=0, pixel_size=.65)
    fit(s, tmp_path/'run')
    about = json.loads((tmp_path/'run/model/config.json').read_text())
    assert about['channels']==['DNA', 'ER'] and about['provenance']['panels']==['DNA, ER']
    for k,v in dict(z='max', t=0, pixel_size=.65).items(): assert about['provenance'][k]==v
    assert '| z | max |' in (tmp_path/'run/model/README.md').read_text()
    made = embed(load_model(tmp_path/'run/model'), s, size=16, progress=False).uns['cellmae']
    assert (made['z'], made['t'], made['pixel_size'], made['channels'])==('max', 0, .65, ['DNA', 'ER'])
    with pytest.raises(ValueError, match="z='max' there and 3 now"):
        fit(opened(screen, z=3, t=0, pixel_size=.65), tmp_path/'run')

@pytest.fixture(scope='module')
def projected(screen, tmp_path_factory):
    return fit(opened(screen, z='max', pixel_size=.65), tmp_path_factory.mktemp('projected')/'run', epochs=1)

@pytest.mark.parametrize('now,says', [
    (dict(z=2), ["z='max'", 'z=2']), (dict(z='max', illum=True), ['illum=False', 'illum=True']),
    (dict(z='max', pixel_size=.325), ['pixel_size=0.65', 'pixel_size=0.325']),
    (dict(z='max'), []), (dict(z='max', pixel_size=.66), []), (dict(t=0), []), ({}, [])])
def test_a_model_warns_of_images_read_otherwise(screen, projected, now, says):
    for model in (projected.model, projected.path/'model'):
        told = warned(lambda: embed(model, opened(screen, **now), size=16, progress=False))
        assert len(told)==bool(says) and all(o in told[0] for o in says), told

def test_bundles_that_say_nothing_load_as_before(screen, tmp_path):
    m = tiny()
    m.channels = ['DNA', 'ER']
    save_model(m, tmp_path/'old', epochs=3)
    for now in ({}, dict(z=3, illum=True)):
        assert not warned(lambda: embed(tmp_path/'old', opened(screen, **now), size=16, progress=False))
    assert 'z' not in load_model(tmp_path/'old').provenance

def test_channels_are_matched_by_name_or_refused(screen, tmp_path):
    m = tiny()
    m.channels = ['DNA', 'ER']
    save_model(m, tmp_path/'run/model')
    turned = Screen(screen.table, ['ER', 'DNA'], screen.root, ranges=screen.fit_ranges()[::-1])
    a,b = (embed(tmp_path/'run/model', s, size=16, progress=False) for s in (screen, turned))
    np.testing.assert_allclose(a.X, b.X, atol=1e-5)
    with pytest.raises(ValueError, match='no ER'):
        embed(tmp_path/'run/model', Screen(screen.table, ['DNA'], screen.root), size=16)

# Sizes

def test_small_sites_are_named_and_counted_before_training(screen, tmp_path):
    for i in range(12):
        shape = (30, 20) if i in (3, 7) else (48, 48)
        imwrite(tmp_path/f'{i}.tif', np.arange(np.prod(shape)).reshape(shape).astype('u2'))
    wells,files = [f'A{i+1:02d}' for i in range(12)],[f'{i}.tif' for i in range(12)]
    s = Screen(pd.DataFrame(dict(plate='P', well=wells, file=files)), ['DNA'], tmp_path)
    with pytest.raises(ValueError, match='well A04, site 1, which is 30x20 and 1 more of 12 sites'): screen_dls(s, 32)
    assert site_sizes(s)[3].tolist()==[30, 20]

def test_sizes_stop_in_time_and_go_through_the_plates(screen, monkeypatch):
    import time
    plates,sites = np.repeat(['P1', 'P2', 'P3'], 400),np.tile(range(400), 3).astype(str)
    t = pd.DataFrame(dict(plate=plates, well='A01', site=sites, file_DNA='x.tif'))
    s = Screen(t)
    monkeypatch.setattr('cellmae.cells.size_of', lambda f: time.sleep(.01) or (48, 64))
    begun = time.monotonic()
    seen = ~np.isnan(site_sizes(s, seconds=.3)[:, 0])
    assert time.monotonic()-begun<2 and 0<seen.sum()<1200
    assert pd.Series(seen).groupby(t.plate).sum().min()>0
