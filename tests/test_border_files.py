"Names, wells, controls, tables and pixels in the spellings that people and instruments have for them"
import bz2
import errno
import gzip
import lzma
import os
import stat
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import Mock

import imagecodecs
import numpy as np
import pandas as pd
import pytest
import tifffile
from PIL import Image

from cellmae import files
from cellmae.files import locked, read_table, write_whole
from cellmae.images import ImageError, fit_range, read_image, to_uint8
from cellmae.labels import clean, dates_among, is_control, well_name, yes_no

# ---- labels

@pytest.mark.parametrize('given,names', [
    ([1., np.float32(12), np.int64(3), np.nan, float('inf')], ['1', '12', '3', '', 'inf']),
    (pd.array([1, None], dtype='Int64'), ['1', '']),
    (pd.array([True, None], dtype='boolean'), ['True', '']),
    (pd.Series([pd.Timestamp('2023-03-01'), pd.NaT]), ['2023-03-01 00:00:00', '']),
    ([b'TP53', 'A\xa0', '\ufeffB', '1.0', '-1.0', '1.50', '.0'], ['TP53', 'A', 'B', '1', '-1', '1.50', '.0']),
    ([1, True, '1', 1.], ['1', 'True', '1', '1']),
    (['NA', 'nan', 'None', 'null', 'N/A', 'NaN'], ['NA', 'nan', 'None', 'null', 'N/A', 'NaN']),
    ([], [])])
def test_clean(given, names): assert clean(given).tolist() == names

rows = dict(A=1, H=8, P=16, Q=17, Z=26, AA=27, AF=32)
spellings = ['{r}{c}', '{l}{c:02d}', '{r}{c:03d}', '{r}-{c}', '{r} - {c:02d}', '{r}_{c:02d}', '{r} {c}', '{r}.{c}',
             ' {r}{c:02d} ', 'Well {r}{c:02d}', 'well_{r}{c}', 'Well{r}{c:02d}', 'r{n:02d}c{c:02d}', 'R{n}C{c}',
             'R{n:02d}-C{c:02d}', 'Row{n}_Col{c}', 'row {n} column {c}', 'Row{n:02d}_Well{c:02d}', '{r}{c}.0', '{r}/{c}']

@pytest.mark.parametrize('spelling', spellings)
def test_wells_of_instruments(spelling):
    for r,n in rows.items():
        for c in (1, 9, 10, 24, 48):
            assert well_name(spelling.format(r=r, l=r.lower(), n=n, c=c)) == f'{r}{c:02d}'

no_wells = ('POS002 0013 W0013 A00 A49 AG01 A0100 r33c01 r01c49 r0c1 r1c0 2_3 12 DMSO A D03f00d0 B02_s1 A1B2 BB01').split()

@pytest.mark.parametrize('name', no_wells)
def test_what_is_no_well_stays(name): assert well_name(name) == name

def test_missing_wells(): assert [well_name(o) for o in (None, np.nan, ' ', 12.)] == ['', '', '', '12']

@pytest.mark.parametrize('name', [
    'Negative Control', 'negctrl', 'neg_ctrl_2', 'NegCon', 'siCTRL', 'si-NC_1', 'shNT', 'sgNTC_0001', 'NT_1', 'NC', 'mock 1',
    'DMSO_10uM', '1% DMSO', 'DMSO control', 'control siRNA', 'siRNA control', 'CONTROL', 'untreated', 'not treated',
    'no treatment', 'Empty vector control', 'NonTargetingControlGuideForHuman_0001', 'non-targeting guide',
    'nontargeting_sgRNA_5', 'safe-targeting', 'INTERGENIC', 'Vehicle', 'scramble', b'DMSO', ' DMSO '])
def test_controls(name): assert is_control(name)

@pytest.mark.parametrize('name', [
    'NT5C', 'NT5E', 'NT3', 'NTS', 'NCF1', 'NEGR1', 'MOCOS', 'POSTN', 'pos control', 'poscon_diverse', 'transfection control',
    'control compound', 'Luciferase', 'EGFP', 'WT', '0', '01', '1', '1.0', 'yes', 'y', 'no', 'true', 'siTP53', 'EGFR siRNA',
    'sgRNA', 'guide 1', 'water', 'MINT', 'nan', 'DMSO + TP53', 'TP53 DMSO', '10 uM', 1138, 1., 1, True, False, None, ''])
def test_no_controls(name): assert not is_control(name)

