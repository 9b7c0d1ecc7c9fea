"""Tables and a picture of what `data.py` measured

    python benchmarks/data_report.py [--results benchmarks/data]

Numbers of the last two tables are multiplied from measured ones, by the formulas of `by_cores` and
`embedding`."""
import json
from pathlib import Path

import pandas as pd

from data_readers import parser
from timing import markdown

here = Path(__file__).resolve().parent
NAMES = {'': 'the library', 'screen': '`screen[i]`', 'CropLoader': '`CropLoader`',
         'before': '`CropLoader` before', 'batches': '`DataLoader` of torch'}
IMAGES = dict(
    store='store', archive='store, `archive=True`', tiff='raw TIFF', deflate='deflated TIFF',
    planes='raw TIFF, a file per channel', planes_deflate='deflated TIFF, a file per channel',
    png='PNG, a file per channel', ome_zarr='OME-Zarr, zstd', npy='numpy, one mapped file',
    zarr='sharded Zarr, zarr-python', tensorstore='sharded Zarr, tensorstore', hdf5='HDF5',
    litdata='litdata', mds='MosaicML MDS', datasets='HF `datasets`', lance='Lance, blobs',
    webdataset='webdataset, in its order')
CORES,ENCODERS = (1,8,32),(1000,5300) # for what is multiplied: cores, and tiles a second

def number(x):
    "Three digits that count"
    if x is None or x!=x: return ''
    if not isinstance(x, float): return f'{x:,}' if isinstance(x, int) else x
    return f'{x:,.0f}' if abs(x)>=100 else f'{x:.3g}'

def table(rows): return markdown([{k: number(v) for k,v in r.items()} for r in rows])

def picked(rows, key, value, **where):
    "`{row[key]: row[value]}` of rows that say what is asked for"
    return {r[key]: r[value] for r in rows if all(r[k]==v for k,v in where.items())}


# crops

LOADER,FROM_MAP = 'CropLoader:store','screen:store'

def halves(name):
    "Who reads, and what"
    how,_,images = name.rpartition(':')
    return NAMES[how],IMAGES[images]

def over(at, a, b):
    "How much faster `a` is than `b`, the median over rounds; None where one is not there"
    if a not in at or b not in at: return None
    return float((pd.Series(at[a]['rates'])/pd.Series(at[b]['rates'])).median())

def crops_row(r, at):
    by,images = halves(r['reader'])
    ours = FROM_MAP if by in (NAMES[''], NAMES['screen']) else LOADER
    return {'images': images, 'read by': by, 'crops/s': r['rate'],
            'least, most': f'{r["low"]:,.0f}, {r["high"]:,.0f}',
            'store over it': over(at, ours, r['reader']), 'MB': r['MB'] or None,
            'write, CPU s': r.get('write'), 'version': r['version']}

def crops_table(rows):
    at = {r['reader']: r for r in rows}
    return table([crops_row(r, at) for r in sorted(rows, key=lambda r: -r['rate'])])


# goals

def at_least(results):
    "Goals of crops; None where a reader was not there"
    at = {r['reader']: r for r in results.get('crops', [])}
    rate = lambda k: at[k]['rate'] if k in at else None
    yield 'crops/s and core from the map', 8000, rate(FROM_MAP)
    yield 'crops/s and core in batches', 5000, rate(LOADER)
    yield 'batches, over the loader before on raw TIFF', 4, over(at, LOADER, 'before:tiff')
    yield 'batches, over the loader before on deflated TIFF', 20, over(at, LOADER, 'before:deflate')
    for k in ('litdata','mds'):
        yield f'from the map, over {IMAGES[k]}', 2, over(at, FROM_MAP, k)
        yield f'in batches, over {IMAGES[k]} in batches', 2, over(at, LOADER, f'batches:{k}')

def at_most(results):
    "Goals of sites"
    for o in results.get('overlap', []):
        yield '`embed`, seconds over what the cores need for its parts', 1.05, o['over']
    for what in ('well','epoch'):
        peaks = picked(results.get('memory', []), 'sites', 'peak', what=what).values()
        if peaks: yield f'peak memory ({what}), most over least', 1.1, max(peaks)/min(peaks)

def goals(results):
    "What was aimed for, and what came out"
    rows = [(what, f'at least {x:,}', got, got>=x) for what,x,got in at_least(results) if got]
    rows += [(what, f'at most {x:,}', got, got<=x) for what,x,got in at_most(results)]
    heads = 'goal','aimed for','measured'
    return [dict(zip(heads, r), met='yes' if r[3] else 'missed') for r in rows]


# a whole screen, and 93 million images: rates of one core that were measured, multiplied

def hours(n, rate):
    "In words: `n` things at `rate` a second"
    h = n/rate/3600
    return f'{h*60:.1f} min' if h<1 else f'{h:.1f} h' if h<48 else f'{h/24:.1f} days'

def each(of): return {f'{c} core{"s"*(c>1)}': of(c) for c in CORES}

def by_cores(step, n, rate, unit):
    "A row: `n / (rate x cores)`"
    return {'step': step, 'measured on one core': f'{number(rate)} {unit}/s',
            **each(lambda c: hours(n, rate*c))}

def embedding(n, tiles, read, encoder, where):
    "A row: what takes longer, `n / (read x cores)` or `n x tiles / encoder`"
    return {'step': f'embed from {where}, an encoder of {encoder:,} tiles/s',
            'measured on one core': f'{number(read)} sites/s',
            **each(lambda c: hours(n, min(read*c, encoder/tiles)))}

