"Containers written by the library of each format give back their planes, and damage is told"
import gc, h5py, imagecodecs, json, multiprocessing, numpy as np, os, pickle, pyarrow as pa, pyarrow.parquet as pq
import fsspec, pytest, shutil, struct, sys, threading, zarr
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from zipfile import ZipFile
from cellmae import containers
from cellmae.containers import (OPENERS, below, held, is_remote, local, open_czi, open_h5, open_lif, open_nd2, open_npy,
                                open_npz, open_parquet, open_zarr, open_zip, opener_of, series_of)
from cellmae.images import ImageError
from cellmae.planes import read_site

rng = np.random.default_rng(0)
X = rng.integers(1, 4000, (2,3,4,32,24), 'u2') # TCZYX, no zeros
NAMES = ['Hoechst','ConA','Phalloidin']

def refuses(words, f, *args, **kw):
    with pytest.raises(ImageError) as e: f(*args, **kw)
    assert words in str(e.value), str(e.value)

@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv('CELLMAE_CACHE', str(tmp_path/'cache'))
    below.cache_clear()

# Zarr

def ngff(root, node, x, axes, version='0.4', level='0', names=NAMES, sep='/', shards=None, chunks=None, compressors='auto', **attrs):
    "An image of OME-Zarr 0.4 or 0.5"
    kinds = dict(t='time', c='channel')
    image = dict(multiscales=[dict(version=version, axes=[dict(name=k, type=kinds.get(k, 'space')) for k in axes],
                                   datasets=[dict(path=level), dict(path='small')])], **attrs)
    if names: image['omero'] = dict(channels=[dict(label=o) for o in names])
    old = version!='0.5'
    g = zarr.open_group(root, mode='a', zarr_format=2 if old else 3).create_group(node)
    g.attrs.update(image if old else dict(ome=dict(image, version='0.5')))
    keys = dict(name='v2' if old else 'default', separator=sep)
    a = g.create_array(level, shape=x.shape, dtype=x.dtype, shards=shards, chunk_key_encoding=keys, compressors=compressors,
                       chunks=chunks or (1,)*(x.ndim-2)+(16,24))
    a[:] = x
    return str(root)

@pytest.mark.parametrize('version', ['0.4','0.5'])
@pytest.mark.parametrize('axes,sep,level', [('cyx','/','0'), ('tczyx','/','full'), ('zyx','.','s0'), ('tczyx','.','0')])
def test_zarr_image(tmp_path, version, axes, sep, level):
    x = X[tuple(slice(None) if k in axes else 1 for k in 'tczyx')]
    p = ngff(tmp_path/'p.zarr', 'B/03/0', x, axes, version, level, sep=sep)
    o = open_zarr(p, 'B/03/0', {})
    assert (o.axes,o.shape,o.dtype,o.names)==(axes.upper(), x.shape, x.dtype, NAMES if 'c' in axes else None)
    assert (o.read()==x).all()
    at = {k:n-1 for k,n in zip(axes, x.shape) if k not in 'yx'}
    assert (o.read(**at)==x[tuple(at.values())]).all()
    assert (pickle.loads(pickle.dumps(o)).read(**at)==o.read(**at)).all()

@pytest.mark.parametrize('version', ['0.4','0.5'])
def test_zarr_without_omero_and_odd_names(tmp_path, version):
    p = ngff(tmp_path/'p.zarr', '0', X[0,:,0], 'cyx', version, names=None)
    assert open_zarr(p, '0', {}).names is None
    p = ngff(tmp_path/'q.zarr', '0', X[0,:,0], 'cyx', version, names=['a','b'])
    assert open_zarr(p, '0', {}).names is None

def test_zarr_03_has_plain_axes(tmp_path):
    p = ngff(tmp_path/'p.zarr', '0', X[0,:,0], 'cyx')
    f = tmp_path/'p.zarr/0/.zattrs'
    about = json.loads(f.read_text()); about['multiscales'][0]['axes'] = ['c','y','x']; f.write_text(json.dumps(about))
    assert open_zarr(p, '0', {}).axes=='CYX'
    del about['multiscales'][0]['axes']; f.write_text(json.dumps(about))
    refuses('3 axes, 3x32x24', open_zarr, p, '0', {}) # five axes are meant where none are named
    assert open_zarr(p, '0', dict(axes='cyx')).axes=='CYX'

def test_zarr_sharded_reads_what_is_chosen(tmp_path):
    p = ngff(tmp_path/'p.zarr', 'A/1/0', X[0], 'czyx', '0.5', shards=(3,2,32,24), chunks=(1,1,16,24))
    o = open_zarr(p, 'A/1/0', {})
    assert (o.read(c=2, z=3)==X[0,2,3]).all() and (o.read(z=1)==X[0,:,1]).all()
    shutil.rmtree(tmp_path/'p.zarr/A/1/0/0/c/0/1') # a shard with z of 2 and 3
    assert (o.read(c=2, z=1)==X[0,2,1]).all()
    refuses('missing. 1 chunks do not exist', o.read, c=2, z=3)

@pytest.mark.parametrize('version', ['0.4','0.5'])
def test_zarr_lost_chunks(tmp_path, version):
    x = X[0,:,0].copy(); x[1,:16] = 0 # a blank chunk that is there
    with zarr.config.set({'array.write_empty_chunks':True}): p = ngff(tmp_path/'p.zarr', 'A/1/0', x, 'cyx', version)
    a = tmp_path/'p.zarr/A/1/0/0'
    o = open_zarr(p, 'A/1/0', {})
    assert (o.read(c=1)==x[1]).all()
    (a/('c/1/1/0' if version=='0.5' else '1/1/0')).unlink()
    refuses('p.zarr/A/1/0/0: missing. 1 chunks do not exist or are cut short, such as (1, 1, 0). Copy', o.read, c=1)
    assert (o.read(c=0)==x[0]).all()
    blank = open_zarr(p, 'A/1/0', dict(blank=1)).read()
    assert not blank[1].any() and (blank[2]==x[2]).all()