@pytest.mark.parametrize('yes,no', [
    ('True', 'False'), ('YES', 'No'), ('y', 'n'), ('T', 'F'), ('1', '0'), ('1.0', '0.0'), (1, 0), (1., 0.), (True, False),
    ('control', 'treatment'), ('negcon', 'poscon_orf'), ('negative_control', 'positive_control'), ('negcon', 'trt')])
def test_yes_or_no(yes, no):
    for kind in (list, pd.Categorical, pd.Series, np.array): assert yes_no(kind([yes, no, no])).tolist() == [True, False, False]

@pytest.mark.parametrize('gap', [None, np.nan, pd.NA, '', ' '])
def test_answers_with_gaps(gap):
    with pytest.raises(ValueError, match='`control` is empty in 1 of 3 rows, first in row 2'): yes_no([True, False, gap])
    with pytest.raises(ValueError, match='1 of 2 rows'): yes_no(pd.array([True, None], dtype='boolean'))

def test_other_answers():
    with pytest.raises(ValueError, match="`control` says 'TP53', '2'"): yes_no(['DMSO', 'TP53', 2])

turned = ['2-Sep', '10-Mar', '1-Dec', '01-Sep', '4-Oct', '2-sept', '1. Mrz', '1-Dec-23', 'Sep-02', '2023-03-01',
          '2023-03-01 00:00:00', '2023-03-01T00:00:00', '01.03.2023', '3/1/2023', '3/1/23', '1-3-2023', '2.31E+13', '1-mars']
genes = ['SEPT2', 'SEPTIN1', 'MARCH10', 'MARCHF1', 'DEC1', 'Oct-4', 'OCT4', 'SEPT-2', 'MAR1', '44986', '2-DG', '5-FU',
         '4-OHT', '1', '1.5', '1-2', '12.5', '1E-06', '2310009E13', 'NOV', 'JUN', 'Jun-D', '5-Aza', '3-MA', '1.2.3', 'A-01', '17-AAG']

def test_names_turned_into_dates(): assert dates_among(genes+turned+turned+['']) == turned

# ---- tables

table = 'well,perturbation,dose\nA01,NA,001\nA02,TP53,0.5\nA03,nan,\n'
semi,tab,pipe = (table.replace(',', o) for o in ';\t|')
dialects = dict(
    comma=table.encode(), semicolon=semi.encode(), tab=tab.encode(), pipe=pipe.encode(), crlf=table.replace('\n', '\r\n').encode(),
    old_mac=table.replace('\n', '\r').encode(), no_last_line_end=table.rstrip('\n').encode(),
    utf8_bom=table.encode('utf-8-sig'), utf16=table.encode('utf-16'), utf16_le=semi.encode('utf-16-le'), utf16_be=tab.encode('utf-16-be'),
    excel_unicode=tab.encode('utf-16'), sep_comma=b'sep=,\n'+table.encode(), sep_semicolon=b'"sep=;"\r\n'+semi.encode(),
    sep_tab_utf16=('sep=\t\n'+tab).encode('utf-16'), title=b'Plate 7\n'+table.encode(), title_padded=b'Plate 7,,\n,,\n'+table.encode(),
    title_of_prose=b'"Plate 7; seeded, stained, imaged"\n\n'+table.encode(), titles=b'Plate 7\nread by me\n\n'+semi.encode(),
    key_value=b'Plate,7,,,\nDate,today,,,\n'+table.replace('\n', ',u,v\n').replace('dose,u,v', 'dose,x,y').encode(),
    comment=b'# map of plate 7\n'+table.encode(), padded=table.replace(',', ' , ').encode(), empty_rows=table.encode()+b',,\n,,\n\n',
    empty_columns=table.replace('\n', ',,\n').encode(), ragged_end=table.replace('001', '001,,').encode(),
    quoted='"well","perturbation","dose"\n"A01","NA","001"\n"A02","TP53","0.5"\n"A03","nan",""\n'.encode(), empty_between=table.replace('A02', ',,\n\nA02').encode())

@pytest.mark.parametrize('packed', [bytes, gzip.compress, bz2.compress, lzma.compress])
@pytest.mark.parametrize('kind', dialects)
def test_dialects(kind, packed, tmp_path):
    f = tmp_path/'map.any'
    f.write_bytes(packed(dialects[kind]))
    t = read_table(f)[['well', 'perturbation', 'dose']]
    assert t.values.tolist() == [['A01', 'NA', '001'], ['A02', 'TP53', '0.5'], ['A03', 'nan', '']]

