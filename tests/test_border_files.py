"Names, wells, controls, tables and pixels in the spellings that people and instruments have for them"
import bz2
import gzip
import lzma

import numpy as np
import pandas as pd
import pytest

from cellmae.files import read_table
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
    (b'well,well \nA01,x\n', 'two columns are called well'), (b'<html>', 'a page'), (bytes(500), 'no text'), (b'\x89PNG\r\n\x1a\n'+bytes(50), 'no text'),
    (b'PAR1'+bytes(40), 'not a table'), (b'PK\x03\x04'+bytes(400), 'Excel|not a table'), (gzip.compress(table.encode())[:-9], 'not a table'),
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
