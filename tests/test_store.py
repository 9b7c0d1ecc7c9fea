"Stores: bytes equal to the source, kept through kills, full disks and damage"
import errno, json, multiprocessing, os, random, shutil, time
from pathlib import Path

import numpy as np, pandas as pd, pytest, tifffile, zarr

from cellmae import containers, store as room
from cellmae.cells import find_cells, site_sizes
from cellmae.data import how_read
from cellmae.embed import embed
from cellmae.images import ImageError
from cellmae.screen import Screen, open_screen, split
from cellmae.store import append, pack, repack, verify
from commands import content

SIZE = 20, 30


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch): monkeypatch.setattr(os, 'fsync', lambda f: None)


def image(seed, size=SIZE, dtype=np.uint16):
    top = 60_000 if dtype == np.uint16 else 256
    return np.random.default_rng(seed).integers(0, top, size).astype(dtype)


def screen_in(folder, plates=('p',), wells=('B03', 'C02', 'H12'), sites=2, channels=('DNA', 'ER'), size=lambda p, w: SIZE,
              batch=None, dtype=np.uint16, seed=0, **how):
    "A screen of TIFFs, each with other pixels"
    folder.mkdir(exist_ok=True)
    rows = []
    for n, p in enumerate(plates):
        for w in wells:
            for s in range(sites):
                names = {f'file_{c}': f'{n}_{seed}_{w}_{s}_{c}.tif' for c in channels}
                for f in names.values():
                    tifffile.imwrite(folder/f, image([seed, len(rows), *map(ord, f[-9:])], size(p, w), dtype))
                rows.append(dict(batch=batch[n] if batch else 'b', plate=p, well=w, site=s + 1, perturbation=f'gene{w}', **names))
    return Screen(pd.DataFrame(rows), root=folder, **how)


def same_pixels(store, screen, rows=None):
    rows = range(len(screen)) if rows is None else rows
    assert len(store) == len(rows)
    for j, i in enumerate(rows):
        assert (store[j] == screen[i]).all() and (store.whole(j) == screen[i]).all()
        assert store.table[['batch', 'plate', 'well', 'site']].iloc[j].tolist() == screen.table[['batch', 'plate', 'well', 'site']].iloc[i].tolist()


def through_zarr(store):
    "What zarr-python reads at each address"
    g = zarr.open_group(store.root/'images.zarr', mode='r')
    for f in store.table['file']:
        name, i = f.split('/')[1].split('#i=')
        yield g[name][int(i)]


def flip(file, at=700):
    raw = bytearray(file.read_bytes())
    raw[at] ^= 1
    file.write_bytes(raw)


def shards(store): return sorted(Path(store if isinstance(store, Path) else store.root).glob('images.zarr/*/c.*'))


KINDS = dict(
    plain=dict(), one_channel=dict(channels=('DNA',)), one_site=dict(wells=('H12',), sites=1), bytes=dict(dtype=np.uint8),
    plates=dict(plates=('a', 'b', 'c')), batches=dict(plates=('p', 'p'), batch=('x', 'y')),
    odd=dict(plates=('A 1/x', 'A-1 x', 'A_1_x', 'a_1_X', '\u7d30\u80de', '..', 'x.zarr', 'p#i=3')),
    sizes=dict(plates=('p', 'q'), size=lambda p, w: (16, 24) if (p, w) == ('q', 'C02') else SIZE))


@pytest.mark.parametrize('archive', [False, True])
@pytest.mark.parametrize('kind', KINDS)
def test_a_store_has_the_pixels_of_its_screen(tmp_path, kind, archive):
    screen = screen_in(tmp_path/'raw', **KINDS[kind])
    store = pack(screen, tmp_path/'out', archive=archive, shard_mb=.003)
    same_pixels(store, screen)
    assert all((a == screen[i]).all() for i, a in enumerate(through_zarr(store)))
    assert verify(store, sources=True).empty and not (tmp_path/'out/left_out.csv').exists()
    moved = shutil.move(tmp_path/'out', tmp_path/'else')
    same_pixels(open_screen(moved), screen)


