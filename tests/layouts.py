"""Tiny plates as microscopes and collections leave them, with what must come out; `python tests/layouts.py` prints a table of them

Each function writes a folder and gives `{(plate, well, site): {channel: pixels}}`. Wells lie neither on a square nor on a diagonal."""
import json, zipfile
from pathlib import Path
from zlib import crc32

import imagecodecs, numpy as np, pandas as pd, tifffile

H,W = 12,20
WELLS = {'B03':(2,3), 'C02':(3,2), 'H12':(8,12)}
LAYOUTS = {} # Name -> function, what of its folder is opened, and options of `Screen.open`


def layout(at='', **options):
    def register(f): LAYOUTS[f.__name__] = f,at,options; return f
    return register

def pixels(*key, bits=12):
    "Noise that belongs to a place"
    g = np.random.default_rng(crc32(repr(key).encode()))
    return g.integers(1, 2**bits, (H,W)).astype('u1' if bits<=8 else 'u2')

def tiff(path, x, **kw):
    path.parent.mkdir(parents=True, exist_ok=True)
    tifffile.imwrite(path, x, **kw)

def text(path, s, encoding='utf-8'):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(s.encode(encoding))

def png(path, x):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(imagecodecs.png_encode(x))

def named(root, plate, stains, name, fields=(1,2), lead='', key=str):
    "One file per channel, called by a function of well, row, column, field, number and name of the channel"
    out = {}
    for w,(r,c) in WELLS.items():
        for f in fields:
            for i,(raw,stain) in enumerate(stains.items()):
                x = pixels(plate, w, f, stain)
                tiff(root/lead/name(w, r, c, f, i, raw), x)
                out.setdefault((plate,w,key(f)), {})[stain] = x
    return out


# -- microscopes with metadata

def harmony(root, version, dyes, planes=1, absent=()):
    images = []
    d = root/'BR1__2020-11-19T19_54_25-Measurement 1/Images'
    out = {}
    for w,(r,c) in WELLS.items():
        for f in (1,2,5):
            for i,dye in enumerate(dyes, 1):
                stack = [pixels(w, f, dye, z) for z in range(planes)]
                for z,x in enumerate(stack, 1):
                    url = f'r{r:02d}c{c:02d}f{f:02d}p{z:02d}-ch{i}sk1fk1fl1.tiff'
                    if (w,f,i) not in absent: tiff(d/url, x)
                    own = f'<ChannelName>{dye}</ChannelName>' if version==5 else ''
                    images.append(
                        f'<Image Version="1"><State>Ok</State><URL>{url}</URL><Row>{r}</Row><Col>{c}</Col><FieldID>{f}</FieldID><PlaneID>{z}</PlaneID>'
                        f'<TimepointID>{version==7:d}</TimepointID><ChannelID>{i}</ChannelID>{own}</Image>')
                if (w,f,i) not in absent: out.setdefault(('BR117','%s'%w,str(f)), {})[dye] = np.max(stack, 0)
    ns = {5: 'http://www.perkinelmer.com/PEHH/HarmonyV5', 7: '43B2A954-E3C3-47E1-B392-6635266B0DD3/HarmonyV7'}[version]
    entry = lambda i,dye: f'<Entry ChannelID="{i}"><ChannelName>{dye}</ChannelName><ImageResolutionX Unit="m">5.98E-07</ImageResolutionX></Entry>'
    maps = f'<Maps><Map><Entry ChannelID="1"/></Map><Map>{"".join(map(entry, range(1, 9), dyes))}</Map></Maps>' if version==7 else ''
    text(d/('Index.idx.xml' if version==5 else 'Index.xml'), f'\ufeff<?xml version="1.0" encoding="utf-8"?><EvaluationInputData xmlns="{ns}"><Plates><Plate>'
         f'<PlateID>BR117</PlateID><PlateRows>16</PlateRows><PlateColumns>24</PlateColumns></Plate></Plates>{maps}<Images>{"".join(images)}</Images></EvaluationInputData>')
    return out

def renamed(out, **names): return {k: {names.get(c.replace(' ', '_'), c): x for c,x in o.items()} for k,o in out.items()}

