"A notebook that nbdev has processed, as Markdown: a page of the site, or the README"
import ast, base64, html, re, sys
from dataclasses import is_dataclass
from importlib import import_module
from inspect import signature
from itertools import groupby
from pathlib import Path
from posixpath import dirname, join, normpath, relpath
from textwrap import fill, indent

import yaml
from execnb.nbio import read_nb
from latex2mathml.converter import convert
from nbdev.config import get_config
from nbdev.doclinks import _nbpath2html
from nbdev.process import Processor
from nbdev.processors import FilterDefaults, rm_export

from cellmae.docstrings import fields_of

kinds = dict(note='note', tip='tip', warning='warning', important='warning', caution='danger')
asides = 'Bad input', 'The same in small' # sections that most readers pass over

re_code = re.compile(r'(^ *```.*?^ *```[ \t]*$|(?<!`)`[^`\n]+`(?!`))', re.M|re.S)
re_math = re.compile(r'\$\$(?P<block>.+?)\$\$'
                     r'|(?<![\\$\w])\$(?=\S)(?P<inline>(?:[^$\n]|\n(?!\n))+?)(?<=\S)\$(?![\d$])', re.S)
re_callout = re.compile(r'^::: *\{\.callout-(\w+)(?:[^}\n]*?title="([^"\n]*)")?[^}\n]*\}\n(.*?)^:::[ \t]*$', re.M|re.S)
re_include = re.compile(r'^\{\{< include (\S+) >\}\}$', re.M)
re_item = re.compile(r'[-*+] |\d+[.)] |\|')
re_aside = re.compile(rf'(#+) ({"|".join(asides)})\n*(.*)', re.S)
re_cards = re.compile(r'<!-- cards: *(.+?) *-->')
re_losses = re.compile(r'<table class="fastprogress">(.*?)<tbody>(.*?)</tbody></table>', re.S)


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


def fields_shown(s):
    "The fields of the named tuple or dataclass that `show_doc` documents in `s`, in place of its arguments"
    at = re.search(r'/(\w+)\.py#.*?^### (\w+)$', s, re.M|re.S)
    cls = at and getattr(import_module(f'{get_config().lib_name}.{at[1]}'), at[2], None)
    if not (isinstance(cls, type) and (hasattr(cls, '_fields') or is_dataclass(cls))): return s
    if not (said := fields_of(cls)): return s
    default = lambda p: '' if p.default is p.empty else f'={p.default!r}'
    lines = [f'    {k}{default(p)}, # {said.get(k, "")}'.removesuffix(', # ') for k,p in signature(cls).parameters.items()]
    return re.sub(r'(?<=^def )(\w+)\(\n.*?\n\):', lambda m: '\n'.join([f'{m[1]}(', *lines, '):']), s, count=1, flags=re.M|re.S)


def symbol_id(name): return name.lower().replace('__', '')


def slug(title): return title.lower().replace(' ', '-')


def options(cell):
    "Options of `cell`, YAML as Quarto reads it, but that all values are text"
    lines = re.findall(r'^#\| *([\w-]+: .*)$', cell.source, re.M)
    return yaml.load('\n'.join(lines), yaml.BaseLoader) or {}


def numbered(opts, i):
    "`opts` of picture number `i` of a cell: of an option that is a list, its part"
    own = lambda v: v if isinstance(v, str) else v[i] if i < len(v) else ''
    return {k: own(opts.get(k, '')) for k in ('fig-cap','fig-alt')}


def plain(s):
    "The Markdown `s` without its marks"
    s = re.sub(r'\[([^]]*)\]\([^)]*\)(\{[^}]*\})?', r'\1', s)
    return ' '.join(re.sub(r'[`*$\\"<>\[\]{}|]|^#+ ', '', s, flags=re.M).split())


def last_sentence(s):
    "What the Markdown `s` says at its end, which is about what follows"
    s = re_code.sub(lambda m: m[0].strip('`') if '\n' not in m[0] else '', s)
    prose = [o for o in re.split(r'\n\n+', s) if o.strip()]
    said = re.split(r'(?<=[.!?:;]) +(?=[A-Z])', plain(prose[-1] if prose else ''))
    while len(said) > 1 and len(said[-1].split()) < 4: said[-2:] = [' '.join(said[-2:])]
    return said[-1].rstrip(' .:;')


def axes(src):
    "What the axes of a picture are called in the code `src`"
    x,y = (re.search(rf"\b{o}label(?:=|\()'([^']+)'", src) for o in 'xy')
    return f' ({y[1]} against {x[1]})' if x and y else ''