def test_several_shards_and_views(tmp_path):
    screen = screen_in(tmp_path/'raw', sites=3)
    store = pack(screen, tmp_path/'out', shard_mb=.003)
    assert len(shards(store)) == 5 and [f.stat().st_size for f in shards(store)[:4]] == [2*1204 + 32 + 36]*4
    x = store[4]
    assert x.dtype == np.uint8 and x.shape == (2, *SIZE) and not x.flags.owndata and not x.flags.writeable
    with pytest.raises(ValueError, match='read-only'): x[0] = 0


def test_names_of_arrays(tmp_path):
    names = lambda **kind: sorted(f.name for f in pack(screen_in(tmp_path/'raw', **kind), tmp_path/str(len(kind))).root.glob('images.zarr/*') if f.is_dir())
    assert names(**KINDS['batches']) == ['x_p', 'y_p']
    shutil.rmtree(tmp_path/'raw')
    got = [n.lower() for n in names(plates=KINDS['odd']['plates'], wells=('B03',), sites=1)]
    assert len(set(got)) == len(got) == 8
    shutil.rmtree(tmp_path/'raw')
    assert names(**KINDS['sizes'], wells=('C02', 'H12'), sites=1) == ['p', 'q', 'q_20x30']


def test_the_same_bytes_whatever_the_workers(tmp_path):
    screen = screen_in(tmp_path/'raw', plates=('p', 'q'))
    Path(screen.address(screen.table['file_ER'][3])).write_bytes(b'II*\0cut')
    made = [content(pack(screen, tmp_path/str(n), workers=n, shard_mb=.003).root) for n in (0, 1, 4)]
    assert made[0] == made[1] == made[2] and 'left_out.csv' in made[0]


def test_bad_sites_are_left_out_and_listed(tmp_path, capsys):
    screen = screen_in(tmp_path/'raw', plates=('p', 'q'))
    address = lambda i: Path(screen.address(screen.table['file_ER'][i]))
    address(1).unlink()
    address(4).write_bytes(b'II*\0cut')
    tifffile.imwrite(address(7), image(1).astype(np.float32)/1e6)
    with pytest.raises(ImageError, match=r'missing.*plate p, well B03, site 2'): pack(screen, tmp_path/'stopped', stop=True)
    store = pack(screen, tmp_path/'out', shard_mb=.003)
    good = [i for i in range(12) if i not in (1, 4, 7)]
    same_pixels(store, screen, good)
    left = pd.read_csv(tmp_path/'out/left_out.csv', dtype=str)
    assert left[['plate', 'well', 'site']].values.tolist() == [['p', 'B03', '2'], ['p', 'H12', '1'], ['q', 'B03', '2']]
    assert left['problem'].tolist()[0] == 'missing' and 'Left out: 3 sites' in capsys.readouterr().out
    assert verify(store).empty and all((a == screen[i]).all() for i, a in zip(good, through_zarr(store)))


def test_what_was_left_out_comes_in_once_it_can_be_read(tmp_path, capsys):
    screen = screen_in(tmp_path/'raw', plates=('p', 'q'))
    whole = content(pack(screen, tmp_path/'whole', shard_mb=.003).root)
    lost = Path(screen.address(screen.table['file_ER'][4]))
    lost.rename(tmp_path/'aside')
    pack(screen, tmp_path/'out', shard_mb=.003)
    kept = {f: f.stat().st_ino for f in (tmp_path/'out/images.zarr').rglob('c.*')}
    (tmp_path/'aside').rename(lost)
    store = pack(Screen(screen.table, root=screen.root), tmp_path/'out', shard_mb=.003)
    same_pixels(store, screen)
    assert content(store.root) == whole and 'left_out.csv' not in whole
    assert sum(f.stat().st_ino != i for f, i in kept.items()) == 1


