#!/usr/bin/env python
"Build the documentation site and README.md from the notebooks, with nothing but Python and no network"
import argparse, base64, os, re, shutil, subprocess, sys
from pathlib import Path
from posixpath import dirname, join, normpath, relpath
from textwrap import indent

root = Path(__file__).resolve().parents[1]
os.chdir(root); sys.path.insert(0, str(root))

import yaml
from execnb.nbio import read_nb
from latex2mathml.converter import convert
from nbdev.config import get_config
from nbdev.doclinks import _nbpath2html, nbglob
from nbdev.processors import FilterDefaults
from nbdev.serve_drv import main as process

kinds = dict(note='note', tip='tip', warning='warning', important='warning', caution='danger')
extensions = ['attr_list', 'admonition', 'footnotes', 'tables', 'pymdownx.details', 'pymdownx.superfences',
              'pymdownx.highlight', dict(toc=dict(permalink=True))]
theme = dict(name='material', font=False, palette=dict(primary='indigo'),
             features=['navigation.sections', 'navigation.footer', 'navigation.top', 'content.code.copy'])
links = dict(nav=dict(omitted_files='warn', not_found='warn'),
             links=dict(not_found='warn', anchors='warn', absolute_links='warn', unrecognized_links='warn'))

re_code = re.compile(r'(^ *```.*?^ *```[ \t]*$|(?<!`)`[^`\n]+`(?!`))', re.M|re.S)
re_math = re.compile(r'\$\$(?P<block>.+?)\$\$'
                     r'|(?<![\\$\w])\$(?=\S)(?P<inline>(?:[^$\n]|\n(?!\n))+?)(?<=\S)\$(?![\d$])', re.S)
re_callout = re.compile(r'^::: *\{\.callout-(\w+)(?:[^}\n]*?title="([^"\n]*)")?[^}\n]*\}\n(.*?)^:::[ \t]*$', re.M|re.S)
re_remote = re.compile(r'<(?:(?:script|img|iframe)[^>]* src|link[^>]*stylesheet[^>]* href)="?(?:https?:)?//[^ >]*')
re_raw_link = re.compile(r'\]\([\w./]+\.md[^)]*\)')   # a link around a name that is a link already
re_include = re.compile(r'^\{\{< include (\S+) >\}\}$', re.M)
re_item = re.compile(r'[-*+] |\d+[.)] |\|')


def outside_code(f, s):
    "Apply `f` to what is not code in the Markdown `s`"
    return ''.join(o if i%2 else f(o) for i,o in enumerate(re_code.split(s)))


def mathml(m):
    "The MathML of a match of TeX; characters that Markdown would take for its own become entities"
    tex = re.sub(r'\\[bB]igg?[lrm]?(?![a-zA-Z])', '', m[m.lastgroup])
    s = convert(' '.join(tex.split()), display=m.lastgroup)
    if bad := re.search(r'\\[a-zA-Z]+', s): sys.exit(f'{bad[0]} has no MathML in {tex}')
    s = re.sub('>([^<]+)<', lambda t: '>' + re.sub(r'[*_`|\\~^$\[\]]', lambda c: f'&#{ord(c[0])};', t[1]) + '<', s)
    s = f'<span class="math">{s}</span>' # a line that starts with <math> would not belong to its paragraph
    return f'\n\n{s}\n\n' if m.lastgroup == 'block' else s


def spaced(s):
    "CommonMark for MkDocs, which needs a blank line before each list and table, and four spaces before a nested item"
    out,fence = [],False
    for l in s.splitlines():
        prose = out and out[-1].strip() and not re.match(r'\s', out[-1]) and not re_item.match(out[-1])
        if prose and not fence and re_item.match(l): out.append('')
        fence ^= l.lstrip().startswith('```')
        out.append(l if fence else re.sub(r'^ {2,3}(?=[-*+] |\d+[.)] )', '    ', l))
    return '\n'.join(out)


def fence(s, kind):
    "A block of code around `s`, whatever backticks it holds"
    ticks = '`' * max(3, 1 + max(map(len, re.findall('`+', s)), default=0))
    return f'{ticks}{kind}\n{s.rstrip()}\n{ticks}'


def symbol_id(name): return name.lower().replace('__', '')


