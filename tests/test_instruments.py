"""What microscopes write beside their images, in tiny folders as they leave them"""
import json, shutil

import numpy as np, pytest, tifffile
from fastcore.test import expect_fail, test_close as close, test_eq as eq

from cellmae.images import ImageError
from cellmae.instruments import htd, located, measures, open_flatfield, polynomial
from cellmae.layouts import LAYOUTS, recognise
from cellmae.patterns import Listing


def put(root, images=(), **texts):
    "TIFFs that are full of their place in `images`, and files with text, by name"
    for i,f in enumerate(images, 1):
        (root/f).parent.mkdir(parents=True, exist_ok=True)
        tifffile.imwrite(root/f, np.full((2,3), i, np.uint16))
    for f,s in texts.items(): write(root, f, s)
    return root

def write(root, name, text):
    (root/name).parent.mkdir(parents=True, exist_ok=True)
    (root/name).write_bytes(text if isinstance(text, bytes) else text.encode())

def scan(root, key):
    "What a scanner makes of a folder that is recognised as its own and nothing else"
    there = Listing(root)
    marks = {k: o for k,o in recognise(there).items() if k not in ('names','patterns')}
    eq(list(marks), [key])
    return LAYOUTS[key].scan(there, marks[key])

def rows(found, *keys): return found.table[list(keys)].values.tolist()

def pixels(root, found): return [int(tifffile.imread(root/f).max()) for f in found.table['file']]


# Opera Phenix and Operetta

V5 = 'http://www.perkinelmer.com/PEHH/HarmonyV5'
V7 = '43B2A954-E3C3-47E1-B392-6635266B0DD3/HarmonyV7'

def shot(row, col, field=1, plane=1, ch=1, t=1, name='', state='Ok', more=''):
    url = f'r{row:02}c{col:02}f{field:02}p{plane:02}-ch{ch}sk{t}fk1fl1.tiff'
    name = f'<ChannelName>{name}</ChannelName>' if name else ''
    return url,f'''<Image Version="1"><id>{row:02}{col:02}K{t}F{field}P{plane}R{ch}</id>
    <State>{state}
    </State><URL>{url}</URL><Row>{row}</Row><Col>{col}</Col><FieldID>{field}</FieldID>
    <PlaneID>{plane}</PlaneID><TimepointID>{t}</TimepointID><ChannelID>{ch}</ChannelID>{name}{more}
    </Image>'''

def index(shots, names=None, space=V5, plate='BR1', flat=None):
    "As Harmony 5 writes it, or with `names` as 6 and 7 do"
    entry = '<Entry ChannelID="{}"><{}>{}</{}></Entry>'.format
    entries = lambda tag, o: ''.join(entry(k, tag, v, tag) for k,v in (o or {}).items())
    maps = [entries('FlatfieldProfile', flat), entries('SkewcropParameters', {1:'H4sIA'}),
            entries('ChannelName', names)]
    return f'''\ufeff<?xml version="1.0" encoding="utf-8"?>
    <EvaluationInputData Version="1" xmlns="{space}"><User>x</User><Plates><Plate>
    <PlateID>{plate}</PlateID><Name>{plate} again</Name><PlateRows>8</PlateRows>
    <PlateColumns>12</PlateColumns></Plate></Plates><Wells><Well><id>0203</id><Row>2</Row>
    <Col>3</Col><Image id="0203K1F1P1R1"/></Well></Wells>
    <Maps>{"".join(f"<Map>{o}</Map>" for o in maps)}</Maps>
    <Images>{"".join(o for _,o in shots)}</Images></EvaluationInputData>'''.lstrip('\n')

DYES = {1:'Alexa 647', 3:'HOECHST 33342'}

def harmony(version, **kw):
    "Two planes, two dyes, wells B03 and C02 of 8 x 12, as one version of Harmony writes it"
    five = version=='V5'
    shots = [shot(*w, field=f, plane=p, ch=c, t=0 if five else 1, name=DYES[c] if five else '')
             for w,f in (((2,3), 1), ((3,2), 7)) for p in (1,2) for c in DYES]
    kw |= {} if five else dict(names=DYES, space=V7)
    return shots,('Index.idx.xml' if five else 'Index.xml'),index(shots, **kw)

@pytest.mark.parametrize('version', ['V5','V7'])
def test_phenix(tmp_path, version):
    shots,name,text = harmony(version)
    at = 'BR00121__2021-03-29T16_51_44-Measurement 1/Images'
    there = [f'{at}/{o}' for o,_ in shots[:-1]] # the last is absent
    put(tmp_path, there, **{f'{at}/{name}': text})
    found = scan(tmp_path, 'phenix')
    want = [['BR1',w,f,DYES[c],p] for w,f in (('B03','1'), ('C02','7')) for p in '12' for c in DYES]
    eq(rows(found, 'plate','well','site','channel','z'), want[:-1])
    eq(pixels(tmp_path, found), [1,2,3,4,5,6,7])
    eq(found.names, {'1':'Alexa 647', '3':'HOECHST 33342'})
    eq(found.about, dict(plate_shape=(8,12)))
    assert 'Named but not there: 1 of 8' in found.said[0] and 'well C02' in found.said[0]