@pytest.mark.parametrize('ending', ['parquet', 'pq', 'parquet.gzip', 'feather', 'arrow', 'txt'])
def test_typed_tables(ending, tmp_path):
    f = tmp_path/f't.{ending}'
    df = pd.DataFrame(dict(well=['A01', 'B02'], site=[1, 2], dose=[.5, None], gene=['NA', None], control=[True, False]))
    (df.to_feather if ending in ('feather', 'arrow') else df.to_parquet)(f)
    assert read_table(f).values.tolist() == [['A01', '1', '0.5', 'NA', 'True'], ['B02', '2', '', '', 'False']]
    assert read_table(f, text=False).equals(df)
    df.set_index('well').to_parquet(f)
    assert read_table(f).well.tolist() == ['A01', 'B02']

@pytest.mark.parametrize('sep,mark', [(';', ','), (';', '.'), ('\t', ','), (',', '.'), ('|', '.')])
def test_numbers(sep, mark, tmp_path):
    "Numbers are numbers, gaps NaN whatever they are called, names stay names"
    f = tmp_path/'p.csv'
    pd.DataFrame(dict(plate=['001', '002', '010'], run=[1, 2, 3], gene=['NA', 'null', 'TP53'], a=[1.5, -2.25e-7, 1e9], b=[1, np.nan, .5],
                      c=['1', 'NaN', ''], n=['', '07', ''])).to_csv(f, sep=sep, decimal=mark, index=False)
    t = read_table(f, text=False)
    assert t.plate.tolist() == ['001', '002', '010'] and t.gene.tolist() == ['NA', 'null', 'TP53'] and t.n[1] == '07'
    np.testing.assert_array_equal(t[['run', 'a', 'b', 'c']].astype(float), [[1, 1.5, 1, 1], [2, -2.25e-7, np.nan, np.nan], [3, 1e9, .5, np.nan]])

def test_index_column_and_quotes(tmp_path):
    (tmp_path/'i.csv').write_text(',emb_0\n0,.5\n1,.7\n')
    assert read_table(tmp_path/'i.csv', text=False)['emb_0'].tolist() == [.5, .7]
    (tmp_path/'q.csv').write_text('well,name\nA01,"1,2-dioxane"\nA02,"two\nlines, of it"\n')
    assert read_table(tmp_path/'q.csv').name.tolist() == ['1,2-dioxane', 'two\nlines, of it']
    (tmp_path/'one.csv').write_text('gene\nTP53\nNA\n')
    assert read_table(tmp_path/'one.csv').gene.tolist() == ['TP53', 'NA']
    (tmp_path/'members.csv').write_text('set,genes,note\ns1,A|B,\ns2,C|D,x;y\ns3,E|F,\n')
    assert read_table(tmp_path/'members.csv').genes.tolist() == ['A|B', 'C|D', 'E|F']

@pytest.mark.parametrize('raw,why', [
    (b'', 'no rows'), (b'well,name\n', 'no rows'), (b'\n\n', 'no rows'), (b'well,name\nA01,DMSO\nA02,1,2-dioxane\n', 'line 3 has 3 fields'),
    (b'Plate\nwell;name\nA01;a;b\n', 'line 3 has 3 fields'), (b'well,name\n1,A01,a\n2,A02,b\n', 'line 2 has 3 fields'),
    (b'well,name,dose\n1,A01,a,3,4\n2,A02,b,3,4\n', 'line 2 has 5 fields, the header 3'),
    (b'well,well \nA01,x\n', 'two columns are called well'), (b'<html>', 'a page'), (bytes(500), 'no text'), (b'\x89PNG\r\n\x1a\n'+bytes(50), 'no text'),
    (b'PAR1'+bytes(40), 'not a table'), (b'PK\x03\x04'+bytes(400), 'Excel|not a table'), (gzip.compress(table.encode(), mtime=0)[:-9], 'not a table'),
    (b'well,name\nA01,"never closed\nA02,b\n'*3, 'not a table')])
def test_tables_that_are_refused(raw, why, tmp_path):
    (tmp_path/'bad.csv').write_bytes(raw)
    for text in (True, False):
        with pytest.raises(ValueError, match=f'bad.csv: .*({why})'): read_table(tmp_path/'bad.csv', text=text)

