"Formats of exchange, written by the library of each, on plates neither square nor symmetric"
import imagecodecs, shutil, zipfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import product
from threading import Thread
import numpy as np, pandas as pd, pytest, tifffile
from cellmae.ome import *
from cellmae.tables import *
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
        more = (lambda f: dict(acquisition=acquired(f))) if acquired else lambda f: {}
        images = [dict(path=f, **more(f)) for f in fields]
        put_attrs(f'{path}/{w}', version, well=dict(images=images))
    for o,x in out.items(): put_image(f'{path}/{o}', x, version, **{k: v(o) if callable(v) else v
                                                                    for k,v in kw.items()})
    return out

def pack(folder, to):
    with zipfile.ZipFile(to, 'w') as z:
        for f in sorted(o for o in folder.rglob('*') if o.is_file()):
            z.write(f, f.relative_to(folder))
    shutil.rmtree(folder)

@pytest.mark.parametrize('version', ['0.4','0.5'])
@pytest.mark.parametrize('wells', [WELLS, ('B/03','C/02')])
def test_zarr_plate(tmp_path, version, wells):
    put_plate(tmp_path/'P1.zarr', ['0','Field_1'], version, wells, names=['DAPI','GFP','Cy5'])
    df = scan(tmp_path, 'ome_zarr').table
    row = df[(df['row']=='B') & (df['site']=='Field_1') & (df['channel']=='GFP')]
    assert len(df)==12 and set(df['plate'])=={'P1'}
    assert set(zip(df['row'], df['col'].astype(int)))=={('B',3),('C',2)}
    assert list(row['file'])==[f'P1.zarr/{wells[0]}/Field_1#c=1']

@pytest.mark.parametrize('wells', [('3/B','2/C'), ('2/3','3/2')])
def test_zarr_rows_are_letters_or_numbers(tmp_path, wells):
    images = put_plate(tmp_path/'P.zarr', ['0'], wells=wells)
    same_pixels(Screen.open(tmp_path), 'C02', '0', ['0','1','2'], images[f'{wells[1]}/0'])

def test_zarr_rows_that_begin_at_0_are_refused(tmp_path):
    put_plate(tmp_path/'P.zarr', ['0'], wells=('0/2','1/1'))
    with pytest.raises(ValueError, match='count from 1'): scan(tmp_path, 'ome_zarr')

def test_zarr_well_and_field_of_a_plate(tmp_path):
    images = put_plate(tmp_path/'P.zarr', ['0','1'])
    for o in ('B/3','B/3/1'):
        s = Screen.open(tmp_path/'P.zarr'/o)
        assert set(s.table['plate'])=={'P'} and set(s.table['well'])=={'B03'}
        same_pixels(s, 'B03', '1', ['0','1','2'], images['B/3/1'])

def test_zarr_opened_itself(tmp_path):
    put_plate(tmp_path/'P1.zarr', ['0'])
    df = scan(tmp_path/'P1.zarr', 'ome_zarr').table
    assert list(df['file'])[0]=='P1.zarr/B/3/0#c=0' and list(df['channel'])[:3]==['0','1','2']

def test_zarr_under_another_name(tmp_path):
    put_plate(tmp_path/'x'/'plate one v1.2', ['0'])
    assert list(scan(tmp_path, 'ome_zarr').table['file'])[0]=='x/plate one v1.2/B/3/0#c=0'

@pytest.mark.parametrize('axes,shape', [
    ('yx',(4,6)), ('zyx',(5,4,6)), ('cyx',(3,4,6)), ('czyx',(3,2,4,6)), ('tczyx',(2,3,2,4,6)),
    ('tcyx',(2,3,4,6))])
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
    images = set(s.table['file'].str.split('#').str[0])
    assert images=={'P.zarr/B/3/0','P.zarr/B/3/1','P.zarr/D/7/0'}
    assert len(s.said)==1 and '2 that are not there' in s.said[0] and 'C/2' in s.said[0]

def test_zarr_damaged_says_where(tmp_path):
    put_plate(tmp_path/'P.zarr', ['0'])
    (tmp_path/'P.zarr/C/2/zarr.json').write_text('{"attributes": {')
    with pytest.raises(ValueError, match='C/2/zarr.json: damaged'): scan(tmp_path, 'ome_zarr')

