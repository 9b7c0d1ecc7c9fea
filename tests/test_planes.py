"Addresses of all kinds, and files of all kinds written by their own libraries: right pixels, and no more of them than asked"
import os
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from struct import pack
from threading import Thread
from zipfile import ZipFile

import h5py
import imagecodecs
import numpy as np
import pytest
import tifffile
import zarr
from PIL import Image

from cellmae.images import ImageError
from cellmae.planes import address, look_into, names_of, nth, parse_address, projected, read_image, read_plane, read_site, size_of

g = np.random.default_rng(0)
X = g.integers(100, 4000, (3, 5, 2, 24, 36)).astype(np.uint16) # T,Z,C,Y,X
DYES = ['Hoechst 33342', 'Alexa 647']

def tiff(f, x, **kw): tifffile.imwrite(f, x, **{**dict(photometric='minisblack'), **kw}); return f

def ome(f, x, axes, names=None, **kw):
    return tiff(f, x, ome=True, metadata={'axes':axes, **({'Channel':{'Name':names}} if names else {})}, **kw)

# ---- addresses

@pytest.mark.parametrize('text,path,inner,at', [
    ('a.tif', 'a.tif', None, {}), ('a.tif#series=3', 'a.tif', None, dict(series=3)), ('a.tif#c=1,z=2', 'a.tif', None, dict(c=1, z=2)),
    ('D:\\plates\\a b.tif#c=1', 'D:\\plates\\a b.tif', None, dict(c=1)), ('B2--W00014--405 nm #1.tif', 'B2--W00014--405 nm #1.tif', None, {}),
    ('B2--405 nm #1.tif#z=0', 'B2--405 nm #1.tif', None, dict(z=0)), ('run #2/a.tif', 'run #2/a.tif', None, {}), ('a #k=v.tif', 'a #k=v.tif', None, {}),
    ('a.tif#', 'a.tif#', None, {}), ('a.tif#foo', 'a.tif#foo', None, {}), ('https://h.org/a #1.tif?sig=x%23&b=1#c=1', 'https://h.org/a #1.tif?sig=x%23&b=1', None, dict(c=1)),
    ('s3://bucket/a.tif#page=7', 's3://bucket/a.tif', None, dict(page=7)), ('p.zarr/A/1/0#c=0', 'p.zarr', 'A/1/0', dict(c=0)), ('p.zarr', 'p.zarr', None, {}),
    ('x/P.ome.ZARR/A/1/0', 'x/P.ome.ZARR', 'A/1/0', {}), ('C:\\x\\p.zarr\\A\\1#z=3', 'C:\\x\\p.zarr', 'A/1', dict(z=3)), ('s3://b/p.zarr/A/1/0#c=2', 's3://b/p.zarr', 'A/1/0', dict(c=2)),
    ('x.h5#/a/b', 'x.h5', '/a/b', {}), ('x.h5#/a/b,i=3', 'x.h5', '/a/b', dict(i=3)), ('plate #1.HDF5#/a #2,z=1', 'plate #1.HDF5', '/a #2', dict(z=1)),
    ('x.npz#key,i=3', 'x.npz', 'key', dict(i=3)), ('x.npy#i=3', 'x.npy', None, dict(i=3)), ('https://h.org/x.h5?sig=1#/a', 'https://h.org/x.h5?sig=1', '/a', {}),
    ('x.h5#/a,axes=cyx,c=1', 'x.h5', '/a', dict(axes='CYX', c=1)), ('p.zarr.zip#A/1/0', 'p.zarr.zip', 'A/1/0', {}), ('Index.xml#flatfield=2', 'Index.xml', None, dict(flatfield=2))])
def test_addresses(text, path, inner, at):
    assert parse_address(text) == parse_address(Path(text) if '//' not in text else text) == (path, inner, at)
    assert parse_address(address(*parse_address(text)[:2], **at)) == (path, inner, at)

@pytest.mark.parametrize('text,what', [('a.tif#c=x', 'c=x'), ('a.tif#c=', 'c='), ('a.tif#c=1.5', 'c=1.5'), ('a.tif#z=-1', 'z=-1'), ('a.tif#c=1,c=2', 'c=2'), ('x.h5#/a,z=max', 'z=max')])
def test_bad_addresses(text, what):
    with pytest.raises(ImageError, match=f'{text.replace("#", ".")}: bad address. `{what}`: give each of .*`series`.*from 0'): parse_address(text)

@pytest.mark.parametrize('tail,why', [
    ('axes=ZCYX', '`axes=` means nothing'), ('q=1', r'`q=` means nothing here. It takes `z=0` to `4`, `c=0` to `1`, `series=`'), ('y=1', '`y=` means nothing'), ('c=2', 'no c=2, but 2'),
    ('z=5', 'no z=5, but 5'), ('t=1', 'no t=1, but 1'), ('series=1', 'no series 1'), ('page=10', 'no page 10, but 10')])