@pytest.mark.parametrize('codec', ['BloscCodec','ZstdCodec',None])
def test_zarr_shards_of_any_compression(tmp_path, codec):
    how = getattr(zarr.codecs, codec)() if codec else None
    p = ngff(tmp_path/'p.zarr', '0', X[0], 'czyx', '0.5', shards=(3,2,32,24), chunks=(1,1,16,24), compressors=how)
    o = open_zarr(p, '0', {})
    assert (o.read()==X[0]).all()
    f = next((tmp_path/'p.zarr/0/0/c').rglob('*/1/0/0')); f.write_bytes(f.read_bytes()[:500])
    refuses('ut short', o.read, c=0, z=3)

def test_zarr_labels_may_be_blank(tmp_path):
    x = np.zeros((32,24), 'u4'); x[:16,:3] = 7
    p = ngff(tmp_path/'p.zarr', 'A/1/0/labels/nuclei', x, 'yx', names=None, chunks=(16,24), **{'image-label':{}})
    assert not (tmp_path/'p.zarr/A/1/0/labels/nuclei/0/1/0').exists()
    assert (open_zarr(p, 'A/1/0/labels/nuclei', {}).read()==x).all()

def test_zarr_nan_is_a_fill_too(tmp_path):
    a = zarr.create_array(tmp_path/'n.zarr', shape=(2,8,8), chunks=(1,8,8), dtype='f4', fill_value=np.nan)
    a[0] = 1
    o = open_zarr(tmp_path/'n.zarr', None, {})
    assert (o.read(i=0)==1).all()
    refuses('missing', o.read, i=1)

@pytest.mark.parametrize('version,lose,words', [
    ('0.4', '0/.zarray', 'missing. Its .zarray or zarr.json is not there'), ('0.5', '0/zarr.json', 'missing'),
    ('0.4', '.zattrs', 'no image. A group without `multiscales`, it holds 0'), ('0.5', 'zarr.json', 'missing')])
def test_zarr_without_its_metadata(tmp_path, version, lose, words):
    p = ngff(tmp_path/'p.zarr', 'A/1/0', X[0,:,0], 'cyx', version)
    (tmp_path/'p.zarr/A/1/0'/lose).unlink()
    refuses(words, open_zarr, p, 'A/1/0', {})

@pytest.mark.parametrize('version', ['0.4','0.5'])
@pytest.mark.parametrize('codec', [None,'blosc','zstd','gzip'])
def test_zarr_cut_short(tmp_path, version, codec):
    modern = dict(blosc=zarr.codecs.BloscCodec, zstd=zarr.codecs.ZstdCodec, gzip=zarr.codecs.GzipCodec)
    how = (dict(id=codec) if version=='0.4' else modern[codec]()) if codec else None
    p = ngff(tmp_path/'p.zarr', 'A/1/0', X[0,:,0], 'cyx', version, compressors=how)
    a = tmp_path/'p.zarr/A/1/0/0'
    f = a/('c/1/1/0' if version=='0.5' else '1/1/0')
    f.write_bytes(f.read_bytes()[:40])
    o = open_zarr(p, 'A/1/0', {})
    refuses('ut short', o.read, c=1)
    assert (o.read(c=0)==X[0,0,0]).all()
    f = a.parent/('zarr.json' if version=='0.5' else '.zattrs')
    f.write_text(f.read_text()[:50])
    refuses('is cut short', open_zarr, p, 'A/1/0', {})

def test_zarr_groups_that_are_no_image(tmp_path):
    root = tmp_path/'p.zarr'
    for i in (0,1): p = ngff(root, f'B/3/{i}', X[i,:,0], 'cyx')
    g = zarr.open_group(root, mode='a', zarr_format=2)
    g.attrs['plate'] = dict(wells=[dict(path='B/3')])
    g['B/3'].attrs['well'] = dict(images=[dict(path='0'), dict(path='1')])
    refuses('p.zarr: a plate. Open it with `Screen.open`', open_zarr, p, None, {})
    refuses('It holds 0, 1. Choose: `#series=0`', open_zarr, p, 'B/3', {})
    assert (open_zarr(p, 'B/3', dict(series=1)).read()==X[1,:,0]).all()
    refuses('missing. There is no zarr.json', open_zarr, p, 'B/4/0', {})
    refuses('no.zarr: missing. No such file', open_zarr, tmp_path/'no.zarr', '0', {})

def test_zarr_of_bioformats2raw(tmp_path):
    p = ngff(tmp_path/'p.zarr', '0', X[0], 'czyx')
    zarr.open_group(p, mode='a').attrs['bioformats2raw.layout'] = 3
    refuses('Choose: `#series=0`', open_zarr, p, None, {})
    assert (open_zarr(p, None, dict(series=0)).read()==X[0]).all()