def test_zarr_repeats_are_sites(tmp_path):
    put_plate(tmp_path/'P.zarr', list('0123'), acquired=lambda f: int(f)//2, names=['a','b','c'])
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
    with pytest.raises(ValueError, match='Choose one: `acquisition='): Screen.open(tmp_path)
    assert Screen.open(tmp_path, acquisition=1).channels==['d','e','f']

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
    assert list(df['file'])==['cells.ome.zarr#c=0','cells.ome.zarr#c=1']
    assert set(df['site'])=={'cells'} and 'well' not in df

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

@pytest.mark.parametrize('kw', [
    dict(shards=(3,4,6), chunks=(1,4,6)), dict(level='full'), dict(chunks=(3,2,2))])
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
    "Images, by names `labels`, in one OME-TIFF; `wells`: `{(row,col) from 0: their numbers}`"
    with tifffile.TiffWriter(path, ome=True) as w:
        for i,x in enumerate(images):
            meta = dict(axes=axes, Channel=dict(Name=list(names))) if names else dict(axes=axes)
            if labels: meta['Name'] = labels[i]
            w.write(x, metadata=meta, photometric='minisblack')
    if not wells: return
    xml = tifffile.tiffcomment(path)
    i = xml.index('<Image ')
    tifffile.tiffcomment(path, xml[:i]+plate_xml(plate, wells)+xml[i:])

def plate_xml(name, wells):
    "Element `Plate`, `{(row,col): numbers of images}`"
    sample = '<WellSample ID="S:{0}" Index="{0}"><ImageRef ID="Image:{0}"/></WellSample>'.format
    well = '<Well ID="Well:{0}:{1}" Row="{0}" Column="{1}">{2}</Well>'.format
    said = ''.join(well(r, c, ''.join(map(sample, o))) for (r,c),o in wells.items())
    return f'<Plate ID="Plate:0" Name="{name}">{said}</Plate>'

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
    files = set(scan(tmp_path, 'ome_tiff').table['file'])
    assert files=={f'all.ome.tif#page={i}' for i in (0,1,4,5)}

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
    for o in ('one','two'):
        put_ome(tmp_path/f'{o}.ome.tif', pixels(0, 2, 2, 4, 6), {(1,2):[0], (2,1):[1]})
    df = scan(tmp_path, 'ome_tiff').table
    assert set(df['plate'])=={'one','two'} and len(df)==8

OME = 'xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"'
SET = f'<OME {OME} UUID="{{own}}">{{plate}}{{images}}</OME>'
IMAGE = """<Image ID="Image:{i}" Name="{label}"><Pixels ID="Pixels:{i}" DimensionOrder="XYZCT"
SizeX="6" SizeY="4" SizeZ="{z}" SizeC="2" SizeT="1" Type="uint16">
<Channel ID="Channel:{i}:0" Name="DAPI"/><Channel ID="Channel:{i}:1" Name="GFP"/>
{data}</Pixels></Image>"""
DATA = """<TiffData FirstC="{c}" FirstZ="{z}" IFD="{z}" PlaneCount="1"><UUID
FileName="{file}">{uuid}</UUID></TiffData>"""

def ome_set(files, z=2, own='', labels=('',)):
    "OME-XML of images whose channels lie in files of their own, `{(image,c): (name,uuid)}`"
    data = lambda i: ''.join(DATA.format(c=c, z=k, file=f, uuid=u) for (j,c),(f,u) in files.items()
                             if j==i for k in range(z))
    return SET.format(own=own, plate='', images=''.join(
        IMAGE.format(i=i, label=n, z=z, data=data(i)) for i,n in enumerate(labels)))

def put_pages(path, x, xml):
    tifffile.imwrite(path, x, description=xml, metadata=None, photometric='minisblack')

@pytest.mark.parametrize('renamed', [False, True])
def test_ome_set_of_files(tmp_path, renamed):
    x = pixels(0, 2, 2, 4, 6) # c, z
    files = {(0,c): (f'old_w{c}.ome.tif', f'urn:uuid:{c}') for c in range(2)}
    for c in range(2):
        put_pages(tmp_path/(f'{1-c}_new.ome.tif' if renamed else f'old_w{c}.ome.tif'), x[c],
                  ome_set(files, own=f'urn:uuid:{c}'))
    s = Screen.open(tmp_path, well='B03', z=1)
    same_pixels(s, 'B03', '0', ['DNA','GFP'], x[:,1])

BINARY = f'<OME {OME}><BinaryOnly MetadataFile="x.companion.ome" UUID="{{}}"/></OME>'

@pytest.mark.parametrize('how', ['named','uuid','ends'])
def test_ome_companion(tmp_path, how):
    x = pixels(0, 2, 2, 2, 4, 6) # image, c, z
    old = lambda i,c: f'0729_B3_s{i}_w{c}.ome.tif'
    new = dict(named=old, uuid=lambda i,c: f'{3-2*i-c}.ome.tif',
               ends=lambda i,c: f'1003_B3_s{i}_w{c}.ome.tif')[how]
    uuid = lambda i,c: 'urn:uuid:?' if how=='ends' else f'urn:uuid:{i}{c}'
    files = {(i,c): (old(i,c), uuid(i,c)) for i in range(2) for c in range(2)}
    (tmp_path/'x.companion.ome').write_text(ome_set(files, labels=('B3','C2')))
    for (i,c),(_,uuid) in files.items(): put_pages(tmp_path/new(i,c), x[i,c], BINARY.format(uuid))
    s = Screen.open(tmp_path, z=1)
    same_pixels(s, 'B03', '0', ['DNA','GFP'], x[0,:,1])
    same_pixels(s, 'C02', '1', ['DNA','GFP'], x[1,:,1])
    assert any('called before' in o for o in scan(tmp_path, 'ome_tiff').said)==(how!='named')

def test_ome_companion_in_doubt_is_refused(tmp_path):
    files = {(0,0):('a.ome.tif',''), (0,1):('b.ome.tif','')}
    (tmp_path/'x.companion.ome').write_text(ome_set(files))
    for o in ('c','d'): put_pages(tmp_path/f'{o}.ome.tif', pixels(0, 2, 4, 6), BINARY.format(''))
    with pytest.raises(ValueError, match='names 2 files that are not there'):
        scan(tmp_path, 'ome_tiff')

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

# bioformats2raw

def put_raw(path, wells, version='0.4', series=None, omero=True):
    "Images beside each other, and a plate in OME-XML: `{(row,col): numbers}`"
    x = pixels(0, 3, 2, 4, 6)
    put_attrs(path, version, **{'bioformats2raw.layout':3})
    put_attrs(path/'OME', version, **(dict(series=series) if series else {}))
    for i,way in enumerate(series or '012'):
        put_image(path/way, x[i], version, names=['DAPI','GFP'] if omero else None)
    images = ''.join(IMAGE.format(i=i, label='', z=1, data='<MetadataOnly/>') for i in range(3))
    plate = plate_xml('P1', wells) if wells else ''
    (path/'OME'/'METADATA.ome.xml').write_text(SET.format(own='', plate=plate, images=images))
    return x

@pytest.mark.parametrize('version', ['0.4','0.5'])
@pytest.mark.parametrize('series', [None, ['0','2','1']])
@pytest.mark.parametrize('omero', [True, False])
def test_bioformats2raw_is_a_plate(tmp_path, version, series, omero):
    x = put_raw(tmp_path/'raw.zarr', {(1,2):[2,0], (2,1):[1]}, version, series, omero)
    assert set(scan(tmp_path, 'bioformats2raw').table['plate'])=={'P1'}
    s = Screen.open(tmp_path/'raw.zarr')
    for well,site,i in (('B03','1',2), ('B03','2',0), ('C02','1',1)):
        same_pixels(s, well, site, ['DNA','GFP'], x[i])

def test_bioformats2raw_without_plate_and_without_xml(tmp_path):
    put_raw(tmp_path/'raw.zarr', {})
    df = scan(tmp_path, 'bioformats2raw').table
    assert 'well' not in df and list(df['site'].unique())==['0','1','2']
    (tmp_path/'raw.zarr/OME/METADATA.ome.xml').unlink()
    with pytest.raises(ValueError, match='METADATA.ome.xml is not there'):
        scan(tmp_path, 'bioformats2raw')

# LoadData

def put_tiffs(root, names, seed=0):
    out = {}
    for i,o in enumerate(names):
        (root/o).parent.mkdir(parents=True, exist_ok=True)
        tifffile.imwrite(root/o, out.setdefault(o, pixels(seed+i, 4, 6)))
    return out

PLACES = ((2,3),(3,2)) # B03 and C02
TIFFS = [f'r0{r}c0{k}-ch{i}.tiff' for r,k in PLACES for i in (1,2)]

def load_table(way='', key='well', **more):
    "A LoadData table of two sites"
    at = dict(well=dict(Metadata_Well=['B03','C02'], Metadata_Site='1'),
              row=dict(Metadata_Row=['2','3'], Metadata_Col=['3','2'], Metadata_FieldID='1'))[key]
    names = {f'FileName_Orig{c}': TIFFS[i::2] for i,c in enumerate(('DNA','ER'))}
    paths = {f'PathName_Orig{c}': way for c in ('DNA','ER')} if way else {}
    return pd.DataFrame({**names, **at, **paths, **more})

def to_csv(df, path, **kw): pd.DataFrame(df).to_csv(path, index=False, **kw)

WRITE = {'csv':to_csv, 'csv.gz':to_csv, 'parquet':lambda df,f: df.to_parquet(f)}

@pytest.mark.parametrize('suffix', list(WRITE))
@pytest.mark.parametrize('key', ['well','row'])
def test_load_data(tmp_path, suffix, key):
    x = put_tiffs(tmp_path, [f'images/{o}' for o in TIFFS])
    WRITE[suffix](load_table('/home/ubuntu/projects/images', key), tmp_path/f'load_data.{suffix}')
    s = Screen.open(tmp_path)
    same_pixels(s, 'B03', '1', ['DNA','ER'], [x['images/'+o] for o in TIFFS[:2]])
    same_pixels(s, 'C02', '1', ['DNA','ER'], [x['images/'+o] for o in TIFFS[2:]])

def test_load_data_beside_its_images(tmp_path):
    x = put_tiffs(tmp_path/'deep'/'P1', TIFFS)
    load_table().to_csv(tmp_path/'deep'/'P1'/'load_data.csv', index=False)
    same_pixels(Screen.open(tmp_path), 'C02', '1', ['DNA','ER'], [x[o] for o in TIFFS[2:]])

def test_gallery(tmp_path):
    "Two batches whose plates share a name, foreign paths, longer folders, illumination functions"
    x = {}
    for b in ('b1','b2'):
        home = tmp_path/f'workspace/load_data_csv/{b}/P1'
        home.mkdir(parents=True)
        df = load_table(f's3://cellpainting-gallery/cpg/source/images/{b}/images/P1__long/Images')
        df.to_csv(home/'load_data.csv', index=False)
        df.assign(Metadata_Plate='P1').to_parquet(home/'load_data.parquet')
        x[b] = put_tiffs(tmp_path/f'images/{b}/images/P1__long/Images', TIFFS, ord(b[1]))
        (tmp_path/f'images/{b}/illum/P1').mkdir(parents=True)
        np.save(tmp_path/f'images/{b}/illum/P1/P1_IllumDNA.npy', np.ones((4,6)))
    found = scan(tmp_path, 'load_data')
    plates = set(zip(found.table['batch'], found.table['plate']))
    assert len(found.table)==4 and plates=={('b1','P1'),('b2','P1')}
    assert len(found.left)==2 and '2 tables' in found.said[0]

def test_gallery_illum_of_each_batch(tmp_path):
    for b in ('b1','b2'):
        home = tmp_path/f'workspace/load_data_csv/{b}/P1'
        home.mkdir(parents=True)
        load_table(f'/x/images/{b}/images/P1/Images').to_csv(home/'load_data.csv', index=False)
        (tmp_path/f'images/{b}/illum/P1').mkdir(parents=True)
        np.save(tmp_path/f'images/{b}/illum/P1/P1_IllumDNA.npy', np.ones((4,6)))
    df = scan(tmp_path, 'load_data').table
    for b,f in zip(df['batch'], df['illum_DNA']): assert f==f'images/{b}/illum/P1/P1_IllumDNA.npy'

def test_load_data_with_illum_is_preferred(tmp_path):
    df = load_table('/x')
    df.to_csv(tmp_path/'load_data.csv', index=False)
    df.assign(FileName_IllumDNA='P_IllumDNA.npy', PathName_IllumDNA='/x/illum').to_csv(
        tmp_path/'load_data_with_illum.csv.gz', index=False)
    s = scan(tmp_path, 'load_data')
    assert list(s.table['illum_DNA'])==['/x/illum/P_IllumDNA.npy']*2 and s.left==['load_data.csv']

def test_load_data_urls_and_plates_below_one_root(tmp_path):
    for p in ('P1','P2'):
        df = load_table(Metadata_Plate=p).rename(columns=lambda c: c.replace('FileName_', 'URL_'))
        for c in ('URL_OrigDNA','URL_OrigER'): df[c] = 's3://bucket/'+p+'/'+df[c]
        df.to_csv(tmp_path/f'{p}.csv', index=False)
    df = scan(tmp_path, 'load_data').table
    assert len(df)==4 and list(df['file_ER'])[-1]=='s3://bucket/P2/r03c02-ch2.tiff'

def test_tables_that_list_no_images_are_no_candidates(tmp_path):
    put_tiffs(tmp_path, TIFFS)
    pd.DataFrame(dict(well=['B03'], treatment=['x'])).to_csv(tmp_path/'map.csv', index=False)
    to_csv(dict(Metadata_Well=['B03'], FileName_IllumDNA=['a.npy']), tmp_path/'illum.csv')
    (tmp_path/'notes.txt').write_text('')
    (tmp_path/'half.parquet').write_bytes(b'PAR1....')
    listing = Listing(tmp_path)
    keys = ('load_data','rxrx','rxrx3_core','channel_rows','arrays')
    assert not [k for k in keys if LAYOUTS[k].finds(listing)]

# RxRx

def put_rxrx(root, wells=('B03','C02','AF48'), plates=(1,2), experiments=('HEPG2-01','HUVEC-01'),
             sites=(1,2), channels=range(1,7)):
    "A folder of RxRx: `{(experiment,plate,well,site,channel): pixels}`, and a row per site"
    x,rows = {},[]
    for e,p,w,s in product(experiments, plates, wells, sites):
        folder = root/f'images/{e}/Plate{p}'
        folder.mkdir(parents=True, exist_ok=True)
        rows.append(dict(site_id=f'{e}_{p}_{w}_{s}', experiment=e, plate=p, well=w, site=s))
        for c in channels:
            x[e,p,w,s,c] = pixels(len(x), 4, 6).astype(np.uint8)
            raw = imagecodecs.png_encode(x[e,p,w,s,c])
            (folder/f'{w}_s{s}_w{c}.png').write_bytes(raw)
    return x,pd.DataFrame(rows)

def test_rxrx1(tmp_path):
    "Plates repeat in each experiment: 12 wells stay 12"
    x,meta = put_rxrx(tmp_path)
    control = meta['well']=='AF48'
    meta['sirna'] = np.where(control, 'EMPTY', 's'+meta['well'])
    kinds = dict(AF48='negative_control', B03='positive_control', C02='treatment')
    meta['well_type'] = meta['well'].map(kinds)
    meta.to_csv(tmp_path/'metadata.csv', index=False)
    s = Screen.open(tmp_path)
    assert len(s.wells)==12 and s.channels==['DNA','ER','actin','RNA','mito','golgi'] and len(s)==24
    t = s.table
    assert set(t['well'][t['control']])=={'AF48'} and set(t['batch'])=={'HEPG2-01','HUVEC-01'}
    i, = np.flatnonzero(t['site_id']=='HUVEC-01_2_C02_2')
    np.testing.assert_array_equal(s.read(i), [x['HUVEC-01',2,'C02',2,c] for c in range(1,7)])
    assert t['perturbation'][i]=='sC02' and list(t.loc[i,['plate','well','site']])==['2','C02','2']

def test_rxrx2_and_19(tmp_path):
    x,meta = put_rxrx(tmp_path, channels=range(1,6), experiments=('VERO-1',), sites=(1,2,3,4))
    meta['disease_condition'] = np.where(meta['well']=='C02', 'Mock', 'Active SARS-CoV-2')
    meta['treatment'] = np.where(meta['well']=='B03', 'Remdesivir (GS-5734)', '')
    meta['treatment_conc'] = np.where(meta['well']=='B03', '0.3', '')
    meta.to_csv(tmp_path/'rxrx19a-metadata.csv', index=False)
    s = scan(tmp_path, 'rxrx')
    t = s.table.set_index('well')
    assert set(t['perturbation'])=={'Remdesivir (GS-5734)','Mock','Active SARS-CoV-2'}
    assert 'file_5' in t and 'give their names' in s.said[0]
    assert t.loc['B03','treatment_conc'].iloc[0]=='0.3'

def test_rxrx3_folder(tmp_path):
    x,meta = put_rxrx(tmp_path, experiments=('gene-001','compound-004'), sites=(1,))
    names = dict(experiment='experiment_name', well='address')
    meta = meta.drop(columns=['site','site_id']).rename(columns=names)
    crispr = meta['experiment_name']=='gene-001'
    meta['gene'] = np.where(crispr, np.where(meta['address']=='B03', 'EMPTY_control', 'RPLP2'), '')
    meta['treatment'] = np.where(crispr, meta['gene']+'_guide_1', 'Narlaprevir')
    meta.to_csv(tmp_path/'metadata.csv', index=False)
    s = Screen.open(tmp_path)
    assert set(s.table['perturbation'])=={'EMPTY_control','RPLP2','Narlaprevir'}
    assert len(s.wells)==12
    assert set(s.table.loc[s.table['control'],'well'])=={'B03'}

def test_rxrx_with_images_of_some_experiments(tmp_path):
    _,meta = put_rxrx(tmp_path)
    meta.assign(sirna='s1').to_csv(tmp_path/'metadata.csv', index=False)
    shutil.rmtree(tmp_path/'images'/'HEPG2-01')
    assert set(scan(tmp_path, 'rxrx').table['batch'])=={'HUVEC-01'}

CORE = (('gene-001','B03'), ('gene-001','C02'), ('gene-002','B03'))

def put_core(root, files):
    "Files of a row per channel, 4 rows in a group: sites are split over groups and files"
    pa,parquet = pytest.importorskip('pyarrow'),pytest.importorskip('pyarrow.parquet')
    x,rows = {},[]
    for (e,w),c in product(CORE, range(1,7)):
        x[e,w,c] = pixels(len(x), 16, 24).astype(np.uint8)
        raw = imagecodecs.jpeg2k_encode(x[e,w,c], level=0, reversible=True)
        key = f'{e}/Plate1/{w}_s1_{c}'
        rows.append(dict(__key__=key, jp2=dict(bytes=raw, path=key+'.jp2')))
    (root/'data').mkdir()
    cut = np.linspace(0, len(rows), files+1).astype(int)
    for i,(a,b) in enumerate(zip(cut, cut[1:])):
        f = root/f'data/train-0000{i}-of-0000{files}.parquet'
        parquet.write_table(pa.Table.from_pylist(rows[a:b]), f, row_group_size=4)
    return x

def test_rxrx3_core(tmp_path):
    x = put_core(tmp_path, 2)
    meta = pd.DataFrame(CORE, columns=['experiment_name','address']).assign(
        plate=1, gene=['X','EMPTY_control','Y'], treatment=['X_1','EMPTY_control','Y_2'])
    to_csv(meta, tmp_path/'metadata_rxrx3_core.csv')
    s = Screen.open(tmp_path)
    assert list(s.table['perturbation'])==['X','EMPTY_control','Y'] and len(s.wells)==3
    assert list(s.table['control'])==[False,True,False]
    for i,o in enumerate(CORE):
        np.testing.assert_array_equal(s.read(i), [x[*o,c] for c in range(1,7)])

def test_rxrx3_core_half_downloaded(tmp_path):
    put_core(tmp_path, 2)
    (tmp_path/'data/train-00001-of-00002.parquet').unlink()
    s = scan(tmp_path, 'rxrx3_core')
    assert list(s.table['well'])==['B03'] and '1 sites lack channels' in s.said[0]
    assert 'No metadata_' in s.said[1]

# A row per channel

@pytest.mark.parametrize('yes', ['negative','True'])
def test_chammi_75(tmp_path, yes):
    "A zip per plate; two channels of one type; a table in no order"
    x,rows = {},[]
    for k,well in enumerate(('B03','C02')):
        with zipfile.ZipFile(tmp_path/f'plate{k}.zip', 'w') as z:
            for c,kind in ((1,'nucleus'),(2,'cell body'),(3,'cell body')):
                x[well,c] = pixels(len(x), 4, 6)
                z.writestr(f'{well}_{c}.png', imagecodecs.png_encode(x[well,c]))
                rows.append({
                    'experiment.study':'idr0017', 'experiment.plate':'P1', 'experiment.well':well,
                    'experiment.reagent':'x' if k else 'taxol', 'microscopy.fov':'1',
                    'experiment.control':yes if k else 'no', 'geometry.z_slice':'unknown',
                    'imaging.multi_channel_id':f'idr0017_{k}', 'geometry.timepoint':'unknown',
                    'imaging.channel':c, 'imaging.channel_type':kind,
                    'storage.zip':f'plate{k}', 'storage.filename':f'{well}_{c}.png'})
    to_csv(pd.DataFrame(rows).sample(frac=1, random_state=0), tmp_path/'metadata.csv')
    s = Screen.open(tmp_path)
    assert list(s.table['control'])==[False,True] and set(s.table['batch'])=={'idr0017'}
    for w,site in (('B03','idr0017_0'),('C02','idr0017_1')):
        same_pixels(s, w, site, ['DNA','cell body 2','cell body 3'], [x[w,c] for c in (1,2,3)])

@pytest.mark.parametrize('where', ['', 'tables/'])
def test_a_home_made_table(tmp_path, where):
    names = [f'img/{i:03}.tif' for i in range(8)]
    x = put_tiffs(tmp_path/where, names)
    rows = [dict(image_path=f, Well=w, fov=v, channel=c, treatment='a' if w=='B3' else 'b')
            for f,(w,v,c) in zip(names, product(('B3','C2'), '12', ('DNA','ER')))]
    pd.DataFrame(rows).iloc[::-1].to_csv(tmp_path/where/'images.csv', index=False)
    s = Screen.open(tmp_path, perturbation='treatment')
    same_pixels(s, 'C02', '1', ['DNA','ER'], [x[o] for o in names[4:6]])
    assert set(s.table['perturbation'])=={'a','b'}

def test_a_home_made_table_with_files_missing(tmp_path):
    put_tiffs(tmp_path, ['a.tif'])
    rows = pd.DataFrame(dict(file=['a.tif','b.tif'], channel=['DNA','ER'], well='B03'))
    to_csv(rows, tmp_path/'t.csv')
    s = scan(tmp_path, 'channel_rows')
    assert list(s.table['file'])==['a.tif'] and 'b.tif' in s.said[0]
    (tmp_path/'a.tif').unlink()
    with pytest.raises(ValueError, match='none of its 2 files is here'):
        scan(tmp_path, 'channel_rows')

# Arrays with a table

@pytest.mark.parametrize('suffix', ['npz','h5'])
@pytest.mark.parametrize('order', ['CYX','YXC'])
@pytest.mark.parametrize('indexed', [True, False])
def test_arrays(tmp_path, suffix, order, indexed):
    import h5py
    x = pixels(0, 5, 2, 14, 16)
    held = dict(images=x if order=='CYX' else x.transpose(0,2,3,1), masks=pixels(1, 5, 14, 16))
    if suffix=='npz': np.savez(tmp_path/'crops.npz', **held, channels=np.array(['DNA','ER']))
    else:
        with h5py.File(tmp_path/'crops.h5', 'w') as f:
            for k,v in held.items(): f[k] = v
            f['channels'] = ['DNA','ER']
    df = pd.DataFrame(dict(well=['B03','B03','C02','C02','C02'], gene=list('aabbb'), site='1'))
    if indexed: df = df.assign(index=[4,3,2,1,0], file=f'crops.{suffix}').iloc[1:]
    df.to_csv(tmp_path/'metadata.csv', index=False)
    s = Screen.open(tmp_path, perturbation='gene')
    i = 2 if indexed else 4
    same_pixels(s, 'C02', str(i), ['DNA','ER'], x[i])
    assert len(s)==(4 if indexed else 5)

def test_arrays_that_do_not_fit_their_table_are_no_candidate(tmp_path):
    np.savez(tmp_path/'crops.npz', images=pixels(0, 5, 14, 16))
    pd.DataFrame(dict(well=['B03']*4)).to_csv(tmp_path/'metadata.csv', index=False)
    assert not LAYOUTS['arrays'].finds(Listing(tmp_path))

def test_a_damaged_tiff_does_not_hinder_recognition(tmp_path):
    put_ome(tmp_path/'all.ome.tif', pixels(0, 2, 2, 4, 6), {(1,2):[0], (2,1):[1]})
    (tmp_path/'a.ome.tif').write_bytes(b'not a TIFF')
    (tmp_path/'z.ome.tif').write_bytes((tmp_path/'all.ome.tif').read_bytes()[:300])
    s = scan(tmp_path, 'ome_tiff')
    assert len(s.table)==4 and set(s.left)=={'a.ome.tif','z.ome.tif'}

def test_zarr_channels_are_in_the_order_of_the_file(tmp_path):
    put_plate(tmp_path/'P.zarr', ['0'], names=['Mito','DAPI','GFP'])
    assert scan(tmp_path, 'ome_zarr').names=={'0':'Mito', '1':'DAPI', '2':'GFP'}

def test_zarr_image_half_copied(tmp_path):
    for o in ('B03_s1','C02_s1'): put_image(tmp_path/f'{o}.zarr', pixels(0, 2, 4, 6))
    shutil.rmtree(tmp_path/'C02_s1.zarr'/'0')
    s = scan(tmp_path, 'ome_zarr')
    assert set(s.table['well'])=={'B3'} and any('C02_s1.zarr' in o for o in s.said)

class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *o): pass