def test_choices_that_are_not_there(tail, why, tmp_path):
    f = ome(tmp_path/'a.ome.tif', X[0], 'ZCYX')
    with pytest.raises(ImageError, match=why) as e: read_image(f'{f}#{tail}', z=0)
    assert e.value.file == f'{f}#{tail}'

# ---- one array in every kind of file

def as_zarr(f, x, axes):
    o = zarr.open_group(f, mode='w', zarr_format=2)
    o.attrs['multiscales'] = [dict(version='0.4', axes=[dict(name=k.lower()) for k in axes], datasets=[dict(path='s0')])]
    o.attrs['omero'] = dict(channels=[dict(label=k) for k in DYES])
    o.create_array('s0', data=x, chunks=(1,)*(x.ndim-2)+x.shape[-2:])

def as_h5(f, x, axes):
    with h5py.File(f, 'w') as o: o.create_dataset('a', data=x, chunks=(1,)*(x.ndim-2)+x.shape[-2:]).attrs['axes'] = axes

stacks = dict(
    ome=('a.ome.tif', lambda f,x,axes: ome(f, x, axes, DYES if 'C' in axes else None)), big=('a.ome.tf8', lambda f,x,axes: ome(f, x, axes, bigtiff=True)),
    packed=('a.ome.tif', lambda f,x,axes: ome(f, x, axes, compression='zlib')), motorola=('a.ome.tif', lambda f,x,axes: ome(f, x, axes, byteorder='>')),
    pages=('a.tif', lambda f,x,axes: tiff(f, x, metadata=dict(axes=axes), contiguous=False, compression='lzw')), shaped=('a.tif', lambda f,x,axes: tiff(f, x, metadata=dict(axes=axes))),
    imagej=('a.tif', lambda f,x,axes: tiff(f, x, imagej=True, metadata=dict(axes=axes))), virtual=('a.tif', lambda f,x,axes: tiff(f, x, imagej=True, truncate=True, metadata=dict(axes=axes))),
    zarr=('a.zarr', as_zarr), h5=('a.h5', as_h5))

@pytest.fixture(params=stacks)
def kind(request): return stacks[request.param]

def test_what_is_there(kind, tmp_path):
    name,write = kind
    write(tmp_path/name, X, 'TZCYX')
    s = look_into(tmp_path/name)
    assert (s.axes, s.shape, s.dtype.newbyteorder('=')) == ('TZCYX', X.shape, X.dtype) and size_of(tmp_path/name) == (24, 36)
    assert (s.read(t=2, c=1) == X[2,:,1]).all() and (s.read(z=4) == X[:,4]).all() and (s.read() == X).all()
    s = look_into(f'{tmp_path/name}#c=1,t=2')
    assert (s.axes, s.shape) == ('ZYX', (5, 24, 36)) and (s.read(z=3) == X[2,3,1]).all()

def test_planes_of_every_kind(kind, tmp_path):
    name,write = kind
    write(tmp_path/name, X, 'TZCYX')
    f = str(tmp_path/name)
    with pytest.raises(ImageError, match='a stack. It holds 3 times and 5 z planes. Choose: `t=0` to `t=2`, `z=0` to `z=4`'): read_image(f)
    for t,i in {1:1, 'first':0, 'last':2}.items():
        assert (read_site(f, 3, t) == X[i,3]).all() and (read_site([f'{f}#c=1', f'{f}#c=0'], 'mid', t) == X[i,2,::-1]).all()
        assert (read_site(f, 'max', t) == X[i].max(0)).all() and (read_site(f, 'mean', t) == np.rint(X[i].mean(0))).all()
    assert (read_plane(f'{f}#c=1,t=2,z=4') == X[2,4,1]).all() and (read_plane(Path(f'{f}#c=0'), z='max', t=1) == X[1,:,0].max(0)).all()
    with pytest.raises(ImageError, match='2 channels in one of several files. Choose: `#c=0` to `#c=1`'): read_plane(f, z=0, t=0)
    with pytest.raises(ImageError, match='no t=3, but 3'): read_site(f, 0, 3)

deep = g.integers(0, 4000, (40, 1, 256, 256)).astype(np.uint16)