def test_excel(tmp_path):
    openpyxl = pytest.importorskip('openpyxl')
    book = openpyxl.Workbook()
    for row in (['Plate 7', None, None], [None]*3, ['plate', 'well', 'gene'], ['P1', 'A01', 'NA'], [None, 'A02', 12], [None, 'A03', None]): book.active.append(row)
    book.active.merge_cells('A1:C1'); book.active.merge_cells('A4:A6'); book.create_sheet('empty')
    book.save(tmp_path/'map.xlsx')
    assert read_table(tmp_path/'map.xlsx').values.tolist() == [['P1', 'A01', 'NA'], ['P1', 'A02', '12'], ['P1', 'A03', '']]
    book.create_sheet('second').append(['well'])
    book.save(tmp_path/'two.xlsx')
    with pytest.raises(ValueError, match=r"two.xlsx: .*2 filled sheets, \['Sheet', 'second'\]. Save"): read_table(tmp_path/'two.xlsx')

# ---- pixels

g = np.random.default_rng(0)
D = g.integers(100, 4000, (4, 3, 24, 32)).astype(np.uint16)

def tiff(f, x, **kw): tifffile.imwrite(f, x, **{**dict(photometric='minisblack'), **kw}); return f

@pytest.mark.parametrize('axes,meta', [(a, m) for a in ('ZCYX', 'TCYX', 'TZCYX', 'CZYX', 'ZYX', 'TYX', 'CTYX') for m in ('imagej', 'ome', 'shaped')
                                       if m!='imagej' or a not in ('CZYX', 'CTYX')])
def test_stacks(axes, meta, tmp_path):
    "Refused with what there is and the cure; read as asked"
    shape = [dict(T=2, Z=4, C=3, Y=24, X=32)[k] for k in axes]
    x,f = g.integers(100, 4000, shape).astype(np.uint16),tmp_path/'a.tif'
    tiff(f, x, metadata=dict(axes=axes), **{meta:True} if meta!='shaped' else {})
    full = np.moveaxis(x, [axes.index(k) for k in axes if k in 'TZ'], range(sum(k in 'TZ' for k in axes))) # (T,Z,C,Y,X)
    if 'Z' not in axes: full = full[:,None] if 'T' in axes else full
    if 'T' not in axes: full = full[None]
    if 'C' not in axes: full = full[:,:,None]
    choose = {k.lower():1 for k in axes if k in 'TZ'}
    with pytest.raises(ImageError, match='a stack. It holds .*' + '.*'.join(f'`{k}=0` to' for k in sorted(choose))): read_image(f)
    assert (read_image(f, **choose) == full[choose.get('t', 0), choose.get('z', 0)]).all()
    if 'Z' in axes:
        t = {k:v for k,v in choose.items() if k=='t'}
        assert (read_image(f, z='max', **t) == full[t.get('t', 0)].max(0)).all()
        mean = read_image(f, z='mean', **t)
        assert mean.dtype==np.uint16 and (mean == np.rint(full[t.get('t', 0)].mean(0))).all()
        with pytest.raises(ImageError, match='no z=4, but 4'): read_image(f, z=4, **t)
        with pytest.raises(ValueError, match="'max' or 'mean', not 'middle'"): read_image(f, z='middle', **t)
    if 'C' not in axes and axes[0]=='Z': assert (read_image([f, f], z=2) == full[0,2,0]).all()

def test_one_plane_is_no_stack(tmp_path):
    f = tiff(tmp_path/'a.ome.tif', D[:1,:,None], metadata=dict(axes='TCZYX'))
    for kw in ({}, dict(z=0), dict(z='max'), dict(z='mean', t=0)): assert (read_image(f, **kw) == D[0]).all()
    with pytest.raises(ImageError, match='no z=3, but 1'): read_image(f, z=3)

def test_pages_without_names(tmp_path):
    "They are channels, unless each file is one channel and `z` is asked for"
    with tifffile.TiffWriter(tmp_path/'a.tif') as o:
        for p in D[0]: o.write(p, metadata=None, photometric='minisblack')
    assert (read_image(tmp_path/'a.tif') == D[0]).all()
    with pytest.raises(ImageError, match='3 planes in one of several files. If they are z planes'): read_image([tmp_path/'a.tif']*2)
    assert (read_image([tmp_path/'a.tif']*2, z='max') == D[0].max(0)).all()
    many = tiff(tmp_path/'many.tif', g.integers(0, 99, (100, 32, 40)).astype(np.uint16))
    assert read_image(many).shape == (100, 32, 40)
    tiff(tmp_path/'one.tif', D[:,0], imagej=True, truncate=True) # all planes behind one directory
    assert (read_image(tmp_path/'one.tif') == D[:,0]).all()