def test_zarr_on_the_web(tmp_path, monkeypatch):
    "A web server lists no files; the plate says what it holds"
    images = put_plate(tmp_path/'web'/'P1.zarr', ['0'], '0.4', names=['DAPI','GFP','Cy5'])
    monkeypatch.setenv('CELLMAE_CACHE', str(tmp_path/'cache'))
    server = ThreadingHTTPServer(('127.0.0.1', 0), partial(Quiet, directory=str(tmp_path/'web')))
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        s = Screen.open(f'http://127.0.0.1:{server.server_port}/P1.zarr')
        same_pixels(s, 'C02', '0', ['DNA','GFP','Cy5'], images['C/2/0'])
    finally: server.shutdown()

@pytest.mark.parametrize('inside', ['', 'P'])
def test_zarr_in_a_plain_zip(tmp_path, inside):
    images = put_plate(tmp_path/'made'/inside, ['0'], '0.4')
    pack(tmp_path/'made', tmp_path/'P.zip')
    s = Screen.open(tmp_path/'P.zip')
    same_pixels(s, 'C02', '0', ['0','1','2'], images['C/2/0'])
    assert set(s.table['plate'])=={'P'}

def test_companion_opened_by_itself(tmp_path):
    x = pixels(0, 2, 1, 4, 6)
    files = {(0,c): (f'w{c}.ome.tif', '') for c in range(2)}
    (tmp_path/'x.companion.ome').write_text(ome_set(files, z=1, labels=('B3',)))
    for c in range(2): put_pages(tmp_path/f'w{c}.ome.tif', x[c], BINARY.format(''))
    same_pixels(Screen.open(tmp_path/'x.companion.ome'), 'B03', '0', ['DNA','GFP'], x[:,0])