@pytest.mark.parametrize('z,planes', [(3, 5), (39, 5), ('mid', 5), ('max', 7), ('mean', 9.5)])
def test_no_more_is_held_than_needed(kind, z, planes, tmp_path):
    "Of 40 planes one, or a few at a time"
    name,write = kind
    write(tmp_path/name, deep, 'ZCYX')
    f = str(tmp_path/name)
    read_site([f], z) # what is imported or kept open is there now
    tracemalloc.start()
    x = read_site([f], z)
    _,peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (x[0] == {'max': lambda: deep.max(0), 'mean': lambda: np.rint(deep.mean(0))}.get(z, lambda: deep[nth(z, 40)])()).all()
    assert peak < planes*deep[0].nbytes+60_000

@pytest.mark.parametrize('write', [lambda f,x: ome(f, x, 'ZCYX', compression='zlib'), lambda f,x: tiff(f, x, metadata=dict(axes='ZCYX'), compression='zlib', contiguous=False)])
def test_nothing_else_is_read(write, tmp_path):
    "Planes that were not asked for may be damaged"
    f = write(tmp_path/'a.tif', X[0])
    with tifffile.TiffFile(f) as t: parts = [(p.dataoffsets[0], p.databytecounts[0]) for p in t.pages]
    with open(f, 'r+b') as o:
        for at,n in parts[:7]+parts[8:]: o.seek(at); o.write(b'\xff'*n)
    assert (read_plane(f'{f}#c=1', z=3) == X[0,3,1]).all()
    for c,z in (('0', 3), ('1', 2), ('1', 'max')):
        with pytest.raises(ImageError, match='unreadable'): read_plane(f'{f}#c={c}', z=z)

@pytest.mark.parametrize('dtype', ['u1', 'u2', 'i2', 'f4', 'f8'])
@pytest.mark.parametrize('how', ['max', 'mean'])
def test_projections(how, dtype):
    x = (g.normal(0, 50, (7, 6, 9))+100).astype(dtype)
    y = getattr(x, how)(0)
    assert projected(iter(x), how).dtype == x.dtype
    np.testing.assert_allclose(projected(iter(x), how), y if how=='max' or dtype[0]=='f' else np.rint(y), rtol=1e-6)
    assert projected(np.full((300, 1, 1), 65535, 'u2'), how) == 65535