@layout()
def phenix_v5(root): return renamed(harmony(root, 5, ['HOECHST 33342','Alexa 647']), HOECHST_33342='DNA')

@layout()
def phenix_v7(root): return renamed(harmony(root, 7, ['Alexa 568','HOECHST 33342']), HOECHST_33342='DNA')

@layout(z='max')
def phenix_planes(root): return harmony(root, 5, ['488 long'], planes=3)

@layout()
def phenix_with_a_file_absent(root): return harmony(root, 7, ['488 long','640 long'], absent={('C02',2,1)})

def metaxpress(root, steps, sites=True, waves=('DAPI','Cy5')):
    "Exported, with its table; step 0 is the projection"
    settings = ['"HTSInfoFile", Version 1.0', '"Description", "two\x82\x81lines"', '"TimePoints", 1', f'"ZSeries", {str(bool(steps)).upper()}', f'"ZSteps", {steps or 1}',
                f'"ZProjection", {str(bool(steps)).upper()}', '"XWells", 12', '"YWells", 8', f'"Sites", {str(sites).upper()}', f'"NWavelengths", {len(waves)}']
    settings += [f'"WaveName{i}", "{w}"' for i,w in enumerate(waves, 1)]
    text(root/'Screen_Plate_3434/9987.HTD', '\r\n'.join(settings), 'latin-1')
    out = {}
    for w in WELLS:
        for s in (1,2) if sites else (1,):
            for i,wave in enumerate(waves, 1):
                name = f'9987_{w}' + f'_s{s}'*sites + f'_w{i}'*(len(waves)>1)
                for z in range(steps+1):
                    at = root/'Screen_Plate_3434/TimePoint_1'/(f'ZStep_{z}' if steps else '')
                    tiff(at/f'{name}.TIF', pixels(w, s, wave, z))
                    tiff(at/f'{name}_Thumb.TIF', pixels(w)[:4,:4])
                made = [pixels(w, s, wave, z) for z in range(1, steps+1)] or [pixels(w, s, wave, 0)]
                out.setdefault(('9987',w,str(s)), {})[wave] = np.max(made, 0)
    return renamed(out, DAPI='DNA')

@layout()
def imagexpress(root): return metaxpress(root, 0)

@layout()
def imagexpress_one_site_one_wave(root): return metaxpress(root, 0, sites=False, waves=('DAPI',))

@layout(z='max')
def imagexpress_steps(root): return metaxpress(root, 2)

def records(root, plate, images, shape, channels, lead=''):
    "Files of Yokogawa: records, detail and settings"
    ns = 'xmlns:bts="http://www.yokogawa.co.jp/BTS/BTSSchema/1.0"'
    head = '<?xml version="1.0" encoding="utf-8"?>'
    at = lambda **kw: ' '.join(f'bts:{k}="{v}"' for k,v in kw.items())
    each = [f'<bts:MeasurementRecord {at(**kw)}>{file}</bts:MeasurementRecord>' for file,kw in images]
    text(root/lead/'MeasurementData.mlf', f'{head}<bts:MeasurementData {ns}>{"".join(each)}</bts:MeasurementData>')
    text(root/lead/'MeasurementDetail.mrf', f'{head}<bts:MeasurementDetail {ns} {at(Title=plate, RowCount=shape[0], ColumnCount=shape[1], MeasurementSettingFileName="a.mes")}/>')
    own = ''.join(f'<bts:Channel {at(Ch=k, Target=v)}/>' for k,v in channels.items())
    text(root/lead/'a.mes', f'{head}<bts:MeasurementSetting {ns}><bts:ChannelList>{own}</bts:ChannelList></bts:MeasurementSetting>')