def test_what_was_appended_stays_when_the_first_is_packed_again(tmp_path):
    first, more = screen_in(tmp_path/'a', plates=('p',)), screen_in(tmp_path/'b', plates=('q',))
    Path(first.address(first.table['file_ER'][4])).unlink()
    pack(first, tmp_path/'out')
    append(tmp_path/'out', more)
    assert len(pack(first, tmp_path/'out')) == 11


def test_other_ranges_are_refused_and_own_columns_stay(tmp_path):
    screen = screen_in(tmp_path/'raw')
    screen.table['source_id'] = 'lab 7'
    store = pack(screen, tmp_path/'out')
    assert set(store.table['source_id']) == {'lab 7'} and verify(store).empty
    with pytest.raises(FileExistsError, match='other ranges'): pack(Screen(screen.table, root=screen.root, ranges=[[0, 9]]*2), tmp_path/'out')


def test_nothing_that_can_be_read(tmp_path):
    screen = screen_in(tmp_path/'raw')
    screen.fit_ranges()
    for f in (tmp_path/'raw').iterdir(): f.unlink()
    with pytest.raises(ImageError, match='missing'): pack(screen, tmp_path/'out')
    assert not (tmp_path/'out/screen.json').exists()


def test_a_disk_that_goes_away_stops_the_call(tmp_path, monkeypatch):
    "Many sites in a row that cannot be read are no accident; some, with a good one between, are"
    screen = screen_in(tmp_path/'raw', plates=('p', 'q', 'r'))
    whole = content(pack(screen, tmp_path/'whole', shard_mb=.003).root)
    monkeypatch.setattr(room, 'MANY', 4)
    path = lambda i: Path(screen.address(screen.table['file_ER'][i]))
    kept = {path(i): path(i).read_bytes() for i in (1, 2, 3, 5, *range(8, 18))}
    times = {f: f.stat().st_mtime_ns for f in kept}
    for f in kept: f.unlink()
    with pytest.raises(ImageError, match='missing. 4 sites in a row cannot be read.*call again'): pack(screen, tmp_path/'out', shard_mb=.003)
    assert not (tmp_path/'out/screen.json').exists() and len(shards(tmp_path/'out')) == 5
    for f, x in kept.items(): f.write_bytes(x), os.utime(f, ns=(times[f], times[f]))
    assert content(pack(screen, tmp_path/'out', shard_mb=.003).root) == whole


def test_a_second_call_returns_the_store_and_another_screen_is_refused(tmp_path):
    screen = screen_in(tmp_path/'raw')
    before = content(pack(screen, tmp_path/'out').root)
    times = {f: f.stat().st_mtime_ns for f in (tmp_path/'out').rglob('*') if f.name != '.lock'}
    shutil.move(tmp_path/'raw', tmp_path/'gone')
    assert len(pack(screen, tmp_path/'out')) == 6
    assert content(tmp_path/'out') == before and all(f.stat().st_mtime_ns == t for f, t in times.items())
    other = screen_in(tmp_path/'other', wells=('A01',))
    with pytest.raises(FileExistsError, match='another screen.*append'): pack(other, tmp_path/'out')
    other.save(tmp_path/'saved')
    with pytest.raises(FileExistsError, match='no store'): pack(other, tmp_path/'saved')
    zarr.create_group(tmp_path/'his/images.zarr')
    with pytest.raises(FileExistsError, match='no store of ours'): pack(other, tmp_path/'his')
    assert content(tmp_path/'out') == before