def few_losses(m):
    "A table of losses in one line, that of the last epoch, if it has many; the rest is a click away"
    names = re.findall('<th>(.*?)</th>', m[1])
    rows = [re.findall('<td>(.*?)</td>', o) for o in re.findall('<tr>.*?</tr>', m[2], re.S)]
    if len(rows) <= 5: return m[0]
    last = ', '.join(f'{k} {v}' for k,v in zip(names[1:], rows[-1][1:]) if v)
    return f'<details class="losses"><summary>{len(rows)} epochs, at the end {last}</summary>{m[0]}</details>'


def has(cell, *names): return cell.cell_type == 'code' and bool(set(cell.directives_) & set(names))


def only_imports(cell): return all(isinstance(o, (ast.Import, ast.ImportFrom)) for o in cell.parsed_())


def assigned(stmts):
    "Names that functions, classes and assignments among `stmts` make"
    patched = lambda o: any(getattr(d, 'id', '').startswith('patch') for d in o.decorator_list)
    defs = {o.name for o in stmts if isinstance(o, (ast.FunctionDef, ast.ClassDef)) and not patched(o)}
    targets = [k for o in stmts if isinstance(o, ast.Assign) for t in o.targets for k in ast.walk(t)]
    return defs | {o.id for o in targets if isinstance(o, ast.Name)}


class own_imports(Processor):
    "Imports of the library, which nbdev leaves out, folded, and after them those of what the page defines"
    def begin(self):
        exporting = 'export', 'exports', 'exporti'
        stmts = lambda cells: [o for c in cells for o in c.parsed_() or []]
        code = [c for c in self.nb.cells if c.cell_type == 'code']
        self.room = next((c.directives_['default_exp'][0] for c in code if has(c, 'default_exp')), None)
        read = {o.id for t in stmts(c for c in code if not has(c, *exporting, 'hide'))
                for o in ast.walk(t) if isinstance(o, ast.Name)}
        self.private = assigned(stmts(c for c in code if has(c, *exporting))) & read

    def cell(self, cell):
        if not (self.room and has(cell, 'export') and only_imports(cell)): return
        module = f'{get_config().lib_name}.{self.room}'
        private = ', '.join(sorted(self.private - set(import_module(module).__all__)))
        named = fill(f'from {module} import ({private})', 99, subsequent_indent='    ')
        if '\n' not in named: named = named.replace('(', '').replace(')', '')
        own = [f'from {module} import *', named if private else '']
        setup = '#| code-fold: true', '#| code-summary: Set up'
        cell.source = '\n'.join([*setup, cell.source, *filter(None, own)])
        cell.directives_.pop('export')


class Shown(FilterDefaults):
    "What nbdev does to the notebooks of a site, and imports"
    def base_procs(self):
        procs = super().base_procs()
        at = procs.index(rm_export)
        return [*procs[:at], own_imports, *procs[at:]]


def joined(cells):
    "`cells`, where set-ups that follow each other become one"
    is_setup = lambda c: c.cell_type == 'code' and options(c).get('code-summary') == 'Set up'
    for setup,group in groupby(cells, is_setup):
        if not setup: yield from group; continue
        first,*more = group
        first.source = '\n\n'.join(o.source.strip() for o in (first, *more))
        yield first