@layout()
def cellvoyager(root):
    "A record of an error, two actions with one channel, shading beside, a channel that was not used"
    images,out = [],{}
    for w,(r,c) in WELLS.items():
        for f in (1,2):
            for a,ch in ((1,1),(2,1),(1,3)):
                file = f'AssayPlate_{w}_T0001F{f:03d}L01A{a:02d}Z01C{ch:02d}.tif'
                bad = (w,f,ch)==('H12',2,3)
                at = dict(Row=r, Column=c, TimePoint=1, FieldIndex=f, ZIndex=1, ActionIndex=a, Ch=ch)
                images.append(('failed',dict(Type='ERR', **at)) if bad else (file,dict(Type='IMG', **at)))
                name = 'actin' if ch==3 else f'DAPI (A{a:02d}_C01)'
                if bad: continue
                out.setdefault(('AssayPlate',w,str(f)), {})[name] = x = pixels(w, f, a, ch)
                tiff(root/'run/AssayPlate'/file, x)
    records(root, 'AssayPlate', images, (8,12), {1:'DAPI', 2:'unused', 3:'Phalloidin'}, 'run/AssayPlate')
    for o in ('DC_sCMOS_1.tif','SC_BP445-45_40x.tif'): tiff(root/'run/AssayPlate'/o, pixels(o))
    return out

def cq1(root, shape):
    images,out = [],{}
    for w,(r,c) in WELLS.items():
        for ch,stain in ((1,'DNA'),(2,'mito')):
            file = f'Image/W{(r-1)*shape[1]+c:04d}F0001T0001Z000C{ch}.tif'
            tiff(root/file, x := pixels(w, ch))
            images.append((file,dict(Type='IMG', Row=r, Column=c, TimePoint=1, FieldIndex=1, ZIndex=0, ActionIndex=1, Ch=ch)))
            out.setdefault(('P7',w,'1'), {})[stain] = x
    records(root, 'P7', images, shape, {1:'Hoechst', 2:'MitoTracker'})
    return out

@layout()
def cq1_of_96_wells(root): return cq1(root, (8,12))

@layout()
def cq1_of_384_wells(root): return cq1(root, (16,24))

@layout()
def scanr(root):
    "Blanks and a `#` in the names"
    stains = {'405 nm #1':'405 nm #1', '488 nm #2':'488 nm #2'}
    name = lambda w,r,c,f,i,raw: f'{w[0]}{c}--W{(r-1)*12+c:05d}--P{f:05d}--Z00000--T00000--{raw}.tif'
    out,images = named(root, root.name, stains, name, lead='data'),[]
    for w,(r,c) in WELLS.items():
        for f in (1,2):
            planes = ''.join(f'<TiffData FirstC="{i}" FirstT="0" FirstZ="0"><UUID FileName="{name(w, r, c, f, i, k)}">u</UUID></TiffData>' for i,k in enumerate(stains))
            own = ''.join(f'<Channel ID="Channel:{i}" Name="{k}"/>' for i,k in enumerate(stains))
            images.append(f'<Image Name="Well {(r-1)*12+c}, Position {f} ({w[0]}{c})"><Pixels SizeX="{W}" SizeY="{H}" SizeZ="1" SizeC="2" SizeT="1">{own}{planes}</Pixels></Image>')
    text(root/'data/metadata.ome.xml', f'<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2013-06">{"".join(images)}</OME>')
    return out

INCELL = {'DAPI - DAPI':'DNA', 'Cy5 - Cy5':'Cy5 - Cy5'}
def incell_name(w, r, c, f, i, raw):
    "Numbers are padded in one well and not in another"
    return f'{w[0]} - {c}(fld {f} wv {raw}).tif' if w=='C02' else f'{w[0]} - {c:02d}(fld {f:02d} wv {raw}).tif'

@layout()
def incell(root):
    out,each = named(root, 'plate1', INCELL, incell_name),[]
    for w,(r,c) in WELLS.items():
        for f in (1,2):
            for i,raw in enumerate(INCELL):
                ex,em = raw.split(' - ')
                each.append(f'<Image filename="{incell_name(w, r, c, f, i, raw)}"><Well label="{w[0]} - {c}"><Row number="{r}"/><Column number="{c}"/></Well>'
                            f'<Identifier field_index="{f-1}" wave_index="{i}" z_index="0" time_index="0"/><ExcitationFilter name="{ex}"/><EmissionFilter name="{em}"/></Image>')
    text(root/'plate1.xdce', f'<?xml version="1.0" encoding="ISO-8859-1"?><ImageStack><Annotation>\xb5m</Annotation><Images>{"".join(each)}</Images></ImageStack>', 'latin-1')
    return out


