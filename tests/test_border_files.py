"Names, wells, controls, tables and pixels in the spellings that people and instruments have for them"
import numpy as np
import pandas as pd
import pytest

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