def test_arrays_opened_by_themselves(tmp_path):
    x = pixels(0, 3, 14, 16)
    np.savez(tmp_path/'crops.npz', images=x)
    pd.DataFrame(dict(well=['B03','B03','C02'])).to_csv(tmp_path/'metadata.csv', index=False)
    same_pixels(Screen.open(tmp_path/'crops.npz'), 'C02', '2', ['0'], x[2:])

def test_load_data_of_plates_that_only_their_files_name(tmp_path):
    for p in ('P1','P2'): load_table('/x').to_csv(tmp_path/f'{p}.csv', index=False)
    assert set(scan(tmp_path, 'load_data').table['plate'])=={'P1','P2'}

def test_load_data_of_one_plate_twice_is_refused(tmp_path):
    for o in ('a','b'): to_csv(load_table('/x', Metadata_Plate='P1'), tmp_path/f'{o}.csv')
    with pytest.raises(ValueError, match='a.csv and b.csv both list plate P1, well B03'):
        scan(tmp_path, 'load_data')

def test_a_home_made_table_with_folders_and_planes(tmp_path):
    rows = [dict(filename=f'{c}{z}.tif', path=w, well=w, channel=c, plane=z)
            for w,c,z in product(('B3','C2'), 'ab', '12')]
    x = put_tiffs(tmp_path, [f'{o["path"]}/{o["filename"]}' for o in rows])
    to_csv(rows, tmp_path/'t.csv')
    same_pixels(Screen.open(tmp_path, z=2), 'C02', '1', ['a','b'], [x['C2/a2.tif'], x['C2/b2.tif']])
    with pytest.raises(ValueError, match='z'): Screen.open(tmp_path)