def test_phenix_channels_go_by_names(tmp_path):
    dyes = ['Alexa 647','HOECHST 33342']
    for plate,order in (('P1', dyes), ('P2', dyes[::-1])):
        names = dict(enumerate(order, 1))
        shots = [shot(2, 3, ch=c) for c in names]
        put(tmp_path, [f'{plate}/Images/{o}' for o,_ in shots],
            **{f'{plate}/Images/Index.xml': index(shots, names, V7, plate)})
    found = scan(tmp_path, 'phenix')
    t = found.table.set_index(['plate','channel'])['file']
    eq(t['P1','Alexa 647'], 'P1/Images/r02c03f01p01-ch1sk1fk1fl1.tiff')
    eq(t['P2','Alexa 647'], 'P2/Images/r02c03f01p01-ch2sk1fk1fl1.tiff')
    eq(found.names, {o: o for o in dyes})
    assert '1 is Alexa 647 or HOECHST 33342' in found.said[0]

def test_phenix_times_of_two_versions(tmp_path):
    "Harmony 5 counts times from 0 and 7 from 1: one time each is no choice; several are"
    for plate,times in (('P1', [0]), ('P2', [1]), ('P3', [1,2])):
        shots = [shot(2, 3, t=t, name='DAPI') for t in times]
        put(tmp_path, [f'{plate}/{o}' for o,_ in shots],
            **{f'{plate}/Index.idx.xml': index(shots, plate=plate)})
        found = scan(tmp_path, 'phenix')
        eq('t' in found.table, plate=='P3')
    eq(rows(found, 'plate','t'), [['P1','1'], ['P2','1'], ['P3','1'], ['P3','2']])

def test_phenix_plate_measured_twice(tmp_path):
    "Two measurements of a plate are two batches, not two images of a site"
    for m in 'ab':
        put(tmp_path, [f'BR1__{m}/Images/{shot(2,3)[0]}'],
            **{f'BR1__{m}/Images/Index.idx.xml': index([shot(2, 3, name='DAPI')])})
    found = scan(tmp_path, 'phenix')
    eq(rows(found, 'batch','plate','well'), [['BR1__a','BR1','B03'], ['BR1__b','BR1','B03']])
    assert 'Plate BR1 lies in 2 folders' in found.said[0]

def test_phenix_not_taken_well(tmp_path):
    bad = [shot(2, 3, name='DAPI'), shot(2, 4, name='DAPI', state='NotAvailable')]
    put(tmp_path, [o for o,_ in bad], **{'Index.idx.xml': index(bad)})
    found = scan(tmp_path, 'phenix')
    eq([rows(found, 'well'), found.left], [[['B03']], [bad[1][0]]])
    assert all(o in found.said[0] for o in ('1 of 2','well B04','NotAvailable'))

def test_phenix_twice_indexed_and_same_names(tmp_path):
    "An older and a newer index of one folder are one; one dye in two channels keeps its numbers"
    shots = [shot(2, 3, ch=c) for c in (2,4)]
    text = index(shots, {2:'GFP', 4:'GFP', 5:'never used'}, V7)
    put(tmp_path, [o for o,_ in shots], **{'Index.idx.xml':text, 'Index.xml':text})
    found = scan(tmp_path, 'phenix')
    eq(found.names, {'2':'GFP (2)', '4':'GFP (4)'})
    eq(len(found.table), 2)

def test_columbus(tmp_path):
    "The same index in another space; the images of a well are pages of one file"
    shots = [shot(*w, plane=p, ch=c, name=DYES[c])
             for w in ((2,3), (3,2)) for p in (1,2) for c in DYES]
    text = index(shots, space='http://www.perkinelmer.com/Columbus')
    for i,(url,_) in enumerate(shots):
        text = text.replace(f'<URL>{url}', f'<URL BufferNo="{i%4}">{"BC"[i//4]}-1.tif')
    write(tmp_path, 'ImageIndex.ColumbusIDX.xml', text)
    write(tmp_path, 'MeasurementIndex.ColumbusIDX.xml', '<ColumbusMeasurementIndex/>')
    for i,w in enumerate('BC'):
        pages = np.arange(4, dtype=np.uint16)[:,None,None]+np.full((2,3), 1+4*i, np.uint16)
        tifffile.imwrite(tmp_path/f'{w}-1.tif', pages, photometric='minisblack', metadata=None)
    found = scan(tmp_path, 'phenix')
    eq(list(found.table['file'])[:2], ['B-1.tif#page=0','B-1.tif#page=1'])
    eq(found.left, [])
    eq(values(opened(tmp_path, z=2), 'C02'), {'Alexa 647':7, 'DNA':8})

def test_phenix_fast_times(tmp_path):
    shots = []
    for t,f in ((1,1), (1,2), (2,1), (2,2)):
        both = shot(2, 3, t=t, name='GFP', more=f'<SequenceID>{f}</SequenceID>')
        shots.append([o.replace('fk1', f'fk{f}') for o in both])
    put(tmp_path, [o for o,_ in shots], **{'Index.idx.xml': index(shots)})
    found = scan(tmp_path, 'phenix')
    eq(list(found.table['t']), list('0123'))

@pytest.mark.parametrize('text,word', [
    (index([shot(2,3)])[:-40], 'Copy it again'), (index([]), 'name no images'),
    (index([shot(2,3,state='Bad')]), '1 of 1 images'), (index([shot(9,9)]), 'none is there')])
def test_phenix_damaged(tmp_path, text, word):
    put(tmp_path, [shot(2,3)[0]], **{'Index.idx.xml': text})
    with expect_fail(ValueError, word): scan(tmp_path, 'phenix')

