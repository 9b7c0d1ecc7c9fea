"What a command says can be pasted into the shell, and does what it promises"
import re, shlex
import numpy as np, pytest
from commands import call
from tifffile import imwrite

from cellmae.cli import cellmae_check, cellmae_report

def plate(folder, name='{well} f{site} {stain}.tif'):
    "A plate with blanks and a quote in its names, whose wells are not said to be controls"
    folder.mkdir()
    g = np.random.default_rng(0)
    for well in ('B02','C03'):
        for site in (1,2):
            for stain in ('DAPI','Alexa 488'):
                imwrite(folder/name.format(well=well, site=site, stain=stain), g.integers(0, 4000, (64,64), dtype=np.uint16))
    return folder

def check(capsys, *args):
    "What `cellmae_check` prints, and its exit code"
    code = call(cellmae_check, *args)
    said = capsys.readouterr()
    return said.out+said.err, code

def printed(text): return re.findall(r'`(cellmae_check [^`]+)`', text)+re.findall(r'The same: (cellmae_check .+)', text)

@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path

def test_printed_commands_open_the_plate(here, capsys):
    said,_ = check(capsys, plate(here/"plate 1", "it's {well}_s{site}_{stain}.tif"), '--n', '2')
    assert 'as in `cellmae_check' in said # nothing matches, so what stands there is an example
    said,_ = check(capsys, plate(here/"plate 2", '{well}_s{site}_{stain}.tif'), '--n', '2')
    (command,) = printed(said)
    again,code = check(capsys, *shlex.split(command)[1:])
    assert not code and 'Page:' in again, again

def test_hints_are_options(here, capsys):
    said,_ = check(capsys, plate(here/'p'), '--n', '2', '--pattern', '{well} f{site} {channel}.tif', '--channels', 'DAPI=DNA,Alexa 488=ER')
    assert '--columns perturbation=' in said and "perturbation='" not in said and 'controls=[' not in said

def test_the_report_says_which_column_names_wells(here, capsys):
    g,rows = np.random.default_rng(0),[f'{p},{w},{n}' for p in ('P1','P2') for w,n in zip(('A1','A2','A3','A4','A5','A6'), ('DMSO','DMSO','DMSO','TP53','TP53','MYC'))]
    (here/'t.csv').write_text('plate,well,gene,'+','.join(f'f{i}' for i in range(4))+'\n'+''.join(f'{r},{",".join(f"{v:.3f}" for v in g.normal(size=4))}\n' for r in rows))
    assert not call(cellmae_report, 't.csv')
    hint = re.search(r'--columns \S+', capsys.readouterr().out)[0]
    assert hint=='--columns perturbation=gene'
    assert not call(cellmae_report, 't.csv', *hint.split())
    page = (here/'report.html').read_text()
    assert '6 control wells' in page and '2 batches' in page and '2 perturbations' in page

def test_a_plate_map_that_lies_there_is_found_by_what_is_printed(here, capsys):
    "Each printed option is added to the command, until every well has a perturbation"
    p = plate(here/'my plate', '{well}_s{site}_{stain}.tif')
    (p/'Plate Map.csv').write_text('WellRow,WellCol,well,line,genotype,passage\nB,2,B02,U2OS,WT,3\nC,3,C03,U2OS,Null,3\n')
    given = [p.name, '--n', '2']
    for hint in (r"(--meta) '(my plate/Plate Map.csv)'", '(--columns) (perturbation=genotype)'):
        said,_ = check(capsys, *given)
        assert (found := re.search(hint, said)), said
        assert '1 x no perturbation' in said
        given += found.groups()
    said,code = check(capsys, *given, '--controls', 'WT')
    assert not code and 'no perturbation' not in said and 'May be' not in said

def test_a_folder_of_several_sets_says_how_to_open_one(here, capsys):
    (here/'all').mkdir()
    plate(here/'all/mine', '{well}_s{site}_{stain}.tif')
    for o in plate(here/'all/the fly', '{well}_{stain}.tif').iterdir(): o.rename(o.with_name(f'01_POS0{o.name[1:3]}_{o.stem[4]}.TIF'))
    said,code = check(capsys, 'all')
    command = printed(said)[-1]
    assert code and command=='cellmae_check all/mine', said
    again,code = check(capsys, *shlex.split(command)[1:])
    assert not code and 'Page:' in again, again
