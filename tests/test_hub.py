"Push a bundle to a model hub and pull it, against a small server that speaks the hub's protocol and keeps files in memory"
import base64, hashlib, json, re, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest, torch
from cellmae.zoo import create_model, pull_model, push_model, save_model


class Hub(BaseHTTPRequestHandler):
    "One repository per name, one commit, no large-file storage"
    repos, calls, commit = {}, [], 'c'*40
    def log_message(self, *a): pass

    def reply(self, body=b'', code=200, **headers):
        if not isinstance(body, bytes): body = json.dumps(body).encode()
        self.send_response(code)
        for k,v in {'Content-Length': len(body), 'Content-Type': 'application/json', **headers}.items(): self.send_header(k.replace('_', '-'), str(v))
        self.end_headers()
        if self.command != 'HEAD': self.wfile.write(body)

    def do_POST(self):
        data = self.rfile.read(int(self.headers.get('Content-Length', 0)))
        self.calls.append((self.path, self.headers.get('Authorization')))
        if self.path == '/api/repos/create':
            o = json.loads(data)
            name = f"{o['organization']}/{o['name']}" if o.get('organization') else o['name']
            self.repos.setdefault(name, {})
            return self.reply({'url': f'http://{self.headers["Host"]}/{name}'})
        if self.path == '/api/validate-yaml': return self.reply({'errors': [], 'warnings': []})
        repo = re.match(r'/api/models/([^/]+/[^/]+)/', self.path)[1]
        if '/preupload/' in self.path:
            return self.reply({'files': [{'path': f['path'], 'uploadMode': 'regular', 'shouldIgnore': False, 'oid': None} for f in json.loads(data)['files']]})
        for line in data.splitlines():
            o = json.loads(line)
            if o['key'] == 'file': self.repos[repo][o['value']['path']] = base64.b64decode(o['value']['content'])
        self.reply({'commitUrl': f'http://{self.headers["Host"]}/{repo}/commit/{self.commit}', 'commitOid': self.commit, 'success': True})

    def do_GET(self):
        self.calls.append((self.path, self.headers.get('Authorization')))
        if m := re.match(r'/api/models/([^/]+/[^/?]+)', self.path):
            if m[1] not in self.repos: return self.reply({'error': 'Repository not found'}, 404, X_Error_Code='RepoNotFound')
            if '/tree/' in self.path: return self.reply([{'type': 'file', 'path': k, 'size': len(v), 'oid': hashlib.sha1(v).hexdigest()} for k,v in self.repos[m[1]].items()])
            return self.reply({'id': m[1], 'sha': self.commit, 'siblings': [{'rfilename': k} for k in self.repos[m[1]]], 'private': True, 'tags': [], 'downloads': 0, 'likes': 0})
        repo,file = re.match(r'/([^/]+/[^/]+)/resolve/[^/]+/(.+)', self.path).groups()
        body = self.repos[repo][file]
        self.reply(body, X_Repo_Commit=self.commit, ETag=f'"{hashlib.sha1(body).hexdigest()}"')
    do_HEAD = do_GET


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_CACHE', str(tmp_path/'cache'))
    Hub.repos.clear(); Hub.calls.clear()
    server = ThreadingHTTPServer(('127.0.0.1', 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}'
    server.shutdown()

@pytest.fixture
def bundle(tmp_path):
    torch.manual_seed(0)
    model = create_model('mae_vitt8', in_chans=2, depth=1).eval()
    return model, save_model(model, tmp_path/'model', ['DNA','ER'], licence='cc0-1.0', data='toy')

def check(model, again):
    x = torch.randint(0, 256, (1,2,64,64), dtype=torch.uint8)
    with torch.no_grad(): assert torch.equal(model.encode(x), again.encode(x))
    assert again.channels == ['DNA','ER'] and again.provenance['data'] == 'toy'

def test_hub(hub, bundle, tmp_path):
    model,folder = bundle
    url = push_model(folder, 'lab/cells', endpoint=hub, token='hf_secret')
    assert url.startswith(f'{hub}/lab/cells')
    assert set(Hub.repos['lab/cells']) == {'README.md','config.json','model.safetensors'}
    assert {a for _,a in Hub.calls} == {'Bearer hf_secret'}
    check(model, pull_model('lab/cells', endpoint=hub, cache=tmp_path/'cache'))

def test_folder(bundle, tmp_path):
    model,folder = bundle
    push_model(folder, 'lab/cells', endpoint=tmp_path/'share')
    check(model, pull_model('lab/cells', endpoint=tmp_path/'share'))

def test_mistakes(hub, bundle, tmp_path):
    with pytest.raises(FileNotFoundError, match='not a model bundle'): push_model(tmp_path, 'lab/cells', endpoint=hub)
    assert not Hub.calls
    with pytest.raises(ValueError, match='no model lab/none'): pull_model('lab/none', endpoint=hub, cache=tmp_path/'cache')
    with pytest.raises(FileNotFoundError, match='not a model bundle'): pull_model('lab/none', endpoint=tmp_path)
