"Commands as a terminal calls them, and what folders hold afterwards"
import sys
from pathlib import Path

def start(command, *args):
    "Run a command; its end is an exception"
    sys.argv = [command.__name__, *map(str, args)]
    code = compile('command()', 'command', 'exec')
    exec(code, dict(command=command, __name__='__main__', __file__='command'))

def call(command, *args):
    "Run a command, and give its exit code"
    try: start(command, *args)
    except SystemExit as e: return e.code or 0
    return 0

def content(folder):
    "Every file below a folder, but for locks"
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(Path(folder).rglob('*')) if f.is_file() and f.name != '.lock'}