def test_series(tmp_path):
    with tifffile.TiffWriter(tmp_path/'fields.ome.tif', ome=True) as o:
        for d in D: o.write(d, metadata=dict(axes='CYX'), photometric='minisblack')
    with pytest.raises(ImageError, match=r'several series. It holds 0: CYX 3x24x32, 1: CYX 3x24x32.*series='): read_image(tmp_path/'fields.ome.tif')
    assert (read_image(tmp_path/'fields.ome.tif', series=2) == D[2]).all()
    with pytest.raises(ImageError, match='no series 4'): read_image(tmp_path/'fields.ome.tif', series=4)
    for p in D[:,0]: tiff(tmp_path/'appended.tif', p, append=(tmp_path/'appended.tif').exists())
    assert (read_image(tmp_path/'appended.tif') == D[:,0]).all()
    one = tiff(tmp_path/'one.tif', D[0,0])
    assert (read_image(one, series=0) == D[0,0]).all()
    with pytest.raises(ImageError, match='no series 1. It holds 0: YX 24x32'): read_image(one, series=1)

@pytest.mark.parametrize('meta', [{}, dict(metadata=None)])
def test_thumbnails_and_levels(meta, tmp_path):
    with tifffile.TiffWriter(tmp_path/'thumb.tif') as o:
        o.write(D[0,0,::4,::4], subfiletype=1, photometric='minisblack', **meta)
        o.write(D[0,0], photometric='minisblack', **meta)
    assert (read_image(tmp_path/'thumb.tif') == D[0,0]).all()
    with tifffile.TiffWriter(tmp_path/'unsaid.tif') as o:
        for s in (4, 1): o.write(D[0,0,::s,::s], photometric='minisblack', **meta)
    with pytest.raises(ImageError, match='0: YX 6x8, 1: YX 24x32'): read_image(tmp_path/'unsaid.tif')
    assert (read_image(tmp_path/'unsaid.tif', series=1) == D[0,0]).all()
    with tifffile.TiffWriter(tmp_path/'pyramid.ome.tif') as o:
        o.write(D[0], subifds=1, metadata=dict(axes='CYX'), photometric='minisblack')
        o.write(D[0,:,::2,::2], subfiletype=1, photometric='minisblack')
    assert (read_image(tmp_path/'pyramid.ome.tif') == D[0]).all()

def parts(folder, D):
    "OME-TIFFs, one per channel with all its planes, each of which describes all"
    c,n,h,w = D.shape
    uuid = 'urn:uuid:{:08d}-0000-0000-0000-000000000000'
    data = ''.join(f'<TiffData FirstC="{i}" FirstZ="{k}" FirstT="0" IFD="{k}" PlaneCount="1"><UUID FileName="{i}.ome.tif">{uuid.format(i)}</UUID></TiffData>'
                   for i in range(c) for k in range(n))
    for i in range(c):
        xml = (f'<?xml version="1.0"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" UUID="{uuid.format(i)}"><Image ID="Image:0">'
               f'<Pixels ID="Pixels:0" DimensionOrder="XYZCT" Type="uint16" SizeX="{w}" SizeY="{h}" SizeZ="{n}" SizeC="{c}" SizeT="1">'
               + ''.join(f'<Channel ID="Channel:0:{j}" SamplesPerPixel="1"/>' for j in range(c)) + data + '</Pixels></Image></OME>')
        tiff(folder/f'{i}.ome.tif', D[i], description=xml, metadata=None)
    return [folder/f'{i}.ome.tif' for i in range(c)]

@pytest.mark.parametrize('n', [1, 3])
def test_parts_of_an_ome_tiff(n, tmp_path):
    fs = parts(tmp_path, D[:2,:n])
    if n>1:
        with pytest.raises(ImageError, match='3 z planes'): read_image(fs)
    assert (read_image(fs, z='max' if n>1 else None) == D[:2,:n].max(1)).all()
    fs[0].rename(tmp_path/'renamed.tif'); fs[1].unlink()
    assert (read_image(tmp_path/'renamed.tif', z=0) == D[0,0]).all()

x8 = (D[0,0]>>4).astype(np.uint8)

@pytest.mark.parametrize('mode', ['RGB', 'RGBA', 'LA', 'P', 'L'])
@pytest.mark.parametrize('ending', ['png', 'tif', 'bmp'])
def test_grey_pictures_in_colour_mode(mode, ending, tmp_path):
    if ending=='bmp' and mode in ('LA', 'RGBA'): return
    Image.fromarray(x8).convert(mode).save(tmp_path/f'a.{ending}')
    for files in (tmp_path/f'a.{ending}', [tmp_path/f'a.{ending}']*2): assert (read_image(files) == x8).all()

