#!/usr/bin/env python
"Build the documentation site and README.md from the notebooks, with nothing but Python and no network"
import argparse, os, re, shutil, subprocess, sys
from pathlib import Path

root = Path(__file__).resolve().parents[1]
os.chdir(root); sys.path.insert(0, str(root))

import yaml
from execnb.nbio import read_nb
from nbdev.config import get_config
from nbdev.doclinks import _nbpath2html, nbglob
from nbdev.serve_drv import main as process
from llms import llms, titles, website
from pages import Page, Shown

extensions = ['attr_list', 'admonition', 'footnotes', 'md_in_html', 'tables', 'pymdownx.superfences',
              'pymdownx.highlight', dict(toc=dict(permalink=True))]
schemes = [('(prefers-color-scheme)', 'default', 'brightness-auto', 'Colours of the system'),
           ('(prefers-color-scheme: light)', 'default', 'brightness-7', 'Light'),
           ('(prefers-color-scheme: dark)', 'slate', 'brightness-4', 'Dark')]
palette = [dict(media=media, scheme=scheme, primary='custom', accent='custom',
                toggle=dict(icon=f'material/{icon}', name=name)) for media,scheme,icon,name in schemes]
theme = dict(name='material', custom_dir=str(root/'tools'/'theme'), font=False, palette=palette,
             logo='images/logo.svg', favicon='images/logo.svg',
             features=['navigation.sections', 'navigation.footer', 'navigation.top', 'content.code.copy'])
links = dict(nav=dict(omitted_files='warn', not_found='warn'),
             links=dict(not_found='warn', anchors='warn', absolute_links='warn', unrecognized_links='warn'))

re_remote = re.compile(r'<(?:(?:script|img|iframe)[^>]* src|link[^>]*stylesheet[^>]* href)="?(?:https?:)?//[^ >]*')
re_raw_link = re.compile(r'\]\([\w./]+\.md[^)]*\)')   # a link around a name that is a link already


def notebooks(): return sorted(f.relative_to(get_config().nbs_path).as_posix() for f in nbglob(as_path=True))


class Book:
    "The notebooks `only`, or all of them, processed by nbdev in one process, so that imports are paid once"
    def __init__(self, site, only=None):
        cfg,srcs = get_config(),notebooks()
        self.home = f'{cfg.doc_host}{cfg.doc_baseurl}/'
        self.srcs = {k:o for o in srcs for k in (o, _nbpath2html(Path(o)).as_posix())}
        raw = {o: read_nb(cfg.nbs_path/o) for o in srcs}
        self.titles = {o: titles(nb.cells[0].source) for o,nb in raw.items()}
        rooms = ((o, re.search(r'#\| *default_exp +(\w+)', c.source)) for o,nb in raw.items() for c in nb.cells)
        self.rooms = {o: m[1] for o,m in rooms if m}
        lib = '\n'.join(f.read_text() for f in sorted(cfg.lib_path.glob('*.py')))
        self.docs = dict(re.findall(r'^def (\w+)\([^"]*?:\n    "([^"\n]+)"', lib, re.M))
        self.pages = {o: self.page(cfg.nbs_path/o, o, site) for o in only or srcs}

    def page(self, path, src, site):
        to = root/'_proc'/src
        to.parent.mkdir(parents=True, exist_ok=True)
        process((path, to, Shown))
        return Page(to, src, self, site)

    def drawn_by(self, src):
        "The first line of what the function says of itself by which the code `src` draws a picture"
        called = re.findall(r'\b((?:plot|show)_\w+)\(', src)
        return next((self.docs[o] for o in called if o in self.docs), '')

    def section(self, name):
        "The notebooks of a section of the sidebar"
        parts = [o for o in website()['sidebar']['contents'] if isinstance(o, dict)]
        found = {o['section']: o['contents'] for o in parts}
        return found[name] if name in found else sys.exit(f'_quarto.yml: the sidebar has no section {name}')


def nav(contents, pages):
    "The sidebar of `_quarto.yml` in the words of MkDocs"
    for o in contents:
        if isinstance(o, dict): yield {o['section']: list(nav(o['contents'], pages))}
        elif o in pages: yield {pages[o].fm['title']: pages[o].name}
        else: sys.exit(f'_quarto.yml: the sidebar lists {o}, which is not in nbs/')


def config(src, book):
    "Settings of MkDocs, its title and sidebar from `_quarto.yml`"
    cfg,web = get_config(),website()
    return dict(site_name=web['title'], site_description=cfg.description, site_dir=str(cfg.doc_path),
                docs_dir=str(src/'docs'), use_directory_urls=False, theme=theme, markdown_extensions=extensions,
                plugins=['search'], validation=links, extra_css=['styles.css'], edit_uri='',
                repo_url=cfg.git_url, repo_name=cfg.git_url.removeprefix('https://github.com/'),
                copyright=f'&copy; {cfg.copyright}', nav=list(nav(web['sidebar']['contents'], book.pages)))


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())


def write_pages(book, docs):
    for p in book.pages.values():
        write(docs/p.name, p.markdown())
        for f,data in p.files.items(): write(docs/f, data)
    shutil.copytree('nbs/images', docs/'images', dirs_exist_ok=True)
    shutil.copy('nbs/styles.css', docs)
    write(docs/'llms.txt', llms())


def render(book, src):
    "The site of the pages in `src`, by MkDocs"
    write(src/'mkdocs.yml', yaml.safe_dump(config(src, book), sort_keys=False))
    subprocess.run([sys.executable, '-m', 'mkdocs', 'build', '-q', '--strict', '-f', str(src/'mkdocs.yml')],
                   check=True, env={**os.environ, 'NO_MKDOCS_2_WARNING':'1'})


def site():
    "The site in `_docs`; a broken link, a page outside the sidebar or a remote resource fails"
    src,out = root/'_site_src',get_config().doc_path
    shutil.rmtree(src, ignore_errors=True)
    book = Book(site=True)
    write_pages(book, src/'docs')
    render(book, src)
    for f in out.rglob('*.html'):
        html = f.read_text()
        if m := re_remote.search(html): sys.exit(f'{f.relative_to(root)} needs the network: {m[0]}')
        if m := re_raw_link.search(html): sys.exit(f'{f.relative_to(root)} shows the source of a link: {m[0]}. Names in backticks become links by themselves')
    print(f'{len(book.pages)} pages in {out.relative_to(root)}')


def readme(check=False):
    "README.md and its pictures from `nbs/index.ipynb`; with `check`, say if they are not what the notebook gives"
    index = get_config().readme_nb
    page = Book(site=False, only=[index]).pages[index]
    files = {'README.md': page.markdown().encode(), **page.files}
    stale = {f.relative_to(root).as_posix() for f in root.glob(page.figures + '_*.png')} - set(files)
    wrong = sorted(stale | {f for f,data in files.items() if not Path(f).exists() or Path(f).read_bytes() != data})
    if check and wrong: sys.exit(f'run python tools/docs.py readme: {index} gives other {" ".join(wrong)}')
    if check: return
    for f in stale: Path(f).unlink()
    for f,data in files.items(): write(Path(f), data)


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('what', choices=['site', 'readme', 'check-readme'])
    a = p.parse_args()
    if a.what == 'site': site()
    else: readme(check=a.what == 'check-readme')
