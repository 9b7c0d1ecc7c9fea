"""Tables and a picture of what `data.py` measured

    python benchmarks/data_report.py [--results benchmarks/data]

Numbers of the last two tables are multiplied from measured ones, by the formulas of `of_screen` and `of_images`."""
import argparse, json
from pathlib import Path

import pandas as pd

from timing import markdown

here = Path(__file__).resolve().parent
NAMES = {'screen':'`screen[i]`', 'CropLoader':'`CropLoader`', 'before':'`CropLoader` before',
         'batches':'`torch` `DataLoader`'}
IMAGES = dict(store='store', archive='store, `archive=True`', tiff='raw TIFF', deflate='deflated TIFF', png='PNG',
              ome_zarr='OME-Zarr, zstd', planes='raw TIFF, a file per channel', npy='numpy, one mapped file', hdf5='HDF5',
              planes_deflate='deflated TIFF, a file per channel', zarr='sharded Zarr through zarr-python',
              tensorstore='sharded Zarr through tensorstore', mds='MosaicML MDS', datasets='HF `datasets`', lance='Lance, blobs',
              litdata='litdata', webdataset='webdataset, in its order')

def number(x):
    "Three digits that count"
    if not isinstance(x, float): return '' if x is None else f'{x:,}' if isinstance(x, int) else x
    return '' if x!=x else f'{x:,.0f}' if abs(x)>=100 else f'{x:.3g}'

def table(rows): return markdown([{k: number(v) for k,v in r.items()} for r in rows])

def picked(rows, key, value, **where):
    return {r[key]: r[value] for r in rows if all(r[k]==v for k,v in where.items())}


# crops

def crops_table(rows, base='CropLoader:store'):
    at = {r['reader']: r for r in rows}
    def row(r):
        how,_,images = r['reader'].rpartition(':')
        return {'images': IMAGES[images], 'read by': NAMES.get(how, 'the library'), 'crops/s': r['rate'],
                'least, most': f'{r["low"]:,.0f}, {r["high"]:,.0f}', 'store over it': over(at, 'screen:store' if how in ('', 'screen') else base, r['reader']),
                'MB': r.get('MB') or None, 'write, CPU s': r.get('write'), 'version': r.get('version')}
    return table([row(r) for r in sorted(rows, key=lambda r: -r['rate'])])

def over(at, a, b):
    "Median over rounds of how much faster `a` is than `b`"
    if a not in at or b not in at: return None
    return float((pd.Series(at[a]['rates'])/pd.Series(at[b]['rates'])).median())


# goals

def goals(results):
    "What was aimed for, and what came out"
    rows = [(what, f'at least {least:,}', got, got>=least) for what,least,got in at_least(results) if got]
    rows += [(what, f'at most {most:,}', got, got<=most) for what,most,got in at_most(results)]
    return [{'goal': what, 'aimed for': aim, 'measured': got, 'met': 'yes' if met else 'missed'} for what,aim,got,met in rows]

def at_least(results):
    "Goals of crops; None where a reader was not there"
    at = {r['reader']: r for r in results.get('crops', [])}
    rate = lambda k: at[k]['rate'] if k in at else None
    loader,from_map = 'CropLoader:store','screen:store'
    yield 'crops/s and core from the map', 8000, rate(from_map)
    yield 'crops/s and core in batches', 5000, rate(loader)
    yield 'batches, over the loader before on raw TIFF', 4, over(at, loader, 'before:tiff')
    yield 'batches, over the loader before on deflated TIFF', 20, over(at, loader, 'before:deflate')
    for k in ('litdata','mds'):
        yield f'from the map, over {IMAGES[k]}', 2, over(at, from_map, k)
        yield f'in batches, over {IMAGES[k]} in batches', 2, over(at, loader, f'batches:{k}')

def at_most(results):
    "Goals of sites"
    for o in results.get('overlap', []): yield '`embed`, seconds over what the cores need', 1.05, o['over']
    peaks = picked(results.get('memory', []), 'sites', 'peak', what='well').values()
    if peaks: yield 'peak memory of `embed`, most over least', 1.1, max(peaks)/min(peaks)

# a whole screen, and 93 million images: rates of one core that were measured, multiplied

CORES = (1,8,32)

def hours(n, rate):
    "In words; `n` things at `rate` a second"
    h = n/rate/3600
    return f'{h*60:.1f} min' if h<1 else f'{h:.1f} h' if h<48 else f'{h/24:.1f} days'

def by_cores(step, n, rate, unit):
    "A row: `n / (rate x cores)`"
    return {'step': step, 'measured on one core': f'{number(rate)} {unit}/s',
            **{f'{c} cores' if c>1 else '1 core': hours(n, rate*c) for c in CORES}}

def embedding(n, tiles, read, encoder, where):
    "A row: what takes longer, `n / (read x cores)` or `n x tiles / encoder`"
    return {'step': f'embed from {where}, an encoder of {encoder:,.0f} tiles/s',
            'measured on one core': f'{number(read)} sites/s',
            **{f'{c} cores' if c>1 else '1 core': hours(n, min(read*c, encoder/tiles)) for c in CORES}}