@pytest.mark.parametrize('old,new', [('<Row>2</Row>', '<Row>B</Row>'), ('<Col>3</Col>', ''),
                                     ('<ChannelID>1</ChannelID>', '')])
def test_phenix_incomplete(tmp_path, old, new):
    text = index([shot(2,3)]).replace('<id>0203</id><Row>2</Row>', '').replace(old, new)
    put(tmp_path, [shot(2,3)[0]], **{'Index.idx.xml': text})
    with expect_fail(ValueError, 'Index.idx.xml has records that are not complete'):
        scan(tmp_path, 'phenix')

def test_another_index_is_no_phenix(tmp_path):
    put(tmp_path, ['A01.tif'], **{'Index.xml': '<rss version="2.0"/>'})
    assert 'phenix' not in recognise(Listing(tmp_path))


# Flat fields

def profile(terms, dims, part='Background', name='"405ex, 570-630-em)"'):
    origin,scale = [(d-1)/2 for d in dims],f'[{1/dims[0]:.8e}, {1/dims[1]:.9f}]' # either occurs
    return (f'{{{part}: {{Character: NonFlat, Mean: 443.79, NonFlatness: {{Random: INF}}, '
            f'Profile: {{Coefficients: {json.dumps(terms)}, Dims: {dims}, Origin: {origin}, '
            f'Scale: {scale}, Type: Polynomial}}, Quality: 1.0}}, Channel: 1, ChannelName: {name}, '
            'Version: Acapella:2013}')

EVEN = '{Background: {Character: Null, Mean: NaN, Profile: {Type: Identity}}, Channel: 2}'
TERMS = [[1.2], [.1, -.3], [-1.4, .05, -.7], [.1, .2, .3, -.4]]

def test_flatfield_is_the_polynomial(tmp_path):
    "Terms go x*x, x*y, y*y; x runs along the width of an image that is not square"
    w,h = 6,4
    write(tmp_path, 'Index.idx.xml', index([shot(2,3)], flat={1:profile(TERMS, [w,h]), 2:EVEN}))
    got = open_flatfield(tmp_path/'Index.idx.xml', None, {'flatfield':1})
    want = np.empty((h,w))
    for j in range(h):
        for i in range(w):
            x,y = (i-(w-1)/2)/w,(j-(h-1)/2)/h
            want[j,i] = (1.2+.1*x-.3*y-1.4*x*x+.05*x*y-.7*y*y+.1*x**3+.2*x*x*y+.3*x*y*y-.4*y**3)
    eq((got.axes, got.shape, got.dtype), ('YX', (h,w), np.dtype('float32')))
    close(got.read(), want/want.mean(), 1e-5)
    even = open_flatfield(tmp_path/'Index.idx.xml', None, {'flatfield':2}).read()
    eq((even.shape, even.min(), even.max()), ((h,w), 1, 1))
    with expect_fail(ImageError, 'Channel 7 has none'):
        open_flatfield(tmp_path/'Index.idx.xml', None, {'flatfield':7})

def test_flatfield_of_the_foreground(tmp_path):
    both = EVEN[:-1]+', '+profile(TERMS, [6,4], 'Foreground')[1:]
    write(tmp_path, 'Index.xml', index([shot(2,3)], {1:'x'}, V7, flat={1:both}))
    assert open_flatfield(tmp_path/'Index.xml', None, {'flatfield':1}).read().std()>.05

def test_flatfield_that_is_not_positive(tmp_path):
    write(tmp_path, 'Index.xml', index([shot(2,3)], flat={1:profile([[.1], [1., 0.]], [6,4])}))
    with expect_fail(ImageError, 'not positive'):
        open_flatfield(tmp_path/'Index.xml', None, {'flatfield':1})

def test_metadata_are_no_image(tmp_path):
    write(tmp_path, 'Index.xml', index([shot(2,3)]))
    with expect_fail(ImageError, 'Open the folder'): open_flatfield(tmp_path/'Index.xml', None, {})

def test_flatfield_addresses(tmp_path):
    shots = [shot(2, 3, ch=c, name=DYES[c]) for c in DYES]
    put(tmp_path, [f'I/{o}' for o,_ in shots],
        **{'I/Index.idx.xml': index(shots, flat={1:profile(TERMS, [3,2]), 3:EVEN})})
    found = scan(tmp_path, 'phenix')
    eq(rows(found, 'illum'), [['I/Index.idx.xml#flatfield=1'], ['I/Index.idx.xml#flatfield=3']])
    assert 'leaves HOECHST 33342' in found.said[0]
    put(tmp_path, ['J/'+shots[0][0]], **{'J/Index.idx.xml': index(shots[:1], plate='BR2')})
    eq(rows(scan(tmp_path, 'phenix'), 'plate','illum')[-1], ['BR2','']) # a plate that has none


# ImageXpress

HTD = b'''"HTSInfoFile", Version 1.0\r\n"Description", "first\x82\x81second, third"\r
"TimePoints", 1\r
"ZSeries", TRUE\r\n"ZSteps", 2\r\n"ZProjection", %s\r\n"XWells", 12\r\n"YWells", 8\r
"WellsSelection2", FALSE, FALSE, TRUE\r\n"WellsSelection3", FALSE, TRUE, FALSE\r
"XSites", 2\r\n"YSites", 1\r\n"SiteSelection1", TRUE, TRUE\r\n"NWavelengths", 2\r
"WaveName1", "DAPI"\r\n"WaveCollect1", 1\r\n"WaveName10", "Cy5"\r\n"WaveCollect10", 1\r
"EndFile"\r\n'''