# -- names of files alone

@layout()
def incell_without_metadata(root): return named(root, root.name, INCELL, incell_name)

@layout()
def arrayscan(root):
    return named(root, 'AS_09125_0501', {'0':'0','1':'1'}, lambda w,r,c,f,i,raw: f'AS_09125_0501_{w}f{f:02d}d{raw}.tif')

@layout()
def cytation(root):
    return named(root, root.name, {'DAPI':'DNA','GFP':'GFP'}, lambda w,r,c,f,i,raw: f'{w[0]}{c}_01_{i+1}_{f}_{raw}_001.tif')

@layout()
def rxrx_names_and_mac(root):
    "Hidden files of a Mac and of Windows beside the images"
    out = named(root, 'P1', {'1':'1','2':'2'}, lambda w,r,c,f,i,raw: f'P1/{w}_s{f}_w{raw}.tif')
    for f in [*root.rglob('*.tif')]: f.with_name(f'._{f.name}').write_bytes(b'\0\5\x16\7')
    for o in ('.DS_Store','Thumbs.db'): (root/'P1'/o).write_bytes(b'x')
    return out

@layout(plate_shape=(8,12))
def cq1_without_metadata(root):
    return named(root, root.name, {'1':'1','2':'2'}, lambda w,r,c,f,i,raw: f'Image/W{(r-1)*12+c:04d}F{f:04d}T0001Z000C{raw}.tif')

@layout()
def nikon_jobs(root):
    "The running number counts over channels too"
    number = lambda w,f,i: [*WELLS].index(w)*4+i*2+f-1
    return named(root, root.name, {'DAPI':'DNA','FITC':'FITC'}, lambda w,r,c,f,i,raw: f'Well{w}_Channel{raw}_Seq{number(w, f, i):04d}.tif')

@layout(t='all')
def tiles_in_time(root):
    out = {}
    for t in ('001','002'):
        for tile in ('r000_c000','r000_c001'):
            tiff(root/f'Timepoint{t}_Row02_Well03_DAPI_zstack001_{tile}.tif', x := pixels(t, tile))
            out[root.name,'B03',tile,t.lstrip('0')] = dict(DNA=x)
    return out


# -- formats of exchange

def zarr_plate(path, version, axes='cyx', pad=False, names=('DAPI','ConA'), level='0'):
    import zarr
    group = zarr.open_group(str(path), mode='w', zarr_format=2 if version=='0.4' else 3)
    def say(o, about): o.attrs.update(about if version=='0.4' else dict(ome=dict(version=version, **about)))
    way = lambda w,c: f'{w[0]}/{c:02d}' if pad else f'{w[0]}/{c}'
    wells = [dict(path=way(w, c), rowIndex=i, columnIndex=j) for (w,(_,c)),i,j in zip(WELLS.items(), (0,1,2), (1,0,2))]
    columns = sorted({way(w, c)[2:] for w,(_,c) in WELLS.items()}, key=int)
    say(group, dict(plate=dict(rows=[dict(name=o) for o in 'BCH'], columns=[dict(name=o) for o in columns], wells=wells)))
    shape,out = [dict(t=1, c=2, z=1, y=H, x=W)[a] for a in axes],{}
    for (w,(_,c)),well in zip(WELLS.items(), wells):
        g = group.create_group(well['path'])
        say(g, dict(well=dict(images=[dict(path=f) for f in ('0','1')])))
        for f in ('0','1'):
            x = np.stack([pixels(w, f, k) for k in (0,1)])
            image = g.create_group(f)
            kw = {} if version=='0.4' else dict(shards=shape)
            image.create_array(level, shape=shape, chunks=[1]*(len(axes)-2)+[H,W], dtype='u2', **kw)[...] = x.reshape(shape)
            about = dict(multiscales=[dict(axes=[dict(name=a) for a in axes], datasets=[dict(path=level)])])
            if names: about['omero'] = dict(channels=[dict(label=o) for o in names])
            say(image, about)
            out[path.name.partition('.')[0],w,f] = dict(zip(('DNA','ER') if names else '01', x))
    return out

