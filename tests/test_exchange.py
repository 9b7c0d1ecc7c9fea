"Formats of exchange, written by the libraries of each format, on plates neither square nor symmetric"
import json, shutil, zipfile
import numpy as np, pandas as pd, pytest, tifffile
from cellmae.exchange import *
from cellmae.layouts import LAYOUTS
from cellmae.patterns import Listing
from cellmae.screen import Screen

zarr = pytest.importorskip('zarr')
WELLS = ('B/3','C/2')

def scan(root, key, **options):
    "What the scanner `key`, and only it, finds"
    listing = Listing(root)
    found = {k:f for k,o in LAYOUTS.items() if (f := o.finds(listing))}
    assert set(found)=={key}, found
    return LAYOUTS[key].scan(listing, found[key], **options)

def same_pixels(screen, well, site, channels, x):
    "Are the planes of a site, in the order of `channels`, those of `x`, bit for bit?"
    t = screen.table
    i, = np.flatnonzero((t['well']==well) & (t['site']==site))
    got = screen.read(i)
    np.testing.assert_array_equal(got[[screen.channels.index(c) for c in channels]], x)

def pixels(seed, *shape): return np.random.default_rng(seed).integers(0, 4000, shape, np.uint16)

def put_attrs(path, version, **ome):
    "Metadata of a group, as its version has them"
    g = zarr.open_group(path, mode='a', zarr_format=2 if version=='0.4' else 3)
    g.attrs.update(ome if version=='0.4' else dict(ome={'version':version, **ome}))

def put_image(path, x, version='0.5', axes='cyx', level='0', names=None, **kw):
    "An image; `kw` go to `create_array`"
    ome = dict(multiscales=[dict(axes=[dict(name=k, type='space') for k in axes],
                                 datasets=[dict(path=level)])])
    if names: ome['omero'] = dict(channels=[dict(label=n) for n in names])
    put_attrs(path, version, **ome)
    kw = {'chunks':(1,)*(x.ndim-2)+x.shape[-2:], **kw}
    zarr.open_group(path, mode='a').create_array(level, data=x, **kw)

def put_plate(path, fields, version='0.5', wells=WELLS, shape=(3,4,6), acquired=None, **kw):
    "A plate of random images, `{well/field: pixels}`; `acquired(field)` is its acquisition"
    out = {f'{w}/{f}': pixels(len(w)+7*i+j, *shape) for i,w in enumerate(wells)
           for j,f in enumerate(fields)}
    put_attrs(path, version, plate=dict(wells=[dict(path=w, rowIndex=i, columnIndex=i)
                                               for i,w in enumerate(wells)]))
    for w in wells:
        images = [dict(path=f, **(dict(acquisition=acquired(f)) if acquired else {})) for f in fields]
        put_attrs(f'{path}/{w}', version, well=dict(images=images))
    for o,x in out.items(): put_image(f'{path}/{o}', x, version, **{k: v(o) if callable(v) else v
                                                                    for k,v in kw.items()})
    return out

def pack(folder, to):
    with zipfile.ZipFile(to, 'w') as z:
        for f in sorted(o for o in folder.rglob('*') if o.is_file()): z.write(f, f.relative_to(folder))
    shutil.rmtree(folder)

@pytest.mark.parametrize('version', ['0.4','0.5'])
@pytest.mark.parametrize('wells', [WELLS, ('B/03','C/02')])
def test_zarr_plate(tmp_path, version, wells):
    put_plate(tmp_path/'P1.zarr', ['0','Field_1'], version, wells, names=['DAPI','GFP','Cy5'])
    df = scan(tmp_path, 'ome_zarr').table
    row = df[(df['row']=='B') & (df['site']=='Field_1') & (df['channel']=='GFP')]
    assert len(df)==12 and set(df['plate'])=={'P1'} and set(zip(df['row'], df['col'].astype(int)))=={('B',3),('C',2)}
    assert list(row['file'])==[f'P1.zarr/{wells[0]}/Field_1#c=1']

def test_zarr_opened_itself(tmp_path):
    put_plate(tmp_path/'P1.zarr', ['0'])
    df = scan(tmp_path/'P1.zarr', 'ome_zarr').table
    assert list(df['file'])[0]=='P1.zarr/B/3/0#c=0' and list(df['channel'])[:3]==['0','1','2']

def test_zarr_under_another_name(tmp_path):
    put_plate(tmp_path/'x'/'plate one v1.2', ['0'])
    assert list(scan(tmp_path, 'ome_zarr').table['file'])[0]=='x/plate one v1.2/B/3/0#c=0'