def test_htd():
    told = htd((HTD % b'TRUE').decode('latin-1'))
    eq((told['XWells'], told['WaveName10']), ('12','Cy5'))
    eq(told['WellsSelection3'], 'FALSE, TRUE, FALSE')

@pytest.mark.parametrize('site', ['','_s2'])
@pytest.mark.parametrize('wave', ['','_w1','_w10'])
def test_imagexpress_names(tmp_path, site, wave):
    "No `_s` with one site, no `_w` with one wavelength; thumbnails are no images"
    files = [f'9987_Plate_3434/TimePoint_1/9987_{w}{site}{wave}.TIF' for w in ('B03','C02')]
    thumbs = [o.replace('.TIF', '_Thumb.TIF') for o in files]
    put(tmp_path, files+thumbs, **{'9987_Plate_3434/9987.HTD': HTD % b'FALSE'})
    found = scan(tmp_path, 'imagexpress')
    dye = 'Cy5' if wave=='_w10' else 'DAPI'
    eq(rows(found, 'plate','well','site','channel'),
       [['9987',w,site[2:] or '1',dye] for w in ('B03','C02')])
    eq((pixels(tmp_path, found), found.about), ([1,2], dict(plate_shape=(8,12))))
    eq(found.said, [])

def test_imagexpress_projection(tmp_path):
    "ZStep_0 is the projection if the table says so, and a plane if it does not"
    for says,zero in ((b'TRUE',''), (b'FALSE','0')):
        root = tmp_path/says.decode()
        files = [f'P/TimePoint_1/ZStep_{z}/9987_{w}_s1_w1.TIF'
                 for z in range(3) for w in ('B03','C02')]
        homes = 'P','P/TimePoint_1','P/TimePoint_1/ZStep_1'
        put(root, files, **{f'{o}/9987.HTD': HTD % says for o in homes})
        found = scan(root, 'imagexpress')
        eq(rows(found, 'well','z'), [[w,z] for z in (zero,'1','2') for w in ('B03','C02')])
        eq(pixels(root, found), [1,2,3,4,5,6])

def test_imagexpress_two_plates_and_a_well_without_images(tmp_path):
    files = ['a/TimePoint_1/A_B03_w1.tif', 'b/TimePoint_2/B_C02_w10.tif', 'b/overview_C02.tif']
    put(tmp_path, files, **{'a/A.htd': HTD % b'FALSE', 'b/B.HTD': HTD % b'FALSE'})
    found = scan(tmp_path, 'imagexpress')
    eq(rows(found, 'plate','well','channel'), [['A','B03','DAPI'], ['B','C02','Cy5']])
    assert 't' not in found.table # one time each
    eq(found.left, ['b/overview_C02.tif'])
    assert any('without an image: 1 of 2 wells, such as C02' in o for o in found.said)

def test_imagexpress_by_names_alone(tmp_path):
    "Without a table and without GUIDs, if somebody says so"
    put(tmp_path, ['TimePoint_1/P_B03_s1_w1.TIF', 'TimePoint_2/P_C02_s1_w1.TIF'])
    found = LAYOUTS['imagexpress'].scan(Listing(tmp_path), [])
    eq(rows(found, 'plate','well','t'), [['P','B03','1'], ['P','C02','2']])

@pytest.mark.parametrize('key', ['phenix','yokogawa','incell','scanr'])
def test_said_to_be_what_it_is_not(tmp_path, key):
    put(tmp_path, ['x.tif'])
    with expect_fail(ValueError, 'metadata of this microscope'):
        LAYOUTS[key].scan(Listing(tmp_path), [])

def test_imagexpress_table_without_images(tmp_path):
    put(tmp_path, ['x.tif'], **{'A.HTD': HTD % b'FALSE'})
    with expect_fail(ValueError, 'metadata of this microscope'): scan(tmp_path, 'imagexpress')

GUID = 'E78EB128-BD0D-4D94-A6AD-3FF28BB1B105'

def metaxpress(path, value, name, site):
    "An image with the properties that MetaXpress writes"
    path.parent.mkdir(parents=True, exist_ok=True)
    props = {'_IllumSetting_':('string',name), 'stage-label':('string',site),
             'spatial-calibration-x':('float','0.5'), 'spatial-calibration-units':('string','um')}
    text = ''.join(f'<prop id="{k}" type="{t}" value="{v}"/>' for k,(t,v) in props.items())
    tifffile.imwrite(path, np.full((2,3), value, np.uint16), software='MetaSeries', metadata=None,
                     description=f'<MetaData><PlaneInfo>{text}</PlaneInfo></MetaData>')

