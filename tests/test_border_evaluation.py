"Recall, retrieval and diagnose at their border: labels, names, pairs and rules as people have them"
import gzip, warnings

import numpy as np, pandas as pd, pytest
from anndata import AnnData
from scipy.sparse import csr_matrix

from cellmae.diagnose import compare_corrections, diagnose, plot_correction
from cellmae.profiles import aggregate
from cellmae.recall import check_names, compare_recall, gene_map, read_complexes, read_relationships, recall
from cellmae.retrieval import (activity, average_precision, consistency, magnitude, match,
                               mean_average_precision, probe)
from cellmae.tvn import CenterScale

genes = [f'G{i}' for i in range(24)]
pairs = pd.DataFrame(dict(entity1=genes[::2], entity2=genes[1::2]))
quick = dict(thresholds=[(.05,.95)], n_boot=0, n_perm=0)

def screen(extra=(), seed=0):
    "Three batches of 8 controls, 24 genes whose neighbours push alike, and wells named as in `extra`"
    g = np.random.default_rng(seed)
    push = 2*np.r_[np.zeros((8, 6)), g.normal(size=(12, 6)).repeat(2, 0), np.zeros((len(extra), 6))]
    names = ['DMSO']*8+genes+[*extra]
    obs = pd.DataFrame(dict(perturbation=pd.Series(names*3, dtype=object), batch=np.repeat([*'abc'], len(names))))
    obs = obs.assign(control=obs.perturbation=='DMSO', moa=obs.perturbation).rename(str)
    x = AnnData(np.tile(push, (3, 1))+g.normal(size=(len(obs), 6)), obs=obs)
    return x

def told(f, *args, **kw):
    "Result and warnings"
    with warnings.catch_warnings(record=True) as ws:
        warnings.simplefilter('always')
        return f(*args, **kw), [str(w.message) for w in ws]


# wells without a name

def groups(x): return mean_average_precision(average_precision(x).query('~control'), n_null=50).perturbation
rooms = dict(
    gene_map=lambda x: gene_map(x)[1],
    mean_average_precision=groups,
    consistency=lambda x: consistency(x, n_null=20).index,
    activity=lambda x: activity(x, n_null=20).index,
    magnitude=lambda x: magnitude(x, n_null=20).index,
    match=lambda x: match(x[~x.obs.control.to_numpy()], 'moa', 'batch').moa)

@pytest.mark.parametrize('room', rooms)
@pytest.mark.parametrize('blank', ['', ' ', None, np.nan, pd.NA, '\t'], ids=repr)
def test_wells_without_a_name(room, blank):
    "They are no gene and no perturbation, and how many there are is said"
    found,said = told(rooms[room], screen([blank]*4))
    assert set(found) == set(genes)
    assert [o for o in said if '12 of ' in o], said

@pytest.mark.parametrize('f', [consistency, activity, magnitude])
def test_unnamed_wells_change_nothing(f):
    "Neither values nor nulls"
    x = screen(['']*4)
    pd.testing.assert_frame_equal(told(f, x, n_null=50)[0], f(x[(x.obs.perturbation!='').to_numpy()], n_null=50))

def test_unnamed_wells_rank_with_nobody():
    x = screen(['']*4)
    t,_ = told(average_precision, x)
    lost = (t.perturbation=='').to_numpy()
    assert len(t)==len(x) and lost.sum()==12
    assert (t.n_total[lost]==0).all() and t.average_precision[lost].isna().all() and t.chance[lost].isna().all()
    alone = average_precision(x[~lost])
    np.testing.assert_array_equal(t.average_precision[~lost], alone.average_precision)
    np.testing.assert_array_equal(t.n_total[~lost], alone.n_total)

def test_unnamed_wells_are_no_class():
    x = screen([None]*4)
    t,said = told(probe, x[~x.obs.control.to_numpy()], n_folds=3, n_boot=0)
    assert t['n_classes']==24 and any('12 of ' in o for o in said)

def test_controls_need_no_name():
    x = screen()
    x.obs['perturbation'] = x.obs.perturbation.where(~x.obs.control, '')
    for f in rooms.values():
        found,said = told(f, x)
        assert set(found)==set(genes) and not said