def test_it_goes_on_where_it_was(tmp_path, monkeypatch):
    screen = screen_in(tmp_path/'raw', plates=('p', 'q'), sites=3)
    whole = content(pack(screen, tmp_path/'whole', shard_mb=.003).root)
    write, seen = room.write_shard, []

    def dies(*a):
        if len(seen) == 4: raise KeyboardInterrupt
        seen.append(write(*a))
    monkeypatch.setattr(room, 'write_shard', dies)
    with pytest.raises(KeyboardInterrupt): pack(screen, tmp_path/'out', shard_mb=.003)
    first = {f: f.stat().st_ino for f in shards(tmp_path/'out')}
    assert len(first) == 4
    monkeypatch.setattr(room, 'write_shard', write)
    (tmp_path/'out/images.zarr/p/.c.7.0.0.host-1-abc.part.0').write_bytes(b'left by a kill')
    pack(screen, tmp_path/'out', shard_mb=.003)
    assert content(tmp_path/'out') == whole and all(f.stat().st_ino == n for f, n in first.items())


def test_sources_that_changed_between_calls(tmp_path, monkeypatch):
    "A shard is kept only if it was made of the same; what was bad is tried again"
    screen = screen_in(tmp_path/'raw', sites=3)
    screen.fit_ranges()
    path = lambda i: Path(screen.address(screen.table['file_ER'][i]))
    good, bad = path(3).read_bytes(), path(0)
    kept = bad.read_bytes()
    bad.write_bytes(b'II*\0cut')
    monkeypatch.setattr(room, '_finish', lambda p: None)
    pack(screen, tmp_path/'out', shard_mb=.003)
    monkeypatch.undo()
    tifffile.imwrite(path(3), image(99))
    path(8).unlink()
    bad.write_bytes(kept)
    store = pack(screen, tmp_path/'out', shard_mb=.003)
    same_pixels(store, screen, range(8))
    fresh = pack(screen, tmp_path/'fresh', shard_mb=.003)
    assert content(store.root) == content(fresh.root) and good != path(3).read_bytes()


def test_another_attempt_leaves_nothing_behind(tmp_path, monkeypatch):
    screen = screen_in(tmp_path/'raw', plates=('p', 'q'))
    monkeypatch.setattr(room, '_finish', lambda p: None)
    pack(screen, tmp_path/'out', shard_mb=.002)
    monkeypatch.undo()
    half = screen.subset(screen.table['plate'] == 'p')
    assert content(pack(half, tmp_path/'out').root) == content(pack(half, tmp_path/'fresh').root)


def packing(screen, out): pack(screen, out, workers=2, shard_mb=.003)


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')
def test_kills_at_random_moments(tmp_path, monkeypatch):
    screen = screen_in(tmp_path/'raw', plates=('p', 'q'), sites=3)
    Path(screen.address(screen.table['file_ER'][3])).write_bytes(b'II*\0cut')
    whole, work = content(pack(screen, tmp_path/'whole', shard_mb=.003).root), room.Packing.work
    monkeypatch.setattr(room.Packing, 'work', lambda self, item: (time.sleep(.03), work(self, item))[1])
    rng, killed = random.Random(0), 0
    for k in range(6):
        child = multiprocessing.get_context('fork').Process(target=packing, args=(screen, tmp_path/'out'))
        child.start()
        child.join(rng.uniform(.02, .25))
        killed += child.is_alive()
        child.kill()
        child.join()
    monkeypatch.undo()
    pack(screen, tmp_path/'out', shard_mb=.003)
    assert killed > 2 and content(tmp_path/'out') == whole


def test_a_disk_that_is_too_small_is_refused(tmp_path, monkeypatch):
    screen = screen_in(tmp_path/'raw')
    monkeypatch.setattr(shutil, 'disk_usage', lambda p: shutil._ntuple_diskusage(9999, 999, 999))
    with pytest.raises(OSError, match='the store takes .* GB, and there are') as e: pack(screen, tmp_path/'out')
    assert e.value.errno == errno.ENOSPC and [f.name for f in (tmp_path/'out').iterdir()] == ['.lock']


