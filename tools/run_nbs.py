#!/usr/bin/env python
"Run notebooks in a real kernel, store their outputs, and clean them"
import argparse, os, re, sys, time
from base64 import b64decode, b64encode
from io import BytesIO
from pathlib import Path

import nbformat
from PIL import Image, ImageChops
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbdev.clean import clean_nb
from nbdev.config import get_config
from nbdev.doclinks import nbglob
from nbdev.process import extract_directives

root = Path(__file__).resolve().parents[1]
bad_text = {r'(?<![\w.<:/])/(?:home|root|work|tmp|usr|opt|mnt|var|data|Users|content)/': 'an absolute path',
            r'\b\w*Warning\b': 'a warning', r' at 0x[0-9a-f]{6,}': 'a memory address',
            r'\d\d:\d\d<\d\d:\d\d|\d+:\d\d<\d+:\d\d': 'the clock of a progress bar'}


def is_skipped(
    cell, # Notebook cell
    skip, # Flags whose cells do not run, such as `{'slow','data'}`
):
    "Should `cell` keep its stored output instead of running?"
    if cell.cell_type != 'code' or 'nbdev_export'+'(' in cell.source: return True
    d = extract_directives(cell, remove=False)
    return bool(set(d) & set(skip)) or d.get('eval:', ['true'])[0].lower() == 'false'


class Runner(NotebookClient):
    "A notebook client that passes over the cells that are flagged"
    async def async_execute_cell(self, cell, cell_index, **kw):
        if is_skipped(cell, self.skip): return cell
        return await super().async_execute_cell(cell, cell_index, **kw)


def kernel_env():
    "The environment of the kernel: inline pictures, fixed hashes, two threads unless told otherwise"
    env = {k:v for k,v in os.environ.items() if k not in ('MPLBACKEND', 'IN_TEST')}
    return {**env, 'PYTHONPATH':str(root), 'PYTHONHASHSEED':'0', 'OMP_NUM_THREADS':env.get('OMP_NUM_THREADS', '2'),
            'PYTHONWARNINGS':'ignore:IProgress not found,ignore:`torch.jit.script` is deprecated'}


def output_text(o):
    "Everything a reader can read in output `o`"
    data = [v for k,v in o.get('data', {}).items() if k.startswith('text')]
    return '\n'.join(''.join(s) for s in data + [o.get('text', '')])


def is_blank(o):
    "Is output `o` only what a vanished progress bar left behind, or a picture that was redrawn while something ran?"
    html = ''.join(o.get('data', {}).get('text/html', '-'))
    return html.startswith('<img src="data:') or not re.sub(r'<style>.*?</style>', '', html, flags=re.S).strip()


def complaints(cell):
    "What is wrong with the stored outputs of `cell`"
    for o in cell.get('outputs', []):
        if o['output_type'] == 'error': yield f"it failed with {o['ename']}: {o['evalue']}"
        if is_blank(o): yield 'it shows nothing, as a vanished progress bar does'
        if o.get('name') == 'stderr': yield f"it wrote to stderr: {''.join(o['text'])[:200]!r}"
        for pat,what in bad_text.items():
            if m := re.search(pat + '.{0,60}', output_text(o)): yield f'its output shows {what}: {m[0]!r}'


def slim(png):
    "The picture `png` (base64) with a palette of 256 colours, if no pixel changes by more than 8 of 255"
    im = Image.open(BytesIO(b64decode(png)))
    if im.mode == 'P' or im.mode == 'RGBA' and im.getextrema()[3][0] < 255: return png
    im = im.convert('RGB')
    few = im.quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=3, dither=Image.Dither.NONE)
    if max(hi for _,hi in ImageChops.difference(im, few.convert('RGB')).getextrema()) > 8: return png
    few.save(to := BytesIO(), 'PNG', optimize=True)
    return min(png, b64encode(to.getvalue()).decode(), key=len)


def halved(png):
    "The picture `png` (base64) with half as many pixels in each direction"
    im = Image.open(BytesIO(b64decode(png))).convert('RGB')
    im.reduce(2).save(to := BytesIO(), 'PNG', optimize=True)
    return slim(b64encode(to.getvalue()).decode())


def fit_pictures(nb, limit=390e3):
    "Give up the pixels that only sharp screens show, largest picture first, until `nb` has less than `limit` bytes"
    outs = [o for c in nb.cells for o in c.get('outputs', []) if 'image/png' in o.get('metadata', {})]
    for o in sorted(outs, key=lambda o: -len(o.data['image/png'])):
        if len(nbformat.writes(nb)) < limit: return
        o.data['image/png'] = halved(o.data['image/png'])
        del o.metadata['image/png']


def clean(nb):
    "What `nbdev_clean` does, on a notebook in memory, small pictures, and no trace of jupytext or of vanished bars"
    cfg = get_config(path=root)
    nb.metadata.pop('jupytext', None)
    keys = cfg.allowed_metadata_keys.split(), cfg.allowed_cell_metadata_keys.split()
    for c in nb.cells:
        if 'outputs' in c: c.outputs = [o for o in c.outputs if not is_blank(o)]
        for d in [o.data for o in c.get('outputs', []) if 'image/png' in o.get('data', {})]: d['image/png'] = slim(d['image/png'])
    fit_pictures(nb)
    clean_nb(nb, cfg.clear_all, *keys, clean_ids=cfg.clean_ids)


def run_nb(
    path, # Notebook file
    skip, # Flags whose cells do not run
    timeout, # Seconds one cell may take
):
    "Run notebook `path` and store its outputs; the file is written only if all cells passed"
    nb,start = nbformat.read(path, as_version=4),time.time()
    runner = Runner(nb, timeout=timeout, kernel_name='python3', record_timing=False,
                    extra_arguments=['--log-level=ERROR', '--InlineBackend.figure_format=retina'],
                    resources=dict(metadata=dict(path=str(path.parent))))
    runner.skip = skip
    runner.execute(env=kernel_env())
    clean(nb)
    tmp = path.with_suffix('.tmp')
    nbformat.write(nb, tmp)
    tmp.replace(path)
    print(f'{path.relative_to(root)}: {time.time()-start:.0f} s, {path.stat().st_size/1e3:.0f} KB', flush=True)
    bad = [f'  cell {c.id}: {s}' for c in nb.cells for s in complaints(c)]
    print(*bad, sep='\n', end='\n'*bool(bad), flush=True)
    return not bad


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('nbs', nargs='*', type=Path, help='notebooks; all of nbs/ if none is named')
    p.add_argument('--flags', default='', help="flags whose cells run too, as in 'slow data'; others keep their outputs")
    p.add_argument('--timeout', type=int, default=3600, help='seconds one cell may take')
    a = p.parse_args()
    skip = set(get_config(path=root).tst_flags.split()) - set(a.flags.split())
    ok = True
    for f in [o.resolve() for o in a.nbs] or sorted(nbglob(root/'nbs', as_path=True)):
        try: ok &= run_nb(f, skip, a.timeout)
        except CellExecutionError as e:
            print(f'{f.relative_to(root)}: NOT stored\n{e}', file=sys.stderr, flush=True)
            ok = False
    sys.exit(not ok)


if __name__ == '__main__': main()