class Page:
    "One processed notebook as Markdown: a page of the site, or the README"
    def __init__(self, path, src, book, site):
        self.nb,self.src,self.book,self.site,self.files = read_nb(path),src,book,site,{}
        self.fm = next(yaml.safe_load(c.source.strip().strip('-')) for c in self.nb.cells if c.cell_type == 'raw')
        self.name = _nbpath2html(Path(src)).with_suffix('.md').as_posix()
        self.figures = f'figures/{Path(self.name).stem}' if site else f'nbs/images/{Path(self.name).stem}'
        shown = '\n'.join(map(self.documented, self.nb.cells))
        self.symbols = {symbol_id(o) for o in re.findall(r'^### (\S+)$', shown, re.M)}

    def documented(self, cell):
        "The Markdown that `show_doc` left in `cell`"
        outs = cell.get('outputs', []) if 'show_doc(' in cell.source else []
        return '\n'.join(''.join(o.data['text/markdown']) for o in outs if 'text/markdown' in o.get('data', {}))

    def url(self, url):
        "Where `url` leads from this page, if it is a file, a notebook or a symbol of the project"
        ours = url.startswith(self.book.home)
        if not ours and re.match(r'\w+:|#|/', url): return url
        path,_,anchor = url.removeprefix(self.book.home).partition('#')
        path = path if ours else normpath(join(dirname(self.src), path))
        if not re.search(r'\.(html|ipynb)$', path): return url if self.site else f'nbs/{path}'
        if path not in self.book.srcs: sys.exit(f'nbs/{self.src}: there is no notebook for the link {url}')
        if not self.site: return f'nbs/{self.book.srcs[path]}'
        page = self.book.pages[self.book.srcs[path]]
        if ours: anchor = next((o for o in (symbol_id(anchor), anchor.split('.')[0]) if o in page.symbols), '')
        return relpath(page.name, dirname(self.name) or '.') + f'#{anchor}' * bool(anchor)

    def callout(self, m):
        kind,title,body = m[1],m[2] or m[1].capitalize(),m[3].strip()
        if not self.site: return indent(f'**{title}.** {body}', '> ', lambda l: True)
        return f'!!! {kinds[kind]} "{title}"\n\n{indent(body, "    ")}\n'

    def included(self, m):
        "A file that the page shows as it is, without its title"
        return re.sub(r'\A# .*\n+', '', (root/'nbs'/dirname(self.src)/m[1]).read_text())

    def text(self, s):
        "Markdown of a notebook as Markdown of the page"
        s = re_include.sub(self.included, s)
        if self.site: s = spaced(outside_code(lambda t: re_math.sub(mathml, t), s))
        s = outside_code(lambda t: re.sub(r'\]\(([^)\s]+)\)', lambda m: f']({self.url(m[1])})', t), s)
        return re_callout.sub(self.callout, s)

    def symbol(self, s):
        "What `show_doc` says: under a heading with the id that links point to, classes as such, no links within code"
        s = re.sub(r'\A---\s*', '', s)
        s = re.sub(r'\s*(?:(?:before|after)_\w+:NoneType=None,?\s*)+(?=\):)', '', s)   # fastai's, in every callback
        s = re.sub(r'\{target="_blank" style="[^"]*"\}', '\n{: .source }', s)
        s = re.sub(r'^```.*?^```', lambda m: re.sub(r'\[(`[^`]+`)\]\([^)]*\)', r'\1', m[0]), s, flags=re.M|re.S)
        s = re.sub(r'^### (\S+)$', lambda m: f'### `{m[1]}` {{#{symbol_id(m[1])} .symbol}}', s, flags=re.M)
        return self.text(re.sub(r'^def (?=[A-Z])', 'class ', s, flags=re.M))

    def output(self, cell, i, o, opts):
        "Output number `i` of `cell`: the richest form it was stored in"
        data = o.get('data', {})
        get = lambda k: ''.join(data[k])
        if 'text/markdown' in data and ('text/html' not in data or self.documented(cell)): return (self.symbol if self.documented(cell) else self.text)(get('text/markdown'))
        if 'image/png' in data:
            name = f'{self.figures}_{cell.id}_{i}.png'
            self.files[join(dirname(self.name), name)] = base64.b64decode(get('image/png'))
            return f"![{opts.get('fig-alt', 'figure')}]({name})"
        if 'text/html' in data:
            s = re.sub(r'<style.*?</style>', '', get('text/html'), flags=re.S)
            return '<div class="output">\n' + '\n'.join(l.strip() for l in s.splitlines() if l.strip()) + '\n</div>'
        return fence(''.join(o.get('text') or data['text/plain']), ' { .text .output }' if self.site else 'text')

    def fold(self, s, title, how='true'):
        "The Markdown `s`, to be opened by a click if `how` is `true`, and to be closed by one if it is `show`"
        if how not in ('true', 'show'): return s
        if self.site: return f'???{"+" * (how == "show")} quote "{title}"\n\n{indent(s, "    ")}'
        return f'<details{" open" * (how == "show")}>\n<summary>{title}</summary>\n\n{s}\n\n</details>'

    def code(self, cell):
        "A code cell and its outputs, as far as its options show them"
        opts = dict(re.findall(r'^#\| *([\w-]+): *"?(.*?)"?$', cell.source, re.M))
        src = re.sub(r'^#\|.*\n?', '', cell.source, flags=re.M).strip()
        if opts.get('include') == 'false': return
        if src and opts.get('echo') != 'false':
            yield self.fold(fence(src, 'python'), opts.get('code-summary', 'Code'), opts.get('code-fold'))
        if opts.get('output') != 'false':
            yield from (self.output(cell, i, o, opts) for i,o in enumerate(cell.get('outputs', [])))

    def markdown(self):
        "The whole page"
        about = self.text(self.fm.get('description', ''))
        parts = [f"# {self.fm['title']}", f'{about}\n{{: .subtitle }}' if self.site else f'> {about}']
        for c in self.nb.cells:
            if c.cell_type == 'markdown' and 'AUTOGENERATED' not in c.source: parts.append(self.text(c.source))
            if c.cell_type == 'code': parts += self.code(c)
        return '\n\n'.join(filter(None, parts)) + '\n'