@pytest.mark.parametrize('kind', ['Series','Frame'])
def test_load_data_within_files(tmp_path, kind):
    "Sites are images or pages of one file"
    x = pixels(0, 2, 4, 6)
    with tifffile.TiffWriter(tmp_path/'all.tif', ome=kind=='Series') as w:
        for o in x: w.write(o, contiguous=kind=='Frame', photometric='minisblack')
    chosen = {f'{k}_OrigDNA': [0,int(k==kind)] for k in ('Series','Frame')}
    to_csv({'Metadata_Well':['B03','C02'], 'FileName_OrigDNA':['all.tif']*2,
            'PathName_OrigDNA':[str(tmp_path)]*2, **chosen}, tmp_path/'t.csv')
    for s in (Screen.open(tmp_path), Screen(tmp_path/'t.csv')):
        same_pixels(s, 'B03', '1', ['DNA'], x[:1])
        same_pixels(s, 'C02', '1', ['DNA'], x[1:])

def test_load_data_some_files_here_and_some_on_the_web(tmp_path):
    df = load_table('/home/x').assign(URL_OrigDNA=['','s3://b/c.tiff'], URL_OrigER='')
    df.loc[1,'FileName_OrigDNA'] = ''
    df.to_csv(tmp_path/'load_data.csv', index=False)
    t = scan(tmp_path, 'load_data').table
    assert list(t['file_DNA'])==['/home/x/r02c03-ch1.tiff','s3://b/c.tiff']
    assert list(t['file_ER'])[1]=='/home/x/r03c02-ch2.tiff'