def test_no_well_has_a_name():
    x = screen()
    x.obs['perturbation'] = x.obs.perturbation.where(x.obs.control, '')
    for f in (gene_map, average_precision, consistency, magnitude):
        with pytest.raises(ValueError, match='no row has a perturbation'): f(x)

@pytest.mark.parametrize('kind', ['tuple', 'frame'])
def test_rows_without_a_name(kind):
    X,names = np.random.default_rng(0).normal(size=(27, 4)),np.array([*genes, None, '', ' '], dtype=object)
    (_,found),said = told(gene_map, (X, names) if kind=='tuple' else pd.DataFrame(X, index=names))
    assert set(found)==set(genes) and '3 of 27' in said[0]


# names

odd = ['NA', 'nan', 'None', 'null', 'N/A', 'NaN', 'inf', 'True']

def test_genes_called_na_are_genes():
    assert set(gene_map(screen(odd))[1]) == {*genes, *odd}
    assert {*odd}<=set(consistency(screen(odd), n_null=20).index)
    rel = read_relationships(pd.DataFrame(dict(entity1=odd[:4], entity2=odd[4:])))
    assert len(rel)==4 and recall(screen(odd), rel, **quick).n_pairs[0]==4

@pytest.mark.parametrize('mark', ['{} ', ' {}', '{}\t', '\xa0{}', '{}\n'], ids=repr)
@pytest.mark.parametrize('side', ['map', 'pairs', 'both'])
def test_stray_spaces(mark, side):
    x,rel = screen(),pairs
    if side!='pairs': x.obs['perturbation'] = [mark.format(o) if i>60 else o for i,o in enumerate(x.obs.perturbation)]
    if side!='map': rel = rel.map(mark.format)
    a,b = recall(x, rel, **quick),recall(screen(), pairs, **quick)
    assert (a.n_genes[0], a.n_pairs[0], a.recall[0]) == (24, 12, b.recall[0])
    assert mean_average_precision(average_precision(x).query('~control'), n_null=50).n.tolist() == [3]*24

def test_names_are_text_of_any_type():
    "Numbers of a table, of a spreadsheet and as text are the same names"
    X = np.random.default_rng(0).normal(size=(24, 4))
    rel = pd.DataFrame(dict(entity1=[0, 2, 4], entity2=[1., 3., 5.]))
    for names in (range(24), np.arange(24.), [f'{i} ' for i in range(24)]):
        assert recall((X, names), rel, **quick).n_pairs[0] == 3

dates = ['1-Sep', '10-Mar', 'Sep-02', '2023-03-01 00:00:00', '2.31E+13']

@pytest.mark.parametrize('date', dates)
def test_names_that_are_dates(date):
    x = (np.random.default_rng(0).normal(size=(25, 4)), [date, *genes])
    _,said = told(recall, x, pairs, **quick)
    assert date in said[0] and 'spreadsheets' in said[0] and 'the map' in said[0]
    rel = pd.concat([pairs, pd.DataFrame(dict(entity1=[date], entity2=['G3']))])
    _,said = told(recall, (x[0][1:], genes), rel, **quick)
    assert date in said[0] and 'spreadsheets' in said[0]
    for names,r in ((x[1], pairs), (genes, rel)):
        t = told(check_names, names, r)[0]
        assert t.gene.tolist()==[date] and t.problem.tolist()==['date']

def test_dates_are_not_seen_where_none_are():
    names = [*genes, 'MARCHF1', 'SEPTIN2', 'DEC1', 'NOV', 'OCT4', 'MAR']
    _,said = told(recall, (np.random.default_rng(0).normal(size=(30, 4)), names), pairs, **quick)
    assert not said and not len(check_names(names, pairs).query('problem=="date"'))


# profiles

@pytest.mark.parametrize('f', [gene_map, lambda x: recall(x, pairs), average_precision, consistency, activity, magnitude])
@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_nan_in_a_replicate(f, bad):
    "One rule for all: refused, with the place"
    x = screen()
    x.X[20, 3] = bad
    with pytest.raises(ValueError, match=r'1 values are NaN or infinite.*row 20 .*column 3.*drop'): f(x)

forms = dict(sparse=lambda x: AnnData(csr_matrix(x.X), obs=x.obs),
             pair=lambda x: (x.X, x.obs), sparse_pair=lambda x: (csr_matrix(x.X), x.obs),
             table=lambda x: pd.DataFrame(x.X, index=x.obs_names).add_prefix('emb_').join(x.obs))

