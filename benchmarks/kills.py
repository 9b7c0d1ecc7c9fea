"Kill packing and embedding at random moments: a second run must end with the files of an undisturbed one"
import os
os.environ.setdefault('OMP_NUM_THREADS', '1') # jobs are forked, so this process starts no threads
import argparse, json, random, shutil, signal, socket, sys, tempfile, time, traceback
from contextlib import suppress
from pathlib import Path

import numpy as np, pandas as pd, tifffile, torch
import pyarrow.parquet
from cellmae.embed import embed
from cellmae.screen import Screen
from cellmae.store import append, pack, repack

plates,wells,stains = ('P1','P2','P3'),('B03','C02','G11'),('DNA','ER') # of 8 x 12
SHARD = .04 # MB, some four of these images

def write_screen(root, some=plates):
    "Sites of 64 x 48, each with its own pixels"
    rng = np.random.default_rng(len(some))
    for f in (root/p/f'{w}_s{s}_{c}.tif' for p in some for w in wells for s in '123' for c in stains):
        f.parent.mkdir(parents=True, exist_ok=True)
        tifffile.imwrite(f, rng.integers(0, 4000, (64,48)).astype(np.uint16))
    s = Screen.from_pattern(root, '{plate}/{well}_s{site}_{channel}.tif')
    s.fit_ranges()
    return s.save(root)

def sources(folder):
    "What is packed and embedded: files, a store, a store to add to, plates to add, a store to mend"
    write_screen(folder/'files')
    pack(folder/'files', folder/'store', shard_mb=SHARD, workers=0)
    some = lambda *names: (s := Screen(folder/'files')).subset(s.table['plate'].isin(names)).save(folder/'-'.join(names))
    pack(some('P2'), folder/'begun', shard_mb=SHARD, workers=0)
    some('P1', 'P3')
    shutil.copytree(folder/'store', folder/'damaged')
    for f in sorted((folder/'damaged').glob('images.zarr/*/c.*'))[::2]: f.write_bytes(f.read_bytes()[:-9])

# --- the jobs

def packing(**how): return lambda of,out: pack(of/'files', out, shard_mb=SHARD, **how)

def adding(of, out): append(out, of/'P1-P3', workers=2)
def mending(of, out): repack(out, root=of/'files', workers=2)

def embedding(source, level, model='mae_vitt8', **how):
    def job(of, out):
        torch.set_num_threads(2)
        embed(model, of/source, level=level, size=24, bs=4, out=out, progress=False, **how)
    return job

JOBS = {
    'pack, no threads': packing(workers=0), 'pack, 2 threads': packing(workers=2), 'pack, archive': packing(workers=2, archive=True),
    'append': adding, 'repack': mending,
    'embed, wells, of files': embedding('files', 'well'), 'embed, sites, of a store': embedding('store', 'site'),
    'embed, tiles, of files': embedding('files', 'tile'), 'embed, wells, by a function': embedding('store', 'well', 'intensity'),
    'embed, wells, 2 processes': embedding('store', 'well'), 'embed, tiles, 2 processes': embedding('files', 'tile')}

BEFORE = dict(append='begun', repack='damaged') # stores that stand there when the job begins

# --- in the process that does a job

def beside(out, what): return out.with_name(f'{out.name}.{what}')

def started(out):
    "Say that the clock runs from now on"
    f = beside(out, f'pid{os.environ.get("RANK", 0)}')
    f.write_text(str(os.getpid())); f.rename(f.with_suffix(f.suffix+'.there'))

CHANGES = 'open','os.rename','os.remove','os.mkdir','os.rmdir','os.truncate','shutil.rmtree'