@pytest.mark.parametrize('version', ['0.4','0.5'])
def test_zarr_of_the_reference_writer(tmp_path, version):
    "A plate as the library ome-zarr writes it, with a pyramid and names"
    writer,formats = pytest.importorskip('ome_zarr.writer'),pytest.importorskip('ome_zarr.format')
    fmt = dict(zip(('0.4','0.5'), (formats.FormatV04,formats.FormatV05)))[version]()
    top = zarr.open_group(tmp_path/'P1.zarr', mode='w', zarr_format=2 if version=='0.4' else 3)
    columns = [str(i+1) for i in range(12)]
    writer.write_plate_metadata(top, list('ABCDEFGH'), columns, list(WELLS), fmt=fmt)
    shown = dict(color='FFFFFF', window=dict(start=0, end=1, min=0, max=1))
    x,names = {},dict(channels=[dict(label=n, **shown) for n in ('DAPI','GFP')])
    for w in WELLS:
        well = top.require_group(w)
        writer.write_well_metadata(well, ['0','1'], fmt=fmt)
        for f in '01':
            x[w,f] = pixels(len(x), 2, 40, 60)
            writer.write_image(x[w,f], well.require_group(f), axes='cyx', fmt=fmt, omero=names)
    found = scan(tmp_path, 'ome_zarr')
    assert found.about['plate_shape']==(8,12) and set(found.table['channel'])=={'DAPI','GFP'}
    s = Screen.open(tmp_path)
    same_pixels(s, 'B03', '1', ['DNA','GFP'], x['B/3','1'])
    same_pixels(s, 'C02', '0', ['DNA','GFP'], x['C/2','0'])

def test_gallery_with_illumination(tmp_path):
    home = tmp_path/'workspace/load_data_csv/b1/P1'
    home.mkdir(parents=True)
    way = 's3://cellpainting-gallery/cpg/source/images/b1'
    light = {f'FileName_Illum{c}': f'P1_Illum{c}.npy' for c in ('DNA','ER')}
    folder = {f'PathName_Illum{c}': f'{way}/illum/P1' for c in ('DNA','ER')}
    df = load_table(f'{way}/images/P1/Images', **light, **folder)
    df.to_csv(home/'load_data_with_illum.csv', index=False)
    x = put_tiffs(tmp_path/'images/b1/images/P1/Images', TIFFS)
    (tmp_path/'images/b1/illum/P1').mkdir(parents=True)
    for c,k in (('DNA',2.),('ER',4.)):
        np.save(tmp_path/f'images/b1/illum/P1/P1_Illum{c}.npy', np.full((4,6), k))
    same_pixels(Screen.open(tmp_path), 'C02', '1', ['DNA','ER'], [x[o] for o in TIFFS[2:]])
    s = Screen.open(tmp_path, illum=True)
    i, = np.flatnonzero(s.table['well']=='C02')
    np.testing.assert_allclose(s.read(i), [x[TIFFS[2]]/2, x[TIFFS[3]]/4], atol=.51)

def test_load_data_with_fields_that_are_called_otherwise(tmp_path):
    df = pd.concat([load_table('/x', 'row').assign(Metadata_FieldID=i) for i in ('1','2')])
    df.to_csv(tmp_path/'load_data.csv', index=False)
    t = scan(tmp_path, 'load_data').table
    assert list(zip(t['well'], t['site']))==[('B03','1'),('C02','1'),('B03','2'),('C02','2')]

def test_load_data_that_lists_a_site_twice_is_refused(tmp_path):
    pd.concat([load_table('/x')]*2).to_csv(tmp_path/'load_data.csv', index=False)
    with pytest.raises(ValueError, match='load_data.csv lists well B03, site 1 twice'):
        scan(tmp_path, 'load_data')

def test_rxrx_packed(tmp_path):
    x,meta = put_rxrx(tmp_path/'made', plates=(1,), sites=(1,))
    to_csv(meta.assign(sirna='s1', well_type='treatment'), tmp_path/'made'/'metadata.csv')
    pack(tmp_path/'made', tmp_path/'rxrx1.zip')
    s = Screen.open(tmp_path/'rxrx1.zip')
    t = s.table
    i, = np.flatnonzero((t['batch']=='HUVEC-01') & (t['well']=='AF48'))
    np.testing.assert_array_equal(s.read(i), [x['HUVEC-01',1,'AF48',1,c] for c in range(1,7)])
    assert set(t['perturbation'])=={'s1'}

def test_load_data_images_of_foreign_paths_are_not_left_over(tmp_path, capsys):
    put_tiffs(tmp_path/'im', [*TIFFS, 'another.tiff'])
    load_table(r'D:\x\im').to_csv(tmp_path/'load_data.csv', index=False, sep=';')
    Screen.open(tmp_path)
    assert '1 .tiff files, such as im/another.tiff' in capsys.readouterr().out

def test_rxrx_with_two_tables_is_asked(tmp_path):
    _,meta = put_rxrx(tmp_path, plates=(1,), sites=(1,))
    for o in 'ab': meta.to_csv(tmp_path/f'{o}.csv', index=False)
    with pytest.raises(ValueError, match='a.csv and b.csv both say'): scan(tmp_path, 'rxrx')