@pytest.mark.parametrize('form', [*forms, 'backed'])
def test_forms_of_profiles(form, tmp_path):
    x = screen()
    if form=='backed':
        import anndata
        x.write_h5ad(tmp_path/'x.h5ad')
        y = anndata.read_h5ad(tmp_path/'x.h5ad', backed='r')
    else: y = forms[form](x)
    a,b = gene_map(x),gene_map(y)
    np.testing.assert_allclose(a[0], b[0], atol=1e-6); assert a[1].tolist()==b[1].tolist()
    np.testing.assert_allclose(average_precision(x).average_precision, average_precision(y).average_precision)
    np.testing.assert_allclose(magnitude(x, n_null=20).value, magnitude(y, n_null=20).value)
    assert diagnose(y)==pytest.approx(diagnose(x))
    if form in ('sparse', 'backed'): plot_correction(y, y)

def test_text_among_the_features():
    "A value that is no number is refused with its place; a column of text is no feature"
    X = pd.DataFrame(screen().X, index=screen().obs.perturbation).add_prefix('f').astype(object)
    expected = gene_map(X.astype(float))
    np.testing.assert_array_equal(gene_map(X.assign(note='fine'))[0], expected[0])
    X.iloc[30, 2] = '#DIV/0!'
    with pytest.raises(ValueError, match="column f2, row 31 holds '#DIV/0!'"): gene_map(X)



# pairs

rows = [('TP53', 'MDM2'), ('KIF11', 'TPX2'), ('KIF11', 'AURKA'), ('ID1', 'TCF3')]

@pytest.mark.parametrize('sep', [',', '\t', ';', ' ', ', '], ids=repr)
@pytest.mark.parametrize('title', [None, 'entity1 entity2', 'gene1 gene2', 'source target', 'GeneA GeneB', 'from to',
                                   'Official_Symbol_A Official_Symbol_B', '#Interactor_A Interactor_B', 'bait prey'])
@pytest.mark.parametrize('order', [1, -1])
def test_pairs_with_and_without_titles(tmp_path, sep, title, order):
    "Whether or not names of the first pair come again"
    lines = [sep.join(o) for o in rows[::order]]
    if title: lines.insert(0, sep.join(title.split()))
    (tmp_path/'a.txt').write_text('\n'.join(lines)+'\n')
    rel = read_relationships(tmp_path/'a.txt')
    assert set(map(tuple, rel.to_numpy())) == {tuple(sorted(o)) for o in rows}

@pytest.mark.parametrize('first', [('gene0', 'gene1'), ('G0', 'G1'), ('7157', '4193'), ('YAL001C', 'YBR123W'), ('ENSG00000141510', 'ENSG00000135679')])
def test_first_pair_is_kept(tmp_path, first):
    stem,n = first[0][:-1],len(first[0])
    more = [(f'{stem}{i}'[:n+1], f'{stem}{i+1}'[:n+1]) for i in (4, 6)]
    (tmp_path/'a.csv').write_text(''.join(f'{a},{b}\n' for a,b in [first, *more]))
    assert len(read_relationships(tmp_path/'a.csv')) == 3

def test_a_table_read_without_titles():
    _,said = told(read_relationships, pd.DataFrame([('KIF11', 'AURKA'), ('TP53', 'X')], columns=['TP53', 'MDM2']))
    assert 'header=None' in said[0]
    _,said = told(read_relationships, pd.DataFrame([('KIF11', 'AURKA')], columns=['gene', 'partner']))
    assert not said

@pytest.mark.parametrize('text,match', [
    ('TP53\nMDM2\n', 'a.txt has no column entity1 and entity2 .it has TP53'),
    ('A,B,1\nC,D,2\n', 'it has A, B, 1.: name its two'), ('A pp B\nC pp D\n', 'name its two'),
    ('gene1,gene2,score\nA,B,1\n', 'it has gene1, gene2, score'), ('', 'no rows'),
    ('one\tA B C\ntwo\tD E\n', 'read_complexes')])