def test_a_disk_that_becomes_full(tmp_path, monkeypatch):
    screen, write, n = screen_in(tmp_path/'raw', sites=3), room.write_shard, []

    def full(path, images, *a):
        if len(n) < 2: return n.append(write(path, images, *a))
        Path(path).write_bytes(b'half')
        next(images)
        raise OSError(errno.ENOSPC, 'No space left on device')
    monkeypatch.setattr(room, 'write_shard', full)
    with pytest.raises(OSError, match='the disk is full.*make room and call again'): pack(screen, tmp_path/'out', shard_mb=.003)
    there = sorted(f.name for f in (tmp_path/'out/images.zarr/p').iterdir())
    assert there == ['c.0.0.0.0', 'c.1.0.0.0', 'zarr.json']
    monkeypatch.undo()
    same_pixels(pack(screen, tmp_path/'out', shard_mb=.003), screen)


def test_images_deleted_while_it_packs(tmp_path, monkeypatch):
    screen, work = screen_in(tmp_path/'raw', sites=3), room.Packing.work

    def deletes(self, item):
        if item[1] == 4: Path(screen.address(screen.table['file_ER'][6])).unlink(missing_ok=True)
        return work(self, item)
    monkeypatch.setattr(room.Packing, 'work', deletes)
    store = pack(screen, tmp_path/'out', workers=0, shard_mb=.003)
    same_pixels(store, screen, [0, 1, 2, 3, 4, 5, 7, 8])
    assert pd.read_csv(tmp_path/'out/left_out.csv')['problem'].tolist() == ['missing']


def test_two_packers_do_not_meet(tmp_path, monkeypatch):
    screen, met = screen_in(tmp_path/'raw'), []
    work = room.Packing.work

    def second(self, item):
        if not met:
            met.append(1)
            with pytest.raises(BlockingIOError, match='in use by'): pack(screen, tmp_path/'out')
        return work(self, item)
    monkeypatch.setattr(room.Packing, 'work', second)
    pack(screen, tmp_path/'out', workers=0)
    assert met


def test_panels_become_stores_below_one_folder(tmp_path):
    a = screen_in(tmp_path/'raw')
    b = screen_in(tmp_path/'more', channels=('RNA', 'ER', 'mito'), seed=1)
    stores = pack([a, b], tmp_path/'out')
    assert [s.root.name for s in stores] == ['DNA-ER', 'RNA-ER-mito']
    for s, screen in zip(stores, (a, b)): same_pixels(open_screen(s.root), screen)


def test_append(tmp_path):
    screen = screen_in(tmp_path/'raw', plates=('p',))
    store = pack(screen, tmp_path/'out', shard_mb=.003)
    before = content(store.root)
    more = screen_in(tmp_path/'more', plates=('P', 'q'), seed=5, size=lambda p, w: (16, 24) if w == 'C02' else SIZE)
    grown = append(store, more, workers=1)
    assert {k: v for k, v in content(grown.root).items() if k in before and k != 'screen.parquet'} == {k: v for k, v in before.items() if k != 'screen.parquet'}
    same_pixels(grown.subset(range(6)), screen)
    same_pixels(grown.subset(range(6, 18)), more.ranged(screen.ranges))
    assert verify(grown, sources=True).empty and (more.ranges != screen.ranges).any()
    with pytest.raises(ValueError, match='Plate P of batch b is in the store'): append(grown, more)
    with pytest.raises(ValueError, match='but the store has'): append(grown, screen_in(tmp_path/'x', plates=('z',), channels=('ER', 'DNA')))
    with pytest.raises(ValueError, match='no store'): append(screen.save(tmp_path/'saved'), more)
    assert len(pack(screen, tmp_path/'out')) == 18
    flip(shards(grown)[-1], 100)
    shards(grown)[0].unlink()
    repack(grown)
    assert verify(grown, sources=True).empty