def test_imagexpress_database(tmp_path):
    "Names of channels are in the images, and projections lie above the steps"
    at = tmp_path/'My plate_x'/'2023-02-21'/'1334'
    shots = [('','B03',1), ('','C02',1), ('ZStep_1/','B03',1), ('ZStep_1/','B03',10)]
    for i,(z,w,c) in enumerate(shots):
        dye = 'DAPI' if c==1 else 'FITC_05'
        metaxpress(at/f'{z}My plate_x_{w}_s1_w{c}{GUID}.tif', i, dye, f'{w} : Site 1')
    put(tmp_path, [f'My plate_x/2023-02-21/1334/My plate_x_B03_s1_w1_thumb{GUID}.tif'])
    found = scan(tmp_path, 'imagexpress')
    got = dict(zip(pixels(tmp_path, found), rows(found, 'plate','well','channel','z')))
    eq(got, {0:['My plate_x','B03','DAPI',''], 1:['My plate_x','C02','DAPI',''],
             2:['My plate_x','B03','DAPI','1'], 3:['My plate_x','B03','FITC_05','1']})
    eq(found.names, {'1':'DAPI', '10':'FITC_05'})
    eq((found.about, found.left), (dict(pixel_size=.5), []))

def test_imagexpress_names_that_plates_share(tmp_path):
    "As in BBBC021, whose plates of a week begin alike"
    put(tmp_path, [f'Week1_{n}/Week1_150607_B03_s1_w{c}{GUID}.tif'
                   for n in (22123,22141) for c in (1,4)])
    found = scan(tmp_path, 'imagexpress')
    eq(rows(found, 'plate','channel'), [[f'Week1_{n}',c] for n in (22123,22141) for c in '14'])
    assert 'batch' not in found.table

def test_imagexpress_images_that_are_none(tmp_path):
    (tmp_path/f'p_B03_s1_w2{GUID}.tif').write_bytes(b'not an image')
    eq(rows(scan(tmp_path, 'imagexpress'), 'well','channel'), [['B03','2']])

def test_imagexpress_real(data):
    found = scan(data/'faim_imagexpress', 'imagexpress')
    eq(found.table['z'].value_counts().to_dict(), {'':12, '1':12})
    got = found.table.groupby('z', observed=True)['channel'].unique().map(sorted).to_dict()
    eq(got, {'': [f'FITC_05 ({i})' for i in (1,2,3)],
             '1': [f'FITC_05 ({i})' for i in (1,2,4)]})
    eq(found.about, dict(pixel_size=1.3668))


# Yokogawa

BTS = 'http://www.yokogawa.co.jp/BTS/BTSSchema/1.0'
LISTED = ('DAPI',''), ('','Alexa 488'), ('',''), ('Cy5','never used') # targets and fluorophores

def bts(tag, more, inner):
    return (f'\ufeff<?xml version="1.0" encoding="utf-8"?><bts:{tag} bts:Version="1.0" {more} '
            f'xmlns:bts="{BTS}">{inner}</bts:{tag}>')

def measured(records, rows=8, cols=12):
    "Files of a measurement; a record is `(name,row,column,field,z,action,channel,type,more)`"
    one = ('<bts:MeasurementRecord bts:Type="{7}" bts:Column="{2}" bts:Row="{1}" bts:TimePoint="1" '
           'bts:FieldIndex="{3}" bts:ZIndex="{4}" bts:ActionIndex="{5}" bts:Ch="{6}"{8}>{0}'
           '</bts:MeasurementRecord>').format
    channel = ('<bts:Channel bts:Ch="{}" bts:Target="{}" bts:Fluorophore="{}" '
               'bts:Acquisition="BP445/45"/>').format
    channels = ''.join(channel(i, *o) for i,o in enumerate(LISTED, 1))
    told = (f'bts:Title="P7" bts:MeasurementSettingFileName="own.mes" bts:ColumnCount="{cols}" '
            f'bts:RowCount="{rows}"')
    pixel = '<bts:MeasurementChannel bts:Ch="1" bts:HorizontalPixelDimension="0.325"/>'
    return {'MeasurementData.mlf': bts('MeasurementData', '', ''.join(one(*o) for o in records)),
            'MeasurementDetail.mrf': bts('MeasurementDetail', told, pixel),
            'other.mes': bts('MeasurementSetting', '', channel(1, 'wrong', '')),
            'own.mes': bts('MeasurementSetting', '', f'<bts:List>{channels}</bts:List>')}

def cv(well, action, channel, z=1, type='IMG', more=''):
    row,col = 'ABCDEFGHIJKLMNOP'.index(well[0])+1,int(well[1:])
    name = f'assay_{well}_T0001F001L01A{action:02}Z{z:02}C{channel:02}.tif'
    return name,row,col,1,z,action,channel,type,more

def test_cellvoyager(tmp_path):
    "Errors and absent files are told, one channel in two actions is two, shading is no image"
    taken = [cv(w, *o) for w in ('B03','C02') for o in ((1,1), (2,1), (2,2), (2,3))]
    lost = [cv('C04', 1, 1, type='ERR'), cv('C05', 1, 1)]
    shading = ['SC_BP445-45_20x_M01_CH01.tif', 'DC_DCAM#1_CAM3.tif']
    put(tmp_path, [f'assay_2023/assay/{o[0]}' for o in taken], **{
        f'assay_2023/assay/{k}': v for k,v in measured([*lost, *taken]).items()})
    put(tmp_path/'assay_2023'/'assay', shading)
    found = scan(tmp_path, 'yokogawa')
    dyes = ['DAPI (A01_C01)','DAPI (A02_C01)','Alexa 488','BP445/45']
    eq(rows(found, 'plate','well','channel'), [['P7',w,c] for w in ('B03','C02') for c in dyes])
    eq(found.names, dict(zip(['A01_C01','A02_C01','2','3'], dyes)))
    eq((found.about, found.left), (dict(pixel_size=.325, plate_shape=(8,12)), []))
    eq(pixels(tmp_path, found), [1,2,3,4,5,6,7,8])
    assert '1 of 10 records' in found.said[0] and 'C04' in found.said[0]
    assert 'Named but not there: 1 of 9' in found.said[1] and 'C05' in found.said[1]

