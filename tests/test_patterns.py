"Names of files: listed once, matched as they are meant, or refused with what differs"
import os
from zipfile import ZipFile

import pytest

from cellmae.patterns import Listing

def touch(root, *names):
    for n in names:
        (root/n).parent.mkdir(parents=True, exist_ok=True)
        (root/n).write_bytes(b'x')
    return root

# --- listings

ASIDE = ['P/._B02.tif', '.DS_Store', 'P/B02_thumb.tif', 'P/B02_w1_Thumb.TIF', 'P/Thumbs.db']

def test_a_listing_is_sorted_and_knows_what_lies_aside(tmp_path):
    l = Listing(touch(tmp_path, 'b/B03.tif', 'b/B02.TIF', 'a.csv', 'map.CSV', '@eaDir/B02.tif', '.git/x.tif', *ASIDE))
    assert l.names == ['a.csv', 'b/B02.TIF', 'b/B03.tif', 'map.CSV'] and l.images == ['b/B02.TIF', 'b/B03.tif']
    assert l.passed == sorted([*ASIDE, '@eaDir', '.git']) and dict(l.other) == {'.csv': 1, '.CSV': 1}
    assert l.beside('b/B02.TIF') == l.images and l.beside('a.csv') == ['a.csv', 'map.CSV']
    assert l.path('b/B02.TIF') == tmp_path/'b/B02.TIF'

def test_flat_fields_are_passed_over_beside_an_mlf_only(tmp_path):
    l = Listing(touch(tmp_path, 'P/a.mlf', 'P/DC_1.tif', 'P/SC_1.tif', 'P/B03.tif', 'Q/DC_1.tif'))
    assert l.images == ['P/B03.tif', 'Q/DC_1.tif'] and l.passed == ['P/DC_1.tif', 'P/SC_1.tif']

@pytest.mark.parametrize('globs,names', [
    (['Index*.xml'], ['p/Index.idx.xml', 'p/index.xml']), (['*.htd'], ['p/a.HTD']), (['index.XML'], ['p/index.xml']),
    (['*.htd', '*.mlf'], ['b.mlf', 'p/a.HTD']), (['a.*'], ['p/a.HTD']), (['README'], ['README']), (['*.none'], [])])
def test_names_are_asked_for_by_their_last_part_in_any_case(tmp_path, globs, names):
    l = Listing(touch(tmp_path, 'p/Index.idx.xml', 'p/index.xml', 'p/a.HTD', 'b.mlf', 'README', 'x.htd/b.tif'))
    assert l.named(*globs) == names

@pytest.mark.parametrize('store', ['p.zarr/A/1/0/.zattrs', 'q/p.ZARR/zarr.json', 'plain/.zgroup', 'other/zarr.json'])
def test_a_store_is_one_name(tmp_path, store):
    l = Listing(touch(tmp_path, store, 'a/b.tif', 'a/c.zip'))
    name = next(store[:i+5] for i in [store.lower().find('.zarr')] if i > 0) if '.zarr' in store.lower() else store.split('/')[0]
    assert l.names == sorted(['a/b.tif', 'a/c.zip', name])
    assert Listing(tmp_path/name).names == [name.split('/')[-1]]

def test_a_file_is_a_folder_with_one_name(tmp_path):
    l = Listing(touch(tmp_path, 'p/a.nd2', 'p/b.nd2')/'p/a.nd2')
    assert l.names == ['a.nd2'] and l.root == tmp_path/'p'

def test_a_zip_is_a_folder(tmp_path):
    with ZipFile(tmp_path/'x.zip', 'w') as z:
        for n in ('P/B03.tif', 'P/', '__MACOSX/P/._B03.tif', 'P/map.csv', '.x/a.tif'): z.writestr(n, 'well\nB03')
    l = Listing(tmp_path/'x.zip')
    assert l.names == ['P/B03.tif', 'P/map.csv'] and l.text('P/map.csv') == 'well\nB03'
    assert l.path('P/B03.tif') == f'{tmp_path}/x.zip#P/B03.tif' and l.passed == ['.x', '__MACOSX/P']

XML = '<?xml version="1.0" encoding="{}"?>\n<a xmlns="http://x/V5" xmlns:b="http://y"><c b:Row="2">\xb5m</c></a>'

@pytest.mark.parametrize('declared,written', [
    ('utf-8', 'utf-8-sig'), ('utf-8', 'utf-8'), ('ISO-8859-1', 'latin-1'), ('utf-16', 'utf-16'), ('utf-16', 'utf-8'),
    ('utf-8', 'latin-1'), ('windows-1252', 'cp1252')])
def test_xml_in_any_encoding_without_namespaces(tmp_path, declared, written):
    (tmp_path/'i.xml').write_bytes(XML.format(declared).encode(written))
    o = Listing(tmp_path).xml('i.xml').find('c')
    assert o.text == '\xb5m' and o.attrib == {'Row': '2'}

@pytest.mark.parametrize('raw', [b'', b'<a><b></a>', b'\x00\x01', b'<a>'+b'x'*50])
def test_damaged_xml_is_named(tmp_path, raw):
    (tmp_path/'i.xml').write_bytes(raw)
    with pytest.raises(ValueError, match=r'i\.xml: damaged XML'): Listing(tmp_path).xml('i.xml')

def test_a_closed_folder_is_named(tmp_path, capsys, monkeypatch):
    touch(tmp_path, 'a/B02.tif', 'b/B02.tif')
    scan = os.scandir
    def closed(d):
        if str(d).endswith('b'): raise PermissionError(13, 'Permission denied', str(d))
        return scan(d)
    monkeypatch.setattr(os, 'scandir', closed)
    assert Listing(tmp_path).images == ['a/B02.tif'] and 'b is left out: Permission denied' in capsys.readouterr().out