@layout()
def ome_zarr_04(root): return zarr_plate(root/'p.zarr', '0.4')

@layout()
def ome_zarr_05(root): return zarr_plate(root/'deep/p.zarr', '0.5', 'tczyx', pad=True, level='full')

@layout()
def ome_zarr_without_names(root): return zarr_plate(root/'p.ome.zarr', '0.4', names=())

@layout()
def ome_tiff_plate_in_one_file(root):
    root.mkdir(parents=True)
    out = {}
    with tifffile.TiffWriter(root/'plate.ome.tif') as t:
        for i,w in enumerate(WELLS):
            x = np.stack([pixels(w, k) for k in (0,1)])
            t.write(x, photometric='minisblack', metadata=dict(axes='CYX', Name=f'Well {w}', Channel=dict(Name=['DAPI','ConA'])))
            out[root.name,w,str(i)] = dict(DNA=x[0], ER=x[1])
    return out

@layout()
def ome_tiff_per_site(root):
    out = {}
    for w in WELLS:
        for s in '12':
            x = np.stack([pixels(w, s, k) for k in (0,1,2)])
            tiff(root/f'{w}_s{s}.ome.tif', x, photometric='minisblack', metadata=dict(axes='CYX', Channel=dict(Name=['Actin','Hoechst','ConA'])))
            out[root.name,w,s] = dict(actin=x[0], DNA=x[1], ER=x[2])
    return out

@layout(z='max', channels=['DNA','ER'])
def imagej_stacks(root):
    out = {}
    for w in WELLS:
        x = np.stack([[pixels(w, z, k) for k in (0,1)] for z in (0,1,2)])
        tiff(root/f'{w}.tif', x, imagej=True, metadata=dict(axes='ZCYX'))
        out[root.name,w,'1'] = dict(zip(('DNA','ER'), x.max(0)))
    return out

def load_data(root, write):
    rows,out = [],{}
    for w,(r,c) in WELLS.items():
        for s in (1,2):
            row = dict(Metadata_Plate='BR1', Metadata_Well=w, Metadata_Site=s)
            for i,stain in enumerate(('DNA','ER'), 1):
                row[f'FileName_Orig{stain}'] = file = f'r{r:02d}c{c:02d}f{s:02d}p01-ch{i}sk1fk1fl1.tiff'
                row[f'PathName_Orig{stain}'] = str(root/'images/BR1')
                tiff(root/'images/BR1'/file, x := pixels(w, s, stain))
                out.setdefault(('BR1',w,str(s)), {})[stain] = x
            rows.append(row)
    write(pd.DataFrame(rows))
    return out

@layout()
def load_data_csv(root): return load_data(root, lambda t: t.to_csv(root/'load_data.csv', index=False))

@layout()
def load_data_packed(root): return load_data(root, lambda t: t.to_csv(root/'load_data.csv.gz', index=False))

@layout()
def load_data_parquet(root): return load_data(root, lambda t: t.to_parquet(root/'load_data.parquet'))

RXRX = ('DNA','ER','actin','RNA','mito','golgi')

@layout()
def rxrx1(root):
    "Plates are numbered anew in every experiment: twelve wells, not six"
    rows,out = [],{}
    for e in ('HEPG2-01','HUVEC-01'):
        for p in (1,2):
            for w in WELLS:
                kind = dict(well_type='negative_control', sirna='EMPTY') if w=='C02' else dict(well_type='treatment', sirna=f's{w}')
                for s in (1,2):
                    rows.append(dict(site_id=f'{e}_{p}_{w}_{s}', experiment=e, plate=p, well=w, site=s, **kind))
                    for i,stain in enumerate(RXRX, 1):
                        png(root/f'images/{e}/Plate{p}/{w}_s{s}_w{i}.png', x := pixels(e, p, w, s, i, bits=8))
                        out.setdefault((e,str(p),w,str(s)), {})[stain] = x
    pd.DataFrame(rows).to_csv(root/'metadata.csv', index=False)
    return out