def test_zarr_images_without_names_among_others(tmp_path):
    names = lambda o: ['Mito','DAPI','GFP'] if o!='C/2/1' else None
    put_plate(tmp_path/'P.zarr', ['0','1'], names=names)
    s = scan(tmp_path, 'ome_zarr')
    t = s.table.set_index(['row','site','channel'])['file']
    assert set(s.table['channel'])=={'Mito','DAPI','GFP'} and t['C','1','DAPI']=='P.zarr/C/2/1#c=1'
    assert 'C/2/1' in s.said[0]

@pytest.mark.parametrize('deep', ['{p}/', 'b{p}/plate/'])
@pytest.mark.parametrize('kind', ['zarr','ome.tif'])
def test_images_in_a_folder_per_plate(tmp_path, kind, deep):
    x = pixels(0, 2, 2, 2, 4, 6) # plate, position, channel
    for p in range(2):
        (tmp_path/deep.format(p=p)).mkdir(parents=True)
        if kind=='ome.tif': put_ome(tmp_path/deep.format(p=p)/'B03.ome.tif', x[p])
        else: put_image(tmp_path/deep.format(p=p)/'B03_s1.zarr', x[p,0], names=['DAPI','GFP'])
    s = Screen.open(tmp_path)
    assert len(s.wells)==2 and len(s)==(4 if kind=='ome.tif' else 2)
    np.testing.assert_array_equal(s.read(len(s)-1), x[1,1 if kind=='ome.tif' else 0])

@pytest.mark.parametrize('folders', [('a','b'), ('a/x','b/x')])
def test_ome_plates_called_alike_in_two_folders(tmp_path, folders):
    x = pixels(0, 2, 2, 2, 4, 6)
    for o,y in zip(folders, x):
        (tmp_path/o).mkdir(parents=True)
        put_ome(tmp_path/o/'plate.ome.tif', y, {(1,2):[0], (2,1):[1]})
    s = Screen.open(tmp_path)
    assert len(s.wells)==4 and s.table['batch'].nunique()==2
    np.testing.assert_array_equal(s.read(3), x[1,1])

def test_zarr_images_made_of_others_are_asked(tmp_path):
    x = put_plate(tmp_path/'P.zarr', ['0','0_corrected'])
    with pytest.raises(ValueError, match="Choose: `images='0'`"): Screen.open(tmp_path)
    s = Screen.open(tmp_path, images='*_corrected')
    same_pixels(s, 'C02', '0_corrected', ['0','1','2'], x['C/2/0_corrected'])
    assert len(s)==2 and len(Screen.open(tmp_path, images='*'))==4

def test_a_home_made_table_of_files_elsewhere(tmp_path):
    x = put_tiffs(tmp_path/'far', ['a.tif'])
    (tmp_path/'here').mkdir()
    files = [str(tmp_path/'far'/'a.tif'), 's3://bucket/b.tif']
    pd.DataFrame(dict(file=files, channel=['DNA','ER'], well='B03')).to_csv(
        tmp_path/'here'/'t.csv', index=False)
    assert set(scan(tmp_path/'here', 'channel_rows').table['file'])==set(files)

def test_tables_that_cannot_be_read_do_not_hinder_recognition(tmp_path):
    put_tiffs(tmp_path, TIFFS)
    load_table(str(tmp_path)).to_csv(tmp_path/'load_data.csv', index=False, lineterminator='\r')
    (tmp_path/'half.csv.gz').write_bytes(b'\x1f\x8b\x08\x00')
    (tmp_path/'odd.txt').write_bytes(bytes(range(256)))
    assert len(Screen.open(tmp_path))==2

def test_names_with_a_hash(tmp_path, capsys):
    "A `#` that is part of a name"
    images = put_plate(tmp_path/'a'/'Plate #1.zarr', ['0'], names=['DAPI','GFP','Cy5'])
    x = pixels(0, 2, 2, 4, 6)
    (tmp_path/'b').mkdir()
    put_ome(tmp_path/'b'/'plate #1.ome.tif', x, {(1,2):[0], (2,1):[1]})
    same_pixels(Screen.open(tmp_path/'a'), 'C02', '0', ['DNA','GFP','Cy5'], images['C/2/0'])
    same_pixels(Screen.open(tmp_path/'b'), 'C02', '1', ['DNA','GFP'], x[1])
    assert 'Not on this machine' not in capsys.readouterr().out