@pytest.mark.parametrize('shape', [(8,12), (16,24)])
def test_cq1(tmp_path, shape):
    "Names count wells over the columns; row and column are in the record"
    number = lambda row, col: (row-1)*shape[1]+col
    records = [(f'{d}\\W{number(*w):04}F0001T0001Z{z:03}C{c}.tif', *w, 1, z, 1, c, 'IMG',
                ' bts:ZImageProcessing="maximum"'*(d=='Projection'))
               for w in ((2,3), (3,2)) for d,z in (('Image',1), ('Image',2), ('Projection',0))
               for c in (1,2)]
    put(tmp_path, [o[0].replace('\\', '/') for o in records], **measured(records, *shape))
    found = scan(tmp_path, 'yokogawa')
    eq(rows(found, 'well','z','channel'), [
        [w,z,c] for w in ('B03','C02') for z in ('1','2','')
        for c in ('DAPI','Alexa 488')])
    eq((pixels(tmp_path, found), found.about['plate_shape']), ([*range(1,13)], shape))

def test_cq1_projections_alone(tmp_path):
    "Where nothing but projections was kept they are the images"
    made = ' bts:ZImageProcessing="focus"'
    records = [(f'W0015F0001T0001Z000C{c}.tif', 2, 3, 1, 0, 1, c, 'IMG', made) for c in (1,2)]
    put(tmp_path, [o[0] for o in records], **measured(records))
    assert 'z' not in scan(tmp_path, 'yokogawa').table

def test_yokogawa_without_settings(tmp_path):
    taken = [cv('B03', 1, 2)]
    put(tmp_path, [taken[0][0]], **{'x.mlf': measured(taken)['MeasurementData.mlf']})
    found = scan(tmp_path, 'yokogawa')
    eq((rows(found, 'plate','channel'), found.about), ([[tmp_path.name,'2']], {}))

def test_yokogawa_cut_short(tmp_path):
    put(tmp_path, ['x.tif'], **{'x.mlf': measured([cv('B03', 1, 2)])['MeasurementData.mlf'][:-30]})
    with expect_fail(ValueError, 'Copy it again'): scan(tmp_path, 'yokogawa')


# InCell

def stack(shots, plate=''):
    image = '''<Image filename="{5}"><Well><Row number="{0}"/><Column number="{1}"/></Well>
      <ExcitationFilter name="{3}" wavelength="350"/><EmissionFilter name="{4}"/>
      <Identifier field_index="{2}" time_index="0" wave_index="{6}" z_index="0"/></Image>'''.format
    return f'''<?xml version="1.0" encoding="ISO-8859-1" standalone="no"?><ImageStack{plate}>
      <AutoLeadAcquisitionProtocol name="M\xfcller"><ObjectiveCalibration pixel_width="0.65"/>
      <Plate columns="12" name="96 well" rows="8"/></AutoLeadAcquisitionProtocol><Images>
      {"".join(image(*o) for o in shots)}</Images></ImageStack>'''.encode('latin-1')

@pytest.mark.parametrize('records', [True,False])
@pytest.mark.parametrize('padded', [True,False])
def test_incell(tmp_path, padded, records):
    "Whatever the padding on disk, by records and by names"
    said,wide = '{} - {}(fld {} wv {}).tif'.format,'{} - {:02}(fld {:03} wv {}).tif'.format
    there = wide if padded else said
    shots = [('B', 3, 1, 'DAPI - DAPI'), ('B', 3, 1, 'TL-Brightfield - DAPI'),
             ('C', 2, 10, 'DAPI - DAPI')]
    lines = [(ord(r)-64, c, f-1, *wv.split(' - '), said(r, c, f, wv), 'DT'.index(wv[0]))
             for r,c,f,wv in shots]
    files = [f'P3/{there(*o)}' for o in shots]
    put(tmp_path, files, **{'P3/P3.xdce': stack(lines if records else [])})
    found = scan(tmp_path, 'incell')
    eq(rows(found, 'plate','well','site','channel'), [
        ['P3','B03','1','DAPI - DAPI'], ['P3','B03','1','TL-Brightfield'],
        ['P3','C02','10','DAPI - DAPI']])
    eq((pixels(tmp_path, found), found.about), ([1,2,3], dict(pixel_size=.65, plate_shape=(8,12))))

def test_incell_one_filter_twice(tmp_path):
    files = [f'B - 3(fld 1 wv Cy5 - Cy5{o}).tif' for o in ('',' wix 4')]
    lines = [(2, 3, 0, 'Cy5', 'Cy5', f, w) for f,w in zip(files, (1,4))]
    put(tmp_path, files, **{'a.xdce': stack(lines, ' PlateID="X1"')})
    found = scan(tmp_path, 'incell')
    eq(rows(found, 'plate','channel'), [['X1','Cy5 - Cy5 (1)'], ['X1','Cy5 - Cy5 (4)']])