@layout()
def rxrx3_core(root):
    "The six rows of a site lie in several row groups, and in two files"
    import pyarrow as pa, pyarrow.parquet as pq
    keys,images,wells,out = [],[],[],{}
    for w in WELLS:
        wells.append(dict(well_id=f'gene-001_1_{w}', experiment_name='gene-001', plate=1, address=w, gene='EMPTY_control' if w=='C02' else f'G{w}', perturbation_type='CRISPR'))
        for i,stain in enumerate(RXRX, 1):
            x = pixels(w, i, bits=8)
            keys.append(f'gene-001/Plate1/{w}_s1_{i}')
            images.append(dict(bytes=imagecodecs.jpeg2k_encode(x, level=0, reversible=True), path=None))
            out.setdefault(('gene-001','1',w,'1'), {})[stain] = x
    t = pa.table({'__key__': keys, 'jp2': pa.array(images, pa.struct([('bytes',pa.binary()), ('path',pa.string())]))})
    (root/'data').mkdir(parents=True)
    for i,part in enumerate((t[:10], t[10:])): pq.write_table(part, root/f'data/train-{i:05d}-of-00002.parquet', row_group_size=4)
    pd.DataFrame(wells).to_csv(root/'metadata_rxrx3_core.csv', index=False)
    return out

@layout()
def chammi(root):
    root.mkdir(parents=True)
    rows,out = [],{}
    with zipfile.ZipFile(root/'s1.zip', 'w') as z:
        for w in WELLS:
            for raw,stain in (('dna','DNA'),('er','ER')):
                x = pixels(w, raw, bits=8)
                z.writestr(f'{w}_{raw}.png', imagecodecs.png_encode(x))
                rows.append({'experiment.study':'s1', 'experiment.plate':'P1', 'experiment.well':w, 'experiment.reagent':'x', 'experiment.control':w=='C02', 'imaging.multi_channel_id':f's1_{w}',
                             'imaging.channel_type':raw, 'geometry.z_slice':0, 'geometry.timepoint':0, 'storage.filename':'s1.zip', 'storage.path':f'{w}_{raw}.png'})
                out.setdefault(('s1','P1',w,f's1_{w}'), {})[stain] = x
    pd.DataFrame(rows).to_csv(root/'metadata.csv', index=False)
    return out

@layout('P1.zip')
def zipped(root):
    "A plate as somebody mailed it"
    out = named(root/'in', 'P1', {'DAPI':'DNA','ConA':'ER'}, lambda w,r,c,f,i,raw: f'P1/{w}_s{f}_{raw}.tif')
    with zipfile.ZipFile(root/'P1.zip', 'w') as z:
        for f in sorted((root/'in').rglob('*.tif')): z.write(f, f.relative_to(root/'in'))
    for f in [*(root/'in').rglob('*.tif')]: f.unlink()
    (root/'in/P1').rmdir(); (root/'in').rmdir()
    return out


def came_out(screen):
    "What a screen holds, in the form that the functions above give"
    t,out = screen.table,{}
    for i in range(len(screen)):
        x = screen.read(i) if not len(t.filter(like='file_')) or (t.filter(like='file_').iloc[i]!='').all() else None
        o = t.iloc[i]
        key = (o['batch'],)*(o['batch']!=o['plate']) + (o['plate'],o['well'],o['site']) + ((o['t'],) if 't' in t else ())
        out[tuple(map(str, key))] = None if x is None else dict(zip(screen.channels, x))
    return out

def main():
    "The table: what was written, what it was taken for, and what came out"
    import contextlib, io, tempfile
    from cellmae.screen import Screen
    print('| folder | options | taken for | sites | channels | shape |\n|---|---|---|---|---|---|')
    for name,(write,at,options) in LAYOUTS.items():
        with tempfile.TemporaryDirectory() as d, contextlib.redirect_stdout(io.StringIO()) as said:
            write(Path(d)/name)
            s = Screen.open(Path(d)/name/at, **options)
            size = next((o.shape for o in map(s.read, range(len(s)))), '')
        taken = next((o for o in said.getvalue().splitlines() if ' site' in o), '').partition(':')[0]
        print('|', ' | '.join([name.replace('_', ' '), json.dumps(options) if options else '', taken, str(len(s)), ', '.join(s.channels), 'x'.join(map(str, size))]), '|')

if __name__=='__main__': main()