def of_screen(results, n, tiles=16):
    "Sites of 5 x 1080 x 1080; an epoch takes a crop of each"
    pack = picked(results['packing'], 'images', 'sites', by='pack', workers=1)
    crop = picked(results['windows'], 'reader', 'rate')
    read = picked(results['readers'], 'images', 'rate', how='threads', workers=1)
    for k in ('planes','planes_deflate'):
        yield by_cores(f'pack from {IMAGES[k]}', n, pack[k], 'sites')
    for k in ('store','planes_deflate'):
        yield by_cores(f'an epoch from {IMAGES[k]}', n, crop[f'CropLoader:{k}'], 'crops')
    for k in ('store','planes_deflate'):
        yield from (embedding(n, tiles, read[k], e, IMAGES[k]) for e in ENCODERS)

def of_images(results, n, size=6*256*256/1e6):
    "Images of 6 x 256 x 256; packing by bytes, as measured on 6 x 512 x 512"
    pack = picked(results['packing'], 'images', 'MB', by='pack', workers=1)
    read = picked(results['crops'], 'reader', 'rate')[LOADER]
    for k in ('tiff','deflate'): yield by_cores(f'pack from {IMAGES[k]}', n, pack[k]/size, 'images')
    yield by_cores('an epoch from store', n, read, 'crops')
    yield from (embedding(n, 1, read, e, 'store') for e in ENCODERS)

SCREEN,MANY = 60*384*9,93_000_000
MULTIPLIED = {
    f'60 plates x 384 wells x 9 sites of 5 x 1080 x 1080, {SCREEN*5*1080**2/1e12:.2f} TB '
    'as a store: multiplied': (('packing','windows','readers'), lambda r: of_screen(r, SCREEN)),
    f'93 million images of 6 x 256 x 256, {MANY*6*256**2/1e12:.1f} TB as a store: multiplied':
    (('packing','crops'), lambda r: of_images(r, MANY))}


# all of it

def wide(rows, index, columns, values):
    "A table with a column for each value of `columns`"
    t = pd.DataFrame(rows)
    t['column'] = t[columns].astype(str).agg(' '.join, axis=1)
    t = t.pivot(index=index, columns='column', values=values)[list(dict.fromkeys(t['column']))]
    return table(t.rename(index=IMAGES).reset_index().to_dict('records'))

def by_name(rows): return table([{k: IMAGES.get(v, v) for k,v in r.items()} for r in rows])

TABLES = dict(
    crops=('A crop of 256 of each 6 x 512 x 512 bytes, one core', crops_table),
    windows=('A crop of 256 of each 5 x 1080 x 1080, one core', crops_table),
    overlap=('`embed` and its parts: CPU seconds a site, seconds for all', table),
    readers=('`embed` with an encoder that costs nothing: sites of 5 x 1080 x 1080 a second',
             lambda rows: wide(rows, 'images', ['how','workers'], 'rate')),
    memory=('Peak memory in MB by sites', lambda rows: wide(rows, 'what', ['sites'], 'peak')),
    packing=('Packing: sites and MB a second, CPU seconds a site', by_name))

def sections(results):
    "Titles and tables of what is there"
    if met := goals(results): yield 'Goals', table(met)
    for k in (k for k in TABLES if k in results): yield TABLES[k][0], TABLES[k][1](results[k])
    for title,(parts,rows) in MULTIPLIED.items():
        if all(k in results for k in parts): yield title, table(rows(results))

def report(parts):
    "Markdown of all parts, and where they were measured"
    tables = sections({k: v['rows'] for k,v in parts.items()})
    text = [f'## {title}\n\n{rows}\n' for title,rows in tables]
    where = [f'- {k}, {v["seconds"]} s: {json.dumps(v["machine"])}' for k,v in parts.items()]
    return '\n'.join([*text, '## Measured\n', *where, ''])

def picture(rows, curves, path):
    "Crops a second as bars, memory over time as curves"
    import matplotlib; matplotlib.use('agg')
    from matplotlib import pyplot as plt
    fig,(left,right) = plt.subplots(1, 2, figsize=(12,5), width_ratios=(3,2), layout='constrained')
    rows = sorted((r for r in rows if r['rate']>100), key=lambda r: r['rate'])
    names = [', by '.join(halves(r['reader'])[::-1]).replace('`', '') for r in rows]
    colours = ['C0' if r['reader'].split(':')[0] in ('screen','CropLoader') else 'C7' for r in rows]
    left.barh(names, [r['rate'] for r in rows], color=colours)
    left.set(xlabel='crops of 6 x 256 x 256 a second and core')
    for r in curves: right.plot(*zip(*r['curve']), label=f'{r["what"]}, {r["sites"]:,} sites')
    right.set(xlabel='seconds', ylabel='memory of the process, MB', ylim=0, xscale='log')
    if curves: right.legend()
    fig.savefig(path); plt.close(fig)

def report_all(folder):
    "`results.md`, and a picture, of the parts that are in a folder"
    parts = {k: folder/f'{k}.json' for k in TABLES}
    parts = {k: json.loads(f.read_text()) for k,f in parts.items() if f.exists()}
    (folder/'results.md').write_text(report(parts))
    rows = {k: v['rows'] for k,v in parts.items()}
    if 'crops' in rows: picture(rows['crops'], rows.get('memory', []), folder/'data.svg')

def main():
    p = parser(__doc__)
    p.add_argument('--results', type=Path, default=here/'data')
    report_all(p.parse_args().results)

if __name__=='__main__': main()