@pytest.mark.parametrize('ending', ['png', 'tif'])
def test_colour_pictures(ending, tmp_path):
    f = tmp_path/f'a.{ending}'
    rgb = (np.moveaxis(D[0], 0, -1)>>4).astype(np.uint8)
    Image.fromarray(rgb).save(f)
    assert (read_image(f) == np.moveaxis(rgb, -1, 0)).all() # three channels, if three are named
    with pytest.raises(ImageError, match='colour picture.*grey levels') as e: read_image([f, f])
    assert 'page=' not in str(e.value)
    Image.fromarray(rgb).quantize(200).save(f)
    with pytest.raises(ImageError, match='palette of colours.*grey levels'): read_image(f)
    Image.fromarray(x8>90).save(f)
    with pytest.raises(ImageError, match='no grey levels'): read_image(f)

def test_shown_in_a_colour(tmp_path):
    "A ramp of one colour leaves the intensities alone"
    green = np.zeros((3, 256), np.uint16); green[1] = np.arange(256)*257
    assert (read_image(tiff(tmp_path/'a.tif', x8, photometric='palette', colormap=green)) == x8).all()
    p = Image.fromarray(x8, 'P'); p.putpalette((green.T>>8).astype(np.uint8).tobytes()); p.save(tmp_path/'a.png')
    assert (read_image(tmp_path/'a.png') == x8).all()

@pytest.mark.parametrize('n', [1, 2, 3, 4])
def test_png_of_16_bits(n, tmp_path):
    x = np.moveaxis(D[:n,0], 0, -1)
    (tmp_path/'a.png').write_bytes(imagecodecs.png_encode(np.ascontiguousarray(x.squeeze())))
    assert (read_image(tmp_path/'a.png') == D[:n,0]).all()

@pytest.mark.parametrize('bits', [8, 12, 16])
@pytest.mark.parametrize('ending', ['jp2', 'j2k'])
def test_jpeg2000(bits, ending, tmp_path):
    x = D[0,0]&(2**min(bits, 12)-1)
    x = x.astype(np.uint8) if bits==8 else x
    (tmp_path/f'a.{ending}').write_bytes(imagecodecs.jpeg2k_encode(x, level=0, bitspersample=bits, codecformat=ending))
    assert (read_image(tmp_path/f'a.{ending}') == x).all()

@pytest.mark.parametrize('dtype', ['u1', '<u2', '>u2', 'i2', 'u4', 'f4'])
@pytest.mark.parametrize('kw', [{}, dict(compression='zlib', predictor=True), dict(compression='lzw'), dict(rowsperstrip=7), dict(tile=(16, 16)),
                                dict(bigtiff=True), dict(planarconfig='contig')])
def test_tiffs(dtype, kw, tmp_path):
    x = (D[0,0]>>4).astype(dtype)
    f = tmp_path/'a.tif'
    tiff(f, x, byteorder='>' if dtype[0]=='>' else '<', **kw)
    y = read_image([f, f])
    assert (y == x).all() and y.dtype == np.dtype(dtype).newbyteorder('=') and read_image(f).shape == (1, 24, 32)

@pytest.mark.parametrize('ending', ['tif', 'png', 'jp2'])
@pytest.mark.parametrize('part', [0, .4, .8, .99])
def test_cut_short(ending, part, tmp_path):
    f = tmp_path/f'a.{ending}'
    tiff(f, D[0,0]) if ending=='tif' else Image.fromarray(D[0,0]).save(f)
    f.write_bytes(f.read_bytes()[:int(part*(f.stat().st_size-20))])
    with pytest.raises(ImageError, match='unreadable. Cut short'): read_image(f)

def test_renamed(tmp_path):
    "What a file is stands in it, not in its name"
    Image.fromarray(x8).save(tmp_path/'a.png'); (tmp_path/'a.png').rename(tmp_path/'a.tif')
    tiff(tmp_path/'b.tif', x8).rename(tmp_path/'b.png')
    assert (read_image([tmp_path/'a.tif', tmp_path/'b.png']) == x8).all()