def test_what_is_no_table_of_pairs(tmp_path, text, match):
    (tmp_path/'a.txt').write_text(text)
    with pytest.raises(ValueError, match=match): read_relationships(tmp_path/'a.txt')

@pytest.mark.parametrize('write', ['to_parquet', 'to_feather'])
@pytest.mark.parametrize('columns', [['x', 'y'], ['gene', 'other'], ['0', '1']])
def test_tables_that_always_have_titles(tmp_path, write, columns):
    getattr(pairs.set_axis(columns, axis=1), write)(tmp_path/'set.pq')
    rel = read_relationships(tmp_path/'set.pq')
    assert len(rel)==12 and rel.attrs['source']=='set'

def test_more_columns_by_name(tmp_path):
    (tmp_path/'a.csv').write_text('score,Entity1, entity2 \n.5,A,B\n.7,B,A\n.1,,C\n')
    rel = read_relationships(tmp_path/'a.csv')
    assert rel.to_numpy().tolist()==[['A', 'B']] and rel.attrs['n_duplicates']==1 and rel.attrs['n_empty']==1

def sets(folder):
    folder.mkdir()
    text = 'entity1,entity2\nG0,G1\nG2,G3\n'
    (folder/'comma.csv').write_text(text)
    (folder/'TAB.TSV').write_text(text.replace(',', '\t'))
    (folder/'bare.txt').write_text(text.split('\n', 1)[1])
    with gzip.open(folder/'packed.csv.gz', 'wt') as f: f.write(text)
    with gzip.open(folder/'tabs.tsv.gz', 'wt') as f: f.write(text.replace(',', '\t'))
    pairs.to_parquet(folder/'hu.MAP.parquet')
    return folder

def test_a_folder_of_sets(tmp_path):
    "All are measured; what is none is left out, and said"
    d,X = sets(tmp_path/'sets'),(np.random.default_rng(0).normal(size=(24, 4)), genes)
    t,said = told(recall, X, d, **quick)
    assert not said and set(t.source)=={'comma', 'TAB', 'bare', 'packed', 'tabs', 'hu.MAP'}
    left = '.DS_Store', '._comma.csv', 'README.txt', 'readme.md', 'LICENSE_annotations.txt', 'notes.docx', 'complexes.tsv'
    for name in left: (d/name).write_text('one\tG1 G2 G3\ntwo\tG4 G5\n')
    (d/'old').mkdir()
    u,said = told(recall, X, d, **quick)
    assert len(said)==1 and all(name in said[0] for name in (*left, 'old'))
    pd.testing.assert_frame_equal(t, u)
    assert set(compare_recall(X, X, d, min_pairs=2).index)==set(t.source)

def test_a_folder_that_is_not_clear(tmp_path):
    X = (np.random.default_rng(0).normal(size=(24, 4)), genes)
    d = sets(tmp_path/'sets')
    (d/'comma.txt').write_text('G0,G1\n')
    with pytest.raises(ValueError, match='comma.csv in two files'): recall(X, d)
    (tmp_path/'none').mkdir(); (tmp_path/'none/README').write_text('')
    with pytest.raises(ValueError, match='no .txt, .csv'): told(recall, X, tmp_path/'none')
    with pytest.raises(FileNotFoundError, match='missing'): recall(X, tmp_path/'nowhere.csv')

def test_complexes_with_strange_names(tmp_path):
    (tmp_path/'c.tsv').write_bytes('\ufefftrio\tNA  B C\r\nnone\tnan NA\r\n'.encode())
    assert {k: len(v) for k,v in read_complexes(tmp_path/'c.tsv').items()} == dict(trio=3, none=1)


# rules

def test_missing_values_in_a_rule():
    "Said, with the column"
    x = screen()
    x.obs['plate'] = ['']*5+['p']*50+['q']*41
    x.obs.loc[x.obs.control, 'plate'] = 'p'
    x.obs.iloc[[10, 11, 50], x.obs.columns.get_loc('plate')] = [None, ' ', np.nan]
    t,said = told(average_precision, x, pos_diffby='plate')
    assert len(said)==1 and '3 of 72 rows have no plate' in said[0]
    assert (t.n_total.iloc[[10, 11, 50]]==0).all()
    for f,kw in ((match, dict(label='moa', not_same='plate')), (activity, dict(not_same='plate', n_null=20))):
        assert any('3 of ' in o and 'no plate' in o for o in told(f, x, **kw)[1])
    with pytest.raises(ValueError, match='3 wells have no `plate`, first row 10'): consistency(x, batch='plate')