@pytest.mark.parametrize('n', [1, 2, 3, 4, 5])
def test_numbers_of_planes(n):
    assert [nth(o, n) for o in ('first', 'mid', 'last')] == [0, n//2, n-1] and nth(n-1, n) == n-1
    for i in (n, -1):
        with pytest.raises(ImageError, match=f'no z={i}, but {n}'): nth(i, n)

@pytest.mark.parametrize('kw', [dict(z='middle'), dict(t='end'), dict(z='all'), dict(z=1.5), dict(t='mid')])
def test_policies_that_are_none(kw, tmp_path):
    with pytest.raises(ValueError, match='is a whole number, .* or .*, not '): read_site(ome(tmp_path/'a.tif', X, 'TZCYX'), **kw)

# ---- names of channels

def test_names_of_ome(tmp_path):
    f = ome(tmp_path/'a.ome.tif', X, 'TZCYX', DYES)
    assert names_of(f) == DYES and names_of(f'{f}#c=1') == DYES[1:] and names_of(f'{f}|{f}') == DYES
    assert names_of(ome(tmp_path/'one.ome.tif', X[0,0,0], 'YX', DYES[:1])) == DYES[:1]
    assert names_of(ome(tmp_path/'none.ome.tif', X[0,0], 'CYX')) is None

@pytest.mark.parametrize('axes,labels,names', [
    ('CYX', DYES, DYES), ('ZCYX', DYES*5, DYES), ('ZCYX', [f'c:{c+1}/2 z:{z+1}/5 - {n}' for z in range(5) for c,n in enumerate(DYES)], DYES),
    ('CYX', ['c:1/2', 'c:2/2'], None), ('CYX', ['scan']*2, None), ('ZYX', list('abcde'), None)])
def test_names_of_imagej(axes, labels, names, tmp_path):
    f = tiff(tmp_path/'a.tif', X[0] if axes=='ZCYX' else X[0,0] if axes=='CYX' else X[0,:,0], imagej=True, metadata=dict(axes=axes, Labels=labels))
    assert names_of(f) == names

def test_names_of_metaseries(tmp_path):
    xml = '<MetaData><PlaneInfo><prop id="spatial-calibration-x" type="float" value="0.65"/><prop id="_IllumSetting_" type="string" value="FITC_05"/></PlaneInfo></MetaData>'
    f = tiff(tmp_path/'a.tif', X[0,0,0], description=xml, metadata=None, software='MetaSeries')
    assert names_of(f) == ['FITC_05'] and (read_plane(f) == X[0,0,0]).all()

def test_no_names(tmp_path):
    Image.fromarray(np.uint8(X[0,0,0]>>4)).save(tmp_path/'a.png')
    assert names_of(tiff(tmp_path/'a.tif', X[0,0])) is names_of(tmp_path/'a.png') is None

# ---- OME-TIFF

def described(f, x, order='XYZCT', sizes=None, data='<TiffData/>', uuid='', names=('a', 'b'), images=1, **kw):
    "Pages `x` with an OME-XML of our own"
    s = dict(Z=1, C=1, T=1, **{}) | (sizes or {})
    px = (f'<Pixels ID="Pixels:0" DimensionOrder="{order}" Type="uint16" SizeX="{x.shape[-1]}" SizeY="{x.shape[-2]}" '
          + ' '.join(f'Size{k}="{n}"' for k,n in s.items()) + '>' + ''.join(f'<Channel ID="Channel:0:{i}" Name="{n}" SamplesPerPixel="1"/>' for i,n in enumerate(names[:s['C']])))
    xml = ('<?xml version="1.0" encoding="UTF-8"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"' + uuid and f'<?xml version="1.0" encoding="UTF-8"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" {uuid}>'
           + ''.join(f'<Image ID="Image:{i}">{px}{data if isinstance(data, str) else data[i]}</Pixels></Image>' for i in range(images)) + '</OME>')
    return tiff(f, x.reshape(-1, *x.shape[-2:]), description=xml, metadata=None, contiguous=False, **kw)

@pytest.mark.parametrize('order', ['XYZCT', 'XYZTC', 'XYCZT', 'XYCTZ', 'XYTCZ', 'XYTZC'])
def test_orders_of_ome(order, tmp_path):
    "Pages follow `DimensionOrder`, the fastest axis first"
    lead = order[:1:-1]
    pages = X.transpose(['TZCYX'.index(k) for k in lead+'YX'])
    f = described(tmp_path/'a.tif', pages, order, dict(Z=5, C=2, T=3))
    assert (read_site(f, 3, 2) == X[2,3]).all() and names_of(f) == ['a', 'b']
    assert (read_plane(f'{f}#c=1,z=4,t=1') == X[1,4,1]).all()

def test_pages_in_any_order(tmp_path):
    data = ''.join(f'<TiffData FirstC="{c}" FirstZ="{z}" IFD="{9-2*z-c}" PlaneCount="1"/>' for z in range(5) for c in range(2))
    f = described(tmp_path/'a.tif', X[0], sizes=dict(Z=5, C=2), data=data)
    assert (read_site(f, 1) == X[0].reshape(10, 24, 36)[::-1].reshape(X[0].shape)[1]).all()

def test_planes_that_are_missing(tmp_path):
    "Not black, but said"
    f = described(tmp_path/'a.tif', X[0,:3], 'XYZCT', dict(Z=5, C=2))
    with pytest.raises(ImageError, match='missing. The plane c=1, z=4 is not in the file'): read_plane(f'{f}#c=1', z=4)
    with pytest.raises(ImageError, match='The plane'): read_site(f, 'max')
    f = described(tmp_path/'b.tif', X[0,0], sizes=dict(C=2), data='<TiffData FirstC="0" IFD="0"/>')
    assert (read_plane(f'{f}#c=0') == X[0,0,0]).all()
    with pytest.raises(ImageError, match='The plane c=1 is not in the file'): read_site(f)
    f = described(tmp_path/'c.tif', X[0,0], sizes=dict(C=2), data='<TiffData FirstC="7" IFD="0"/>')
    with pytest.raises(ImageError, match='OME-XML has 1x2x1 planes along TCZ, and names one at'): read_site(f)

def test_many_fields_in_one_file(tmp_path):
    "Another kind of image in each, with names of its own"
    with tifffile.TiffWriter(tmp_path/'p.ome.tif', ome=True) as o:
        o.write(X[0], metadata=dict(axes='ZCYX', Channel=dict(Name=DYES)), photometric='minisblack')
        o.write(X[1,0,:,:12], metadata=dict(axes='CYX', Channel=dict(Name=['x', 'y'])), photometric='minisblack')
    f = tmp_path/'p.ome.tif'
    with pytest.raises(ImageError, match='several series. It holds 0: ZCYX 5x2x24x36, 1: CYX 2x12x36. Choose with `series=`'): read_image(f, z=0)
    assert (read_site(f'{f}#series=0', 'mid') == X[0,2]).all() and (read_site(f'{f}#series=1') == X[1,0,:,:12]).all()
    assert names_of(f'{f}#series=1') == ['x', 'y'] and size_of(f'{f}#series=1') == (12, 36) and (read_image(f, series=1) == X[1,0,:,:12]).all()
    assert (read_site([f'{f}#page={i}' for i in (7, 2)]) == np.stack([X[0,3,1], X[0,1,0]])).all()

ids = 'urn:uuid:00000000-0000-0000-0000-00000000000{}'

def test_sets_of_files(tmp_path):
    "Each file is what is in it: here the planes of one channel, described in all, and the companion names them as they once were"
    data = ''.join(f'<TiffData FirstC="{c}" FirstZ="{z}" IFD="{z}" PlaneCount="1"><UUID FileName="2024_{c}.ome.tif">{ids.format(c)}</UUID></TiffData>' for c in range(2) for z in range(5))
    full = described(tmp_path/'full.tif', X[0,:,0], sizes=dict(Z=5, C=2), data=data, uuid=f'UUID="{ids.format(0)}"', names=DYES)
    assert look_into(full).axes == 'ZYX' and names_of(full) == DYES[:1] and (read_site([full], 4) == X[0,4,0]).all()
    xml = tifffile.TiffFile(full).ome_metadata
    only = f'<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"><BinaryOnly MetadataFile="2024.companion.ome" UUID="{ids.format(1)}"/></OME>'
    f = tiff(tmp_path/'b.ome.tif', X[0,:,1], description=only, metadata=None)
    with pytest.raises(ImageError, match='2024.companion.ome, which says what its pages are, is not beside it'): read_plane(f, z=1)
    (tmp_path/'2025.companion.ome').write_text(xml)
    assert names_of(f) == DYES[1:] and (read_plane(f, z=1) == X[0,1,1]).all() and (read_site([full, f], 'max') == X[0].max(0)).all()

def test_copies_for_zooming(tmp_path):
    with tifffile.TiffWriter(tmp_path/'p.ome.tif') as o:
        o.write(X[0], subifds=1, metadata=dict(axes='ZCYX'), photometric='minisblack', tile=(16, 16))
        o.write(X[0,...,::2,::2], subfiletype=1, photometric='minisblack', tile=(16, 16))
    assert size_of(tmp_path/'p.ome.tif') == (24, 36) and (read_site(tmp_path/'p.ome.tif', 2) == X[0,2]).all()

@pytest.mark.parametrize('big', [False, True])
@pytest.mark.parametrize('write', ['ome', 'packed', 'pages', 'shaped', 'imagej', 'virtual'])
def test_half_copied(write, big, tmp_path):
    "Wherever a file ends, what is read is right, or nothing is"
    if big and write in ('imagej', 'virtual'): return
    f = tmp_path/'a.tif'
    if write=='pages':
        with tifffile.TiffWriter(f, bigtiff=big) as o:
            for x in X[0,:,0]: o.write(x, photometric='minisblack', metadata=None, contiguous=False)
    else: tifffile.imwrite(f, X[0,:,0], photometric='minisblack', metadata=dict(axes='ZYX'), bigtiff=big, ome=write in ('ome', 'packed') or None, imagej=write in ('imagej', 'virtual'),
                           truncate=write=='virtual', **dict(compression='zlib') if write=='packed' else {})
    whole,n = f.read_bytes(),0
    for part in np.linspace(.02, .999, 60):
        f.write_bytes(whole[:int(part*len(whole))])
        try: x = read_site([f], 'max')
        except ImageError as e: assert 'Cut short' in str(e); n += 1
        else: assert (x[0] == X[0,:,0].max(0)).all()
    assert n > 40
    f.write_bytes(whole)
    assert (read_site([f], 'max')[0] == X[0,:,0].max(0)).all()

# ---- other TIFFs

def test_metamorph_stacks(tmp_path):
    "Planes behind one directory, as a tag of MetaMorph's own counts them"
    x,n = X[0,:,0],5
    uic2 = np.array([[i+1, 1, 2459000, 1000*i, 2459000, 1000*i] for i in range(n)], '<u4')
    f = tmp_path/'a.stk'
    with tifffile.TiffWriter(f, byteorder='<') as o:
        o.write(x[0], photometric='minisblack', metadata=None, software='MetaMorph', extratags=[(33628, 4, 1, [28], True), (33629, 5, 3*n, uic2.ravel().tolist(), True)])
    whole = f.read_bytes().replace(pack('<HHI', 33629, 5, 3*n), pack('<HHI', 33629, 5, n)) # six numbers each
    with tifffile.TiffFile(f) as t: at = t.pages[0].dataoffsets[0]
    f.write_bytes(whole[:at+x[0].nbytes]+x[1:].astype('<u2').tobytes()+whole[at+x[0].nbytes:])
    s = look_into(f)
    assert (s.axes, s.shape) == ('ZYX', (5, 24, 36)) and (read_plane(f, z=3) == x[3]).all() and (read_site([f], 'max')[0] == x.max(0)).all()

@pytest.mark.parametrize('c', [1, 3])
def test_confocal_stacks_of_zeiss(c, tmp_path):
    "A thumbnail behind every plane"
    info = np.zeros((), [(k or f'gap{i}', kind) for i,(k,kind) in enumerate(tifffile.TIFF.CZ_LSMINFO)])
    told = dict(MagicNumber=67127628, StructureSize=info.nbytes, DimensionX=36, DimensionY=24, DimensionZ=5, DimensionChannels=c, DimensionTime=1)
    for k,v in told.items(): info[k] = v
    x = X.reshape(5, 6, 24, 36)[:,:c].squeeze()
    with tifffile.TiffWriter(tmp_path/'a.lsm', byteorder='<') as o:
        for i in range(5):
            o.write(x[i], photometric='minisblack', planarconfig='separate' if c>1 else None, metadata=None, extratags=[(34412, 1, info.nbytes, info.tobytes(), True)][i:])
            o.write(np.zeros((6, 9, 3), 'u1'), photometric='rgb', subfiletype=1, metadata=None)
    f = tmp_path/'a.lsm'
    assert look_into(f).axes == ('ZYX' if c==1 else 'ZCYX') and (read_plane(f'{f}#c={c-1}', z=3) == x.reshape(5, c, 24, 36)[3,-1]).all()
    assert (read_site(f, 'max') == x.reshape(5, c, 24, 36).max(0)).all()

def test_imagej_cut_short(tmp_path):
    "The first plane is not taken for all"
    f = tiff(tmp_path/'a.tif', X[0,:,0], imagej=True, truncate=True, metadata=dict(axes='ZYX'))
    f.write_bytes(f.read_bytes()[:-X[0,0,0].nbytes])
    with pytest.raises(ImageError, match='unreadable. Cut short'): read_site([f], 0)

def test_colours_and_samples(tmp_path):
    "Samples that are colours are `S`, others channels"
    rgb = np.moveaxis(g.integers(0, 255, (3, 24, 36)).astype(np.uint8), 0, -1)
    for kw in (dict(planarconfig='contig'), dict(planarconfig='separate')):
        x = rgb if kw['planarconfig']=='contig' else np.moveaxis(rgb, -1, 0)
        f = tifffile.imwrite(tmp_path/'rgb.tif', x, photometric='rgb', **kw) or tmp_path/'rgb.tif'
        assert 'S' in look_into(f).axes and (read_image(f) == np.moveaxis(rgb, -1, 0)).all() and (read_plane(f'{f}#c=1') == rgb[...,1]).all()
        tiff(f, x, **kw)
        assert 'C' in look_into(f).axes and (read_image(f) == np.moveaxis(rgb, -1, 0)).all() and size_of(f) == (24, 36)
    ome(tmp_path/'o.ome.tif', rgb, 'YXS', photometric='rgb')
    assert (read_image(tmp_path/'o.ome.tif') == np.moveaxis(rgb, -1, 0)).all()

last = lambda x: np.ascontiguousarray(np.moveaxis(x, 0, -1))
S3,S4,S5 = X[0,:3,0],np.concatenate([X[0,:3,0], np.full((1, 24, 36), 65535, np.uint16)]),X[0,:,1]

@pytest.mark.parametrize('stored,kw,axes,x', [
    (last(S3), dict(planarconfig='contig', extrasamples=['unspecified']*2), 'YXC', S3), (last(S5), dict(planarconfig='contig'), 'YXC', S5),
    (S5, dict(planarconfig='separate'), 'CYX', S5), (last(S4), dict(photometric='rgb', extrasamples=['unassalpha']), 'YXS', S3),
    (last(S4), dict(photometric='rgb', extrasamples=['unspecified']), 'YXC', S4), (S3, dict(bitspersample=12), 'IYX', S3), (S3, dict(compression='jpegxl'), 'IYX', S3),
    (S3, dict(compression='jpeg2000'), 'IYX', S3),
    (last(S3), {}, 'YXC', S3), (last(S3)[:,:4], {}, 'YXC', S3[...,:4])]) # pages of three columns are no pages
def test_samples(stored, kw, axes, x, tmp_path):
    "What is a colour, what a channel, what a row of pages"
    f = tiff(tmp_path/'a.tif', stored, **kw)
    assert look_into(f).axes == axes and (read_image(f) == x).all() and size_of(f) == x.shape[-2:]
    for c in (0, len(x)-1): assert (read_plane(f'{f}#c={c}') == x[c]).all()

def test_volumes(tmp_path):
    f = tiff(tmp_path/'a.tif', X[0,:,0], volumetric=True, tile=(5, 16, 16), metadata=dict(axes='ZYX'))
    assert look_into(f).axes == 'ZYX' and (read_plane(f, z=3) == X[0,3,0]).all()

# ---- pictures

@pytest.mark.parametrize('ending', ['png', 'jp2', 'j2k', 'jxl', 'jxr', 'bmp', 'tif'])
@pytest.mark.parametrize('bits', [8, 12, 16])
def test_pictures(ending, bits, tmp_path):
    if ending=='bmp' and bits>8: return
    x,f = (X[0,0,0]&(2**bits-1)).astype('u1' if bits==8 else 'u2'),tmp_path/f'a.{ending.upper()}'
    if ending in ('jp2', 'j2k'): f.write_bytes(imagecodecs.jpeg2k_encode(x, level=0, bitspersample=bits, codecformat=ending))
    elif ending=='jxl': f.write_bytes(imagecodecs.jpegxl_encode(x, lossless=True))
    elif ending=='jxr': f.write_bytes(imagecodecs.jpegxr_encode(x, level=1.))
    elif ending=='tif': tiff(f, x)
    else: Image.fromarray(x).save(f)
    for o in (f, f'{f}#c=0', f'{f}#z=0,t=0', f'{f}#series=0', f'{f}#page=0'): assert (read_plane(o) == x).all()
    for k in ('c', 'z', 't', 'series', 'page'):
        with pytest.raises(ImageError, match=f'no {k}[= ]1'): read_plane(f'{f}#{k}=1')
    assert size_of(f) == x.shape and look_into(f).read().dtype == x.dtype == look_into(f).dtype

def test_channels_of_a_colour_picture(tmp_path):
    x = np.ascontiguousarray(np.moveaxis(X[0,:3,0], 0, -1))
    (tmp_path/'a.png').write_bytes(imagecodecs.png_encode(x))
    assert (read_site([f'{tmp_path}/a.png#c={c}' for c in (2, 0)]) == np.stack([x[...,2], x[...,0]])).all()
    Image.fromarray(np.uint8(x>>4)).save(tmp_path/'b.png')
    assert (read_plane(f'{tmp_path}/b.png#c=1') == x[...,1]>>4).all()

@pytest.mark.parametrize('inner', ['a.tif', 'images/a #1, b.tif', 'deep/a.png'])
def test_pictures_in_a_zip(inner, tmp_path):
    f = tiff(tmp_path/'a.tif', X[0,0,0]) if inner.endswith('tif') else Image.fromarray(X[0,0,0]).save(tmp_path/'a.png') or tmp_path/'a.png'
    with ZipFile(tmp_path/'p.zip', 'w') as z: z.write(f, inner); z.write(ome(tmp_path/'s.tif', X, 'TZCYX', DYES), 's.tif')
    assert (read_plane(f'{tmp_path}/p.zip#{inner}') == X[0,0,0]).all()
    s = f'{tmp_path}/p.zip#s.tif'
    assert names_of(s) == DYES and (read_site(f'{s},t=1', 3) == X[1,3]).all() and (read_plane(f'{s}#t=1,c=1', z=0) == X[1,0,1]).all()

def test_a_store_under_any_name(tmp_path):
    as_zarr(tmp_path/'plate', X, 'TZCYX')
    assert (read_site(tmp_path/'plate', 3, 1) == X[1,3]).all() and names_of(f'{tmp_path}/plate#c=1') == DYES[1:]

@pytest.fixture
def web(tmp_path, monkeypatch):
    "A folder, and where it is on the web"
    monkeypatch.setenv('CELLMAE_CACHE', str(tmp_path/'cache'))
    (tmp_path/'www').mkdir()
    with ThreadingHTTPServer(('127.0.0.1', 0), partial(SimpleHTTPRequestHandler, directory=tmp_path/'www')) as o:
        Thread(target=o.serve_forever, daemon=True).start()
        yield tmp_path/'www',f'http://127.0.0.1:{o.server_port}'
        o.shutdown()

def test_what_is_remote(web):
    folder,url = web
    ome(folder/'a #1.ome.tif', X[0], 'ZCYX', DYES); as_h5(folder/'a.h5', X[0], 'ZCYX')
    with ZipFile(folder/'a.zip', 'w') as z: z.write(folder/'a #1.ome.tif', 'b/a.tif')
    for f in ('a%20%231.ome.tif#', 'a%20%231.ome.tif?key=1&b=2#', 'a.h5?key=1#/a,', 'a.zip#b/a.tif,'):
        assert (read_plane(f'{url}/{f}c=1,z=3') == X[0,3,1]).all() and size_of(f'{url}/{f}c=0') == (24, 36)
    assert names_of(f'{url}/a%20%231.ome.tif') == DYES
    assert (read_site((folder/'a #1.ome.tif').as_uri(), 2) == X[0,2]).all()
    with pytest.raises(ImageError, match=f'{url}/none.tif#c=1: missing.*404'): read_site(f'{url}/none.tif#c=1')

# ---- planes in files of their own

def test_planes_in_several_files(tmp_path):
    fs = {(c,z): tiff(tmp_path/f'c{c}z{z}.tif', X[0,z,c]) for c in range(2) for z in range(5)}
    names = ['|'.join(str(fs[c,z]) for z in range(5)) for c in range(2)]
    for z,y in {'max':X[0].max(0), 'mean':np.rint(X[0].mean(0)), 'mid':X[0,2], 4:X[0,4]}.items(): assert (read_site(names, z) == y).all()
    assert (read_site(names[0], 'max') == X[0,:,0].max(0)).all() and size_of(names[0]) == (24, 36)
    with pytest.raises(ImageError, match='5 planes. Choose: `z=0` to `z=4`'): read_site(names)
    with pytest.raises(ImageError, match='no z=5, but 5'): read_site(names, 5)
    for c in range(2): [fs[c,z].unlink() for z in (0, 1, 3, 4)]
    assert (read_site(names, 'mid') == X[0,2]).all() # nothing else is read
    with pytest.raises(ImageError, match='c0z0.tif: missing'): read_site(names, 'max')
    with pytest.raises(ImageError, match='unequal depth in z: 4 planes, but 5 in'): read_site([names[0].partition('|')[2], names[1]], 'max')

def test_planes_that_differ(tmp_path):
    a,b = tiff(tmp_path/'a.tif', X[0,0,0]),tiff(tmp_path/'b.tif', X[0,0,0,:12])
    with pytest.raises(ImageError, match='wrong size. Planes of several sizes'): read_site([f'{a}|{b}'], 'max')

# ---- what goes wrong

def test_damage(tmp_path):
    with pytest.raises(ImageError, match='none.tif#c=1: missing. No such file'): read_site(f'{tmp_path}/none.tif#c=1')
    (tmp_path/'folder').mkdir()
    with pytest.raises(ImageError, match='folder: missing. A folder, no image'): read_site(tmp_path/'folder')
    (tmp_path/'a.tif').write_text('no image')
    with pytest.raises(ImageError, match='a.tif: unreadable. Cut short, or no image'): read_site(tmp_path/'a.tif')
    with pytest.raises(ImageError, match='none.h5.*missing'): read_site(f'{tmp_path}/none.h5#/a')

@pytest.mark.skipif(os.name=='nt' or os.getuid()==0, reason='everything may be read')
def test_no_permission(tmp_path):
    tiff(tmp_path/'a.tif', X[0,0,0]).chmod(0)
    with pytest.raises(ImageError, match='a.tif: no permission. Ask'): read_site(tmp_path/'a.tif')

def test_many_threads_one_file(tmp_path):
    f = ome(tmp_path/'a.ome.tif', X, 'TZCYX', compression='zlib')
    at = [(t,z,c) for t in range(3) for z in range(5) for c in range(2)]*4
    with ThreadPoolExecutor(8) as pool: xs = pool.map(lambda o: read_plane(f'{f}#t={o[0]},z={o[1]},c={o[2]}'), at)
    for (t,z,c),x in zip(at, xs): assert (x == X[t,z,c]).all()

def test_a_file_of_many_pages(tmp_path):
    "It stays open, and is still read right once it is written anew, or gone"
    x = g.integers(0, 4000, (60, 2, 16, 24)).astype(np.uint16)
    f = ome(tmp_path/'a.ome.tif', x, 'TCYX', DYES)
    at = [(t,c) for t in range(60) for c in range(2)]
    with ThreadPoolExecutor(8) as pool: xs = list(pool.map(lambda o: read_plane(f'{f}#t={o[0]},c={o[1]}'), at))
    assert (np.stack(xs) == x.reshape(-1, 16, 24)).all() and (read_plane(f'{f}#page=117') == x[58,1]).all() and names_of(f) == DYES
    ome(f, x[::-1], 'TCYX')
    assert (read_plane(f'{f}#t=1,c=1') == x[58,1]).all() and names_of(f) is None
    tiff(f, x[0,0])
    assert (read_plane(f) == x[0,0]).all()
    f.unlink()
    with pytest.raises(ImageError, match='missing'): read_plane(f)

def test_a_file_that_is_written_anew(tmp_path):
    f = ome(tmp_path/'a.ome.tif', X, 'TZCYX')
    assert (read_plane(f'{f}#t=1,z=1,c=1') == X[1,1,1]).all()
    ome(f, X[::-1], 'TZCYX', DYES)
    assert (read_plane(f'{f}#t=1,z=1,c=1') == X[1,1,1]).all() and (read_plane(f'{f}#t=0,z=1,c=1') == X[2,1,1]).all() and names_of(f) == DYES