def test_options_of_a_plate_are_part_of_the_call(tmp_path, capsys):
    put_plate(tmp_path/'P.zarr', list('0123'), acquired=lambda f: int(f)//2, names=['a','b','c'])
    assert len(Screen.open(tmp_path, acquisition=1))==4
    assert 'acquisition=1' in capsys.readouterr().out

@pytest.mark.parametrize('where', ['', 'tables/'])
def test_a_table_of_sites_under_any_name(tmp_path, where):
    names = [f'img/{i}.tif' for i in range(4)]
    x = put_tiffs(tmp_path/where, names)
    to_csv(dict(file_DNA=names[::2], file_ER=names[1::2], Well=['B3','C2'], gene=['a','b']),
           tmp_path/where/'mine.csv')
    s = Screen.open(tmp_path, perturbation='gene')
    same_pixels(s, 'C02', '1', ['DNA','ER'], [x[names[2]], x[names[3]]])

def test_a_table_of_files_that_hold_all_channels(tmp_path):
    x = [pixels(i, 2, 4, 6) for i in range(2)]
    for i,o in enumerate(x): tifffile.imwrite(tmp_path/f'{i}.tif', o, photometric='minisblack')
    to_csv(dict(filename=['0.tif','1.tif'], well=['B3','C2']), tmp_path/'mine.csv')
    same_pixels(Screen.open(tmp_path, channels=['DNA','ER']), 'C02', '1', ['DNA','ER'], x[1])

def test_a_table_of_other_files_is_no_candidate(tmp_path):
    put_tiffs(tmp_path, ['B03.tif'])
    to_csv(dict(file=['scan.pdf'], well=['B3']), tmp_path/'notes.csv')
    assert not LAYOUTS['sites'].finds(Listing(tmp_path))

def test_a_table_of_sites_within_files(tmp_path):
    x = put_tiffs(tmp_path/'deep', ['a #1.tif'])
    tifffile.imwrite(tmp_path/'deep'/'b.tif', y := pixels(5, 2, 4, 6), photometric='minisblack')
    to_csv(dict(file_DNA=['a #1.tif','b.tif#page=1'], well=['B3','C2']), tmp_path/'deep'/'mine.csv')
    s = Screen.open(tmp_path)
    same_pixels(s, 'B03', '1', ['DNA'], [x['a #1.tif']])
    same_pixels(s, 'C02', '1', ['DNA'], y[1:])

@pytest.mark.parametrize('part,sites', [('B',2), ('B/3',2), ('B/3/1',1)])
def test_zarr_part_of_a_plate_keeps_its_place(tmp_path, part, sites):
    images = put_plate(tmp_path/'P.zarr', ['0','1'], names=['WGA','DAPI','ConA'])
    s = Screen.open(tmp_path/'P.zarr'/part)
    assert len(s)==sites and set(s.table['plate'])=={'P'}
    same_pixels(s, 'B03', '1', ['golgi','DNA','ER'], images['B/3/1'])

def test_zarr_array_of_an_image_is_no_plate(tmp_path):
    put_plate(tmp_path/'P.zarr', ['0'])
    with pytest.raises(ValueError, match='or a well or an image of it'):
        Screen.open(tmp_path/'P.zarr/B/3/0/0')

def test_zarr_several_plates_in_one_zip(tmp_path):
    x = {p: put_plate(tmp_path/f'in/{p}.zarr', ['0'], shape=n) for p,n in
         dict(P1=(3,4,6), P2=(3,5,7)).items()}
    pack(tmp_path/'in', tmp_path/'all.zip')
    s = Screen.open(tmp_path/'all.zip')
    for p in x:
        one = s.subset((s.table['plate']==p).to_numpy())
        same_pixels(one, 'C02', '0', ['0','1','2'], x[p]['C/2/0'])

def test_zarr_images_in_a_folder_per_well(tmp_path):
    x = {w: pixels(i, 2, 4, 6) for i,w in enumerate(('B03','C02'))}
    for w in x: put_image(tmp_path/w/'f1.zarr', x[w], names=['DAPI','ConA'])
    same_pixels(Screen.open(tmp_path), 'C02', 'f1', ['DNA','ER'], x['C02'])

@pytest.mark.parametrize('change,says', [
    (lambda a: a['plate'].pop('wells'), "lack 'wells'"),
    (lambda a: a['plate']['wells'][0].update(path='B3'), 'are not as OME-Zarr has them')])
def test_zarr_metadata_of_no_sense_say_where(tmp_path, change, says):
    put_plate(tmp_path/'P.zarr', ['0'], '0.4')
    put_attrs(tmp_path/'P.zarr/B3', '0.4', well=dict(images=[dict(path='0')]))
    attrs = dict(zarr.open_group(tmp_path/'P.zarr').attrs)
    change(attrs)
    put_attrs(tmp_path/'P.zarr', '0.4', **attrs)
    with pytest.raises(ValueError, match=f'P.zarr, its plate: the metadata {says}'):
        Screen.open(tmp_path)

def test_zarr_null_channels_are_numbers(tmp_path):
    put_plate(tmp_path/'P.zarr', ['0'], '0.4')
    for o in WELLS: put_attrs(f'{tmp_path}/P.zarr/{o}/0', '0.4', omero=dict(channels=None))
    s = Screen.open(tmp_path)
    assert s.channels==['0','1','2'] and s.read(0).shape==(3,4,6)

def test_ome_channels_are_in_the_order_of_the_file(tmp_path):
    x = {w: pixels(i, 2, 4, 4, 6) for i,w in enumerate(('B03','C02'))}
    for w in x:
        with tifffile.TiffWriter(tmp_path/f'{w}.ome.tif', ome=True) as t:
            for o in x[w]: t.write(o, photometric='minisblack', metadata=dict(
                axes='CYX', Channel=dict(Name=['WGA','DAPI','ConA','Mito'])))
    s = Screen.open(tmp_path)
    assert s.channels==['golgi','DNA','ER','mito']
    np.testing.assert_array_equal(s.read(1), x['B03'][1])

def test_zarr_plates_of_other_orders_take_that_of_the_first(tmp_path):
    for p,names in dict(P1=['WGA','DAPI'], P2=['DAPI','WGA']).items():
        x = put_plate(tmp_path/f'{p}.zarr', ['0'], shape=(2,4,6), names=names)
    s = Screen.open(tmp_path)
    assert s.channels==['golgi','DNA']
    second = s.subset((s.table['plate']=='P2').to_numpy())
    same_pixels(second, 'C02', '0', ['DNA','golgi'], x['C/2/0'])

@pytest.mark.parametrize('at', ['data.parquet', 'data/train-00000-of-00001.parquet'])
def test_pictures_in_rows_with_their_places(tmp_path, at):
    pa,pq,rows = pytest.importorskip('pyarrow'),pytest.importorskip('pyarrow.parquet'),[]
    x = {(w,c): pixels(i, 4, 6) for i,(w,c) in enumerate(product(('B03','C02'), ('DNA','ER')))}
    for (w,c),o in x.items():
        picture = dict(bytes=imagecodecs.png_encode(o), path=f'{w}.png')
        rows.append(dict(image=picture, plate='P1', well=w, channel=c))
    (tmp_path/at).parent.mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows[::-1]), tmp_path/at)
    both = np.stack([x['C02','DNA'], x['C02','ER']])
    for o in (tmp_path,tmp_path/at): same_pixels(Screen.open(o), 'C02', '1', ['DNA','ER'], both)

@pytest.mark.parametrize('name', ['c.npz','c.h5'])
def test_arrays_without_a_table_ask_for_one(tmp_path, name):
    x = pixels(0, 3, 2, 4, 6)
    if name=='c.npz': np.savez(tmp_path/name, images=x)
    else:
        with pytest.importorskip('h5py').File(tmp_path/name, 'w') as f: f['images'] = x
    for o in (tmp_path,tmp_path/name):
        with pytest.raises(FileNotFoundError, match=f'Write a table.*{name}#i=0'): Screen.open(o)

def test_a_zip_cut_short_is_no_crash(tmp_path):
    (tmp_path/'a.zip').write_bytes(b'PK\3\4 and no more')
    with pytest.raises(ValueError, match='a.zip: .*Copy it again'): Screen.open(tmp_path/'a.zip')

def test_load_data_with_metadata_for_each_channel(tmp_path):
    x,rows = pixels(0, 2, 2, 4, 6),[]
    for i,w in enumerate(('B03','C02')):
        rows.append({f'Image_{k}_{c}':v for j,c in enumerate(('DAPI','Actin')) for k,v in
                     dict(FileName=f'{w}_{c}.tif', PathName='.', Metadata_Plate='P',
                          Metadata_Well=w).items()})
        for c,o in zip(('DAPI','Actin'), x[i]): tifffile.imwrite(tmp_path/f'{w}_{c}.tif', o)
    pd.DataFrame(rows).to_csv(tmp_path/'image.csv', index=False)
    s = Screen.open(tmp_path)
    assert set(s.table['plate'])=={'P'}
    same_pixels(s, 'C02', '1', ['DNA','actin'], x[1])

def test_load_data_without_wells_asks_for_them(tmp_path):
    tifffile.imwrite(tmp_path/'a.tif', pixels(0, 4, 6))
    pd.DataFrame(dict(FileName_DNA=['a.tif'])).to_csv(tmp_path/'load_data.csv', index=False)
    with pytest.raises(ValueError, match='which wells'): Screen.open(tmp_path)