def watch(out, last):
    "Count the changes of files below `out`, kill this process before number `last`, and keep parts that are done with"
    done = [0]
    def hook(event, args):
        if event not in CHANGES or not str(args[0]).startswith(f'{out}/'): return
        if event=='open' and (not isinstance(args[1], str) or args[1].startswith('r')): return
        if done[0]==last: os.kill(os.getpid(), signal.SIGKILL)
        done[0] += 1
        if event=='shutil.rmtree' and str(args[0])==f'{out}/parts' and os.path.exists(args[0]):
            shutil.copytree(args[0], beside(out, 'parts'), copy_function=os.link, dirs_exist_ok=True)
    sys.addaudithook(hook)
    return done

def do(name, of, out, last=None):
    "Do a job, and write what it took"
    done = watch(out, last)
    started(out)
    start = time.monotonic()
    JOBS[name](of, out)
    if not int(os.environ.get('RANK', 0)):
        beside(out, 'took').write_text(json.dumps([time.monotonic()-start, done[0]]))

# --- in the process that kills

def fork(f, *args):
    "Call a function in a child, which need not import anything"
    sys.stdout.flush()
    if pid := os.fork(): return pid
    try: f(*args); os._exit(0)
    except BaseException: traceback.print_exc(); sys.stderr.flush(); os._exit(1)

def launch(name, of, out, last):
    "Do a job in a process, or in two, of which torchrun would end the other when one ends badly"
    os.setsid()
    log = os.open(beside(out, 'log'), os.O_WRONLY|os.O_CREAT|os.O_TRUNC)
    os.dup2(log, 1); os.dup2(log, 2)
    if '2 processes' not in name: return do(name, of, out, last)
    with socket.socket() as o: o.bind(('', 0)); port = o.getsockname()[1]
    os.environ.update(MASTER_ADDR='localhost', MASTER_PORT=str(port), WORLD_SIZE='2', LOCAL_WORLD_SIZE='2')
    ranks = [fork(rank, r, name, of, out, last) for r in '01']
    for _ in ranks:
        pid,end = os.wait()
        if end: time.sleep(.5); [os.kill(o, signal.SIGKILL) for o in ranks if o!=pid]; os._exit(1)

def rank(r, name, of, out, last):
    os.environ.update(RANK=r, LOCAL_RANK=r)
    do(name, of, out, last)

def begin(name, of, out, last=None):
    "The process of a job, when its clock runs"
    for f in out.parent.glob(f'{out.name}.pid*'): f.unlink()
    if name in BEFORE and not out.exists(): shutil.copytree(of/BEFORE[name], out)
    pid,n = fork(launch, name, of, out, last),1+('2 processes' in name)
    while len(there := [*out.parent.glob(f'{out.name}.pid*.there')])<n:
        if (end := os.waitpid(pid, os.WNOHANG))[0]: return pid,end[1],[]
        time.sleep(.002)
    return pid,None,[int(f.read_text()) for f in there]

def finish(name, of, out):
    "Do a job to its end"
    pid,end,_ = begin(name, of, out)
    if end is None: _,end = os.waitpid(pid, 0)
    if end: raise SystemExit(f'{name}: it did not end well\n{beside(out, "log").read_text()[-3000:]}')

def kill(name, of, out, moment, how):
    "Begin a job and kill it at a moment; False: it was done before"
    took,changes = json.loads(beside(of/'undisturbed'/name, 'took').read_text())
    pid,end,ranks = begin(name, of, out, int(moment*changes) if how=='change' else None)
    if how!='change': time.sleep(moment*took)
    if end is None and how=='second of all': os.killpg(pid, signal.SIGKILL)
    if end is None and how=='second of one':
        with suppress(ProcessLookupError): os.kill(random.choice(ranks), signal.SIGKILL)
    if end is None: _,end = os.waitpid(pid, 0)
    for _ in range(100):
        if not any(map(lives, ranks)): break
        time.sleep(.02)
    return end!=0

def lives(pid):
    with suppress(ProcessLookupError): os.kill(pid, 0); return True

def large(out):
    "Files that took work, and the number by which the disk knows each: shards and parts, also parts that were removed"
    found = {f.relative_to(out): f for f in out.rglob('*') if f.name.startswith('c.') or f.parent.name=='parts' and f.name[0]!='.'}
    found |= {Path('parts')/f.name: f for f in beside(out, 'parts').glob('[!.]*')}
    return {k: f.stat().st_ino for k,f in found.items()}