@pytest.mark.parametrize('axes,shape', [('yx',(4,6)),('zyx',(5,4,6)),('cyx',(3,4,6)),('czyx',(3,2,4,6)),
                                        ('tczyx',(2,3,2,4,6)),('tcyx',(2,3,4,6))])
def test_zarr_axes(tmp_path, axes, shape):
    put_plate(tmp_path/'P.zarr', ['0'], axes=axes, shape=shape, level='full')
    files = list(scan(tmp_path, 'ome_zarr').table['file'])
    n = shape[axes.index('c')] if 'c' in axes else 0
    assert files[:n or 1]==([f'P.zarr/B/3/0#c={i}' for i in range(n)] or ['P.zarr/B/3/0'])

def test_zarr_names_differ_between_images(tmp_path):
    names = lambda o: ['DAPI','GFP','Cy5'] if o.startswith('B') else ['Cy5','DAPI','GFP']
    put_plate(tmp_path/'P.zarr', ['0'], names=names)
    df = scan(tmp_path, 'ome_zarr').table.set_index(['row','channel'])['file']
    assert df['B','DAPI']=='P.zarr/B/3/0#c=0' and df['C','DAPI']=='P.zarr/C/2/0#c=1'

def test_zarr_one_name_twice(tmp_path):
    put_plate(tmp_path/'P.zarr', ['0'], names=['DAPI','GFP','GFP'])
    assert list(scan(tmp_path, 'ome_zarr').table['channel'])[:3]==['DAPI','GFP 1','GFP 2']

def test_zarr_names_that_do_not_fit_are_numbers(tmp_path):
    put_plate(tmp_path/'P.zarr', ['0'], names=['DAPI','GFP'])
    assert list(scan(tmp_path, 'ome_zarr').table['channel'])[:3]==['0','1','2']

def test_zarr_half_copied(tmp_path):
    put_plate(tmp_path/'P.zarr', ['0','1'], wells=('B/3','C/2','D/7'))
    shutil.rmtree(tmp_path/'P.zarr/C/2')
    shutil.rmtree(tmp_path/'P.zarr/D/7/1')
    s = scan(tmp_path, 'ome_zarr')
    assert set(s.table['file'].str.split('#').str[0])=={'P.zarr/B/3/0','P.zarr/B/3/1','P.zarr/D/7/0'}
    assert len(s.said)==1 and '2 that are not there' in s.said[0] and 'C/2' in s.said[0]

def test_zarr_damaged_says_where(tmp_path):
    put_plate(tmp_path/'P.zarr', ['0'])
    (tmp_path/'P.zarr/C/2/zarr.json').write_text('{"attributes": {')
    with pytest.raises(ValueError, match='C/2/zarr.json: damaged'): scan(tmp_path, 'ome_zarr')