class Book:
    "The notebooks `only`, or all of them, processed by nbdev in one process, so that imports are paid once"
    def __init__(self, site, only=None):
        cfg = get_config()
        self.home = f'{cfg.doc_host}{cfg.doc_baseurl}/'
        srcs = sorted(f.relative_to(cfg.nbs_path).as_posix() for f in nbglob(as_path=True))
        self.srcs = {k:o for o in srcs for k in (o, _nbpath2html(Path(o)).as_posix())}
        self.pages = {o: self.page(cfg.nbs_path/o, o, site) for o in only or srcs}

    def page(self, path, src, site):
        to = root/'_proc'/src
        to.parent.mkdir(parents=True, exist_ok=True)
        process((path, to, FilterDefaults))
        return Page(to, src, self, site)


def nav(contents, pages):
    "The sidebar of `_quarto.yml` in the words of MkDocs"
    for o in contents:
        if isinstance(o, dict): yield {o['section']: list(nav(o['contents'], pages))}
        elif o in pages: yield {pages[o].fm['title']: pages[o].name}
        else: sys.exit(f'_quarto.yml: the sidebar lists {o}, which is not in nbs/')


def config(src, book):
    "Settings of MkDocs, its title and sidebar from `_quarto.yml`"
    cfg,web = get_config(),yaml.safe_load(Path('_quarto.yml').read_text())['website']
    return dict(site_name=web['title'], site_description=cfg.description, site_dir=str(cfg.doc_path),
                docs_dir=str(src/'docs'), use_directory_urls=False, theme=theme, markdown_extensions=extensions,
                plugins=['search'], validation=links, extra_css=['styles.css'],
                copyright=f"&copy; {cfg.copyright}. <a href='{cfg.git_url}'>Source code</a>",
                nav=list(nav(web['sidebar']['contents'], book.pages)))


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())


def site():
    "The site in `_docs`; a broken link, a page outside the sidebar or a remote resource fails"
    src,out = root/'_site_src',get_config().doc_path
    shutil.rmtree(src, ignore_errors=True)
    book = Book(site=True)
    for p in book.pages.values():
        write(src/'docs'/p.name, p.markdown())
        for f,data in p.files.items(): write(src/'docs'/f, data)
    shutil.copytree('nbs/images', src/'docs'/'images', dirs_exist_ok=True)
    shutil.copy('nbs/styles.css', src/'docs')
    write(src/'mkdocs.yml', yaml.safe_dump(config(src, book), sort_keys=False))
    subprocess.run([sys.executable, '-m', 'mkdocs', 'build', '-q', '--strict', '-f', str(src/'mkdocs.yml')],
                   check=True, env={**os.environ, 'NO_MKDOCS_2_WARNING':'1'})
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