@pytest.mark.parametrize('name', ['a.ims', 'a.C01', 'a.FLEX', 'a.oib', 'a.vsi'])
def test_formats_that_are_not_read(name, tmp_path):
    tiff(tmp_path/name, D[0]) # some are TIFFs inside, whose pages only their own program knows
    with pytest.raises(ImageError, match=r'not read\. .*bioformats2raw.* TIFF') as e: read_image(tmp_path/name)
    assert 'Copy it again' not in str(e.value)

def test_other_pictures(tmp_path):
    Image.fromarray(x8).save(tmp_path/'a.DIB')
    assert (read_image(tmp_path/'a.DIB') == x8).all()
    Image.fromarray(x8).save(tmp_path/'a.gif', save_all=True, append_images=[Image.fromarray(x8.T), Image.fromarray(255-x8)])
    with pytest.raises(ImageError, match='3 pictures. Save one'): read_image(tmp_path/'a.gif')
    with pytest.raises(ImageError, match='no page 7'): read_image(tiff(tmp_path/'a.tif', D[0]), page=7)
    with pytest.raises(ImageError, match='Stored as QQYX'): read_image(tiff(tmp_path/'4d.tif', D))

@pytest.mark.parametrize('most,few', [('u2', 'u1'), ('u1', 'u2'), ('u2', 'f4'), ('u2', 'i2')])
def test_a_few_images_of_another_type(most, few):
    "They neither set the ranges nor are stretched by those of others"
    of = lambda d,x: (x>>4 if d=='u1' else x).astype(d)
    imgs = [of(few if i in (2, 5) else most, x) for i,x in enumerate(np.concatenate([D]*3))]
    with pytest.warns(UserWarning, match=f'2 images are {np.dtype(few)}, 10 {np.dtype(most)}'): r = fit_range(imgs)
    assert (r == fit_range([x for x in imgs if x.dtype==most])).all()
    if 'u1' in (most, few):
        with pytest.raises(ValueError, match='wrong type: .*one bit depth'): to_uint8(imgs[2], r)

# ---- written whole, locked

def folder(word):
    def make(d): d.mkdir(); (d/'sub').mkdir(); (d/'sub/a').write_text(word)
    return make

def dead():
    "The number of a process that is no more"
    p = subprocess.Popen(['true']); p.wait()
    return p.pid

@pytest.mark.parametrize('name', ['a.csv', 'folder', 'model.v2', 'x0-0', 'a b.[1]'])
def test_parts_of_killed_writers(name, tmp_path):
    f = tmp_path/name
    begin,end = f'.{f.stem}.{files._host}-',f'.part{f.suffix}'
    (tmp_path/f'{begin}{dead()}-abc{end}').mkdir()
    (tmp_path/f'{begin}{dead()}-abd{end}').write_text('half')
    living,other = tmp_path/f'{begin}{os.getpid()}-abc{end}',tmp_path/f'.other.{files._host}-{dead()}-abc.part{f.suffix}'
    for o in (living, other): o.write_text('mine')
    write_whole(f, lambda o: o.write_text('all'))
    assert {o.name for o in tmp_path.iterdir()} == {f.name, living.name, other.name} and f.read_text() == 'all'

def test_a_folder_that_was_put_aside_comes_back(tmp_path):
    aside = tmp_path/f'.run.{files._host}-{dead()}-abc.part.old'
    folder('old')(aside)
    with pytest.raises(OSError, match='full'): write_whole(tmp_path/'run', Mock(side_effect=OSError('full')))
    assert (tmp_path/'run/sub/a').read_text() == 'old' and not aside.exists()