def of_screen(results, encoders, n=60*384*9, tiles=16):
    "60 plates x 384 wells x 9 sites of 5 x 1080 x 1080, a crop of each in an epoch"
    pack = picked(results['packing'], 'images', 'sites', by='pack', workers=1)
    crop = picked(results['windows'], 'reader', 'rate')
    read = picked(results['readers'], 'images', 'rate', how='threads', workers=1)
    rows = [by_cores(f'pack from {IMAGES[k]}', n, pack[k], 'sites') for k in ('planes','planes_deflate')]
    for k in ('store','planes_deflate'):
        rows.append(by_cores(f'read an epoch from {IMAGES[k]}', n, crop[f'CropLoader:{k}'], 'crops'))
    for k in ('store','planes_deflate'):
        rows += [embedding(n, tiles, read[k], e, IMAGES[k]) for e in encoders]
    return rows

def of_images(results, encoders, n=93_000_000, size=6*256*256/1e6):
    "93 million images of 6 x 256 x 256; packing by bytes, as measured on 6 x 512 x 512"
    pack = picked(results['packing'], 'images', 'MB', by='pack', workers=1)
    read = picked(results['crops'], 'reader', 'rate')
    rows = [by_cores(f'pack from {IMAGES[k]}', n, pack[k]/size, 'images') for k in ('tiff','deflate')]
    rows.append(by_cores('read an epoch from store', n, read['CropLoader:store'], 'crops'))
    return rows + [embedding(n, 1, read['CropLoader:store'], e, 'store') for e in encoders]

def in_gb(n, *shape): return f'{n*shape[0]*shape[1]*shape[2]/1e9:,.0f} GB'


# all of it

def memory_table(rows):
    t = pd.DataFrame(rows).pivot(index='what', columns='sites', values='peak')
    t.columns = [f'{n:,} sites, MB' for n in t]
    return table(t.round().astype(int).reset_index().to_dict('records'))

def readers_table(rows):
    t = pd.DataFrame(rows)
    t['column'] = t.workers.astype(str)+' '+t.how
    t = t.pivot(index='images', columns='column', values='rate').rename(index=IMAGES)
    return table(t[sorted(t, key=lambda o: o.split()[::-1], reverse=False)].reset_index().to_dict('records'))

def sections(results, encoders):
    "Titles and tables of what is there"
    need = lambda *keys: all(k in results for k in keys)
    if goals(results): yield 'Goals', table(goals(results))
    if need('crops'): yield 'Crops of 6 x 512 x 512 bytes, one core', crops_table(results['crops'])
    if need('windows'): yield 'Crops of 5 x 1080 x 1080, one core', crops_table(results['windows'])
    if need('overlap'): yield '`embed` and its parts, seconds', table(results['overlap'])
    if need('readers'): yield '`embed` with an encoder that costs nothing, sites/s of 5 x 1080 x 1080', readers_table(results['readers'])
    if need('memory'): yield 'Peak memory', memory_table(results['memory'])
    if need('packing'): yield 'Packing', table(results['packing'])
    if need('packing','windows','readers'):
        yield f'A screen of 60 plates, {in_gb(60*384*9, 5, 1080, 1080)} as a store: multiplied', table(of_screen(results, encoders))
    if need('packing','crops'):
        yield f'93 million images, {in_gb(93_000_000, 6, 256, 256)} as a store: multiplied', table(of_images(results, encoders))

def report(folder, encoders=(1000,5300)):
    "Markdown of all parts in a folder"
    parts = {f.stem: json.loads(f.read_text()) for f in folder.glob('*.json')}
    results = {k: v['rows'] for k,v in parts.items()}
    machines = {json.dumps(v['machine'], sort_keys=True): k for k,v in parts.items()}
    text = [f'## {title}\n\n{rows}\n' for title,rows in sections(results, encoders)]
    text += ['## Measured\n', *(f'- {k}: {m}' for m,k in machines.items())]
    return '\n'.join(text)+'\n'

def picture(folder):
    "Crops a second as bars, memory as curves"
    import matplotlib; matplotlib.use('agg')
    from matplotlib import pyplot as plt
    rows = json.loads((folder/'crops.json').read_text())['rows']
    rows = sorted((r for r in rows if r['rate']>=100), key=lambda r: r['rate'])
    name = lambda r: ' '.join(reversed([IMAGES[r['reader'].split(':')[-1]], *[NAMES[o]+':' for o in r['reader'].split(':')[:-1]]]))
    fig,ax = plt.subplots(figsize=(8, .3*len(rows)+1))
    ax.barh([name(r).replace('`','') for r in rows], [r['rate'] for r in rows], color=['C0' if r['version']=='0.1.0' else 'C7' for r in rows])
    ax.set_xlabel('crops of 6 x 256 x 256 a second and core'); fig.tight_layout()
    fig.savefig(folder/'crops.svg'); plt.close(fig)

def report_all(folder):
    (folder/'results.md').write_text(report(folder))
    if (folder/'crops.json').exists(): picture(folder)

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--results', type=Path, default=here/'data')
    a = p.parse_args()
    report_all(a.results)

if __name__=='__main__': main()