def test_append_goes_on_after_an_interrupt(tmp_path, monkeypatch):
    screen, more = screen_in(tmp_path/'raw'), screen_in(tmp_path/'more', plates=('q', 'r'), seed=1)
    whole = content(append(pack(screen, tmp_path/'whole', shard_mb=.003), more).root)
    store, write = pack(screen, tmp_path/'out', shard_mb=.003), room.write_sites
    before = store.table

    def dies(*a): raise KeyboardInterrupt
    monkeypatch.setattr(room, 'write_sites', dies)
    with pytest.raises(KeyboardInterrupt): append(store, more)
    assert open_screen(store.root).table.equals(before) and 'not in the table' in set(verify(store)['problem'])
    monkeypatch.setattr(room, 'write_sites', write)
    append(store, more)
    assert content(store.root) == whole


DAMAGE = dict(
    flipped=(lambda s: flip(shards(s)[0]), 'damaged', ImageError),
    index=(lambda s: flip(shards(s)[0], -20), 'unreadable', ImageError),
    missing=(lambda s: shards(s)[0].unlink(), 'missing', ImageError),
    short=(lambda s: os.truncate(shards(s)[0], 1500), 'unreadable', ImageError),
    empty=(lambda s: os.truncate(shards(s)[0], 0), 'unreadable', ImageError),
    array=(lambda s: (s.root/'images.zarr/p/zarr.json').unlink(), 'unreadable', ImageError),
    group=(lambda s: (s.root/'images.zarr/zarr.json').write_text('{'), 'unreadable', None),
    other=(lambda s: shutil.copy(shards(s)[1], shards(s)[0]), 'of other files', None))


@pytest.mark.parametrize('archive', [False, True])
@pytest.mark.parametrize('kind', DAMAGE)
def test_damage_is_seen_and_mended(tmp_path, kind, archive):
    screen = screen_in(tmp_path/'raw', sites=3)
    store = pack(screen, tmp_path/'out', archive=archive, shard_mb=.003)
    whole, (damage, problem, error) = content(store.root), DAMAGE[kind]
    store.whole(0)
    damage(store)
    found = verify(store)
    assert found['problem'].tolist()[0] == problem and 'repack(store)' in found['cure'].iat[0]
    if error:
        with pytest.raises(error, match='plate p, well B03, site 1'): store.whole(0)
    if kind == 'flipped':
        assert found[['plate', 'well', 'site']].values.tolist() == [['p', 'B03', '1']]
        assert 'damaged' in set(store.check()['problem'])
        with pytest.raises(ImageError, match=r'c\.0\.0\.0\.0: damaged.*repack'): store.whole(0)
        if archive:
            with pytest.raises(ImageError, match='damaged'): store[0]
    repack(store)
    assert content(store.root) == whole and verify(store, sources=True).empty
    same_pixels(store, screen)


def test_a_flipped_bit_is_not_embedded(tmp_path):
    mean = lambda x: x.float().mean((2, 3))
    store = pack(screen_in(tmp_path/'raw'), tmp_path/'out')
    assert len(embed(mean, store, level='site', progress=False)) == 6
    flip(shards(store)[0])
    with pytest.raises(ImageError, match='damaged.*plate p, well B03, site 1'): embed(mean, store, level='site', progress=False)


def test_left_out_places_stay_empty_when_a_shard_is_mended(tmp_path):
    screen = screen_in(tmp_path/'raw', sites=3)
    Path(screen.address(screen.table['file_ER'][1])).write_bytes(b'II*\0cut')
    store = pack(screen, tmp_path/'out', shard_mb=.006)
    whole = content(store.root)
    flip(shards(store)[0])
    repack(store)
    assert content(store.root) == whole