@pytest.mark.parametrize('version', [2,3])
def test_zarr_plain_arrays(tmp_path, version):
    p = tmp_path/'p.zarr'
    g = zarr.open_group(p, mode='w', zarr_format=version)
    for k,x in dict(two=X[0,0,0], three=X[0,0], five=X).items(): g.create_array(k, data=x)
    assert open_zarr(p, 'two', {}).axes=='YX' and open_zarr(p, 'three', {}).axes=='IYX'
    refuses('5 axes, 2x3x4x32x24, unknown. Name them, Y before X, as in `#axes=', open_zarr, p, 'five', {})
    o = open_zarr(p, 'five', dict(axes='TCZYX'))
    assert (o.read(t=1, c=2, z=3)==X[1,2,3]).all()
    o = open_zarr(p, 'five', dict(i=1, axes='czyx'))
    assert o.axes=='CZYX' and (o.read(c=2)==X[1,2]).all()
    refuses('no i=2, but 2 images', open_zarr, p, 'five', dict(i=2))
    refuses('no image. A group without `multiscales`, it holds five, three, two', open_zarr, p, None, {})

def test_zarr_names_of_dimensions(tmp_path):
    zarr.create_array(tmp_path/'a.zarr', data=X[0], dimension_names=['channel','z','y','x'])
    assert open_zarr(tmp_path/'a.zarr', None, {}).axes=='CZYX'
    a = zarr.create_array(tmp_path/'b.zarr', data=X[0], zarr_format=2); a.attrs['_ARRAY_DIMENSIONS'] = ['c','z','y','x']
    assert open_zarr(tmp_path/'b.zarr', None, {}).axes=='CZYX'

def packed(root, f):
    with ZipFile(f, 'w') as z:
        for o in sorted(Path(root).rglob('*')):
            if o.is_file(): z.write(o, o.relative_to(root))
    return f

@pytest.mark.parametrize('version,end', [('0.4','.zarr.zip'), ('0.5','.zarr.zip'), ('0.5','.ozx'), ('0.4','.zip')])
def test_zarr_in_a_zip(tmp_path, version, end):
    root = ngff(tmp_path/'p.zarr', 'B/3/0', X[0,:,0], 'cyx', version)
    f = packed(root, tmp_path/f'p{end}')
    o = opener_of(f)(f, 'B/3/0', {})
    assert o.names==NAMES and (o.read(c=1)==X[0,1,0]).all()
    next(o for o in Path(root).rglob('*') if o.is_file() and o.parent.name=='1').unlink()
    o = opener_of(f)(packed(root, f), 'B/3/0', {})
    refuses('chunks do not exist', o.read)

def test_zarr_written_anew_is_read_anew(tmp_path):
    p = tmp_path/'p.zarr'
    ngff(p, '0', X[0,:,0], 'cyx'); assert open_zarr(p, '0', {}).read().shape==(3,32,24)
    shutil.rmtree(p)
    ngff(p, '0', X[1,:,0,:16], 'cyx')
    assert (open_zarr(p, '0', {}).read()==X[1,:,0,:16]).all()

@pytest.mark.parametrize('version', ['0.4','0.5'])
def test_zarr_in_a_bucket(version):
    url = f'memory://z{version}.zarr'
    fsspec.filesystem('memory').store.clear()
    ngff(url, 'B/3/0', X[0,:,0], 'cyx', version)
    o = open_zarr(url, 'B/3/0', {})
    assert o.names==NAMES and (o.read(c=1)==X[0,1,0]).all()
    fs = fsspec.filesystem('memory')
    fs.rm(next(o for o in fs.find(f'/z{version}.zarr') if o.endswith('1/1/0')))
    refuses('1 chunks do not exist', o.read, c=1)
    refuses('missing', open_zarr, url, 'B/4/0', {})

# Arrays

def test_npy_and_npz(tmp_path):
    np.save(tmp_path/'x.npy', X[0]); np.savez(tmp_path/'a.npz', a=X[0,0], b=X[1,0]); np.savez_compressed(tmp_path/'1.npz', X[0,:,0])
    o = open_npy(tmp_path/'x.npy', None, dict(axes='CZYX'))
    assert (o.read(z=2)==X[0,:,2]).all() and (o.read(c=1, z=2)==X[0,1,2]).all()
    assert (open_npy(tmp_path/'x.npy', None, dict(i=2)).read()==X[0,2]).all()
    refuses('unknown axes. 4 axes', open_npy, tmp_path/'x.npy', None, {})
    refuses('`CXY`. Name them', open_npz, tmp_path/'a.npz', 'a', dict(axes='CXY'))
    assert (open_npz(tmp_path/'1.npz', None, {}).read()==X[0,:,0]).all()
    assert (open_npz(tmp_path/'a.npz', 'b', dict(i=3)).read()==X[1,0,3]).all()
    refuses('Choose one of `#a`, `#b`', open_npz, tmp_path/'a.npz', None, {})
    np.save(tmp_path/'o.npy', np.array([{}]), allow_pickle=True)
    refuses('unreadable', open_npy, tmp_path/'o.npy', None, {})

def test_npy_is_not_read_whole(tmp_path):
    x = np.lib.format.open_memmap(tmp_path/'big.npy', mode='w+', dtype='u2', shape=(20000,1000,1000)) # 40 GB, sparse
    x[17777,5,6] = 9; x.flush(); del x
    assert open_npy(tmp_path/'big.npy', None, {}).read(i=17777)[5,6]==9

@pytest.mark.parametrize('how', ['labels','axes','bytes','list','ilastik','words'])
def test_h5_axes(tmp_path, how):
    with h5py.File(tmp_path/'x.h5', 'w') as f:
        x = f.create_dataset('a/b', data=X[0], chunks=(1,1,32,24), compression='gzip')
        if how=='axes': x.attrs['axes'] = 'czyx'
        if how=='list': x.attrs['axes'] = [b'c', b'z', b'y', b'x']
        if how=='bytes': x.attrs['axes'] = np.bytes_('CZYX')
        if how=='ilastik': x.attrs['axistags'] = json.dumps(dict(axes=[dict(key=k) for k in 'czyx']))
        if how in ('labels','words'):
            for d,k in zip(x.dims, 'czyx' if how=='labels' else ('channel','z','row','column')): d.label = k
    o = open_h5(tmp_path/'x.h5', '/a/b', {})
    assert o.axes=='CZYX' and (o.read(c=1, z=2)==X[0,1,2]).all()
    assert (open_h5(tmp_path/'x.h5', 'a', {}).read(z=2)==X[0,:,2]).all() # the only one in there