def test_incell_names_of_wavelengths(tmp_path):
    "Where records name no filters, the list of wavelengths does"
    text = stack([(2, 3, 0, 'x', 'y', 'a.tif', 1)]).decode('latin-1')
    for o in ('ExcitationFilter','EmissionFilter'): text = text.replace(f'<{o} ', '<Old ')
    waves = ''.join(f'<Wavelength index="{i}"><EmissionFilter name="{o}"/></Wavelength>'
                    for i,o in enumerate(['DAPI','FITC']))
    text = text.replace('<Images>', waves+'<Images>')
    put(tmp_path, ['a.tif'], **{'a.xdce': text.encode('latin-1')})
    eq(rows(scan(tmp_path, 'incell'), 'well','channel'), [['B03','FITC']])


# ScanR

def position(n, well, site, names, depth=1):
    tiff = '''<TiffData FirstC="{}" FirstT="0" FirstZ="{}"><UUID FileName="{}">urn:uuid:1</UUID>
      </TiffData>'''.format
    files = [(c, z, f'{well}--W{n:05}--P{site:05}--Z{z:05}--T00000--{o}.tif')
             for c,o in enumerate(names) for z in range(depth)]
    planes = ''.join(f'<Channel Name="{o}"/>' for o in names)+''.join(tiff(*o) for o in files)
    return [o[2] for o in files],f'''<Image ID="Image:W{n}P{site}" Name="Well {n}, Position {site}
      ({well})"><Pixels PhysicalSizeX="0.325000">{planes}</Pixels></Image>'''

def ome(*positions):
    space = 'http://www.openmicroscopy.org/Schemas/OME/2013-06'
    images = ''.join(o for _,o in positions)
    return f'''<?xml version="1.0" encoding="UTF-8" standalone="no" ?>
      <OME Creator="Olympus, scanR 3.3.0" xmlns="{space}">{images}</OME>'''

def test_scanr(tmp_path):
    "Blanks and `#` are part of names; a position without a channel shifts nothing"
    at = [position(15, 'B3', 1, ['405 nm #1','488 nm #1']), position(26, 'C2', 2, ['488 nm #1'])]
    files = [o for names,_ in at for o in names]
    put(tmp_path, [f'run7/data/{o}' for o in files], **{'run7/data/metadata.ome.xml': ome(*at)})
    found = scan(tmp_path, 'scanr')
    eq(rows(found, 'plate','well','site','channel'), [
        ['run7','B03','1','405 nm #1'], ['run7','B03','1','488 nm #1'],
        ['run7','C02','2','488 nm #1']])
    eq((pixels(tmp_path, found), found.about), ([1,2,3], dict(pixel_size=.325)))
    eq(rows(scan(tmp_path/'run7'/'data', 'scanr'), 'plate')[0], ['run7']) # from within

def test_scanr_planes(tmp_path):
    at = [position(15, 'B3', 1, ['DAPI'], depth=3)]
    put(tmp_path, at[0][0], **{'metadata.ome.xml': ome(*at)})
    eq(rows(scan(tmp_path, 'scanr'), 'z'), [['0'],['1'],['2']])

def test_one_file_for_two_images(tmp_path):
    at = position(15, 'B3', 1, ['DAPI'], depth=2)
    same = at[1].replace('Z00001', 'Z00000')
    put(tmp_path, at[0], **{'metadata.ome.xml': ome((at[0], same))})
    with expect_fail(ValueError, 'two images by the metadata'): scan(tmp_path, 'scanr')


# What they share

def test_located():
    there = ['p/A - 01.tif', 'p/Image/b.TIF', 'q/b.tif']
    eq(located(there, ['p','p','q','q'], ['A - 1.tif','b.tif','b.tif','c.tif']),
       ['p/A - 01.tif','p/Image/b.TIF','q/b.tif',None])
    eq(located(['a.PNG','a.txt'], [''], ['a.tiff']), ['a.PNG']) # converted
    eq(located(['a.png','a.jxl'], [''], ['a.tiff']), [None])
    eq(located(['1/a.tif','2/a.tif'], [''], ['a.tif']), [None])
    eq(located(['1/a.tif'], ['',''], ['a.tif','x/a.tif']), [None,None]) # who of the two is it?
    eq(located(['p/Images/a.tif'], ['p/meta'], ['../Images/a.tif']), ['p/Images/a.tif'])

def test_measures():
    eq(measures('2.96688E-07', '8', '12', um=1e6), dict(pixel_size=.296688, plate_shape=(8,12)))
    eq(measures('0,65', '8', None), dict(pixel_size=.65))

def test_polynomial():
    eq(polynomial([[1.], [10., 100.]], (3,2), (0,0), (1,1)).tolist(), [[1,11,21], [101,111,121]])

@pytest.mark.parametrize('key', ['phenix','imagexpress','yokogawa','incell','scanr'])
def test_are_registered(key): assert key in LAYOUTS


# All the way: one line opens, pixels are those of the files

def opened(root, **how):
    "A screen, with what it prints kept"
    from cellmae.screen import Screen
    return Screen.open(root, **how)

def values(screen, well):
    "Channel -> the one value of its pixels at the first site of a well"
    x = screen.read(int(np.flatnonzero(screen.table['well'].astype(str)==well)[0]))
    return {c: int(only) for c,y in zip(screen.channels, x) for only in [np.unique(y).item()]}

def test_open_phenix_planes(tmp_path):
    "One plane, the largest of all, or a question"
    shots,name,text = harmony('V7')
    put(tmp_path, [f'Images/{o}' for o,_ in shots], **{f'Images/{name}': text})
    with expect_fail(ValueError, "z='max'"): opened(tmp_path)
    for how,a,b in ((2,7,8), (1,5,6), ('max',7,8)):
        eq(values(opened(tmp_path, z=how), 'C02'), {'Alexa 647':a, 'DNA':b})