@pytest.mark.parametrize('umask,mode', [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_rights_follow_the_umask(umask, mode, tmp_path):
    def private(d): d.mkdir(mode=0o700); (d/'sub').mkdir(0o700); (d/'sub/a').touch(0o600); (d/'gone').symlink_to('nowhere')
    was = os.umask(umask)
    try: write_whole(tmp_path/'new/d', private); write_whole(tmp_path/'f', lambda f: f.touch(0o600))
    finally: os.umask(was)
    rights = lambda o: stat.S_IMODE((tmp_path/o).stat().st_mode)
    assert [rights(o) for o in ('f', 'new/d/sub/a')] == [mode]*2
    assert [rights(o) for o in ('new', 'new/d', 'new/d/sub')] == [mode|(mode>>2&0o111)]*3

@pytest.mark.parametrize('fails', [1, 2])
def test_renames_that_fail(fails, tmp_path, monkeypatch):
    "Old and new survive, and the message says where the new one is"
    write_whole(tmp_path/'d', folder('old'))
    rename,calls = os.rename,[]
    def sometimes(a, b):
        calls.append(a)
        if len(calls)==fails: raise OSError('no more')
        rename(a, b)
    with monkeypatch.context() as m:
        m.setattr(os, 'rename', sometimes)
        with pytest.raises(OSError, match='no more. What was written is whole in .*part') as e: write_whole(tmp_path/'d', folder('new'))
    assert (tmp_path/'d/sub/a').read_text() == 'old'
    assert (Path(str(e.value).split('whole in ')[1].rstrip('.'))/'sub/a').read_text() == 'new'
    assert (write_whole(tmp_path/'d', folder('newer'))/'sub/a').read_text() == 'newer'

def test_another_kind_is_not_replaced(tmp_path):
    write_whole(tmp_path/'d', folder('mine')); (tmp_path/'f').write_text('mine')
    for o,write in (('d', Path.touch), ('f', folder('new'))):
        with pytest.raises(OSError, match='not replaced by anything else'): write_whole(tmp_path/o, write)
    assert (tmp_path/'f').read_text() == (tmp_path/'d/sub/a').read_text() == 'mine'
    with pytest.raises(FileNotFoundError): write_whole(tmp_path/'nothing', lambda f: None)

def test_what_is_written_reaches_the_disk(tmp_path, monkeypatch):
    synced,fsync = [],os.fsync
    monkeypatch.setattr(os, 'fsync', lambda o: synced.append(os.readlink(f'/proc/self/fd/{o}')) or fsync(o))
    replace = os.replace
    monkeypatch.setattr(os, 'replace', lambda a, b: synced.append(f'{b} has its name') or replace(a, b))
    write_whole(tmp_path/'f', Path.touch)
    part,*after = synced
    assert Path(part).name.startswith('.f.') and after==[f"{tmp_path/'f'} has its name", str(tmp_path)]
    (tmp_path/'f').unlink(); synced.clear()
    write_whole(tmp_path/'d', folder('new'))
    names = [Path(o).name for o in synced]
    assert 'a' in names and 'sub' in names and names[-3].startswith('.d.') and synced[-1] == str(tmp_path)
    monkeypatch.setattr(os, 'fsync', Mock(side_effect=OSError('no space')))
    with pytest.raises(OSError, match='no space'): write_whole(tmp_path/'f', Path.touch)
    assert not (tmp_path/'f').exists() and len(list(tmp_path.iterdir())) == 1

def test_threads_and_processes_do_not_mix(tmp_path):
    "Whoever comes last wins, and nothing is mixed"
    words = [str(i)*100_000 for i in range(8)]
    with ThreadPoolExecutor(8) as pool: list(pool.map(lambda w: write_whole(tmp_path/'f', lambda f: f.write_text(w)), words))
    assert (tmp_path/'f').read_text() in words and len(list(tmp_path.iterdir())) == 1

@pytest.mark.parametrize('error', [KeyError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_locks_end_with_their_block(error, tmp_path):
    with pytest.raises(error):
        with locked(tmp_path/'run', 'training'): raise error()
    with locked(tmp_path/'run', 'training'):
        for _ in range(2):
            with pytest.raises(BlockingIOError, match=rf'in use by process {os.getpid()} on .*\(training\): wait'):
                with locked(tmp_path/'run'): pass
    with locked(tmp_path/'run'): pass

def test_locks_end_though_a_child_lives_on(tmp_path):
    with locked(tmp_path/'run'):
        child = subprocess.Popen(['sleep', '60'], pass_fds=[int(o.name) for o in Path('/proc/self/fd').iterdir() if os.path.exists(o) and os.readlink(o).endswith('.lock')])
    try:
        with locked(tmp_path/'run'): pass
    finally: child.kill(); child.wait()

def test_where_there_are_no_locks(tmp_path, monkeypatch):
    ran = []
    for target,error in ((files.fcntl, dict(flock=OSError(errno.ENOLCK, 'no locks'))), (files.fcntl, dict(flock=OSError(errno.EOPNOTSUPP, 'none')))):
        with monkeypatch.context() as m:
            m.setattr(target, 'flock', Mock(side_effect=error['flock']))
            with locked(tmp_path): ran.append(1)
    with monkeypatch.context() as m:
        m.setattr(files, 'open', Mock(side_effect=OSError(errno.EROFS, 'read-only')), raising=False)
        with locked(tmp_path): ran.append(1)
    with monkeypatch.context() as m:
        m.setattr(files, 'fcntl', None)
        with locked(tmp_path): ran.append(1)
    assert len(ran) == 4