@pytest.mark.parametrize('chunks', [(1,8,8), (2,4,8), None])
def test_h5_where_nobody_wrote(tmp_path, chunks):
    with h5py.File(tmp_path/'x.h5', 'w') as f:
        d = f.create_dataset('a', shape=(5,8,8), dtype='u2', chunks=chunks)
        f.create_dataset('none', shape=(5,8,8), dtype='u2', chunks=chunks)
        d[0],d[1] = 7,0
    assert (open_h5(tmp_path/'x.h5', 'a', {}).read(i=0)==7).all() and not open_h5(tmp_path/'x.h5', 'a', {}).read(i=1).any()
    refuses('x.h5#none: missing. Nobody wrote to this part', open_h5(tmp_path/'x.h5', 'none', {}).read, i=1)
    if chunks: refuses('x.h5#a: missing. Nobody wrote', open_h5(tmp_path/'x.h5', 'a', dict(i=4)).read)

def test_h5_says_what_it_holds(tmp_path):
    with h5py.File(tmp_path/'x.hdf5', 'w') as f:
        for k in 'ab': f[f'w/{k}'] = X[0,0,0]
        f['table'] = np.arange(3)
    refuses('Choose one of `#/w/a`, `#/w/b`.', open_h5, tmp_path/'x.hdf5', None, {})
    refuses('There is no /c. It holds `#/w/a`', open_h5, tmp_path/'x.hdf5', '/c', {})
    (tmp_path/'y.h5').write_bytes((tmp_path/'x.hdf5').read_bytes()[:1000])
    refuses('y.h5: unreadable. Cut short', open_h5, tmp_path/'y.h5', 'w/a', {})

# Pictures

def test_zip(tmp_path):
    with ZipFile(tmp_path/'x.zip', 'w', 8) as z:
        for i in range(3): z.writestr(f'p/{i}.png', imagecodecs.png_encode(X[0,0,i]))
        z.writestr('__MACOSX/p/._0.png', b'')
    assert (imagecodecs.png_decode(open_zip(tmp_path/'x.zip', 'p/1.png', {}))==X[0,0,1]).all()
    refuses('There is no p/3.png. It holds `#p/0.png`, `#p/1.png`, `#p/2.png`.', open_zip, tmp_path/'x.zip', 'p/3.png', {})
    raw = bytearray((tmp_path/'x.zip').read_bytes()); raw[200] ^= 255
    (tmp_path/'y.zip').write_bytes(raw)
    refuses('y.zip: unreadable', open_zip, tmp_path/'y.zip', 'p/0.png', {})

@pytest.mark.parametrize('kind', ['struct','binary','large'])
def test_parquet(tmp_path, kind):
    raw = [imagecodecs.jpeg2k_encode(X[t,c,0], level=0, reversible=True) for t in range(2) for c in range(3)]
    types = dict(binary=pa.binary(), large=pa.large_binary())
    cells = [dict(bytes=o, path=f'{i}.jp2') for i,o in enumerate(raw)] if kind=='struct' else pa.array(raw, types[kind])
    pq.write_table(pa.table(dict(id=[str(i) for i in range(6)], jp2=cells)), tmp_path/'x.parquet', row_group_size=4)
    for i in (5,0,3,4): assert open_parquet(tmp_path/'x.parquet', None, dict(row=i))==raw[i]
    refuses('no row=6, but 6 rows', open_parquet, tmp_path/'x.parquet', None, dict(row=6))
    refuses('Choose: `#row=0` to `#row=5`', open_parquet, tmp_path/'x.parquet', 'jp2', {})

def test_parquet_reads_one_group_and_keeps_it(tmp_path, monkeypatch):
    pq.write_table(pa.table(dict(jp2=[bytes([i])*9 for i in range(100)])), tmp_path/'x.parquet', row_group_size=10)
    asked,was = [],pq.ParquetFile.read_row_group
    monkeypatch.setattr(pq.ParquetFile, 'read_row_group', lambda self, i, **kw: asked.append(i) or was(self, i, **kw))
    for i in range(25, 45): assert open_parquet(tmp_path/'x.parquet', None, dict(row=i))==bytes([i])*9
    assert asked==[2,3,4]

def test_parquet_without_bytes(tmp_path):
    rows = [dict(bytes=None, path='a.jp2'), dict(bytes=b'1', path='b.jp2')]
    pq.write_table(pa.table(dict(image=rows, mask=rows)), tmp_path/'x.parquet')
    refuses('Choose one of `#image`, `#mask`', open_parquet, tmp_path/'x.parquet', None, dict(row=0))
    refuses("No picture in this row, only {'bytes': None, 'path': 'a.jp2'}", open_parquet, tmp_path/'x.parquet', 'mask', dict(row=0))
    pq.write_table(pa.table(dict(id=[1])), tmp_path/'y.parquet')
    refuses('holds nothing that could be one', open_parquet, tmp_path/'y.parquet', None, dict(row=0))

# The microscopes' own

def write_czi(f, x, scenes=2, names=('DAPI','GFP','Cy5'), skip=()):
    "`x`: scene, channel, plane, height, width"
    from pylibCZIrw import czi
    with czi.create_czi(str(f)) as o:
        for s,c,z in np.ndindex(x.shape[:3]):
            if (s,c,z) in skip: continue
            o.write(x[s,c,z][...,None] if x.ndim==5 else x[s,c,z], location=(100*s,50*s), plane=dict(C=c, Z=z), scene=s)
        o.write_metadata('x', channel_names=dict(enumerate(names)))
    return f