@pytest.mark.parametrize('channels', [
    {'1':'mito', '3':'DNA'}, {'Alexa 647':'mito', 'HOECHST 33342':'DNA'},
    {'Alexa 647':'mito', '3':'DNA'}, ['mito','DNA'], None])
def test_open_phenix_channels(tmp_path, channels):
    "By number, by the file's own name, in the file's order, or as the file says"
    shots,name,text = harmony('V7')
    put(tmp_path, [f'Images/{o}' for o,_ in shots], **{f'Images/{name}': text})
    eq(values(opened(tmp_path, z=1, channels=channels), 'C02'),
       {'mito' if channels else 'Alexa 647':5, 'DNA':6})

def test_open_phenix_channels_that_contradict(tmp_path):
    shots,name,text = harmony('V7')
    put(tmp_path, [f'Images/{o}' for o,_ in shots], **{f'Images/{name}': text})
    for wrong in (['DNA','mito'], {'3':'mito', '1':'DNA'}, {'2':'mito'}):
        with expect_fail(ValueError): opened(tmp_path, z=1, channels=wrong)

def test_open_phenix_flatfield(tmp_path):
    "Pixels are divided by the profile of their own channel"
    shots = [shot(2, 3, ch=c, name=DYES[c]) for c in DYES]
    put(tmp_path, **{'Index.idx.xml': index(shots, flat={1:profile(TERMS, [3,2]), 3:EVEN})})
    for o,_ in shots: tifffile.imwrite(tmp_path/o, np.full((2,3), 1000, np.uint16))
    f = open_flatfield(tmp_path/'Index.idx.xml', None, {'flatfield':1}).read()
    s = opened(tmp_path, illum=True)
    x = s.read(0)
    assert f.std()>.05
    eq(x[s.channels.index('Alexa 647')].tolist(), np.rint(1000/f).tolist())
    eq(x[s.channels.index('DNA')].tolist(), np.full((2,3), 1000).tolist())
    eq(opened(tmp_path, illum=False).read(0).max(), 1000)

@pytest.mark.parametrize('how,want', [('projection', {'DNA':1}), (1, {'DNA':2, 'Cy5':3}),
                                      ('max', {'DNA':4, 'Cy5':5})])
def test_open_imagexpress_projection_or_steps(tmp_path, how, want):
    "Never both: the projection is no plane of the steps, and has channels of its own"
    files = [f'TimePoint_1/ZStep_{z}/9987_B03_s1_w{c}.TIF'
             for z,c in ((0,1), (1,1), (1,10), (2,1), (2,10))]
    put(tmp_path, files, **{'9987.HTD': HTD % b'TRUE'})
    with expect_fail(ValueError, 'projection'): opened(tmp_path)
    eq(values(opened(tmp_path, z=how), 'B03'), want)

def test_open_scanr_hash(tmp_path):
    dyes = ['405 nm #1','488 nm #1']
    at = [position(15, 'B3', 1, dyes), position(26, 'C2', 1, dyes)]
    files = [f'data/{o}' for names,_ in at for o in names]
    put(tmp_path, files, **{'data/metadata.ome.xml': ome(*at)})
    eq(values(opened(tmp_path), 'C02'), {'405 nm #1':3, '488 nm #1':4})

def test_open_phenix_in_a_zip(tmp_path):
    shots,name,text = harmony('V5', flat={1:profile(TERMS, [3,2])})
    put(tmp_path/'a', [f'Images/{o}' for o,_ in shots], **{f'Images/{name}': text})
    shutil.make_archive(tmp_path/'P', 'zip', tmp_path/'a')
    eq(values(opened(tmp_path/'P.zip', z=2), 'C02'), {'Alexa 647':7, 'DNA':8})
    assert 'not read in a zip' in ' '.join(scan(tmp_path/'P.zip', 'phenix').said)

@pytest.mark.parametrize('name,texts', [
    ('Index.idx.xml', {'Index.idx.xml': index([shot(2, 3, name='DAPI')])}),
    ('9987.HTD', {'9987.HTD': HTD % b'FALSE'})])
def test_open_metadata_file(tmp_path, name, texts):
    "Who names the file that knows means its folder"
    put(tmp_path, [shot(2,3)[0], 'TimePoint_1/9987_B03_w1.TIF'], **texts)
    s = opened(tmp_path/name)
    eq(values(s, 'B03'), {'DNA': 1 if name.endswith('xml') else 2})

def test_open_yokogawa_and_incell(tmp_path):
    taken = [cv(w, 1, c) for w in ('B03','C02') for c in (1,2)]
    put(tmp_path/'cv', [o[0] for o in taken], **measured(taken))
    eq(values(opened(tmp_path/'cv'), 'C02'), {'DNA':3, 'Alexa 488':4})
    lines = [(r, c, 0, 'DAPI', 'DAPI', f'{"ABC"[r-1]} - {c}(fld 1 wv DAPI - DAPI).tif', 0)
             for r,c in ((2,3), (3,2))]
    put(tmp_path/'ge', [o[5] for o in lines], **{'P.xdce': stack(lines)})
    eq(values(opened(tmp_path/'ge'), 'C02'), {'DNA':2})