class Page:
    "One processed notebook as Markdown: a page of the site, or the README"
    def __init__(self, path, src, book, site):
        self.nb,self.src,self.book,self.site,self.files,self.alts = read_nb(path),src,book,site,{},[]
        self.fm = next(yaml.safe_load(c.source.strip().strip('-')) for c in self.nb.cells if c.cell_type == 'raw')
        self.name = _nbpath2html(Path(src)).with_suffix('.md').as_posix()
        self.figures = f'figures/{Path(self.name).stem}' if site else f'nbs/images/{Path(self.name).stem}'
        shown = '\n'.join(map(self.documented, self.nb.cells))
        self.headings = re.findall(r'^### (\S+)$', shown, re.M)
        self.symbols = set(map(symbol_id, self.headings))

    def documented(self, cell):
        "The Markdown that `show_doc` left in `cell`"
        outs = cell.get('outputs', []) if 'show_doc(' in cell.source else []
        return '\n'.join(''.join(o.data['text/markdown']) for o in outs if 'text/markdown' in o.get('data', {}))

    def link(self, src):
        "Where the page made of the notebook `src` lies, seen from this one"
        return relpath(self.book.pages[src].name, dirname(self.name) or '.') if self.site else f'nbs/{src}'

    def url(self, url):
        "Where `url` leads from this page, if it is a file, a notebook or a symbol of the project"
        ours = url.startswith(self.book.home)
        if not ours and re.match(r'\w+:|#|/', url): return url
        path,_,anchor = url.removeprefix(self.book.home).partition('#')
        path = path if ours else normpath(join(dirname(self.src), path))
        if not re.search(r'\.(html|ipynb)$', path): return url if self.site else f'nbs/{path}'
        if path not in self.book.srcs: sys.exit(f'nbs/{self.src}: there is no notebook for the link {url}')
        src = self.book.srcs[path]
        if not self.site: return self.link(src)
        symbols = self.book.pages[src].symbols
        if ours: anchor = next((o for o in (symbol_id(anchor), anchor.split('.')[0]) if o in symbols), '')
        return self.link(src) + f'#{anchor}' * bool(anchor)

    def callout(self, m):
        kind,title,body = m[1],m[2] or m[1].capitalize(),m[3].strip()
        if not self.site: return indent(f'**{title}.** {body}', '> ', lambda l: True)
        return f'!!! {kinds[kind]} "{title}"\n\n{indent(body, "    ")}\n'

    def included(self, m):
        "A file that the page shows as it is, without its title"
        return re.sub(r'\A# .*\n+', '', (get_config().nbs_path/dirname(self.src)/m[1]).read_text())

    def text(self, s):
        "Markdown of a notebook as Markdown of the page"
        s = re_include.sub(self.included, s)
        if self.site: s = spaced(outside_code(lambda t: re_math.sub(mathml, t), s))
        s = outside_code(lambda t: re.sub(r'\]\(([^)\s]+)\)', lambda m: f']({self.url(m[1])})', t), s)
        return re_cards.sub(self.cards, re_callout.sub(self.callout, s))

    def symbol(self, s):
        "What `show_doc` says: under a heading with the id that links point to, classes as such, no links within code"
        s = fields_shown(re.sub(r'\A---\s*', '', s))
        s = re.sub(r'\s*(?:(?:before|after)_\w+:NoneType=None,?\s*)+(?=\):)', '', s)   # fastai's, in every callback
        s = re.sub(r'\{target="_blank" style="[^"]*"\}', '\n{: .source }', s)
        s = re.sub(r'^```.*?^```', lambda m: re.sub(r'\[(`[^`]+`)\]\([^)]*\)', r'\1', m[0]), s, flags=re.M|re.S)
        s = re.sub(r'^### (\S+)$', lambda m: f'### `{m[1]}` {{#{symbol_id(m[1])} .symbol}}', s, flags=re.M)
        return self.text(re.sub(r'^def (?=[A-Z])', 'class ', s, flags=re.M))

    def alt(self, cell, opts):
        "A picture in words: its caption, or what its function says of itself, or the sentence before it, and its axes"
        about = self.book.drawn_by(cell.source) or last_sentence(self.said)
        alt = plain(opts['fig-alt'] or opts['fig-cap'] or f'{self.topic}: {about}{axes(cell.source)}')
        self.alts.append(alt)
        n = self.alts.count(alt)
        return f'{alt} ({n})' if n > 1 else alt

    def picture(self, cell, png, name, opts, size):
        "A stored picture, as wide as it was meant to be, with its caption"
        self.files[join(dirname(self.name), name)] = base64.b64decode(png)
        alt,width,caption = self.alt(cell, opts),size.get('width'),opts['fig-cap']
        width = f' width="{width}"' * bool(width)
        image = f'<img src="{name}" alt="{html.escape(alt)}"{width}>'
        if not self.site: return image + f'\n\n*{caption}*' * bool(caption)
        image = f'![{alt}]({name}){{ .picture{width} }}'
        if not caption: return image
        unread = ' aria-hidden="true"' * (not opts['fig-alt']) # as pandoc has it: no one hears the same twice
        return f'<figure markdown="span">\n{image}\n<figcaption{unread}>{html.escape(caption)}</figcaption>\n</figure>'

    def output(self, cell, i, o, opts):
        "Output number `i` of `cell`: the richest form it was stored in"
        data = o.get('data', {})
        get = lambda k: ''.join(data[k])
        documented = self.documented(cell)
        if 'text/markdown' in data and (documented or 'text/html' not in data):
            return (self.symbol if documented else self.text)(get('text/markdown'))
        if 'image/png' in data:
            name = f'{self.figures}_{cell.id}_{i}.png'
            before = sum('image/png' in p.get('data', {}) for p in cell.outputs[:i])
            opts = numbered(opts, before)
            return self.picture(cell, get('image/png'), name, opts, o.get('metadata', {}).get('image/png', {}))
        if 'text/html' in data:
            s = re.sub(r'<style[^>]*>[^<]*(?:dataframe|progress).*?</style>', '', get('text/html'), flags=re.S)
            lines = [l.strip() for l in re_losses.sub(few_losses, s).splitlines() if l.strip()]
            return '\n'.join(['<div class="output">', *lines, '</div>'])
        return fence(''.join(o.get('text') or data['text/plain']), ' { .text .output }' if self.site else 'text')

    def fold(self, s, title, how='true', id=''):
        "The Markdown `s`, to be opened by a click if `how` is `true`, and to be closed by one if it is `show`"
        if how not in ('true', 'show'): return s
        opened,id = ' open' * (how == 'show'),f' id="{id}"' * bool(id)
        start = f'<details class="fold" markdown="1"{id}{opened}>' if self.site else f'<details{opened}>'
        return f'{start}\n<summary>{title}</summary>\n\n{s}\n\n</details>'

    def code(self, cell):
        "A code cell and its outputs, as far as its options show them"
        opts = options(cell)
        src = re.sub(r'^#\|.*\n?', '', cell.source, flags=re.M).strip()
        if opts.get('include') == 'false': return
        if src and opts.get('echo') != 'false':
            yield self.fold(fence(src, 'python'), opts.get('code-summary', 'Code'), opts.get('code-fold'))
        if opts.get('output') != 'false':
            yield from (self.output(cell, i, o, opts) for i,o in enumerate(cell.get('outputs', [])))

    def head(self):
        "Which module this is, the names it defines, and where to find the notebook and the source"
        cfg,n = get_config(),12
        at = f'{cfg.git_url}/blob/{cfg.branch}'
        room = self.book.rooms.get(self.src)
        names = [o for o in self.headings if '.' not in o]
        links = ' '.join(f'[`{o}`](#{symbol_id(o)})' for o in names[:n])
        if len(names) > n: links += f' and {len(names)-n} more'
        module = [f'**`{cfg.lib_name}.{room}`**', links] if room else []
        source = [f'[source]({at}/{cfg.lib_name}/{room}.py)'] if room else []
        notebook = f'[notebook]({at}/{cfg.nbs_path.name}/{self.src})'
        return ' &middot; '.join(filter(None, [*module, notebook, *source])) + '\n{: .head }'

    def thumbnail(self):
        "The first picture of the page, or the logo"
        outs = ((c, i, o) for c in self.nb.cells for i,o in enumerate(c.get('outputs', [])))
        names = (f'{self.figures}_{c.id}_{i}.png' for c,i,o in outs if 'image/png' in o.get('data', {}))
        name = next(names, None)
        return join(dirname(self.name), name) if name else 'images/logo.svg'

    def card(self, src):
        title,about = self.book.titles[src]
        if not self.site: return f'- [{title}]({self.link(src)}): {about[0].lower()}{about[1:]}'
        link,page = self.link(src),self.book.pages[src]
        image = relpath(page.thumbnail(), dirname(self.name) or '.')
        return f'-   [![]({image})]({link})\n\n    **[{title}]({link})**\n\n    {about}'

    def cards(self, m):
        "The pages of a section of the sidebar, each with a picture"
        cards = [self.card(o) for o in self.book.section(m[1])]
        if not self.site: return '\n'.join(cards)
        return '\n\n'.join(['<div class="grid cards" markdown="1">', *cards, '</div>'])

    def folded(self, parts):
        "`parts` of the page, where what stands under a heading in `asides` is folded"
        aside,rank,title = [],0,''
        def close(): return [self.fold('\n\n'.join(aside), title, id=slug(title))] if aside else []
        for s in parts:
            heading = re.match('(#+) ', s)
            if aside and heading and len(heading[1]) <= rank: yield from close(); aside = []
            if m := re_aside.fullmatch(s): aside,rank,title = [m[3]],len(m[1]),m[2]
            elif aside: aside.append(s)
            else: yield s
        yield from close()

    def parts(self):
        "The page, cell by cell"
        about = self.text(self.fm.get('description', ''))
        yield from (f"# {self.fm['title']}", f'{about}\n{{: .subtitle }}' if self.site else f'> {about}')
        if self.site: yield self.head()
        self.said,self.topic = about,self.fm['title']
        for c in joined(self.nb.cells):
            if c.cell_type == 'markdown' and 'AUTOGENERATED' not in c.source:
                self.said = c.source
                self.topic = (re.findall('^#+ (.+)$', c.source, re.M) or [self.topic])[-1]
                yield self.text(c.source)
            if c.cell_type == 'code': yield from self.code(c)

    def markdown(self): return '\n\n'.join(self.folded(filter(None, self.parts()))) + '\n'