def test_a_source_that_changed_or_is_gone(tmp_path):
    screen = screen_in(tmp_path/'raw')
    store = pack(screen, tmp_path/'out', shard_mb=.003)
    tifffile.imwrite(screen.address(screen.table['file_ER'][3]), image(99))
    Path(screen.address(screen.table['file_ER'][5])).unlink()
    assert verify(store).empty
    found = verify(store, sources=True)
    assert found[['problem', 'well', 'site']].values.tolist() == [['source changed', 'C02', '2'], ['source gone', 'H12', '2']]
    before = content(store.root)
    with pytest.raises(ImageError, match='missing'): repack(store, sources=True)
    assert not [f for f in store.root.rglob('*part*')] and content(store.root)['images.zarr/p/c.2.0.0.0'] == before['images.zarr/p/c.2.0.0.0']
    shutil.copy(screen.address(screen.table['file_ER'][4]), screen.address(screen.table['file_ER'][5]))
    same_pixels(repack(store, sources=True), screen)
    assert verify(store, sources=True).empty


def test_mended_from_where_the_source_is_now(tmp_path):
    screen = screen_in(tmp_path/'raw')
    store = pack(screen, tmp_path/'out', shard_mb=.003)
    whole = content(store.root)
    shutil.copytree(tmp_path/'raw', tmp_path/'now')
    shutil.rmtree(tmp_path/'raw')
    shards(store)[1].unlink()
    with pytest.raises(ImageError, match='missing'): repack(store)
    for f in (tmp_path/'now').iterdir(): shutil.copystat(f, f)
    repack(store, root=tmp_path/'now')
    assert content(store.root)['images.zarr/p/c.1.0.0.0'] == whole['images.zarr/p/c.1.0.0.0']


def test_a_store_of_another_version_is_refused(tmp_path):
    store = pack(screen_in(tmp_path/'raw'), tmp_path/'out')
    f = store.root/'screen.json'
    said = json.loads(f.read_text())
    said['packed']['version'] = 99
    f.write_text(json.dumps(said))
    for call in (open_screen, verify, repack):
        with pytest.raises(ValueError, match='a store of version 99.*Update cellmae'): call(store.root)


def test_a_store_written_anew_is_read_anew(tmp_path):
    for seed in range(3):
        shutil.rmtree(tmp_path, ignore_errors=True)
        tmp_path.mkdir()
        screen = screen_in(tmp_path/'raw', seed=seed, sites=seed + 1)
        same_pixels(pack(screen, tmp_path/'out', shard_mb=.003), screen)


def test_few_maps_are_open(tmp_path, monkeypatch):
    screen = screen_in(tmp_path/'raw', sites=4)
    store = pack(screen, tmp_path/'out', shard_mb=.001)
    monkeypatch.setattr(containers, '_most_maps', lambda: 3)
    for _ in range(2): same_pixels(store, screen)
    assert len(containers._mapped) == 3 == sum(len(a.maps) for _, a in containers._arrays.values() if a.folder.startswith(str(tmp_path)))


@pytest.mark.parametrize('z', [1, 'max', 'mean'])
def test_what_was_chosen_is_said_and_not_done_twice(tmp_path, z):
    raw, rows = tmp_path/'raw', []
    raw.mkdir()
    tifffile.imwrite(raw/'light.tif', np.linspace(.5, 2, 600, dtype=np.float32).reshape(SIZE))
    for n, w in enumerate(('B03', 'C02')):
        tifffile.imwrite(raw/f'{w}.ome.tif', np.stack([image([n, k]) for k in range(3)]), metadata=dict(axes='ZYX'), ome=True)
        rows.append(dict(plate='p', well=w, site=1, file_DNA=f'{w}.ome.tif', illum_DNA='light.tif'))
    screen = Screen(pd.DataFrame(rows), root=raw, z=z, illum=True)
    screen.pixel_size = .65
    store = pack(screen, tmp_path/'out')
    same_pixels(store, screen)
    assert how_read([store]) == how_read([screen]) == dict(z=z, illum=True, pixel_size=.65)
    again = open_screen(store.subset([1]).save(tmp_path/'part'))
    assert (again[0] == screen[1]).all() and how_read([again]) == how_read([screen])
    packed = pack(store, tmp_path/'twice')
    same_pixels(packed, screen)
    shards(store)[0].unlink()
    same_pixels(repack(store), screen)
    with pytest.raises(ValueError, match='z=0'): append(store, Screen(pd.DataFrame(rows).assign(plate='q'), root=raw, z=0, illum=True))