def content(folder):
    "Bytes by name; of a lock only that it is there"
    return {str(f.relative_to(folder)): b'' if f.name=='.lock' else f.read_bytes() for f in sorted(folder.rglob('*')) if f.is_file()}

def half_written(out, *whole):
    "Files that stand under their names with other bytes than they have when they are whole"
    found = content(out) if out.exists() else {}
    return [k for k,v in found.items() if '.part' not in k and v not in [o.get(k) for o in whole]]

def one_kill(name, of, out, rng):
    "What a kill did, and whether the second run made up for it"
    model,two = of/'undisturbed'/name,'2 processes' in name
    want,parts = content(model),{f'parts/{k}': v for k,v in content(beside(model, 'parts')).items()}
    before = content(of/BEFORE[name]) if name in BEFORE else {}
    how = rng.choice(('second of all','second of one') if two else ('second of all','change'))
    while not kill(name, of, out, moment := rng.random(), how): clear(out)
    torn,there = half_written(out, want, parts, before),large(out)
    finish(name, of, out)
    got,kept = content(out),len(there.items() & large(out).items())
    odd = sorted(k for k in {*want,*got} if want.get(k)!=got.get(k))
    clear(out)
    return dict(job=name, killed=how, at=round(moment, 2), files=len(large(model)), there=len(there), kept=kept,
                torn=', '.join(torn), differ=', '.join(odd))

def clear(out):
    for f in (out, beside(out, 'parts')): shutil.rmtree(f, ignore_errors=True)

def campaign(n, seed, folder, jobs):
    "As many kills as asked for, the jobs in turn"
    rng,of = random.Random(seed),folder/'of'
    os.waitpid(fork(sources, of), 0)
    for o in ('undisturbed','killed'): (of/o).mkdir() # as deep, for paths between folders are written down
    for name in jobs[:n]: finish(name, of, of/'undisturbed'/name)
    rows = []
    for k in range(n):
        rows.append(one_kill(name := jobs[k%len(jobs)], of, of/'killed'/name, rng))
        print('{job:28} killed by {killed:13} at {at:4.2f}: {there:2} of {files:2} files there, {kept:2} kept; {torn}{differ}'.format(**rows[-1]), flush=True)
    return pd.DataFrame(rows)

def markdown(table):
    "A row per job"
    lines = ['| job | kills | files | there at the kill | of these kept | half-written | other in the end |', '|---|---|---|---|---|---|---|']
    for name,t in table.groupby('job', sort=False):
        there = f'{t.there.min()} to {t.there.max()}'
        lines.append(f'| {name} | {len(t)} | {t.files.iat[0]} | {there} | {t.kept.sum()} of {t.there.sum()} | {(t.torn!="").sum()} | {(t.differ!="").sum()} |')
    return '\n'.join(lines)

def main(about=__doc__, jobs=tuple(JOBS), n=30, campaign=campaign, markdown=markdown, left='the files of an undisturbed one'):
    "Kill some jobs, show the table, and fail if one of them left something else"
    p = argparse.ArgumentParser(description=about)
    p.add_argument('--n', type=int, default=n, help='kills')
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--jobs', nargs='+', default=[''], help='only those whose names begin with one of these')
    args = p.parse_args()
    some = [o for o in jobs if o.startswith(tuple(args.jobs))]
    with tempfile.TemporaryDirectory() as folder: table = campaign(args.n, args.seed, Path(folder), some)
    print(f'\n{markdown(table)}')
    bad = table[(table.torn!='')|(table.differ!='')]
    if len(bad): raise SystemExit(f'{len(bad)} of {len(table)} kills left something else:\n{bad.to_string()}')
    print(f'\nAfter all of {len(table)} kills the second run ended with {left}')

if __name__=='__main__': main()
