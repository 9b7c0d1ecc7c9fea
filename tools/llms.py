#!/usr/bin/env python
"llms.txt of the site, what a language model reads before it answers about cellmae: what it is, every page in one line"
import json, re
from pathlib import Path

import yaml
from nbdev.config import get_config
from nbdev.doclinks import _nbpath2html

root = Path(__file__).resolve().parents[1]

about = """Install: `pip install -e .` in a clone. The shortest use, in Python:

    from cellmae.all import *
    screen = Screen.open('plates', meta='platemap.csv')  # a folder as a microscope left it
    learn = fit_mae(screen)                              # a masked autoencoder, stopped and resumed at will
    profiles = embed(learn.model, screen)                # AnnData, a row per well
    wells = TVN().fit_transform(profiles)                # batches corrected on their controls

`help(f)` tells what each argument of a function is. Commands: cellmae_demo, cellmae_check, cellmae_pack, cellmae_fit,
cellmae_embed, cellmae_recall, cellmae_report, each with --help."""


def website(): return yaml.safe_load((root/'_quarto.yml').read_text())['website']


def titles(first):
    "Title and subtitle in the first cell of a notebook"
    return re.match(r'# (.+)\n+> (.+)', first).groups()


def head(name):
    "Title and subtitle of a notebook"
    return titles(''.join(json.loads((get_config().nbs_path/name).read_text())['cells'][0]['source']))


def lines(contents, home):
    "The sidebar of `_quarto.yml`, a line per page"
    for o in contents:
        if isinstance(o, dict):
            yield f"\n## {o['section']}\n"
            yield from lines(o['contents'], home)
        else:
            title,subtitle = head(o)
            yield f'- [{title}]({home}/{_nbpath2html(Path(o)).as_posix()}): {subtitle}'


def llms():
    "The content of llms.txt"
    cfg,web = get_config(),website()
    pages = lines(web['sidebar']['contents'], cfg.doc_host+cfg.doc_baseurl)
    return '\n'.join((f'# {cfg.lib_name}\n\n> {cfg.description}\n\n{about}\n', *pages)) + '\n'


if __name__ == '__main__': print(llms(), end='')