def test_czi(tmp_path):
    f = write_czi(tmp_path/'x.czi', X, skip=[(1,2,3)])
    refuses('2 scenes. Choose: `#series=0` to `#series=1`', open_czi, f, None, {})
    o = open_czi(f, None, dict(series=1))
    assert sorted(zip(o.axes, o.shape))==[('C',3),('X',24),('Y',32),('Z',4)] and o.names==['DAPI','GFP','Cy5']
    assert (o.read(c=1, z=2)==X[1,1,2]).all() and o.read(c=1).shape==(4,32,24) and (o.read(c=1)==X[1,1]).all()
    refuses('holds nothing: the microscope was stopped', o.read, c=2, z=3)
    assert (pickle.loads(pickle.dumps(o)).read(c=0, z=0)==X[1,0,0]).all()

def test_czi_of_colours(tmp_path):
    x = rng.integers(0, 255, (1,1,1,32,24,3), 'u1')
    o = open_czi(write_czi(tmp_path/'x.czi', x, names=['RGB']), None, {})
    assert (o.axes,o.shape)==('YXS',(32,24,3)) and (o.read()==x[0,0,0,...,::-1]).all()

def lif(f, images, dyes, axis=3):
    "A file of Leica; `images`: name -> `(Z,C,Y,X)`, or tiles for Z if `axis` is 10"
    def dim(i, n, inc):
        return f'<DimensionDescription DimID="{i}" NumberOfElements="{n}" Origin="0" Length="1" Unit="m" BitInc="0" BytesInc="{inc}"/>'
    xml,blocks = '',b''
    for k,(name,x) in enumerate(images.items()):
        z,c,h,w = x.shape
        channels = ''.join(f'<ChannelDescription DataType="0" ChannelTag="0" Resolution="16" NameOfMeasuredQuantity="" Min="0" '
            f'Max="1" Unit="" LUTName="{lut}" IsLUTInverted="0" BytesInc="{i*h*w*2}" BitInc="0">'
            +(f'<ChannelProperty><Key>DyeName</Key><Value>{dye}</Value></ChannelProperty>' if dye else '')
            +'</ChannelDescription>' for i,(lut,dye) in enumerate(dyes))
        dims = dim(1, w, 2)+dim(2, h, 2*w)+dim(axis, z, 2*w*h*c)
        xml += (f'<Element Name="{name}"><Data><Image><ImageDescription><Channels>{channels}</Channels><Dimensions>{dims}'
                f'</Dimensions></ImageDescription></Image></Data><Memory Size="{x.nbytes}" MemoryBlockID="M{k}"/></Element>')
        raw,label = x.tobytes(),f'M{k}'.encode('utf-16-le')
        blocks += struct.pack('<IIBQBI', 0x70, 0, 0x2A, len(raw), 0x2A, len(label)//2)+label+raw
    head = (f'<LMSDataContainerHeader Version="2"><Element Name="p"><Children>{xml}</Children></Element>'
            '</LMSDataContainerHeader>').encode('utf-16-le')
    f.write_bytes(struct.pack('<IIBI', 0x70, len(head)+5, 0x2A, len(head)//2)+head+blocks)
    return f

def test_lif(tmp_path):
    x = np.swapaxes(X, 1, 2) # position, Z, C, Y, X
    f = lif(tmp_path/'x.lif', dict(a=x[0], b=x[1]), [('Blue','DAPI'), ('Green','FITC'), ('Red','Cy5')])
    refuses('2 images. Choose: `#series=0`', open_lif, f, None, {})
    o = open_lif(f, None, dict(series=1))
    assert (o.axes,o.shape,o.names)==('ZCYX', (4,3,32,24), ['DAPI','FITC','Cy5'])
    assert (o.read(c=2, z=3)==X[1,2,3]).all() and (o.read(z=1)==X[1,:,1]).all() and (o.read()==x[1]).all()
    f = lif(tmp_path/'y.lif', dict(a=x[0]), [('Gray',None)]*3)
    assert open_lif(f, None, {}).names is None
    f = lif(tmp_path/'z.lif', dict(a=x[0]), [('Blue',None), ('Green',None), ('Red',None)])
    assert open_lif(f, None, {}).names==['Blue','Green','Red']
    f.write_bytes(f.read_bytes()[:-1000])
    refuses('unreadable. Cut short', open_lif(f, None, {}).read, c=2, z=3)

def test_lif_of_tiles(tmp_path):
    o = open_lif(lif(tmp_path/'x.lif', dict(a=np.swapaxes(X[0], 0, 1)), [('Gray',None)]*3, axis=10), None, {})
    assert o.axes=='ICYX' and (o.read(i=3, c=1)==X[0,1,3]).all() and (o.read(i=2)==X[0,:,2]).all()
    assert (read_site(f'{tmp_path}/x.lif#i=2')==X[0,:,2]).all()

def clx(name, v):
    "What Nikon calls a variant, in XML"
    kind = {bool:'bool', int:'lx_uint32', float:'double', str:'CLxStringW'}.get(type(v))
    if kind: return f'<{name} runtype="{kind}" value="{str(v).lower() if kind=="bool" else v}"/>'
    return f'<{name} runtype="CLxListVariant">{"".join(clx(k if isinstance(v, dict) else "no_name", o) for k,o in (v.items() if isinstance(v, dict) else enumerate(v)))}</{name}>'

def nd2(f, x, names, lose=(), called='B0{}_0'):
    "A file of Nikon, version 2, of `(P,Z,C,Y,X)`"
    p,z,c,h,w = x.shape
    xml = lambda v: f'<variant version="1.0">{clx("no_name", v)}</variant>'.encode()
    planes = {f'a{i}':dict(sDescription=o, uiCompCount=1, pFluorescentProbe=dict(m_uiColor=1)) for i,o in enumerate(names)}
    z_loop = dict(eType=4, uLoopPars=dict(uiCount=z, dZStep=1.))
    points = [dict(dPosX=float(i), dPosY=0., dPosZ=0., pPosName=called.format(i+3)) for i in range(p)]
    chunks = {'ImageAttributes!': xml(dict(uiWidth=w, uiHeight=h, uiWidthBytes=w*c*2, uiComp=c, uiBpcInMemory=16,
                                           uiBpcSignificant=16, uiSequenceCount=p*z, eCompression=2)),
              'ImageMetadataSeq|0!': xml(dict(bCalibrated=True, dCalibration=1., sPicturePlanes=dict(uiCount=c, sPlaneNew=planes))),
              'ImageMetadata!': xml(dict(eType=2, uLoopPars=dict(Points=points), ppNextLevelEx=[z_loop]))}
    for i,o in enumerate(x.reshape(-1,c,h,w)):
        if i not in lose: chunks[f'ImageDataSeq|{i}!'] = bytes(8)+np.moveaxis(o, 0, -1).tobytes()
    raw = struct.pack('IIQ32s64s', 0x0ABECEDA, 32, 64, b'ND2 FILE SIGNATURE CHUNK NAME01!', b'Ver2.0')
    raw,places = raw.ljust(4096, b'\0'),b''
    for name,data in chunks.items():
        places += name.encode()+struct.pack('QQ', len(raw), len(data))
        raw += struct.pack('IIQ', 0x0ABECEDA, 4072, len(data))+name.encode().ljust(4072, b'\0')+data
    places += b'ND2 CHUNK MAP SIGNATURE 0000001!'+struct.pack('Q', len(raw))
    f.write_bytes(raw+struct.pack('IIQ', 0x0ABECEDA, 32, len(places))+b'ND2 FILEMAP SIGNATURE NAME 0001!'+places)
    return f

def test_nd2(tmp_path):
    x = np.swapaxes(X, 1, 2)
    f = nd2(tmp_path/'x.nd2', x, ['DAPI','GFP','Cy5'], lose=[6])
    refuses('2 positions. Choose: `#series=0` to `#series=1`', open_nd2, f, None, {})
    o = open_nd2(f, None, dict(series=1))
    assert (o.axes,o.shape,o.dtype,o.names)==('ZCYX', (4,3,32,24), X.dtype, ['DAPI','GFP','Cy5'])
    assert (o.read(c=2, z=3)==X[1,2,3]).all() and (o.read(z=1)==X[1,:,1]).all()
    refuses('Frame 6 holds nothing', o.read, c=0, z=2)
    one = open_nd2(nd2(tmp_path/'y.nd2', x[:1,:1,:1], ['DAPI']), None, {})
    assert (one.axes,one.names)==('YX',['DAPI']) and (one.read()==X[0,0,0]).all()

@pytest.mark.parametrize('end,module', [('.nd2','nd2'), ('.lif','liffile'), ('.czi','pylibCZIrw.czi')])
def test_vendor_is_an_extra(tmp_path, monkeypatch, end, module):
    monkeypatch.setitem(sys.modules, module, None)
    (tmp_path/f'x{end}').write_bytes(b'1')
    refuses(f'{end[1:]} files: `pip install cellmae[vendor]`', OPENERS[end], tmp_path/f'x{end}', None, {})

@pytest.mark.parametrize('end', sorted(o for o,f in OPENERS.items() if o[0]=='.' and f.__module__==containers.__name__))
def test_damage_is_told_with_the_file(tmp_path, end):
    f = tmp_path/f'x{end}'
    refuses('missing. No such file', OPENERS[end], f, 'a', dict(row=0, series=0))
    f.write_bytes(b'no container at all'*9)
    with pytest.raises(ImageError) as e: OPENERS[end](f, 'a', dict(row=0, series=0))
    assert e.value.file.startswith(str(f)) and e.value.problem in ('unreadable','missing'), e.value

# Open containers

def fds(root): return sum(os.path.realpath(f'/proc/self/fd/{o}').startswith(str(root)) for o in os.listdir('/proc/self/fd'))

def many(root, n):
    "Containers of six kinds, each with its number in it"
    out = []
    for i in range(n):
        end = ('.h5','.npy','.npz','.zip','.parquet','.zarr')[i%6]
        f = root/f'{i}{end}'
        x = np.full((2,8,8), i+1, 'u2')
        if end=='.h5':
            with h5py.File(f, 'w') as o: o['a'] = x
        elif end=='.npy': np.save(f, x)
        elif end=='.npz': np.savez(f, a=x)
        elif end=='.parquet': pq.write_table(pa.table(dict(a=[imagecodecs.png_encode(x[0])])), f)
        elif end=='.zarr': zarr.create_array(f, name='a', data=x)
        else:
            with ZipFile(f, 'w') as o: o.writestr('a', imagecodecs.png_encode(x[0]))
        out.append(f)
    return out

def number(f):
    o = opener_of(f)(f, None if f.suffix=='.npy' else 'a', {})
    x = imagecodecs.png_decode(o) if isinstance(o, bytes) else o.read(i=1)
    assert (x==x.flat[0]).all()
    return int(x.flat[0])-1

def test_two_hundred_containers_keep_64_open(tmp_path):
    for i,f in enumerate(many(tmp_path, 200)):
        assert number(f)==i
        assert fds(tmp_path)<=64
    assert fds(tmp_path)>40

def test_threads(tmp_path):
    fs = many(tmp_path, 120)
    order = rng.integers(0, len(fs), 4000)
    with ThreadPoolExecutor(8) as pool: got = list(pool.map(lambda i: number(fs[i]), order))
    assert got==order.tolist()
    gc.collect()
    assert fds(tmp_path)<=64

def hammer(fs, seed, said):
    order = np.random.default_rng(seed).integers(0, len(fs), 500)
    said.put([number(fs[i]) for i in order]==order.tolist())

@pytest.mark.parametrize('how', ['fork','spawn'])
def test_forked_and_spawned_readers(tmp_path, how):
    fs = many(tmp_path, 80)
    for f in fs: number(f) # open in this process
    stop = threading.Event()
    def busy():
        while not stop.is_set(): hammer(fs, 9, type('Q', (), dict(put=lambda self, o: None))())
    t = threading.Thread(target=busy); t.start() # holds locks while we fork
    ctx = multiprocessing.get_context(how)
    said = ctx.Queue()
    ps = [ctx.Process(target=hammer, args=(fs, i, said)) for i in range(2)]
    for p in ps: p.start()
    try: assert [said.get(timeout=60) for _ in ps]==[True,True]
    finally:
        stop.set(); t.join()
        for p in ps: p.join(10)

def test_a_container_in_use_is_not_closed(tmp_path):
    fs = many(tmp_path, 200)
    with held(fs[3], ZipFile) as z:
        for f in fs[4:]: number(f)
        assert (imagecodecs.png_decode(z.read('a'))==4).all()

def test_a_changed_file_is_opened_again(tmp_path):
    f = tmp_path/'x.h5'
    for i in (1,2):
        if i==2: f.unlink()
        with h5py.File(f, 'w') as o: o['a'] = np.full((2,8,8), i+1)
        assert number(f)==i
    f.unlink()
    refuses('missing. No such file', number, f)

def test_an_error_does_not_stay(tmp_path):
    f = tmp_path/'x.npy'
    f.write_bytes(b'')
    refuses('unreadable', number, f)
    np.save(f, np.full((2,8,8), 6, 'u2'))
    assert number(f)==5

def test_no_right_to_read(tmp_path):
    np.save(tmp_path/'x.npy', X)
    def shut(path): raise PermissionError(13, 'Permission denied')
    def read():
        with held(tmp_path/'x.npy', shut): pass
    refuses('x.npy: no permission. Ask its owner', read)

# Remote

class Server(SimpleHTTPRequestHandler):
    asked,lie = [],False
    def log_message(self, *args): pass
    def do_GET(self): self.asked.append(self.path); super().do_GET()
    def send_header(self, k, v):
        super().send_header(k, str(int(v)+5) if self.lie and k=='Content-Length' else v)

@pytest.fixture
def server(tmp_path):
    (tmp_path/'www').mkdir()
    Server.asked.clear(); Server.lie = False
    s = ThreadingHTTPServer(('127.0.0.1',0), partial(Server, directory=str(tmp_path/'www')))
    threading.Thread(target=s.serve_forever, daemon=True).start()
    yield tmp_path/'www',f'http://127.0.0.1:{s.server_port}'
    s.shutdown(); s.server_close()

def test_http_without_aiohttp(server, monkeypatch):
    www,url = server
    for o in ('aiohttp','fsspec'): monkeypatch.setitem(sys.modules, o, None)
    np.save(www/'a b.npy', X[0])
    with ThreadPoolExecutor(8) as pool: fs = set(pool.map(local, [f'{url}/a b.npy']*16))
    assert len(fs)==1 and Server.asked==['/a%20b.npy']
    o = opener_of(f'{url}/a b.npy?download=1')(f'{url}/a b.npy', None, dict(i=1))
    assert (o.read(i=2)==X[0,1,2]).all()

def test_http_says_what_is_wrong(server, tmp_path):
    www,url = server
    refuses('no.npy: missing. HTTP Error 404', local, f'{url}/no.npy')
    refuses('not fetched', local, 'http://127.0.0.1:1/no.npy')
    (www/'x.txt').write_text('abc')
    Server.lie = True
    refuses('not fetched. 3 bytes of 8 came', local, f'{url}/x.txt')
    assert not [f for f in (tmp_path/'cache').rglob('*') if f.is_file()]
    refuses('do not list', below, url)
    refuses('p.zarr: not fetched', open_zarr, 'http://127.0.0.1:1/p.zarr', '0', {})

def test_zarr_on_a_server(server):
    www,url = server
    ngff(www/'p.zarr', 'B/3/0', X[0,:,0], 'cyx', '0.5')
    o = open_zarr(f'{url}/p.zarr', 'B/3/0', {})
    assert o.names==NAMES and (o.read(c=1)==X[0,1,0]).all()
    assert not [o for o in Server.asked if o.endswith('/c/0/0/0')] # no other chunk
    packed(www/'p.zarr', www/'p.zarr.zip')
    assert (open_zarr(f'{url}/p.zarr.zip', 'B/3/0', {}).read(c=2)==X[0,2,0]).all()

def test_bucket():
    fs = fsspec.filesystem('memory'); fs.store.clear()
    fs.pipe({'/b/A/1.txt':b'1', '/b/B/2.txt':b'22', '/c.txt':b''})
    assert below('memory://b')==['A/1.txt','B/2.txt']
    assert local('memory://b/B/2.txt').read_bytes()==b'22'
    refuses('missing. Nothing is there', below, 'memory://no')
    refuses('missing', local, 'memory://b/no.txt')

def test_s3_without_its_library(monkeypatch):
    monkeypatch.setattr(containers, '_nobody', lambda: True)
    monkeypatch.setitem(sys.modules, 's3fs', None)
    monkeypatch.delitem(sys.modules['fsspec.registry']._registry, 's3', raising=False) # what was imported
    refuses('`pip install cellmae[remote]`', local, 's3://bucket/x.tif')

@pytest.mark.parametrize('nobody', [True,False])
def test_public_buckets_need_no_key(monkeypatch, nobody):
    pytest.importorskip('s3fs')
    monkeypatch.setattr(containers, '_nobody', lambda: nobody)
    assert containers._file_system('s3://bucket/x.tif')[0].anon==nobody

def test_what_is_remote(tmp_path):
    for o in ('https://x.org/a.tif','s3://b/a','gs://b/a','memory://a'): assert is_remote(o)
    for o in ('a.tif','C:/a.tif','C:\\a.tif','file:///a.tif','a://b.tif',tmp_path): assert not is_remote(o)

# Through an address

def every_kind(t):
    "Address of the same three planes in each kind of container, without and with a number"
    x = X[1,:,0]
    for end,version in (('.zarr','0.4'), ('','0.5')): ngff(t/f'p{end}', 'B/3/0', x, 'cyx', version)
    packed(t/'p', t/'p.ozx'); np.save(t/'x.npy', x); np.save(t/'last.npy', np.moveaxis(x, 0, -1)); np.savez(t/'x.npz', a=x, b=X)
    with h5py.File(t/'x.h5', 'w') as f: f['a/b'] = x; f['all'] = X
    png = [imagecodecs.png_encode(o) for o in x]
    with ZipFile(t/'x.zip', 'w') as z: [z.writestr(f'a b/{i} #1.png', o) for i,o in enumerate(png)]
    pq.write_table(pa.table(dict(png=[dict(bytes=o, path='') for o in png])), t/'x.parquet', row_group_size=2)
    write_czi(t/'x.czi', X[:,:,:1]); nd2(t/'x.nd2', np.swapaxes(X, 1, 2)[:,:1], NAMES)
    lif(t/'x.lif', {str(i):np.swapaxes(o, 0, 1)[:1] for i,o in enumerate(X)}, [('Blue','DAPI'), ('Green','FITC'), ('Red','Cy5')])
    whole = ['p.zarr/B/3/0','p/B/3/0','p.ozx#B/3/0','x.npy','last.npy','last.npy#axes=YXC','x.npz#a','x.npz#b,i=1,axes=CZYX,z=0','x.h5#/a/b',
             'x.h5#/all,axes=tczyx,t=1,z=0','x.czi#series=1','x.nd2#series=1','x.lif#series=1']
    return [str(t/o) for o in whole],[[str(t/f'x.zip#a b/{i} #1.png') for i in range(3)], [str(t/f'x.parquet#row={i}') for i in range(3)]]

def test_the_same_planes_from_every_kind(tmp_path):
    whole,lists = every_kind(tmp_path)
    for a in whole+lists: assert (read_site(a)==X[1,:,0]).all(), a
    for a in whole: assert (read_site([f'{a}{"," if "#" in a else "#"}c=2'])==X[1,2:,0]).all(), a

def name_scenes(f, *wells):
    "As the microscope does, in any order"
    from pylibCZIrw import czi
    scenes = [f'<Scene Index="{i}" Name="P1"><ArrayName>{w}</ArrayName></Scene>' for i,w in enumerate(wells)]
    with czi.edit_czi(str(f)) as e, e.edit_session() as b:
        dims = f'<Dimensions><S><Scenes>{"".join(scenes[::-1])}</Scenes></S>'
        b.set_xml(b.get_xml().replace('<Dimensions>', dims))

def test_names_of_positions(tmp_path):
    f = write_czi(tmp_path/'x.czi', X[:,:,:1])
    assert series_of(f)==['','']
    name_scenes(f, 'B03', 'B04')
    assert series_of(f)==['B03','B04']
    x = np.swapaxes(X, 1, 2)
    assert series_of(nd2(tmp_path/'x.nd2', x, NAMES))==['B03_0','B04_0']
    assert series_of(lif(tmp_path/'x.lif', {'B/3/R1':x[0], 'B/4/R1':x[1]}, [('Gray',None)]*3))==['B/3/R1','B/4/R1']

@pytest.mark.parametrize('how', ['nd2','wells.nd2','lif','czi','nameless.czi'])
def test_a_plate_of_a_vendor_opens(tmp_path, how):
    from cellmae.screen import Screen
    x,t = np.swapaxes(X, 1, 2)[:,:1],tmp_path/'P7'
    t.mkdir()
    if how=='nd2': nd2(t/'P7.nd2', x, NAMES)
    if how=='wells.nd2': [nd2(t/f'Well{w}.nd2', x[i:i+1], NAMES, called='') for i,w in enumerate(('B03','B04'))]
    if how=='lif': lif(t/'P7.lif', {'B/3/R1':x[0], 'B/4/R1':x[1]}, [(o,o) for o in NAMES])
    if 'czi' in how: f = write_czi(t/'P7.czi', X[:,:,:1], names=NAMES)
    if how=='nameless.czi':
        with pytest.raises(ValueError, match="which wells.*`well='A01'`"): Screen.open(t)
        return
    if how=='czi': name_scenes(f, 'B03', 'B04')
    screen = Screen.open(t)
    assert list(screen.table['well'])==['B03','B04'] and set(screen.table['plate'])=={'P7'}
    assert (screen.read(1)==X[1,:,0]).all() and len(screen.channels)==3