def test_zarr_repeats_are_sites(tmp_path):
    put_plate(tmp_path/'P.zarr', ['0','1','2','3'], acquired=lambda f: int(f)//2, names=['a','b','c'])
    s = scan(tmp_path, 'ome_zarr')
    assert set(s.table['site'])=={'0_0','0_1','1_2','1_3'} and 'acquisitions 0, 1' in s.said[0]
    one = scan(tmp_path, 'ome_zarr', acquisition=1)
    assert set(one.table['site'])=={'2','3'} and not one.said

def test_zarr_cycles_of_one_field_are_channels(tmp_path):
    put_plate(tmp_path/'P.zarr', ['0','1'], acquired=int,
              names=lambda o: ['DAPI','A','B'] if o.endswith('0') else ['DAPI','C','D'])
    df = scan(tmp_path, 'ome_zarr').table
    b = df[df['row']=='B'].set_index('channel')['file']
    assert set(b.index)=={'DAPI 0','A','B','DAPI 1','C','D'} and df['site'].nunique()==1
    assert b['DAPI 1']=='P.zarr/B/3/1#c=0' and b['D']=='P.zarr/B/3/1#c=2'

def test_zarr_cycles_of_several_fields_are_asked(tmp_path):
    put_plate(tmp_path/'P.zarr', ['0','1','2','3'], acquired=lambda f: int(f)//2,
              names=lambda o: ['a','b','c'] if o[-1] in '01' else ['d','e','f'])
    with pytest.raises(ValueError, match='Choose: `acquisition='): scan(tmp_path, 'ome_zarr')
    assert len(scan(tmp_path, 'ome_zarr', acquisition=1).table)==12

def test_zarr_plates_of_one_name_in_two_folders(tmp_path):
    for b in ('one','two'): put_plate(tmp_path/b/'P.zarr', ['0'])
    put_plate(tmp_path/'two'/'Q.zarr', ['0'])
    df = scan(tmp_path, 'ome_zarr').table
    assert set(zip(df['batch'], df['plate']))=={('one','P'),('two','P'),('two','Q')}

@pytest.mark.parametrize('name,inside', [('P.ozx',''),('P.zarr.zip',''),('P.zarr.zip','P.zarr')])
def test_zarr_packed(tmp_path, name, inside):
    put_plate(tmp_path/'made'/inside, ['0'], names=['a','b','c'])
    pack(tmp_path/'made', tmp_path/name)
    df = scan(tmp_path, 'ome_zarr').table
    lead = f'{name}#'+(inside and inside+'/')
    assert list(df['file'])[1]==f'{lead}B/3/0,c=1' and set(df['plate'])=={'P'} and len(df)==6

def test_zarr_single_image_has_no_well(tmp_path):
    put_image(tmp_path/'cells.ome.zarr', pixels(0, 2, 4, 6), names=['a','b'])
    df = scan(tmp_path/'cells.ome.zarr', 'ome_zarr').table
    assert list(df['file'])==['cells.ome.zarr#c=0','cells.ome.zarr#c=1'] and set(df['site'])=={'cells'}
    assert 'well' not in df

def test_zarr_images_with_wells_in_their_names(tmp_path):
    for o in ('B03_s1','B03_s2','C02_s1'): put_image(tmp_path/f'{o}.zarr', pixels(0, 2, 4, 6))
    df = scan(tmp_path, 'ome_zarr').table
    assert set(zip(df['well'], df['site']))=={('B3','B03_s1'),('B3','B03_s2'),('C2','C02_s1')}

def test_zarr_of_something_else_is_no_candidate(tmp_path):
    zarr.open_group(tmp_path/'cells.zarr', mode='w').attrs['encoding-type'] = 'anndata'
    put_attrs(tmp_path/'held.zarr', '0.4', something=1)
    put_plate(tmp_path/'held.zarr'/'P1', ['0'], '0.4')
    assert set(scan(tmp_path, 'ome_zarr').table['plate'])=={'P1'}

@pytest.mark.parametrize('version', ['0.4','0.5'])
def test_zarr_pixels(tmp_path, version):
    images = put_plate(tmp_path/'P1.zarr', ['0','Field_1'], version, names=['DAPI','GFP','Cy5'])
    s = Screen.open(tmp_path)
    for o,x in images.items():
        row,col,site = o.split('/')
        same_pixels(s, f'{row}0{col}', site, ['DNA','GFP','Cy5'], x)

@pytest.mark.parametrize('kw', [dict(shards=(3,4,6), chunks=(1,4,6)), dict(level='full'), dict(chunks=(3,2,2))])
def test_zarr_pixels_however_stored(tmp_path, kw):
    images = put_plate(tmp_path/'P1.zarr', ['0'], **kw)
    s = Screen.open(tmp_path/'P1.zarr')
    same_pixels(s, 'B03', '0', ['0','1','2'], images['B/3/0'])
    same_pixels(s, 'C02', '0', ['2','1','0'], images['C/2/0'][::-1])

def test_zarr_pixels_of_a_stack(tmp_path):
    images = put_plate(tmp_path/'P1.zarr', ['0'], axes='tczyx', shape=(2,3,4,5,6))
    s = Screen.open(tmp_path, z='max', t=1)
    same_pixels(s, 'C02', '0', ['0','1','2'], images['C/2/0'][1].max(1))

@pytest.mark.parametrize('name', ['P.ozx','P.zarr.zip'])
def test_zarr_pixels_packed(tmp_path, name):
    images = put_plate(tmp_path/'made', ['0'])
    pack(tmp_path/'made', tmp_path/name)
    for where in (tmp_path, tmp_path/name):
        same_pixels(Screen.open(where), 'C02', '0', ['0','1','2'], images['C/2/0'])

# OME-TIFF

def put_ome(path, images, wells=None, names=('DAPI','GFP'), plate='P1', axes='CYX', labels=None):
    "Images in one OME-TIFF; `wells`: `{(row,col) from 0: numbers of images}`; `labels`: their names"
    with tifffile.TiffWriter(path, ome=True) as w:
        for i,x in enumerate(images):
            meta = dict(axes=axes, Channel=dict(Name=list(names))) if names else dict(axes=axes)
            if labels: meta['Name'] = labels[i]
            w.write(x, metadata=meta, photometric='minisblack')
    if not wells: return
    samples = lambda o: ''.join(f'<WellSample ID="WellSample:{i}" Index="{i}"><ImageRef ID="Image:{i}"/>'
                                '</WellSample>' for i in o)
    said = ''.join(f'<Well ID="Well:{r}:{c}" Row="{r}" Column="{c}">{samples(o)}</Well>'
                   for (r,c),o in wells.items())
    xml = tifffile.tiffcomment(path)
    i = xml.index('<Image ')
    tifffile.tiffcomment(path, f'{xml[:i]}<Plate ID="Plate:0" Name="{plate}">{said}</Plate>{xml[i:]}')

def test_ome_plate_in_one_file(tmp_path):
    x = pixels(0, 3, 2, 4, 6)
    put_ome(tmp_path/'all.ome.tif', x, {(1,2):[2,0], (2,1):[1]})
    s = Screen.open(tmp_path/'all.ome.tif')
    assert list(s.table['plate'])==['P1']*3
    for well,site,i in (('B03','1',2), ('B03','2',0), ('C02','1',1)):
        same_pixels(s, well, site, ['DNA','GFP'], x[i])

def test_ome_plate_with_stacks(tmp_path):
    x = pixels(0, 2, 2, 3, 4, 6)
    put_ome(tmp_path/'all.ome.tif', x, {(1,2):[0], (2,1):[1]}, axes='CZYX')
    with pytest.raises(ValueError, match='z=0'): Screen.open(tmp_path)
    same_pixels(Screen.open(tmp_path, z=2), 'C02', '1', ['DNA','GFP'], x[1][:,2])
    same_pixels(Screen.open(tmp_path, z='max'), 'B03', '1', ['DNA','GFP'], x[0].max(1))

def test_ome_plate_without_suffix_and_without_names(tmp_path):
    x = pixels(0, 2, 2, 4, 6)
    put_ome(tmp_path/'all.tif', x, {(1,2):[0], (2,1):[1]}, names=None, plate='')
    df = scan(tmp_path, 'ome_tiff').table
    assert set(df['plate'])=={'all'} and list(df['channel'])==['0','1','0','1']

def test_ome_images_on_no_well_are_left_out(tmp_path):
    put_ome(tmp_path/'all.ome.tif', pixels(0, 3, 2, 4, 6), {(1,2):[0], (2,1):[2]})
    assert set(scan(tmp_path, 'ome_tiff').table['file'])=={f'all.ome.tif#page={i}' for i in (0,1,4,5)}

def test_ome_positions_are_sites(tmp_path):
    x = pixels(0, 3, 2, 4, 6)
    put_ome(tmp_path/'positions.ome.tif', x)
    df = scan(tmp_path, 'ome_tiff').table
    assert 'well' not in df and list(df['site'].unique())==['0','1','2']
    s = Screen.open(tmp_path, well='A01')
    same_pixels(s, 'A01', '2', ['DNA','GFP'], x[2])

def test_ome_wells_from_names_of_images(tmp_path):
    x = pixels(0, 3, 2, 4, 6)
    put_ome(tmp_path/'positions.ome.tif', x, labels=['B3-Site_0','B3-Site_1','C2-Site_0'])
    s = Screen.open(tmp_path)
    same_pixels(s, 'B03', '1', ['DNA','GFP'], x[1])
    same_pixels(s, 'C02', '2', ['DNA','GFP'], x[2])

def test_ome_a_file_per_well(tmp_path):
    x = pixels(0, 2, 3, 2, 4, 6)
    put_ome(tmp_path/'exp_B03.ome.tif', x[0])
    put_ome(tmp_path/'exp_C02.ome.tif', x[1])
    s = Screen.open(tmp_path)
    same_pixels(s, 'B03', '2', ['DNA','GFP'], x[0,2])
    same_pixels(s, 'C02', '0', ['DNA','GFP'], x[1,0])

def test_ome_plates_of_one_name_in_two_files(tmp_path):
    for o in ('one','two'): put_ome(tmp_path/f'{o}.ome.tif', pixels(0, 2, 2, 4, 6), {(1,2):[0], (2,1):[1]})
    df = scan(tmp_path, 'ome_tiff').table
    assert set(df['plate'])=={'one','two'} and len(df)==8

SET = """<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" UUID="{own}">{plate}{images}</OME>"""
IMAGE = """<Image ID="Image:{i}" Name="{label}"><Pixels ID="Pixels:{i}" DimensionOrder="XYZCT" SizeX="6"
SizeY="4" SizeZ="{z}" SizeC="2" SizeT="1" Type="uint16"><Channel ID="Channel:{i}:0" Name="DAPI"/>
<Channel ID="Channel:{i}:1" Name="GFP"/>{data}</Pixels></Image>"""
DATA = '<TiffData FirstC="{c}" FirstZ="{z}" IFD="{z}" PlaneCount="1"><UUID FileName="{file}">{uuid}</UUID></TiffData>'

def ome_set(files, z=2, own='', labels=('',)):
    "OME-XML of images whose channels lie in files of their own, `{(image,c): (name,uuid)}`"
    data = lambda i: ''.join(DATA.format(c=c, z=k, file=f, uuid=u) for (j,c),(f,u) in files.items()
                             if j==i for k in range(z))
    return SET.format(own=own, plate='', images=''.join(
        IMAGE.format(i=i, label=n, z=z, data=data(i)) for i,n in enumerate(labels)))

def put_pages(path, x, xml): tifffile.imwrite(path, x, description=xml, metadata=None, photometric='minisblack')

@pytest.mark.parametrize('renamed', [False, True])
def test_ome_set_of_files(tmp_path, renamed):
    x = pixels(0, 2, 2, 4, 6) # c, z
    files = {(0,c): (f'old_w{c}.ome.tif', f'urn:uuid:{c}') for c in range(2)}
    for c in range(2):
        put_pages(tmp_path/(f'{1-c}_new.ome.tif' if renamed else f'old_w{c}.ome.tif'), x[c],
                  ome_set(files, own=f'urn:uuid:{c}'))
    s = Screen.open(tmp_path, well='B03', z=1)
    same_pixels(s, 'B03', '0', ['DNA','GFP'], x[:,1])

BINARY = ('<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"><BinaryOnly '
          'MetadataFile="x.companion.ome" UUID="{}"/></OME>')

@pytest.mark.parametrize('how', ['named','uuid','ends'])
def test_ome_companion(tmp_path, how):
    x = pixels(0, 2, 2, 2, 4, 6) # image, c, z
    old = lambda i,c: f'0729_B3_s{i}_w{c}.ome.tif'
    new = old if how=='named' else lambda i,c: f'1003_B3_s{i}_w{c}.ome.tif' if how=='ends' else f'{3-2*i-c}.ome.tif'
    files = {(i,c): (old(i,c), f'urn:uuid:{i}{c}' if how!='ends' else 'urn:uuid:?') for i in range(2) for c in range(2)}
    (tmp_path/'x.companion.ome').write_text(ome_set(files, labels=('B3','C2')))
    for (i,c),(_,uuid) in files.items(): put_pages(tmp_path/new(i,c), x[i,c], BINARY.format(uuid))
    s = Screen.open(tmp_path, z=1)
    same_pixels(s, 'B03', '0', ['DNA','GFP'], x[0,:,1])
    same_pixels(s, 'C02', '1', ['DNA','GFP'], x[1,:,1])
    assert len(scan(tmp_path, 'ome_tiff').said)==(how!='named')

def test_ome_companion_in_doubt_is_refused(tmp_path):
    (tmp_path/'x.companion.ome').write_text(ome_set({(0,0):('a.ome.tif',''), (0,1):('b.ome.tif','')}))
    for o in ('c','d'): put_pages(tmp_path/f'{o}.ome.tif', pixels(0, 2, 4, 6), BINARY.format(''))
    with pytest.raises(ValueError, match='names 2 files that are not there'): scan(tmp_path, 'ome_tiff')

def test_ome_companion_with_a_file_missing(tmp_path):
    files = {(0,c): (f'w{c}.ome.tif', '') for c in range(2)}
    (tmp_path/'x.companion.ome').write_text(ome_set(files))
    put_pages(tmp_path/'w1.ome.tif', pixels(0, 2, 4, 6), BINARY.format(''))
    s = scan(tmp_path, 'ome_tiff')
    assert set(s.table['channel'])=={'GFP'} and 'w0.ome.tif' in s.said[0]

def test_ome_parts_without_their_companion(tmp_path):
    for o in ('a','b'): put_pages(tmp_path/f'{o}.ome.tif', pixels(0, 2, 4, 6), BINARY.format(''))
    with pytest.raises(ValueError, match='Copy the companion'): scan(tmp_path, 'ome_tiff')

def test_ome_file_per_site_is_a_matter_of_names(tmp_path):
    for o in ('B03_s1','C02_s1'): put_ome(tmp_path/f'{o}.ome.tif', pixels(0, 1, 2, 4, 6))
    assert not LAYOUTS['ome_tiff'].finds(Listing(tmp_path))