def test_mean_average_precision_by_a_column_with_gaps():
    t = average_precision(screen()).query('~control')
    t['gene'] = ['' if o=='G3' else o for o in t.perturbation]
    res,said = told(mean_average_precision, t, 'gene', n_null=50)
    assert len(res)==23 and '3 of 72 rows have no gene' in said[0]

@pytest.mark.parametrize('rule', [dict(some=['moa']), dict(any=[['moa', 'batch']]), [['moa', 'batch']]])
def test_rules_of_another_form(rule):
    with pytest.raises(ValueError, match='a rule is a column'): average_precision(screen(), pos_sameby=rule)
    with pytest.raises(ValueError, match='a rule is a column'): match(screen(), 'moa', rule)

@pytest.mark.parametrize('cell', [['a', 'b'], ('a', 'b'), {'a', 'b'}, np.array(['a', 'b'])])
def test_several_labels_where_there_must_be_one(cell):
    obs = screen().obs
    obs['moa'] = [cell]*len(obs)
    x = screen().X,obs
    t = average_precision(x, pos_sameby='perturbation')
    for f in (lambda: match(x, not_same='batch'), lambda: probe(x, 'moa'), lambda: consistency(x, batch='moa'),
              lambda: mean_average_precision(t, 'moa'), lambda: aggregate(x, 'moa')):
        with pytest.raises(ValueError, match='`moa` has several labels in a cell'): f()
    with pytest.raises(ValueError, match='one name for what was done'): gene_map((x[0], obs.assign(perturbation=obs.moa)))

@pytest.mark.parametrize('f,kw,match', [
    (consistency, dict(null='control'), "'wells' or 'controls', not 'control'"), (consistency, dict(batch='palte'), 'no column `palte`'),
    (magnitude, dict(batch='palte'), 'no column `palte`'), (match, dict(k=0), 'k is a whole number from 1 on, not 0'),
    (consistency, dict(n_null=0), 'n_null is a whole'), (activity, dict(n_null=-1), 'n_null is a whole'),
    (magnitude, dict(n_null=.5), 'n_null is a whole'), (probe, dict(n_folds=1), 'n_folds is a whole number from 2'),
    (recall, dict(relationships=pairs, n_boot=-1), 'n_boot is a whole'), (recall, dict(relationships=pairs, n_perm=2.5), 'n_perm is a whole'),
    (recall, dict(relationships=pairs, thresholds=(.05, .95)), 'thresholds are pairs'),
    (recall, dict(relationships=pairs, thresholds=[(.95, .05)]), 'tails need'),
    (average_precision, dict(ties='random'), "'last' or 'first'")])
def test_options(f, kw, match):
    with pytest.raises(ValueError, match=match): f(screen(), **kw)


def test_relationships_of_another_type():
    with pytest.raises(TypeError, match='a dict of them by name, not list'): recall(screen(), [('G0', 'G1')])
    with pytest.raises(ValueError, match='empty dict'): recall(screen(), {})
    with pytest.raises(ValueError, match='relationships holds no pairs'): recall(screen(), pairs[:0])


# corrections

def test_too_few_controls_are_said():
    x = screen()
    few = x[~(x.obs.control&(x.obs.batch=='b')&(np.arange(96)%32>2)).to_numpy()]
    t,said = told(compare_corrections, few, {'none':None, 'centred':CenterScale()})
    assert sum('b with 3' in o for o in said)==1 and t.offset.isna().all() and t.leak.notna().all()
    none = x[~(x.obs.control&(x.obs.batch=='b')).to_numpy()]
    with pytest.raises(ValueError, match="correction 'centred'.*batch b"): told(compare_corrections, none, {'centred':CenterScale()})
    one = x[~(x.obs.control&(np.arange(96)%32>0)).to_numpy()]
    with pytest.raises(ValueError, match='3 controls in 3 batches'): diagnose(one)

def test_replicates_in_one_batch_are_said():
    t,said = told(compare_corrections, screen()[:32], {'none':None})
    assert any('mAP is missing' in o for o in said) and t.mAP.isna().all()