def test_a_store_goes_where_a_screen_goes(tmp_path):
    screen = screen_in(tmp_path/'raw', plates=('p', 'q'), sites=3, size=lambda p, w: (16, 24) if w == 'C02' else SIZE)
    store = pack(screen, tmp_path/'out')
    assert store.ranges.tolist() == [[0, 255]]*2 and (site_sizes(store, seconds=5) == site_sizes(screen, seconds=5)).all()
    assert [a.tolist() for a in split(store, by='plate')] == [a.tolist() for a in split(screen, by='plate')]
    assert store.wells.equals(screen.wells) and store.report(tmp_path/'x.html').exists()
    assert set(store.check()['problem']) == set(screen.check()['problem'])
    named = Screen(store.root, controls=['geneB03'])
    assert named.table['control'].sum() == 6 and (named[4] == screen[4]).all()
    table = pd.DataFrame(dict(FileName_DNA=screen.table['file_DNA'], y=5., x=6.))
    assert find_cells(store, table=table).counts.tolist() == [1]*18


def test_fingerprints(tmp_path):
    screen = screen_in(tmp_path/'raw')
    one, two = (pack(screen, tmp_path/o) for o in 'ab')
    assert one.fingerprint() == two.fingerprint() != screen.fingerprint()
    tifffile.imwrite(screen.address(screen.table['file_ER'][3]), image(99))
    assert repack(two, sources=True).fingerprint() != one.fingerprint()
    shards(one)[0].unlink()
    assert len(one.fingerprint()) == 12


def test_sizes_of_many_sites_are_known_at_once(tmp_path, monkeypatch):
    store, calls = pack(screen_in(tmp_path/'raw', sites=9), tmp_path/'out'), []
    monkeypatch.setattr('cellmae.cells.size_of', lambda f: calls.append(f) or SIZE)
    assert site_sizes(store).tolist() == [[*SIZE]]*27 and len(calls) == 1


@pytest.mark.parametrize('archive', [False, True])
def test_a_store_in_a_bucket(tmp_path, monkeypatch, archive):
    fs = pytest.importorskip('fsspec').filesystem('memory')
    monkeypatch.setenv('CELLMAE_CACHE', str(tmp_path/'cache'))
    screen = screen_in(tmp_path/'raw', plates=('p', 'q'))
    store = pack(screen, tmp_path/'out', archive=archive, shard_mb=.003)
    name = f'/bucket{archive}'
    for f, x in content(store.root).items(): fs.pipe(f'{name}/{f}', x)
    same_pixels(open_screen(f'memory:/{name}'), screen)


def test_other_zarrs_of_this_form_are_mapped(tmp_path):
    "Whoever wrote them, with or without checksums"
    for k, codecs in enumerate([None, [zarr.codecs.Crc32cCodec()]]):
        x = np.stack([image(i, dtype=np.uint8) for i in range(14)]).reshape(7, 2, *SIZE)
        a = zarr.create_array(tmp_path/f'{k}.zarr', name='p', shape=x.shape, chunks=(1, *x.shape[1:]), shards=(3, *x.shape[1:]), dtype='u1', compressors=codecs)
        a[:] = x
        for i in range(7): assert (containers.mapped(f'{tmp_path}/{k}.zarr/p#i={i}', True) == x[i]).all()
        assert containers.mapped(f'{tmp_path}/{k}.zarr/p#i=7') is None
    b = zarr.create_array(tmp_path/'c.zarr', name='p', shape=x.shape, chunks=(1, 1, *SIZE), shards=(3, *x.shape[1:]), dtype='u1', compressors=None)
    b[:] = x
    assert containers.images_at(f'{tmp_path}/c.zarr/p') is None
